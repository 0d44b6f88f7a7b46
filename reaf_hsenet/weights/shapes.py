"""What a published checkpoint's configuration is, read from the shapes of its tensors; and its tensors in
ours.

What no shape tells is taken from the config.json beside the file where it says so, else from the published
rule, and noted: heads, the two sizes behind a flattened patch, REAF's scan layers, the number of slices.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F

from reaf_hsenet.config import (
    ClipConfig,
    GuidedVisionConfig,
    ReafVisionConfig,
    Size3,
    TextConfig,
    VisionConfig,
)
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_object
from reaf_hsenet.models.positions import depth_plus_2d, resample_3d
from reaf_hsenet.settings import from_dict
from reaf_hsenet.weights.files import State, summary
from reaf_hsenet.weights.names import import_state
from reaf_hsenet.weights.published import Published, recognise, without_module

OWN = "reaf_hsenet"  # the key of this project's settings in the config.json of what it exports
# Keys of a config.json and our settings. M3D-CLIP's vision encoder:
VISION_KEYS = {"width": "hidden_size", "depth": "num_layers", "mlp": "mlp_dim"}
# BERT, with values that are compared with shapes:
TEXT_KEYS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp": "intermediate_size",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
}
# BERT, beside shapes:
TEXT_RULES = {
    "heads": "num_attention_heads",
    "layer_norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pad_id": "pad_token_id",
    "kind": "model_type",
}
TEXT_ONLY = {"hidden_act": "gelu", "position_embedding_type": "absolute"}  # no others are computed
PATCH, TABLE = "vision.patch_embed.proj.weight", "vision.pos_embed"


def shape(published: Published, name: str, ndim: int) -> tuple[int, ...]:
    """Return a tensor's shape. Raises InputError where it is absent or has other than `ndim` axes."""
    if name not in published.state:
        raise InputError(
            f"{published.name}: has no tensor for {name}, whose shape is needed; fetch the file again"
        )
    found = tuple(published.state[name].shape)
    if len(found) != ndim or 0 in found:
        raise InputError(f"{published.name}: {name} is {found}; expected {ndim} axes, none of them empty")
    return found


