"""Published checkpoints at small sizes: their names, tensors of the `fill` rule, and the files beside
them.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models

import fill
from parity_case import Case
from parity_decoder import build
from reaf_hsenet.config import ClipConfig, ReafVisionConfig, TextConfig
from reaf_hsenet.models.clip import adapt, build_dual_encoder
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import to_dict
from reaf_hsenet.weights.decoder import save_decoder

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    n: Case(GOLDEN / f"{n}.json", GOLDEN)
    for n in ("bert_tiny", "hsenet_vit_stage1_tiny", "hsenet_vit_stage2_tiny", "lora_phi3_tiny")
}
BERT = CASES["bert_tiny"]
REAF = ClipConfig(
    "reaf",
    ReafVisionConfig(
        (8, 16, 16),
        (4, 8, 8),
        width=24,
        depth=3,
        heads=2,
        mlp=48,
        scan_layers=(2,),
        region_size=(1, 1, 1),
        drop_path=0.0,
    ),
    TextConfig(vocab=40, width=16, depth=1, heads=2, mlp=32, positions=20),
    embed=12,
    projection_bias=False,
    logit_scale="exp",
)
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


def reaf_shapes(fusion: bool = True) -> dict[str, list[int]]:
    """Names and shapes as REAF's and HLIP's checkpoints have them (open_clip's TimmModel and
    HFTextEncoder).
    """
    c, t = REAF.vision.width, REAF.text.width
    block = {
        "norm1.weight": [c],
        "norm1.bias": [c],
        "attn.qkv.weight": [3 * c, c],
        "attn.qkv.bias": [3 * c],
        "attn.proj.weight": [c, c],
        "attn.proj.bias": [c],
        "norm2.weight": [c],
        "norm2.bias": [c],
        "mlp.fc1.weight": [48, c],
        "mlp.fc1.bias": [48],
        "mlp.fc2.weight": [c, 48],
        "mlp.fc2.bias": [c],
    }
    trunk = {
        "cls_token": [1, 1, c],
        "spatial_posemb": [1, *REAF.vision.grid, c],
        "patch_embed.proj.weight": [c, 1, 4, 8, 8],
        "patch_embed.proj.bias": [c],
        "norm.weight": [c],
        "norm.bias": [c],
        **{f"blocks.{i}.{n}": s for i in range(3) for n, s in block.items()},
    }
    if fusion:
        trunk |= {"fusion_layer.weight": [c, 2 * c], "fusion_layer.bias": [c]}
    layer = {
        **{
            f"attention.self.{p}.{k}": [t, t] if k == "weight" else [t]
            for p in ("query", "key", "value")
            for k in ("weight", "bias")
        },
        "attention.output.dense.weight": [t, t],
        "attention.output.dense.bias": [t],
        "attention.output.LayerNorm.weight": [t],
        "attention.output.LayerNorm.bias": [t],
        "intermediate.dense.weight": [32, t],
        "intermediate.dense.bias": [32],
        "output.dense.weight": [t, 32],
        "output.dense.bias": [t],
        "output.LayerNorm.weight": [t],
        "output.LayerNorm.bias": [t],
    }
    bert = {
        "embeddings.word_embeddings.weight": [40, t],
        "embeddings.position_embeddings.weight": [20, t],
        "embeddings.token_type_embeddings.weight": [2, t],
        "embeddings.LayerNorm.weight": [t],
        "embeddings.LayerNorm.bias": [t],
        "pooler.dense.weight": [t, t],
        **{f"encoder.layer.0.{n}": s for n, s in layer.items()},
    }
    return {
        "logit_scale": [],
        "visual.head.proj.weight": [12, c],
        "text.proj.weight": [12, t],
        **{f"visual.trunk.{n}": s for n, s in trunk.items()},
        **{f"text.transformer.{n}": s for n, s in bert.items()},
    }


def reaf(fusion: bool = True, prefix: str = "") -> dict:
    return prefixed(prefix, filled(reaf_shapes(fusion)))


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


def write_reaf(folder: Path, fusion: bool = True, prefix: str = "") -> Path:
    """REAF's checkpoint, or HLIP's, beside a vocabulary and the settings that no tensor tells."""
    config = REAF if fusion else replace(REAF, vision=replace(REAF.vision, fusion=None))
    write_vocabulary(folder, REAF.text.vocab, {"reaf_hsenet": {"model": to_dict(config)}})
    return write(folder / "epoch_1.pt", {"epoch": 1, "name": "reaf", "state_dict": reaf(fusion, prefix)})


def new_run(folder, config, recipe, stage="clip1", lora=False):
    """A run with random weights, as training leaves it, with heads and settings that no published rule
    gives.
    """
    torch.manual_seed(0)
    model = build_dual_encoder(config)
    if lora:
        adapt(model, config.lora)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter)
    run = Run(folder)
    run.save(3, model.state_dict(), {}, keep=1, best=True)
    write_vocabulary(folder, config.text.vocab)
    run.write_config(
        {
            "version": "0",
            "stage": stage,
            "preset": "",
            "model": to_dict(config),
            "recipe": to_dict(recipe),
            "train": {},
            "origin": {},
            "slices": {"slices": 32, "width": 16} if stage == "clip2" else None,
            "data": str(folder),
        }
    )
    return folder
