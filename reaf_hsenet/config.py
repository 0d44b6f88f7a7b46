"""What describes a network, its input and a stage of training: dataclasses, whose defaults are the published
values.

Symbols: D/H/W depth, height and width of a volume, C width, L layers. Spacings are mm in (D, H, W) order,
windows are HU. Sources: HSENet (commit c7198f3) and REAF (commit f9475f8), as their settings take effect.
"""

import math
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from reaf_hsenet.errors import InputError
from reaf_hsenet.settings import check_ranges, setting

# Largest size of any part of a network. A larger one is a mistake, which would end in too little memory.
LARGEST = 2**24
Size3 = tuple[int, int, int]
D_H_W = ("D", "H", "W")
CONTRASTIVE, LANGUAGE = ("clip1", "clip2"), ("mrg", "vqa")  # stages of training
GUIDED = ("clip2",)
KINDS = ("location", "abnormality", "presence", "size")  # of questions
MOST_VOXELS = 2**30  # of a volume, whether read or made


@dataclass(frozen=True)
class Recipe:
    """How a CT becomes a network's input.

    axes: directions that the array's (D, H, W) axes run to (L left, P posterior, S superior).
    spacing: mm in (D, H, W) that the CT is resampled to; None keeps the CT's own grid.
    clamp: `before` or `after` resampling the values are clamped to the window.
    fit: `foreground` crops to the box of voxels above the minimum and resizes, `resize` resizes the whole
        grid, `crop` pads with the lowest value and crops around the centre.
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
            raise InputError(
                f"axes of Recipe are {self.axes!r:.60}; expected the letters L, P and S in the order of D H W"
            )
        if not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise InputError(f"--window {self.window}: expected LOW HIGH in HU with LOW < HIGH")
        if not all(math.isfinite(x) for x in self.window):
            raise InputError(f"--window {self.window}: expected finite HU values")
        if len(self.size) != 3 or min(self.size) < 1:
            raise InputError(f"--size {self.size}: expected three positive numbers of voxels, D H W")
        if math.prod(self.size) > MOST_VOXELS:
            raise InputError(
                f"--size {self.size}: expected at most {MOST_VOXELS} voxels in all, 4 GB of float32"
            )
        if self.spacing is not None and (
            len(self.spacing) != 3 or not all(0 < x < math.inf for x in self.spacing)
        ):
            raise InputError(f"--spacing {self.spacing}: expected three positive distances in mm, D H W")
        if self.fit not in FITS:
            raise InputError(f"--fit {self.fit}: expected one of {', '.join(FITS)}")


FITS = ("foreground", "crop", "resize")


def _size(default, help: str = "", **flag):
    """Return the field of a size, or of several."""
    return setting(default, help, above=0, most=LARGEST, **flag)


def _encoder(default, help: str, **how):
    """Return the field of an encoder's setting that has a flag."""
    return setting(default, help, only=CONTRASTIVE, **how)


def _changeable(default, help: str, **how):
    """Return the field of a setting that a resumed run may change."""
    return setting(default, help, changeable=True, **how)


def _whole_heads(config) -> None:
    if config.width % config.heads:
        raise InputError(f"{config.heads} heads do not share a width of {config.width}")


VOXELS = {"metavar": D_H_W, "only": CONTRASTIVE}

# 0.449 and 0.226 are the averages over colours of ImageNet's means and standard deviations, in float32 as
# published.
RECIPES = {
    "hsenet": Recipe(
        name="hsenet",
        axes="SLP",
        spacing=(1.5, 0.75, 0.75),
        window=(-1000.0, 200.0),
        size=(32, 256, 256),
        clamp="before",
        scale="minmax",
        fit="foreground",
    ),
    "reaf": Recipe(
        name="reaf",
        axes="SPL",
        spacing=(3.0, 1.0, 1.0),
        window=(-1150.0, 350.0),
        size=(112, 336, 336),
        clamp="after",
        scale="window",
        fit="crop",
        mean=0.449,
        std=0.226,
    ),
}


