"""Every hyperparameter of the project: dataclasses, named presets and the published recipes.

Symbols: D/H/W depth, height and width of a volume, C width, L layers. Spacings are mm in (D, H, W) order,
windows are HU. Sources: HSENet (commit c7198f3) and REAF (commit f9475f8), as their settings take effect.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field, replace

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


# Small enough for a laptop's processor. The text encoder trains on its own vocabulary, from the reports.
TINY_TEXT = TextConfig(
    vocab=1000, width=128, depth=1, heads=4, mlp=512, positions=320, dropout=0.0, attention_dropout=0.0
)
PRESETS = {
    "hsenet-base": ClipConfig(),
    "hsenet-tiny": ClipConfig(
        vision=VisionConfig(size=(32, 64, 64), patch=(8, 16, 16), width=128, depth=2, heads=4, mlp=512),
        text=TINY_TEXT,
        embed=128,
        max_text=320,
    ),
    "reaf-base": ClipConfig(
        model="reaf", vision=ReafVisionConfig(), embed=512, projection_bias=False, logit_scale="exp"
    ),
    "reaf-tiny": ClipConfig(
        model="reaf",
        vision=ReafVisionConfig(
            size=(32, 64, 64),
            patch=(8, 16, 16),
            width=144,
            depth=3,
            heads=4,
            mlp=576,
            scan_layers=(2,),
            region_size=(2, 2, 2),
            drop_path=0.0,
        ),
        text=TINY_TEXT,
        embed=128,
        projection_bias=False,
        logit_scale="exp",
        max_text=320,
    ),
}


@dataclass(frozen=True)
class Augmentation:
    """Probabilities of HSENet's training augmentations, applied in this order; 0 switches one off."""

    rotate: float = 0.5  # by 90, 180 or 270 degrees in the (H, W) plane
    flip: float = 0.1  # each of D, H, W, independently
    scale: float = 0.5  # v * (1 + f), f uniform in +-intensity
    shift: float = 0.5  # v + o, o uniform in +-intensity
    intensity: float = 0.1
    translate: int = 0  # voxels at most, each axis, background moving in; not published, for the tiny presets