def count_blocks(published: Published, prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.")
    numbers = {int(match[1]) for name in published.state if (match := pattern.match(name))}
    if numbers != set(range(len(numbers))) or not numbers:
        raise InputError(
            f"{published.name}: has {len(numbers)} blocks of {prefix}, numbered up to "
            f"{max(numbers, default=0)}; fetch it again"
        )
    return len(numbers)


def count_heads(published: Published, width: int, tower: str) -> int:
    """Return num_heads of the config.json (vision only), else heads of 64 channels, as published."""
    said = published.beside.get("num_heads") if tower == "vision" else None
    heads = max(1, width // 64) if said is None else said
    if type(heads) is not int or heads < 1 or width % heads:
        raise InputError(
            f"{published.settings if published.beside else published.name}: {heads!r} heads do not share "
            f"{tower}'s width of {width}; correct num_heads"
        )
    if said is None:
        published.notes.append(
            f"{tower}: {heads} heads, by the published rule of 64 channels each; no shape tells them"
        )
    return heads


def contradiction(path: Path | str, key: str, said, found) -> InputError:
    return InputError(
        f"{path}: {key} is {said!r:.60}, the tensors have {found}; use the config.json of this checkpoint"
    )


def dual_config(published: Published, text: TextConfig | None = None) -> ClipConfig:
    """Return the configuration of a dual encoder. text: by --text-model's config.json, which must fit."""
    reaf = published.family.starts == "reaf"
    if OWN in published.beside:
        return _own_config(published, reaf)
    vision = reaf_vision(published) if reaf else vit3d_vision(published)
    found = text_shapes(published, "text.")
    if text is not None:
        require_shapes(text, found, "--text-model's config.json")
        found = text
    limit = found.positions - (found.pad_id + 1 if found.kind == "roberta" else 0)
    return ClipConfig(
        model="reaf" if reaf else "hsenet",
        vision=vision,
        text=found,
        embed=shape(published, "vision_proj.weight", 2)[0],
        projection_bias="vision_proj.bias" in published.state,
        logit_scale="exp" if reaf else "raw",
        max_text=min(ClipConfig.max_text, limit),
    )


def _own_config(published: Published, reaf: bool) -> ClipConfig:
    """Return the settings that `export` wrote beside the weights; a stage-1 model's are without guidance."""
    own, path = published.beside[OWN], published.settings
    if not isinstance(own, dict) or not isinstance(own.get("slices", {}), dict | None):
        raise InputError(f"{path}: {OWN} is not what `export` writes; remove it")
    config = from_dict(ClipConfig, own.get("model"), f"{path}: {OWN}")
    if (config.model == "reaf") != reaf:
        raise InputError(
            f"{path}: is of {config.model}, the tensors beside it are not; use its own config.json"
        )
    if isinstance(config.vision, GuidedVisionConfig) and "vision.score.weight" not in published.state:
        values = vars(config.vision)
        config = replace(config, vision=VisionConfig(**{name: values[name] for name in vars(VisionConfig())}))
    return config


def vit3d_vision(published: Published) -> VisionConfig:
    """Return the settings of monai's ViT (M3D-CLIP, HSENet), and of stage 2's guidance where it is there."""
    beside = published.beside
    values = {
        "width": shape(published, "vision.cls_token", 3)[2],
        "depth": count_blocks(published, "vision."),
        "mlp": shape(published, "vision.blocks.0.mlp.fc1.weight", 2)[0],
    }
    for name, key in VISION_KEYS.items():
        if beside.get(key, values[name]) != values[name]:
            raise contradiction(published.settings, key, beside[key], values[name])
    voxels, tokens = shape(published, PATCH, 2)[1], shape(published, TABLE, 3)[1]
    size, patch = (_size3(published, key) for key in ("img_size", "patch_size"))
    if size is None or patch is None:
        size, patch = VisionConfig.size, VisionConfig.patch
        if (math.prod(patch), math.prod(VisionConfig().grid)) != (voxels, tokens):
            raise InputError(
                f"{published.name}: its patches of {voxels} voxels and {tokens} tokens tell no sizes and are "
                "not the published ones; put a config.json with img_size and patch_size (D, H, W) beside it"
            )
        published.notes.append(
            f"vision: size {size} and patch {patch} as published, which its {tokens} tokens and {voxels} "
            f"voxels fit"
        )
    if math.prod(patch) != voxels:
        raise contradiction(
            published.settings, "patch_size", beside.get("patch_size"), f"{voxels} voxels a patch"
        )
    if math.prod(size) // voxels != tokens:
        raise contradiction(published.settings, "img_size", beside.get("img_size"), f"{tokens} tokens")
    heads = count_heads(published, values["width"], "vision")
    config = VisionConfig(size, patch, heads=heads, **values)
    if "vision.score.weight" not in published.state:
        return config
    slices = beside.get("num_slices", GuidedVisionConfig.slices)
    if type(slices) is not int or not 0 < slices < 2**14:
        raise InputError(
            f"{published.settings}: num_slices is {slices!r:.60}; expected a whole number above 0"
        )
    published.notes.append(
        f"vision: {slices} slices a volume{'' if 'num_slices' in beside else ', as published'}; no shape "
        f"tells them"
    )
    width = shape(published, "vision.guidance.key.weight", 2)[1]
    return GuidedVisionConfig(**vars(config), slices=slices, slice_width=width)


def _size3(published: Published, key: str) -> Size3 | None:
    said = published.beside.get(key)
    if said is None:
        return None
    if not (
        isinstance(said, list) and len(said) == 3 and all(type(n) is int and 0 < n < 2**14 for n in said)
    ):
        raise InputError(
            f"{published.settings}: {key} is {said!r:.60}; expected three whole numbers, D, H and W"
        )
    return tuple(said)


def reaf_vision(published: Published) -> ReafVisionConfig:
    """Return the settings of REAF's or HLIP's trunk, whose kernel and position table keep their axes."""
    if any(name.endswith("sequential_posemb") for name in published.tensors):
        raise InputError(
            f"{published.name}: has sequential_posemb, HLIP's positions of several scans a study (brain "
            "MRI); its chest CT checkpoints of one scan are computed here"
        )
    width, _, *patch = shape(published, PATCH, 5)
    grid = shape(published, TABLE, 5)[1:4]
    depth = count_blocks(published, "vision.")
    layers = tuple(range(2, depth, 3))
    published.notes.append(f"vision: scan layers {layers}, every third as published; no shape tells them")
    fused = "vision.fusion_layer.weight" in published.state
    return ReafVisionConfig(
        size=tuple(n * p for n, p in zip(grid, patch, strict=True)),
        patch=tuple(patch),
        width=width,
        depth=depth,
        heads=count_heads(published, width, "vision"),
        mlp=shape(published, "vision.blocks.0.mlp.fc1.weight", 2)[0],
        scan_layers=layers,
        fusion=ReafVisionConfig.fusion if fused else None,
        regions=ReafVisionConfig.regions if fused else 0,
        region_size=ReafVisionConfig.region_size if fused else (1, 1, 1),
    )


def text_shapes(published: Published, prefix: str = "") -> TextConfig:
    """Return the settings of a BERT or RoBERTa. One token type is RoBERTa's, two are BERT's."""
    vocab, width = shape(published, f"{prefix}word_embed.weight", 2)
    types = shape(published, f"{prefix}type_embed.weight", 2)[0]
    return TextConfig(
        vocab=vocab,
        width=width,
        depth=count_blocks(published, prefix),
        heads=count_heads(published, width, "text"),
        mlp=shape(published, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        positions=shape(published, f"{prefix}pos_embed.weight", 2)[0],
        token_types=types,
        **({"layer_norm_eps": 1e-5, "pad_id": 1, "kind": "roberta"} if types == 1 else {}),
    )


def require_shapes(said: TextConfig, found: TextConfig, source: str) -> None:
    """Raise InputError unless a config.json has the sizes of the tensors."""
    for name, key in TEXT_KEYS.items():
        if getattr(said, name) != getattr(found, name):
            raise contradiction(source, key, getattr(said, name), getattr(found, name))


def bert_config(folder: Path) -> TextConfig:
    """Read a BERT's config.json. Raises InputError for what this encoder does not compute."""
    path = Path(folder) / "config.json"
    values = {"type_vocab_size": 2, **read_object(path)}
    for key, expected in TEXT_ONLY.items():
        if values.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {values[key]!r}; this encoder has {expected!r} only")
    for key in (*TEXT_KEYS.values(), "num_attention_heads"):
        if key not in values:
            raise InputError(f"{path}: has no {key!r}; expected the config.json of a BERT or RoBERTa")
    keys = TEXT_KEYS | TEXT_RULES
    found = {name: values[key] for name, key in keys.items() if key in values}
    return from_dict(
        TextConfig, {**found, "kind": "roberta" if found.get("kind") == "roberta" else "bert"}, str(path)
    )


def bert_settings(config: TextConfig) -> dict:
    """Return the values of a config.json as transformers writes it."""
    return {
        "architectures": ["RobertaModel" if config.kind == "roberta" else "BertModel"],
        **{key: getattr(config, name) for name, key in (TEXT_KEYS | TEXT_RULES).items()},
        **TEXT_ONLY,
    }


def initial_state(published: State, source: str, model: str, patch, grid: Size3) -> State:
    """Return tensors that start a dual encoder, under DualEncoder's names.

    published: a checkpoint's tensors. model: hsenet starts from M3D-CLIP or HSENet; reaf from the dual
    encoder or the vision trunk of REAF or HLIP, or a 2D MAE or timm ViT; both from this project's own. Raises
    InputError for anything else.
    """
    tensors = without_module(published, source)
    family = recognise(tensors)
    if family is not None and family.key == "run-dual":
        if any("lora_" in name for name in tensors):
            raise InputError(
                f"{source}: holds LoRA adapters; name the run's folder, whose config.json says how to add "
                "them"
            )
        # A fusion's constant weights are the run's own choice, not what was learned.
        return {n: t for n, t in tensors.items() if not n.startswith("vision.fusion.")}
    if family is None or family.starts is None:
        raise InputError(
            f"{source}: is not a checkpoint of REAF, HLIP, M3D-CLIP, HSENet or a MAE ViT; it has "
            f"{summary(sorted(tensors)[:6])} and the like"
        )
    if family.starts != model:
        raise InputError(
            f"{source}: starts --model {family.starts}, not {model}; choose a checkpoint of {model}'s family"
        )
    if family.kind == "slices":
        return {f"vision.{name}": tensor for name, tensor in inflated(tensors, patch, grid).items()}
    state = import_state(family.table, tensors)
    if model == "reaf":
        return flat_reaf(state, grid)
    table = state.get(TABLE)
    if grid and table is not None and table.shape[1:2] != (math.prod(grid),):
        raise InputError(
            f"{source}: has positions {tuple(table.shape)}, not those of a grid of {grid}; convert it to "
            f"that --size first: python -m reaf_hsenet.weights convert {source} RUN --size D H W, then "
            "--init RUN"
        )
    return state


def on_grid(state: State, own: Size3, grid: Size3) -> State:
    """Return M3D-CLIP's or HSENet's tensors, the position table of a grid `own` resampled to another one."""
    if TABLE not in state or own == grid:
        return state
    return state | {TABLE: resample_3d(state[TABLE].unflatten(1, own), grid).flatten(1, 3)}


def flat_reaf(state: State, grid: Size3) -> State:
    """Return REAF's or HLIP's tensors in our shapes: kernel and table flat, the table resampled to `grid`."""
    state = dict(state)
    if (weight := state.get(PATCH)) is not None:
        if weight.ndim != 5:
            raise InputError(
                f"patch_embed.proj.weight is {tuple(weight.shape)}; expected channels, 1, and the patch's "
                "D, H, W"
            )
        state[PATCH] = weight.flatten(1)  # a Conv3d whose stride is its kernel
    if (table := state.get(TABLE)) is not None:
        if table.ndim != 5:
            raise InputError(
                f"spatial_posemb is {tuple(table.shape)}; expected 1, depth, height, width, channels"
            )
        state[TABLE] = resample_3d(table, grid).flatten(1, 3)
    return state


def with_axes(state: State, vision: ReafVisionConfig) -> State:
    """Return our tensors in REAF's and HLIP's shapes: `flat_reaf` backwards."""
    kernel = state[PATCH].reshape(vision.width, 1, *vision.patch)
    return state | {PATCH: kernel, TABLE: state[TABLE].unflatten(1, vision.grid)}


def inflated(published: State, patch: Size3, grid: Size3) -> State:
    """Return a 2D MAE or timm ViT as REAF's encoder, as HLIP and REAF inflate it.

    The patch kernel is resized in the plane (bicubic, no antialiasing), summed over colours and spread evenly
    over depth. The position table is resampled and gets a sine-cosine over depth; the class token takes its
    position with it.
    """
    state = dict(published)
    table, kernel = state.pop("pos_embed"), state["patch_embed.proj.weight"]
    rows = table.shape[1] if table.ndim == 3 else -1
    square = rows > 0 and math.isqrt(rows) ** 2 == rows
    with_class = rows > 0 and math.isqrt(rows) ** 2 == rows - 1
    if kernel.ndim != 4 or not (square or with_class):
        raise InputError(
            f"pos_embed is {tuple(table.shape)}; expected 1, rows of a square with or without a class "
            "token's, channels"
        )
    if with_class:
        state["cls_token"] = state["cls_token"] + table[:, :1]
        table = table[:, 1:]
    state["pos_embed"] = depth_plus_2d(table, grid).flatten(1, 3)
    if tuple(kernel.shape[2:]) != tuple(patch[1:]):
        kernel = F.interpolate(kernel.float(), size=patch[1:], mode="bicubic")
    kernel = kernel.sum(1).unsqueeze(1).expand(-1, patch[0], -1, -1) / patch[0]  # (C, p_d, p_h, p_w)
    return state | {"patch_embed.proj.weight": kernel.flatten(1)}
