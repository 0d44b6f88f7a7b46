"""Published checkpoints -> this project's names: files, hub ids, renaming, strict loading.

    python -m reaf_hsenet.weights convert FILE RUN
    python -m reaf_hsenet.weights export RUN OUT --format {m3d-clip,hlip,reaf,transformers}

What is recognised is the table of families.py; docs/weights.md says where each comes from and what it is for.
Only tensors are ever unpickled, and nothing is downloaded unless a hub id (ORGANISATION/NAME, or
ORGANISATION/NAME@REVISION) is given where a folder is expected.
"""

import math
from pathlib import Path

from reaf_hsenet.config import TextConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder, read_object
from reaf_hsenet.settings import from_dict
from reaf_hsenet.weights.loading import load_matching, load_strictly
from reaf_hsenet.weights.names import (
    bert_state,
    m3d_clip_state,
    mae_state,
    reaf_state,
    reaf_vision_state,
    slice_encoder_state,
    teacher_state,
    vit3d_state,
)
from reaf_hsenet.weights.reading import State, check_finite, read_weights, read_weights_file, summary

__all__ = [
    "State",
    "bert_config",
    "bert_settings",
    "bert_state",
    "check_finite",
    "initial_state",
    "load_matching",
    "load_strictly",
    "m3d_clip_state",
    "mae_state",
    "read_checkpoint",
    "read_weights",
    "read_weights_file",
    "reaf_state",
    "reaf_vision_state",
    "slice_encoder_state",
    "teacher_state",
    "vit3d_state",
]


def read_checkpoint(name: str) -> State:
    """The tensors of a file, a folder or a hub id; those of a training checkpoint's `model` or
    `state_dict`.
    """
    if Path(name).is_file():
        state = read_weights_file(Path(name))
    else:
        state = read_weights(find_folder(name, ["*.safetensors", "*pytorch_model.bin", "*.pt", "*.pth"]))
    check_finite(state, name)
    return state


def initial_state(published: State, source: str, model: str, patch, grid: tuple[int, int, int]) -> State:
    """A checkpoint to start a dual encoder from, under DualEncoder's names; recognised by its tensors' names.

    Of hsenet: M3D-CLIP or HSENet. Of reaf: the dual encoder or the vision trunk of REAF or HLIP, or a 2D MAE
    or timm ViT. Of both: this project's own. Raises InputError for anything else.
    """
    state = {n.removeprefix("module."): t for n, t in published.items()}
    if "vision.cls_token" in state:
        if any("lora_" in n for n in state):
            raise InputError(
                f"{source}: holds LoRA adapters; name the run's folder, whose config.json says how to add "
                f"them"
            )
        # A fusion's constant weights are the run's own choice, not what was learned.
        return {n: t for n, t in state.items() if not n.startswith("vision.fusion.")}
    if any(n.startswith("vision_encoder.") for n in state):
        kind, found = "hsenet", m3d_clip_state(state)
        table = found.get("vision.pos_embed")
        if model == kind and grid and table is not None and table.shape[1:2] != (math.prod(grid),):
            raise InputError(
                f"{source}: has positions {tuple(table.shape)}, not those of a grid of {grid}; convert it to "
                f"that --size first: python -m reaf_hsenet.weights convert {source} RUN --size D H W, then "
                "--init RUN"
            )
    elif (
        "spatial_posemb" in state
        or any(n.startswith("visual.trunk.") for n in state)
        and "visual.trunk.pos_embed" not in state
    ):
        kind, found = "reaf", reaf_state(state, grid)
    elif {"pos_embed", "patch_embed.proj.weight"} <= set(state) and state[
        "patch_embed.proj.weight"
    ].ndim == 4:
        kind, found = "reaf", {f"vision.{n}": t for n, t in mae_state(state, patch, grid).items()}
    else:
        raise InputError(
            f"{source}: is not a checkpoint of REAF, HLIP, M3D-CLIP, HSENet or a MAE ViT; it has "
            f"{summary(sorted(state)[:6])} and the like"
        )
    if kind != model:
        raise InputError(
            f"{source}: starts --model {kind}, not {model}; choose a checkpoint of {model}'s family"
        )
    return found


def bert_config(folder: Path) -> TextConfig:
    """Read a config.json. Raises InputError for what this encoder does not compute."""
    path = Path(folder) / "config.json"
    return bert_settings(read_object(path), path)


def bert_settings(values: dict, path: Path) -> TextConfig:
    """The values of a config.json. path: for errors."""
    for key, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if values.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {values[key]!r}; this encoder has {expected!r} only")
    try:
        found = dict(
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
    return from_dict(TextConfig, found, str(path))