@dataclass(frozen=True)
class TrainConfig:
    """One training stage. warmup is the share of all steps; no_decay is the published rule of each method.

    first_step: 0, the warm-up starts at a rate of 0; 1, at the first step's share of it, as REAF does.
    text_blocks: last blocks of the text encoder that are trained, the rest frozen but for its LayerNorms; None: all.
    grad_cache: volumes per pass of --grad-cache (grad_cache.py); None: the whole batch in one pass.
    relation: weight of stage 2's relation loss at step 0, which falls to 0 at relation_steps.
    slices_follow: a volume's slice features follow its depth flip; HSENet publishes that they do not.
    encoder_rate: of the learning rate, for encoders that a language stage trains on.
    label_epochs: before the first step, in which the encoders learn to tell the scan's labels (label_start.py); list_epochs:
        the first epochs of a language stage, in which the answer is the list of these labels. Later reports begin with it.
        A decoder that starts from nothing else learns to write without looking; not published, for the tiny presets.
    questions: kind of questions that stage vqa learns to answer.
    shard: the ranks share the weights and the optimizer's states of a language stage (sharding.py).
    max_bad: volumes that may be left out because they cannot be read, before the run stops.
    max_skipped: steps that may be skipped because a loss or a gradient is not finite, before the run stops.
    best_by: the number of the validation that chooses the best checkpoint; None: mean R@5, or the loss.
    calibrate: training volumes that set the start of what is trained from nothing (calibration.py); 0: plain start.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    warmup: float
    epochs: int
    batch_size: int  # per process
    no_decay: str = "hsenet"
    clip_norm: float | None = 1.0
    accumulate: int = 1
    precision: str = "bf16"
    grad_checkpoint: bool = False
    seed: int = 42
    augment: Augmentation = Augmentation()
    validate_every: float = 0.04  # share of all steps
    validate_samples: int = 512
    save_every: int = 1000
    keep: int = 2
    first_step: int = 0
    text_blocks: int | None = None
    grad_cache: int | None = None
    relation: float = 0.0
    relation_steps: int = 5000
    slices_follow: bool = True
    encoder_rate: float = 1.0
    label_epochs: int = 0
    list_epochs: int = 0
    questions: str = "location"
    max_bad: int = 0
    shard: bool = False
    max_skipped: int = 10
    best_by: str | None = None
    calibrate: int = 0


NO_AUGMENTATION = Augmentation(rotate=0, flip=0, scale=0, shift=0)

# The published settings of every stage, per process (HSENet and REAF used 8 and 1 processes in their examples).
STAGES = {
    ("clip1", "hsenet"): TrainConfig(
        lr=1e-4, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, warmup=0.03, epochs=50, batch_size=3
    ),
    ("clip2", "hsenet"): TrainConfig(
        lr=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.999),
        eps=1e-8,
        warmup=0.03,
        epochs=50,
        batch_size=3,
        relation=0.1,
    ),
    ("mrg", "hsenet"): TrainConfig(
        lr=1e-4,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        warmup=0.03,
        epochs=6,
        batch_size=2,
        save_every=2000,
    ),
    ("vqa", "hsenet"): TrainConfig(
        lr=5e-5,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        warmup=0.03,
        epochs=4,
        batch_size=5,
        save_every=2000,
        validate_samples=1024,
    ),
    # REAF's script says warmup 313, which its code reads as epochs, so that the published run of 2 epochs never
    # leaves the warm-up; its README's example (2 of 50 epochs) is taken instead.
    ("clip1", "reaf"): TrainConfig(
        lr=5e-4,
        weight_decay=0.2,
        betas=(0.9, 0.98),
        eps=1e-6,
        warmup=0.04,
        epochs=50,
        batch_size=16,
        no_decay="reaf",
        clip_norm=None,
        precision="fp16",
        grad_checkpoint=True,
        seed=0,
        augment=NO_AUGMENTATION,
        first_step=1,
        text_blocks=0,
    ),
}

# REAF's authors train no decoder: HSENet's settings.
STAGES |= {(stage, "reaf"): STAGES[stage, "hsenet"] for stage in ("mrg", "vqa")}

# What belongs to one stage only. Text lengths are tokens, the 256 visual tokens of report generation and question
# answering included. REAF's LoRA, off in its recipe, is LoraConfig.
DECODER_LORA = {"r": 16, "alpha": 32, "dropout": 0.05, "targets": "every linear layer of the decoder but lm_head"}
PUBLISHED_VISUAL_TOKENS = 256
TEXT_LENGTH = {"clip1": 512, "clip2": 512, "mrg": 800, "vqa": 330}
GENERATION = {
    "mrg": {"new_tokens": 512, "sample": False, "prompt": "Can you summarize with findings the images presented?"},
    "vqa": {"new_tokens": 74, "sample": False, "prompt": "a location template with the name of the abnormality"},
}

# What the tiny presets change, so that a stage ends within minutes on two cores. No augmentation: flips contradict the
# sides that phantom reports name, and a shift of all voxels is larger than most findings in a mean over tokens.
TINY_STAGES = {
    ("clip1", "hsenet"): {
        "lr": 1e-3,
        "weight_decay": 0.3,
        "warmup": 0.1,
        "epochs": 14,
        "batch_size": 64,
        "precision": "fp32",
        "validate_every": 0.125,
        "augment": NO_AUGMENTATION,
        "calibrate": 256,
    },
    ("clip2", "hsenet"): {
        "lr": 1e-3,
        "weight_decay": 0.3,
        "warmup": 0.1,
        "epochs": 10,
        "batch_size": 64,
        "precision": "fp32",
        "validate_every": 0.125,
        "augment": NO_AUGMENTATION,
        "relation_steps": 150,
    },
    ("clip1", "reaf"): {
        "lr": 1e-3,
        "weight_decay": 0.3,
        "warmup": 0.1,
        "epochs": 14,
        "batch_size": 64,
        "clip_norm": 1.0,
        "precision": "fp32",
        "grad_checkpoint": False,
        "validate_every": 0.125,
        "text_blocks": None,
        "calibrate": 256,
    },
}
# A decoder from nothing, whose encoders are trained on: a few voxels to and fro keep them from learning the patients by
# heart, and contradict no report.
TINY_LANGUAGE = {
    "lr": 2e-3,
    "encoder_rate": 0.2,
    "weight_decay": 0.1,
    "betas": (0.9, 0.98),
    "warmup": 0.05,
    "batch_size": 16,
    "precision": "fp32",
    "validate_every": 0.25,
    "validate_samples": 160,
    "augment": replace(NO_AUGMENTATION, translate=2),
    "calibrate": 256,
}
for _model in ("hsenet", "reaf"):
    TINY_STAGES["mrg", _model] = {**TINY_LANGUAGE, "label_epochs": 20, "epochs": 9, "list_epochs": 2}
    TINY_STAGES["vqa", _model] = {**TINY_LANGUAGE, "epochs": 9, "list_epochs": 5, "validate_samples": 400}
# Phantoms for the tiny presets: coarse enough that the whole chest is in the crop.
TINY_RECIPES = {
    "hsenet": replace(RECIPES["hsenet"], size=PRESETS["hsenet-tiny"].vision.size),
    "reaf": replace(RECIPES["reaf"], size=PRESETS["reaf-tiny"].vision.size, spacing=(10.5, 5.5, 5.5)),
}


def stage_config(stage: str, model: str, preset: str) -> TrainConfig:
    """The recipe of a stage, with a tiny preset's changes."""
    if (stage, model) not in STAGES:
        known = ", ".join(sorted({s for s, m in STAGES if m == model}))
        raise InputError(f"--stage {stage}: {model} has the stages {known}")
    config = STAGES[stage, model]
    return replace(config, **TINY_STAGES.get((stage, model), {})) if preset.endswith("-tiny") else config


def to_dict(config) -> dict:
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, source: str = "config.json"):
    """Rebuild a dataclass from its JSON form (lists become tuples, nested dataclasses are rebuilt).

    Raises InputError, naming `source` and the setting, for what is absent, unknown or of another kind.
    """
    if not isinstance(values, dict):
        raise InputError(f"{source}: {cls.__name__} is {values!r:.60}; expected an object of settings")
    kinds, hints = {"text": TextConfig, "augment": Augmentation, "lora": LoraConfig}, typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{source}: {cls.__name__} has no setting {', '.join(unknown)[:200]}: written by another version?")
    made = {}
    for name, value in values.items():
        if isinstance(value, dict) and name == "vision":
            value = vision_config(value, source)
        elif isinstance(value, dict) and name in kinds:
            value = from_dict(kinds[name], value, source)
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
