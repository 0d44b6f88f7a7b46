"""Published checkpoints -> this project's names: files, hub ids, renaming, strict loading.

So far: BERT and RoBERTa folders (bert-base-uncased, BiomedBERT, CXR-BERT) and the ViT of M3D-CLIP and HSENet.
Nothing is unpickled, and nothing is downloaded unless a hub id (ORGANISATION/NAME, or ORGANISATION/NAME@REVISION) is
given where a folder is expected.
"""

import pickle
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reaf_hsenet.config import TextConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_json

State = dict[str, Tensor]

VIT3D_NAMES = (
    (r"^patch_embedding\.position_embeddings$", "pos_embed"),
    (r"^patch_embedding\.patch_embeddings\.1\.", "patch_embed.proj."),
    (r"\.mlp\.linear([12])\.", r".mlp.fc\1."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
)

BERT_NAMES = (
    (r"\.gamma$", ".weight"),  # the oldest files' names of LayerNorm parameters
    (r"\.beta$", ".bias"),
    (r"^embeddings\.word_embeddings\.", "word_embed."),
    (r"^embeddings\.position_embeddings\.", "pos_embed."),
    (r"^embeddings\.token_type_embeddings\.", "type_embed."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^(blocks\.\d+)\.output\.LayerNorm\.", r"\1.norm2."),
)
# Heads of masked-language models and CXR-BERT's projection, which the dual encoders do not use.
BERT_IGNORED = re.compile(r"^(cls\.|cls_projection_head\.|lm_head\.|pooler\.|.*position_ids$)")


def rename(state: State, rules: tuple[tuple[str, str], ...]) -> State:
    """Apply every rule, in order, to every name."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def vit3d_state(published: State) -> State:
    """Names of monai's ViT (M3D-CLIP, HSENet) -> ViT3D's."""
    return rename(published, VIT3D_NAMES)


def bert_state(published: State) -> State:
    """Names of transformers' BERT and RoBERTa, with or without prefix -> TextEncoder's; q, k and v become one matrix."""
    inner = {re.sub(r"^(bert|roberta)\.", "", name): tensor for name, tensor in published.items()}
    state = rename({n: t for n, t in inner.items() if not BERT_IGNORED.match(n)}, BERT_NAMES)
    for name in [n for n in state if ".attn.query." in n]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        missing = [p for p in parts if p not in state]
        if missing:
            raise InputError(f"the checkpoint has {name} but no {missing[0]}")
        state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(p) for p in parts])
    return state


def bert_config(folder: Path) -> TextConfig:
    """Read a config.json. Raises InputError for what this encoder does not compute."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    for key, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if values.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {values[key]!r}; this encoder has {expected!r} only")
    try:
        return TextConfig(
            vocab=values["vocab_size"],
            width=values["hidden_size"],
            depth=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            mlp=values["intermediate_size"],
            positions=values["max_position_embeddings"],
            token_types=values.get("type_vocab_size", 2),
            layer_norm_eps=values.get("layer_norm_eps", 1e-12),
            dropout=values.get("hidden_dropout_prob", 0.1),
            attention_dropout=values.get("attention_probs_dropout_prob", 0.1),
            pad_id=values.get("pad_token_id", 0),
            kind="roberta" if values.get("model_type") == "roberta" else "bert",
        )
    except KeyError as error:
        raise InputError(f"{path}: has no {error}; expected the config.json of a BERT or RoBERTa") from error


def find_folder(name: str, patterns: list[str]) -> Path:
    """A local folder as it is; ORGANISATION/NAME[@REVISION] from the Hugging Face hub, the files that match only."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) or name.startswith("."):
        raise InputError(
            f"{name}: no such folder; expected one, or a hub id such as google-bert/bert-base-uncased"
        )
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub client's own errors are of these kinds
        raise InputError(
            f"{name}: no such folder, and the hub does not give it ({type(error).__name__}); fetch "
            f"{', '.join(patterns)} by hand and name their folder"
        ) from error


def read_weights(folder: Path) -> State:
    """model.safetensors, or pytorch_model.bin, of a folder. Raises InputError when neither can be read."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = Path(folder) / name
        if path.is_file():
            return read_weights_file(path)
    raise InputError(f"{folder}: has neither model.safetensors nor pytorch_model.bin")


def read_weights_file(path: Path) -> State:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors, which is not loaded; save its state_dict alone"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path}: is truncated or not a checkpoint ({' '.join(str(error).split())[:120]})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{path}: is not a dictionary of tensors")
    return state


def load_strictly(module: nn.Module, state: State, source: str) -> None:
    """Fill `module` with `state`. Raises InputError that lists missing, unexpected and misshapen tensors by name."""
    own = module.state_dict()
    problems = [f"{n} is missing" for n in own if n not in state]
    problems += [f"{n} is not known" for n in state if n not in own]
    problems += [
        f"{n} is {tuple(state[n].shape)}, expected {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise InputError(f"{source}: does not fit this model: {'; '.join(problems[:6])}{more}")
    module.load_state_dict(state)
