"""What describes a network and its input: dataclasses, whose defaults are the published sizes, and how JSON becomes one.

Symbols: D/H/W depth, height and width of a volume, C width, L layers. Spacings are mm in (D, H, W) order,
windows are HU. Sources: HSENet (commit c7198f3) and REAF (commit f9475f8), as their settings take effect.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field

from reaf_hsenet.errors import InputError

Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class Recipe:
    """How a CT becomes a network's input.

    axes: directions that the array's (D, H, W) axes run to (L left, P posterior, S superior).
    spacing: mm in (D, H, W) that the CT is resampled to; None keeps the CT's own grid.
    clamp: `before` or `after` resampling the values are clamped to the window.
    fit: `foreground` crops to the box of voxels above the minimum and resizes, `resize` resizes the whole grid,
        `crop` pads with the lowest value and crops around the centre.
    scale: `minmax` maps the volume's own range to [0, 1], `window` maps the window to [0, 1].
    mean, std: applied last.
    """

    name: str
    axes: str
    spacing: tuple[float, float, float] | None
    window: tuple[float, float]
    size: Size3
    clamp: str
    scale: str
    fit: str
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise InputError(f"--window {self.window}: expected LOW HIGH in HU with LOW < HIGH")
        if not all(math.isfinite(x) for x in self.window):
            raise InputError(f"--window {self.window}: expected finite HU values")
        if len(self.size) != 3 or min(self.size) < 1:
            raise InputError(f"--size {self.size}: expected three positive numbers of voxels, D H W")
        if self.spacing is not None and (
            len(self.spacing) != 3 or not all(0 < x < math.inf for x in self.spacing)
        ):
            raise InputError(f"--spacing {self.spacing}: expected three positive distances in mm, D H W")
        if self.fit not in FITS:
            raise InputError(f"--fit {self.fit}: expected one of {', '.join(FITS)}")


FITS = ("foreground", "crop", "resize")
LARGEST = 2**24  # of any size of a network: above is a mistake, which would be found out by running out of memory


def _require_sizes(config, *sizes: int) -> None:
    """Raises InputError unless a network's sizes are positive, and its width is one of whole heads."""
    if not all(0 < n < LARGEST for n in sizes) or config.depth > 1000:
        raise InputError(f"{type(config).__name__} has a size out of range: {str(config)[:200]}")
    if config.width % config.heads:
        raise InputError(f"{config.heads} heads do not share a width of {config.width}")

# 0.449 and 0.226 are the averages over colours of ImageNet's means and standard deviations, in float32 as published.
RECIPES = {
    "hsenet": Recipe(
        "hsenet", "SLP", (1.5, 0.75, 0.75), (-1000.0, 200.0), (32, 256, 256), "before", "minmax", "foreground"
    ),
    "reaf": Recipe(
        "reaf",
        "SPL",
        (3.0, 1.0, 1.0),
        (-1150.0, 350.0),
        (112, 336, 336),
        "after",
        "window",
        "crop",
        mean=0.449,
        std=0.226,
    ),
}


