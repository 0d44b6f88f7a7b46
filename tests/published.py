"""Published checkpoints at small sizes: their names, tensors of the `fill` rule, and the files beside
them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models

import fill
import test_reaf_weights
from parity_case import Case
from parity_decoder import build
from reaf_hsenet.weights.decoder import save_decoder

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    n: Case(GOLDEN / f"{n}.json", GOLDEN)
    for n in ("bert_tiny", "hsenet_vit_stage1_tiny", "hsenet_vit_stage2_tiny", "lora_phi3_tiny")
}
BERT = CASES["bert_tiny"]
REAF = test_reaf_weights.CONFIG
WIDTH, EMBED = 48, 20  # of the golden encoders, and of the space that both towers lead to
HEADS = {
    "img_size": [16, 64, 64],
    "patch_size": [4, 16, 16],
    "num_heads": 4,
}  # beside M3D-CLIP's weights, and nothing else of it
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def filled(shapes: dict) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(fill.fill(name, shape, 0))) for name, shape in shapes.items()}


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def m3d_clip() -> dict:
    """Stage 1: the golden ViT, the golden BERT with its pooler, two projections."""
    text = BERT["config"]["hidden_size"]
    heads = filled(
        {
            "logit_scale": [],
            "mm_vision_proj.weight": [EMBED, WIDTH],
            "mm_vision_proj.bias": [EMBED],
            "mm_language_proj.weight": [EMBED, text],
            "mm_language_proj.bias": [EMBED],
        }
    )
    vision = prefixed("vision_encoder.", CASES["hsenet_vit_stage1_tiny"].weights())
    return heads | vision | prefixed("language_encoder.", BERT.weights())


def hsenet_2e3() -> dict:
    """Stage 2: the golden guided ViT, and stage 1 inside."""
    first = m3d_clip()
    outer = {n: t for n, t in first.items() if not n.startswith("vision_encoder.")}
    outer |= prefixed("vision_encoder.", CASES["hsenet_vit_stage2_tiny"].weights())
    outer["logit_scale"] = torch.tensor(3.25)
    return outer | prefixed("stage1_pretrained_CLIP.", first)


def reaf(fusion: bool = True, prefix: str = "") -> dict:
    return test_reaf_weights.published(fusion, prefix)


def language() -> dict:
    """HSENet's mm_projector_and_lora.bin: two packers, and the golden adapter under peft's names in
    memory.
    """
    case, out = CASES["lora_phi3_tiny"], 96
    shapes = {
        "proj_mpls.0.weight": [out, WIDTH],
        "proj_mpls.0.bias": [out],
        "proj_mpls.2.weight": [out, out],
        "proj_mpls.2.bias": [out],
        **{f"resolution_attention.{n}.weight": [WIDTH, WIDTH] for n in ("Wq", "Wk", "Wv", "output_linear")},
        **{f"resolution_attention.{n}.bias": [WIDTH] for n in ("Wq", "Wk", "Wv", "output_linear", "norm")},
        "resolution_attention.norm.weight": [WIDTH],
    }
    packers = filled(
        {
            f"base_model.model.model.{packer}.{n}": s
            for packer in ("mm_projector", "mm_projector2")
            for n, s in shapes.items()
        }
    )
    adapters = filled(case["adapter_weights"])
    return packers | {n.replace(".weight", ".default.weight"): t for n, t in adapters.items()}


def mae(width: int = 24) -> dict:
    """A 2D ViT of one block for images of 64 x 64, with MAE's decoder."""
    block = {
        "norm1": [],
        "norm2": [],
        "attn.qkv": [3 * width, width],
        "attn.proj": [width, width],
        "mlp.fc1": [48, width],
        "mlp.fc2": [width, 48],
    }
    shapes = {
        "cls_token": [1, 1, width],
        "pos_embed": [1, 17, width],
        "patch_embed.proj.weight": [width, 3, 16, 16],
        "patch_embed.proj.bias": [width],
        "norm.weight": [width],
        "norm.bias": [width],
        "mask_token": [1, 1, 8],
        "decoder_embed.weight": [8, width],
    }
    for name, shape in block.items():
        shapes |= {f"blocks.0.{name}.weight": shape or [width], f"blocks.0.{name}.bias": shape[:1] or [width]}
    return filled(shapes)


def biomedclip() -> dict:
    trunk = {n: t for n, t in mae().items() if n != "mask_token" and not n.startswith("decoder_")}
    text = prefixed("text.transformer.", BERT.weights())
    return (
        prefixed("visual.trunk.", trunk)
        | text
        | filled({"logit_scale": [], "visual.head.proj.weight": [8, 24], "text.proj.0.weight": [8, 64]})
    )


def bert(prefix: str = "bert.") -> dict:
    return {prefix + n: t for n, t in BERT.weights().items()}


def classifier(roberta: bool = False) -> dict:
    c, inner = 64, {n: t for n, t in BERT.weights().items() if not n.startswith("pooler.")}
    if roberta:
        inner["embeddings.token_type_embeddings.weight"] = inner["embeddings.token_type_embeddings.weight"][
            :1
        ]
        heads = {
            "classifier.dense.weight": [c, c],
            "classifier.dense.bias": [c],
            "classifier.out_proj.weight": [18, c],
            "classifier.out_proj.bias": [18],
        }
        return prefixed("roberta.", inner) | filled(heads)
    pooler = {n: t for n, t in BERT.weights().items() if n.startswith("pooler.")}
    return prefixed("model.", inner | pooler) | filled(
        {"classifier.weight": [18, c], "classifier.bias": [18]}
    )


def write_vocabulary(folder: Path, rows: int, config: dict | None = None) -> Path:
    """A text encoder's folder without weights: vocab.txt of so many tokens, and config.json where it has
    one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text(
        "\n".join([*SPECIAL, *(f"w{i}" for i in range(rows - len(SPECIAL)))]) + "\n"
    )
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_m3d_clip(
    folder: Path, state: dict | None = None, file: str = "model.safetensors", **settings
) -> Path:
    """A folder as M3D-CLIP's: weights, config.json, vocab.txt. Returns the weights' file."""
    write_vocabulary(folder, BERT["config"]["vocab_size"], HEADS | settings)
    return write(folder / file, m3d_clip() if state is None else state)


def write(path: Path, state: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({n: t.clone() for n, t in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def write_decoder(folder: Path) -> Path:
    """The golden decoder under the golden adapter, with a vocabulary of words for all of its 320 rows."""
    case = CASES["lora_phi3_tiny"]
    save_decoder(build(case), folder)
    words = {f"t{i}": i for i in range(320) if i != 313} | {"<|endoftext|>": 313}
    Backend(models.WordLevel(words, unk_token="t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"))
    )
    return folder
