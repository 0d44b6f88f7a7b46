"""A published checkpoint's configuration, read from the shapes of its tensors.

What no shape tells is taken from the config.json beside the file where it says so, else from the published
rule, and
noted: the number of heads, the two sizes that a flattened patch has, REAF's scan layers, the number of
slices.
"""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

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
from reaf_hsenet.settings import from_dict
from reaf_hsenet.weights.names import reaf_names
from reaf_hsenet.weights.reading import State

OWN = "reaf_hsenet"  # the key of this project's settings in the config.json of what it exports
# config.json's keys of an encoder, as M3D-CLIP's says them, and the settings here.
VISION_KEYS = {
    "img_size": "size",
    "patch_size": "patch",
    "hidden_size": "width",
    "num_layers": "depth",
    "mlp_dim": "mlp",
}
TEXT_KEYS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp": "intermediate_size",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
}


@dataclass
class Reader:
    """A checkpoint's tensors under our names, the settings beside it, and what was assumed on the way."""

    state: State
    source: str
    path: Path | None = None  # of `beside`
    beside: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def shape(self, name: str, ndim: int) -> tuple[int, ...]:
        """Raises InputError, naming the tensor, where it is absent or has other than `ndim` axes."""
        if name not in self.state:
            raise InputError(
                f"{self.source}: has no tensor for {name}, whose shape is needed; fetch the file again"
            )
        shape = tuple(self.state[name].shape)
        if len(shape) != ndim or 0 in shape:
            raise InputError(f"{self.source}: {name} is {shape}; expected {ndim} axes, none of them empty")
        return shape

    def depth(self, prefix: str) -> int:
        numbers = {
            int(m[1]) for n in self.state if (m := re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", n))
        }
        if numbers != set(range(len(numbers))) or not numbers:
            raise InputError(
                f"{self.source}: has {len(numbers)} blocks of {prefix}, numbered up to "
                f"{max(numbers, default=0)}; fetch it again"
            )
        return len(numbers)

    def heads(self, width: int, what: str) -> int:
        """Of the config.json, or the published rule of 64 channels a head."""
        said = self.beside.get("num_heads") if what == "vision" else None
        heads = max(1, width // 64) if said is None else said
        if type(heads) is not int or heads < 1 or width % heads:
            raise InputError(
                f"{self.path or self.source}: {heads!r} heads do not share {what}'s width of {width}; "
                f"correct num_heads"
            )
        if said is None:
            self.notes.append(
                f"{what}: {heads} heads, by the published rule of 64 channels each; no shape tells them"
            )
        return heads

    def contradiction(self, key: str, said, found) -> InputError:
        return InputError(
            f"{self.path}: {key} is {said!r:.60}, the tensors have {found}; use the config.json of this "
            f"checkpoint"
        )


def read_beside(folder: Path) -> tuple[Path | None, dict]:
    """(path, values) of a folder's config.json; (None, {}) where there is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None, {}
    return path, read_object(path)


def dual_config(published: State, reader: Reader, text: TextConfig | None = None) -> ClipConfig:
    """Of a dual encoder's checkpoint, whose tensors `reader` has under our names. text: of --text-model's
    config.json.
    """
    reaf = any(name.startswith("visual.") for name in published)
    if OWN in reader.beside:
        return _own_config(reader, reaf)
    vision = reaf_vision(published, reader) if reaf else vit3d_vision(reader)
    found = text_shapes(reader, "text.")
    if text is not None:
        require_shapes(text, found, "--text-model's config.json")
        found = text
    limit = found.positions - (found.pad_id + 1 if found.kind == "roberta" else 0)
    return ClipConfig(
        model="reaf" if reaf else "hsenet",
        vision=vision,
        text=found,
        embed=reader.shape("vision_proj.weight", 2)[0],
        projection_bias="vision_proj.bias" in reader.state,
        logit_scale="exp" if reaf else "raw",
        max_text=min(ClipConfig.max_text, limit),
    )


def _own_config(reader: Reader, reaf: bool) -> ClipConfig:
    """The settings that `export` wrote beside the weights; of stage 2's teacher, without the guidance."""
    own = reader.beside[OWN]
    if not isinstance(own, dict) or not isinstance(own.get("slices", {}), dict | None):
        raise InputError(f"{reader.path}: {OWN} is not what `export` writes; remove it")
    config = from_dict(ClipConfig, own.get("model"), f"{reader.path}: {OWN}")
    if (config.model == "reaf") != reaf:
        raise InputError(
            f"{reader.path}: is of {config.model}, the tensors beside it are not; use its own config.json"
        )
    if isinstance(config.vision, GuidedVisionConfig) and "vision.score.weight" not in reader.state:
        values = vars(config.vision)
        config = replace(config, vision=VisionConfig(**{name: values[name] for name in vars(VisionConfig())}))
    return config


def vit3d_vision(reader: Reader) -> VisionConfig:
    """Of monai's ViT, M3D-CLIP's and HSENet's, with stage 2's guidance where it is there."""
    width = reader.shape("vision.cls_token", 3)[2]
    values = {
        "width": width,
        "depth": reader.depth("vision."),
        "mlp": reader.shape("vision.blocks.0.mlp.fc1.weight", 2)[0],
    }
    voxels, tokens = (
        reader.shape("vision.patch_embed.proj.weight", 2)[1],
        reader.shape("vision.pos_embed", 3)[1],
    )
    for key, name in VISION_KEYS.items():
        if name in values and reader.beside.get(key, values[name]) != values[name]:
            raise reader.contradiction(key, reader.beside[key], values[name])
    size, patch = (_size3(reader, key) for key in ("img_size", "patch_size"))
    if size is None or patch is None:
        size, patch = VisionConfig.size, VisionConfig.patch
        if (math.prod(patch), math.prod(VisionConfig().grid)) != (voxels, tokens):
            raise InputError(
                f"{reader.source}: its patches of {voxels} voxels and {tokens} tokens tell no sizes and are "
                "not the published ones; put a config.json with img_size and patch_size (D, H, W) beside it"
            )
        reader.notes.append(
            f"vision: size {size} and patch {patch} as published, which its {tokens} tokens and {voxels} "
            f"voxels fit"
        )
    for key, said, found in (
        ("patch_size", math.prod(patch), voxels),
        ("img_size", math.prod(size) // voxels, tokens),
    ):
        if said != found:
            what = "voxels a patch" if key == "patch_size" else "tokens"
            raise reader.contradiction(key, reader.beside.get(key), f"{found} {what}")
    config = VisionConfig(size, patch, heads=reader.heads(width, "vision"), **values)
    if "vision.score.weight" not in reader.state:
        return config
    slices = reader.beside.get("num_slices", GuidedVisionConfig.slices)
    if type(slices) is not int or not 0 < slices < 2**14:
        raise InputError(f"{reader.path}: num_slices is {slices!r:.60}; expected a whole number above 0")
    reader.notes.append(
        f"vision: {slices} slices a volume{'' if 'num_slices' in reader.beside else ', as published'}; no "
        f"shape tells them"
    )
    return GuidedVisionConfig(
        **vars(config), slices=slices, slice_width=reader.shape("vision.guidance.key.weight", 2)[1]
    )


def _size3(reader: Reader, key: str) -> Size3 | None:
    said = reader.beside.get(key)
    if said is None:
        return None
    if not (
        isinstance(said, list) and len(said) == 3 and all(type(n) is int and 0 < n < 2**14 for n in said)
    ):
        raise InputError(f"{reader.path}: {key} is {said!r:.60}; expected three whole numbers, D, H and W")
    return tuple(said)


def reaf_vision(published: State, reader: Reader) -> ReafVisionConfig:
    """Of REAF's or HLIP's trunk, whose patch kernel and position table keep their axes."""
    if any(name.endswith("sequential_posemb") for name in published):
        raise InputError(
            f"{reader.source}: has sequential_posemb, HLIP's positions of several scans a study (brain MRI); "
            "its chest CT checkpoints of one scan are computed here"
        )
    plain = Reader(reaf_names(published), reader.source)
    width, _, *patch = plain.shape("vision.patch_embed.proj.weight", 5)
    grid = plain.shape("vision.pos_embed", 5)[1:4]
    depth = reader.depth("vision.")
    layers = tuple(range(2, depth, 3))
    reader.notes.append(f"vision: scan layers {layers}, every third as published; no shape tells them")
    fused = "vision.fusion_layer.weight" in reader.state
    return ReafVisionConfig(
        size=tuple(n * p for n, p in zip(grid, patch, strict=True)),
        patch=tuple(patch),
        width=width,
        depth=depth,
        heads=reader.heads(width, "vision"),
        mlp=reader.shape("vision.blocks.0.mlp.fc1.weight", 2)[0],
        scan_layers=layers,
        fusion=ReafVisionConfig.fusion if fused else None,
        regions=ReafVisionConfig.regions if fused else 0,
        region_size=ReafVisionConfig.region_size if fused else (1, 1, 1),
    )


def text_shapes(reader: Reader, prefix: str = "") -> TextConfig:
    """Of a BERT or RoBERTa under our names. One token type is RoBERTa's, two are BERT's."""
    vocab, width = reader.shape(f"{prefix}word_embed.weight", 2)
    types = reader.shape(f"{prefix}type_embed.weight", 2)[0]
    roberta = types == 1
    return TextConfig(
        vocab=vocab,
        width=width,
        depth=reader.depth(prefix),
        heads=reader.heads(width, "text"),
        mlp=reader.shape(f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
        positions=reader.shape(f"{prefix}pos_embed.weight", 2)[0],
        token_types=types,
        **({"layer_norm_eps": 1e-5, "pad_id": 1, "kind": "roberta"} if roberta else {}),
    )


def require_shapes(said: TextConfig, found: TextConfig, source: str) -> None:
    """Raise InputError unless a config.json has the sizes of the tensors."""
    for name, key in TEXT_KEYS.items():
        if getattr(said, name) != getattr(found, name):
            raise InputError(
                f"{source}: {key} is {getattr(said, name)}, the tensors have {getattr(found, name)}; use the "
                "config.json of this checkpoint"
            )
