"""What describes a network and its input: dataclasses, whose defaults are the published sizes.

Symbols: D/H/W depth, height and width of a volume, C width, L layers. Spacings are mm in (D, H, W) order,
windows are HU. Sources: HSENet (commit c7198f3) and REAF (commit f9475f8), as their settings take effect.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from reaf_hsenet.errors import InputError
from reaf_hsenet.settings import check_ranges, setting

LARGEST = 2**24  # of any size of a network: above is a mistake, which would be found out by running out of memory
Size3 = tuple[int, int, int]
MOST_VOXELS = 2**30  # of a volume, whether read or made


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
    clamp: Literal["before", "after"]
    scale: Literal["minmax", "window"]
    fit: str
    mean: float = setting(0.0, least=-1e30, most=1e30)
    std: float = setting(1.0, above=0, most=1e30)

    def __post_init__(self):
        check_ranges(self)
        if sorted(self.axes) != ["L", "P", "S"]:
            raise InputError(f"axes of Recipe are {self.axes!r:.60}; expected the letters L, P and S in the order of D H W")
        if not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise InputError(f"--window {self.window}: expected LOW HIGH in HU with LOW < HIGH")
        if not all(math.isfinite(x) for x in self.window):
            raise InputError(f"--window {self.window}: expected finite HU values")
        if len(self.size) != 3 or min(self.size) < 1:
            raise InputError(f"--size {self.size}: expected three positive numbers of voxels, D H W")
        if math.prod(self.size) > MOST_VOXELS:
            raise InputError(f"--size {self.size}: expected at most {MOST_VOXELS} voxels in all, 4 GB of float32")
        if self.spacing is not None and (
            len(self.spacing) != 3 or not all(0 < x < math.inf for x in self.spacing)
        ):
            raise InputError(f"--spacing {self.spacing}: expected three positive distances in mm, D H W")
        if self.fit not in FITS:
            raise InputError(f"--fit {self.fit}: expected one of {', '.join(FITS)}")


FITS = ("foreground", "crop", "resize")


def _size(default):
    """The field of a size, or of several."""
    return setting(default, above=0, most=LARGEST)


def _whole_heads(config) -> None:
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

    size: Size3 = _size((32, 256, 256))
    patch: Size3 = _size((4, 16, 16))
    width: int = _size(768)
    depth: int = setting(12, above=0, most=1000)
    heads: int = _size(12)
    mlp: int = _size(3072)

    def __post_init__(self):
        check_ranges(self)
        _whole_heads(self)
        if any(s % p for s, p in zip(self.size, self.patch, strict=True)):
            raise InputError(
                f"input size {self.size} is not a multiple of the patch {self.patch}: change --size"
            )

    @staticmethod
    def variant(values: dict) -> type["VisionConfig"]:
        """The encoder that settings are of, by those that only one has."""
        guided = GuidedVisionConfig if "slice_width" in values else VisionConfig
        return ReafVisionConfig if "scan_layers" in values else guided

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

    size: Size3 = _size((112, 336, 336))
    patch: Size3 = _size((8, 24, 24))
    scan_layers: tuple[int, ...] = (2, 5, 8, 11)
    fusion: Literal[(*FUSIONS, "last")] | None = "weighted_mean"
    fusion_seed: int = setting(0, least=0, most=2**31)
    regions: int = setting(3, least=0, most=LARGEST)
    region_size: Size3 = _size((3, 3, 3))
    suppression: float = setting(0.1, least=0, most=1)
    class_score: Literal["first_patch", "class_token"] = "first_patch"
    remainder: Literal["suppressed", "regions"] = "suppressed"
    slice_class: Literal["first", "mean"] = "first"
    drop_path: float = setting(0.2, least=0, most=0.99)

    def __post_init__(self):
        super().__post_init__()
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

    slices: int = _size(32)
    slice_width: int = _size(768)
    guidance_dropout: float = setting(0.1, least=0, most=0.99)


@dataclass(frozen=True)
class TextConfig:
    """BERT or RoBERTa encoder, as its config.json says."""

    vocab: int = _size(30522)
    width: int = _size(768)
    depth: int = setting(12, above=0, most=1000)
    heads: int = _size(12)
    mlp: int = _size(3072)
    positions: int = _size(512)
    token_types: int = _size(2)
    layer_norm_eps: float = setting(1e-12, above=0, most=1)
    dropout: float = setting(0.1, least=0, most=0.99)
    attention_dropout: float = setting(0.1, least=0, most=0.99)
    pad_id: int = setting(0, least=0)
    kind: Literal["bert", "roberta"] = "bert"  # roberta: positions count from pad_id + 1

    def __post_init__(self):
        check_ranges(self)
        _whole_heads(self)
        if self.pad_id >= self.vocab:
            raise InputError(f"pad_id of TextConfig is {self.pad_id}; expected one of {self.vocab} tokens")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of a dual encoder (models/lora.py). towers: of `vision` and `text`, those that get them."""

    towers: tuple[Literal["vision", "text"], ...]
    r: int = _size(8)
    alpha: float = setting(8, above=0, most=1e30)
    dropout: float = setting(0.0, least=0, most=0.99)
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class ClipConfig:
    """Dual encoder. logit_scale `raw` multiplies by the parameter itself, as HSENet publishes; `exp` is CLIP's."""

    model: Literal["hsenet", "reaf"] = "hsenet"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed: int = _size(768)
    projection_bias: bool = True
    logit_scale: Literal["raw", "exp"] = "raw"
    max_text: int = _size(512)
    lora: LoraConfig | None = None

    def __post_init__(self):
        check_ranges(self)