@dataclass(frozen=True)
class VisionConfig:
    """3D patch ViT (HSENet stage 1; the vision encoder of M3D-CLIP)."""

    size: Size3 = (32, 256, 256)
    patch: Size3 = (4, 16, 16)
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072

    def __post_init__(self):
        _require_sizes(self, *self.size, *self.patch, self.width, self.depth, self.heads, self.mlp)
        if any(s % p for s, p in zip(self.size, self.patch, strict=True)):
            raise InputError(
                f"input size {self.size} is not a multiple of the patch {self.patch}: change --size"
            )

    @property
    def grid(self) -> Size3:
        return tuple(s // p for s, p in zip(self.size, self.patch, strict=True))


FUSIONS = ("mean", "max", "weighted_mean", "inverse_weighted_mean", "random_weighted_mean")


@dataclass(frozen=True)
class ReafVisionConfig(VisionConfig):
    """REAF's slice/scan ViT. Its oddities are the defaults, each with a sound variant (models/reaf.py, saliency.py).

    fusion: one of FUSIONS; `last`, the last layer alone; None, HLIP's encoder, without fusion and saliency.
    regions: of region_size tokens that keep weight 1 in the saliency map; 0, no map of regions.
    """

    size: Size3 = (112, 336, 336)
    patch: Size3 = (8, 24, 24)
    scan_layers: tuple[int, ...] = (2, 5, 8, 11)
    fusion: str | None = "weighted_mean"
    fusion_seed: int = 0
    regions: int = 3
    region_size: Size3 = (3, 3, 3)
    suppression: float = 0.1
    class_score: str = "first_patch"  # or class_token
    remainder: str = "suppressed"  # or regions
    slice_class: str = "first"  # or mean
    drop_path: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "fusion": (*FUSIONS, "last", None),
            "class_score": ("first_patch", "class_token"),
            "remainder": ("suppressed", "regions"),
            "slice_class": ("first", "mean"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(map(str, known))}")
        if min(self.region_size) < 1 or self.regions < 0:
            raise InputError(
                f"--region-size {self.region_size}, --regions {self.regions}: expected positive sizes and 0 or more"
            )
        if self.regions and any(r > n for r, n in zip(self.region_size, self.grid, strict=True)):
            raise InputError(
                f"--region-size {self.region_size}: does not fit the grid of {self.grid} patches; choose a smaller "
                "one, or a larger --size or smaller --patch"
            )
        if self.width % 6:
            raise InputError(f"width {self.width}: three axes of sines and cosines need a multiple of 6")
        if not all(0 <= i < self.depth for i in self.scan_layers):
            raise InputError(f"scan_layers {self.scan_layers}: there are {self.depth} layers, counted from 0")


@dataclass(frozen=True)
class GuidedVisionConfig(VisionConfig):
    """HSENet's 2E3 encoder: slices features of slice_width a volume score its patches (models/slice_guidance.py)."""

    slices: int = 32
    slice_width: int = 768
    guidance_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _require_sizes(self, self.slices, self.slice_width)


@dataclass(frozen=True)
class TextConfig:
    """BERT or RoBERTa encoder, as its config.json says."""

    vocab: int = 30522
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    positions: int = 512
    token_types: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pad_id: int = 0
    kind: str = "bert"  # or roberta: positions count from pad_id + 1

    def __post_init__(self):
        sizes = self.vocab, self.width, self.depth, self.heads, self.mlp, self.positions, self.token_types
        _require_sizes(self, *sizes)
        if not 0 <= self.pad_id < self.vocab or self.layer_norm_eps <= 0:
            raise InputError(f"pad_id {self.pad_id} and layer_norm_eps {self.layer_norm_eps}: expected a token, and a number above 0")
        if not (0 <= self.dropout < 1 and 0 <= self.attention_dropout < 1):
            raise InputError(f"dropout {self.dropout} and {self.attention_dropout}: expected probabilities below 1")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of a dual encoder (models/lora.py). towers: of `vision` and `text`, those that get them."""

    towers: tuple[str, ...]
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ("query", "value")


@dataclass(frozen=True)
class ClipConfig:
    """Dual encoder. logit_scale `raw` multiplies by the parameter itself, as HSENet publishes; `exp` is CLIP's."""

    model: str = "hsenet"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed: int = 768
    projection_bias: bool = True
    logit_scale: str = "raw"
    max_text: int = 512
    lora: LoraConfig | None = None

    def __post_init__(self):
        if self.model not in ("hsenet", "reaf") or self.logit_scale not in ("raw", "exp"):
            raise InputError(f"model {self.model!r} and logit_scale {self.logit_scale!r}: expected hsenet or reaf, raw or exp")
        if not (0 < self.embed < LARGEST and 0 < self.max_text < LARGEST):
            raise InputError(f"embed {self.embed} and max_text {self.max_text}: expected sizes above 0")


def to_dict(config) -> dict:
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, source: str = "config.json"):
    """Rebuild a dataclass from its JSON form (lists become tuples, nested dataclasses are rebuilt).

    Raises InputError, naming `source` and the setting, for what is absent, unknown or of another kind.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: {cls.__name__} is {values!r:.60}; expected an object of settings")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{source}: {cls.__name__} has no setting {', '.join(unknown)[:200]}: written by another version?")
    made = {}
    for name, value in values.items():
        if isinstance(value, dict) and name == "vision":
            value = vision_config(value, source)
        elif isinstance(value, dict) and name in hints:
            nested = [kind for kind in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(kind)]
            value = from_dict(nested[0], value, source) if nested else value
        made[name] = tuple(value) if isinstance(value, list) else value
        if not _is_a(made[name], hints[name]):
            kind = getattr(hints[name], "__name__", "") if isinstance(hints[name], type) else ""
            raise InputError(f"{source}: {name} of {cls.__name__} is {value!r:.60}; expected {kind or hints[name]}")
    try:
        return cls(**made)
    except TypeError as error:  # a setting without default is absent
        raise InputError(f"{source}: {error}") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _is_a(value, hint) -> bool:
    """Whether a value is of an annotation: a class, a tuple of one, or a choice of these."""
    parts = typing.get_args(hint)
    if not parts:
        return type(value) in (int, float) and math.isfinite(value) if hint is float else (
            isinstance(value, hint) if dataclasses.is_dataclass(hint) else type(value) is hint
        )
    if typing.get_origin(hint) is not tuple:
        return any(_is_a(value, part) for part in parts)
    parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
    return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_a, value, parts))


def vision_config(values: dict, source: str = "config.json") -> VisionConfig:
    """The encoder's settings of whichever kind these are."""
    known = values if isinstance(values, dict) else {}
    guided = GuidedVisionConfig if "slice_width" in known else VisionConfig
    return from_dict(ReafVisionConfig if "scan_layers" in known else guided, values, source)