@dataclass(frozen=True)
class VisionConfig:
    """3D patch ViT (HSENet stage 1; the vision encoder of M3D-CLIP)."""

    size: Size3 = _size((32, 256, 256), "input size, when not the preset's", **VOXELS)
    patch: Size3 = _size((4, 16, 16), "patch size, when not the preset's", **VOXELS)
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
    """REAF's slice/scan ViT. Its oddities are the defaults, each with a sound variant (models/reaf.py,
    saliency.py).

    fusion: one of FUSIONS; `last`, the last layer alone; None, HLIP's encoder, without fusion and saliency.
    regions: of region_size tokens that keep weight 1 in the saliency map; 0, no map of regions.
    """

    size: Size3 = _size((112, 336, 336), "input size, when not the preset's", **VOXELS)
    patch: Size3 = _size((8, 24, 24), "patch size, when not the preset's", **VOXELS)
    scan_layers: tuple[int, ...] = _encoder((2, 5, 8, 11), "blocks that see the whole scan", metavar="I")
    fusion: Literal[(*FUSIONS, "last")] | None = _encoder(
        "weighted_mean", "over layers; none: HLIP's encoder", none="none"
    )
    fusion_seed: int = _encoder(0, "seed of random_weighted_mean", least=0, most=2**31)
    regions: int = _encoder(3, "salient regions that are kept; 0: no regions", least=0, most=LARGEST)
    region_size: Size3 = _size((3, 3, 3), "patches", **VOXELS)
    suppression: float = _encoder(0.1, "factor outside the regions", least=0, most=1)
    class_score: Literal["first_patch", "class_token"] = _encoder(
        "first_patch", "token whose attention counts"
    )
    remainder: Literal["suppressed", "regions"] = _encoder("suppressed", "patches that fill no whole region")
    slice_class: Literal["first", "mean"] = _encoder("first", "class token of the slice branch")
    drop_path: float = _encoder(0.2, "rate of the last block, 0 at the first", least=0, most=0.99)

    def __post_init__(self):
        super().__post_init__()
        if self.regions and any(r > n for r, n in zip(self.region_size, self.grid, strict=True)):
            raise InputError(
                f"--region-size {self.region_size}: does not fit the grid of {self.grid} patches; choose a "
                "smaller one, or a larger --size or smaller --patch"
            )
        if self.width % 6:
            raise InputError(f"width {self.width}: three axes of sines and cosines need a multiple of 6")
        if not all(0 <= i < self.depth for i in self.scan_layers):
            raise InputError(f"scan_layers {self.scan_layers}: there are {self.depth} layers, counted from 0")


@dataclass(frozen=True)
class GuidedVisionConfig(VisionConfig):
    """HSENet's 2E3 encoder: slices features of slice_width a volume score its patches
    (models/slice_guidance.py).
    """

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
    """Low-rank adapters of a dual encoder (models/lora.py). towers: of `vision` and `text`, those that
    get them.
    """

    towers: tuple[Literal["vision", "text"], ...] = _encoder(
        MISSING, "towers of a dual encoder to train by adapters only", flag="lora"
    )
    r: int = _size(8, "rank (default: 8; the decoder's: 16)", flag="lora_r")
    alpha: float = setting(
        8, "scale, times 1 / rank (default: 8; the decoder's: 32)", flag="lora_alpha", above=0, most=1e30
    )
    dropout: float = setting(0.0, "default: 0; the decoder's: 0.05", flag="lora_dropout", least=0, most=0.99)
    targets: tuple[str, ...] = _encoder(
        ("query", "value"),
        "layers: query, key, value, proj, fc1, fc2 (default: query value)",
        flag="lora_targets",
    )

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class ClipConfig:
    """Dual encoder. logit_scale `raw` multiplies by the parameter itself, as HSENet publishes; `exp` is
    CLIP's.
    """

    model: Literal["hsenet", "reaf"] = "hsenet"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed: int = _size(768)
    projection_bias: bool = True
    logit_scale: Literal["raw", "exp"] = _encoder("raw", "raw: as HSENet publishes; exp: as CLIP")
    max_text: int = _size(512)
    lora: LoraConfig | None = None

    def __post_init__(self):
        check_ranges(self)

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return isinstance(self.vision, GuidedVisionConfig)


@dataclass(frozen=True)
class Augmentation:
    """Probabilities of HSENet's training augmentations, applied in this order; 0 switches one off."""

    GONE: ClassVar = ("translate",)

    rotate: float = setting(0.5, least=0, most=1)  # by 90, 180 or 270 degrees in the (H, W) plane
    flip: float = setting(0.1, least=0, most=1)  # each of D, H, W, independently
    scale: float = setting(0.5, least=0, most=1)  # v * (1 + f), f uniform in +-intensity
    shift: float = setting(0.5, least=0, most=1)  # v + o, o uniform in +-intensity
    intensity: float = setting(0.1, least=0, most=1)

    def __post_init__(self):
        check_ranges(self)


NO_AUGMENTATION = Augmentation(rotate=0, flip=0, scale=0, shift=0)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training stage. Those with a text are flags of train.py; of the others:

    betas, eps: of AdamW. no_decay: the published rule of each method (train/optimizer.py).
    first_step: step i of the warm-up, from 0, has the rate lr (i + first_step) / warm-up; 1 as REAF does.
    encoder_rate: factor on the learning rate, for encoders that a language stage trains on.
    findings_weight: of the cross-entropy of a findings head (--cues) beside the answers'.
    start: initial weights of what is not loaded: `published`, or `xavier` for the tiny presets.
    calibrate: training volumes that set the start of what is trained from scratch (calibration.py); 0: none.
    """

    GONE: ClassVar = ("label_epochs", "list_epochs")  # before there were cues

    lr: float = setting(MISSING, "learning rate", above=0, most=1e30)  # of float32
    weight_decay: float = setting(MISSING, "decoupled from the gradient (AdamW)", least=0, most=1e30)
    betas: tuple[float, float] = setting(least=0, most=0.999999)
    eps: float = setting(least=0, most=1)
    warmup: float = setting(MISSING, "share of all steps", least=0, most=1)
    epochs: int = _changeable(MISSING, "passes over the training split", above=0)
    batch_size: int = setting(MISSING, "volumes per process", above=0)
    no_decay: Literal["hsenet", "reaf"] = "hsenet"
    clip_norm: float | None = setting(1.0, "largest norm of the gradients", above=0)
    accumulate: int = setting(1, "batches per optimizer step", above=0)
    precision: Literal["fp32", "bf16", "fp16"] = _changeable("bf16", "of products (default: fp32 on a CPU)")
    grad_checkpoint: bool = _changeable(False, "less memory, a third more time")
    seed: int = setting(42, "of weights, order, augmentation and dropout", least=0, most=2**31)
    augment: Augmentation = setting(
        Augmentation(), "train on the volumes as they are", flag="no_augment", const=NO_AUGMENTATION
    )
    validate_every: float = _changeable(0.04, "share of all steps between validations", above=0, most=1e6)
    validate_samples: int = _changeable(
        512, "first N of the split that is validated on", metavar="N", above=0
    )
    save_every: int = _changeable(1000, "steps between checkpoints", above=0)
    keep: int = _changeable(2, "checkpoints to keep beside the best and the last good (default: 2)", above=0)
    first_step: Literal[0, 1] = 0
    text_blocks: int | None = setting(
        None,
        "last blocks of the text encoder to train (reaf: 0; LayerNorms always are)",
        flag="unfreeze_text",
        none="all",
        metavar="N|all",
        least=0,
        only=CONTRASTIVE,
    )
    grad_cache: int | None = _changeable(
        None,
        "the whole batch's gradients, CHUNK volumes at a time",
        metavar="CHUNK",
        above=0,
        only=CONTRASTIVE,
    )
    loss: Literal["softmax", "siglip"] = _encoder("softmax", "contrastive loss of a batch (default: softmax)")
    relation: float = setting(0.0, "weight of the relation loss at step 0", least=0, most=1000, only=GUIDED)
    relation_steps: int = setting(5000, "steps until that weight is 0", above=0, only=GUIDED)
    slices_follow: bool = setting(
        True,
        "slice features do not follow a flip, as published",
        flag="slices_stay",
        const=False,
        only=(*GUIDED, *LANGUAGE),
    )
    encoder_rate: float = setting(1.0, least=0, most=1e30)
    findings_weight: float = setting(1.0, least=0, most=1e30)
    questions: Literal[KINDS] = setting("location", "kind of questions (default: location)", only=("vqa",))
    templates: tuple[str, ...] | None = setting(
        None,
        "all questions' wordings: HSENet's prompt_templates.py, or json",
        word=Path,
        metavar="FILE",
        only=("vqa",),
    )
    frozen_dropout: bool = setting(False, "frozen encoders keep their dropout, as published", only=LANGUAGE)
    max_bad: int = _changeable(
        0,
        "volumes that may be left out, each by name, because they cannot be read (default: 0, the run stops)",
        metavar="N",
        least=0,
    )
    shard: bool = _changeable(
        False,
        "with --full: every GPU holds a part of the weights and the optimizer's states (FSDP)",
        only=LANGUAGE,
    )
    max_skipped: int = _changeable(
        10,
        "steps to skip as their loss or gradients are not finite, before the run stops (default: 10)",
        metavar="N",
        least=0,
    )
    best_by: str | None = setting(
        None,
        "number of the validation that chooses the best (default: mean R@5, or the loss)",
        metavar="NAME",
    )
    start: Literal["xavier", "published"] = "xavier"
    calibrate: int = setting(0, least=0)

    def __post_init__(self):
        check_ranges(self)


# The published settings of every stage, per process. HSENet's README has 8 processes for the contrastive
# stages, its files force one in clip1, mrg and vqa; REAF's example has one.
_HSENET = TrainConfig(
    lr=1e-4,
    weight_decay=0.1,
    betas=(0.9, 0.999),
    eps=1e-8,
    warmup=0.03,
    epochs=50,
    batch_size=3,
    start="published",
)
_LANGUAGE = replace(_HSENET, weight_decay=0.0, save_every=2000, start="xavier")
STAGES = {
    ("clip1", "hsenet"): _HSENET,
    ("clip2", "hsenet"): replace(_HSENET, relation=0.1),
    ("mrg", "hsenet"): replace(_LANGUAGE, epochs=6, batch_size=2),
    ("vqa", "hsenet"): replace(_LANGUAGE, lr=5e-5, epochs=4, batch_size=5, validate_samples=1024),
    # REAF's train.sh says warmup 313, which its code reads as epochs, so that the published run of 2 epochs
    # never leaves the warm-up. Its README's example (2 of 50 epochs) is taken instead; our README has
    # train.sh as a command.
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
        start="published",
    ),
}

# REAF's authors train no decoder: HSENet's settings.
STAGES |= {(stage, "reaf"): STAGES[stage, "hsenet"] for stage in ("mrg", "vqa")}

# What belongs to one stage only. Text lengths are tokens, the 256 visual tokens of report generation and
# question answering included. REAF's LoRA, off in its recipe, is LoraConfig. The decoder's adapters are in
# every linear layer but lm_head.
DECODER_LORA = {"r": 16, "alpha": 32, "dropout": 0.05}
PUBLISHED_VISUAL_TOKENS = 256
TEXT_LENGTH = {"clip1": 512, "clip2": 512, "mrg": 800, "vqa": 330}
# The likeliest token is taken. A question of vqa comes from a template (data/questions.py).
GENERATION = {
    "mrg": {"new_tokens": 512, "prompt": "Can you summarize with findings the images presented?"},
    "vqa": {"new_tokens": 74},
}
