"""How a stage trains: its settings, and the published ones of every stage.

Sources: HSENet (commit c7198f3) and REAF (commit f9475f8), as their settings take effect.
"""

from dataclasses import dataclass
from typing import Literal

from reaf_hsenet.settings import check_ranges, setting


@dataclass(frozen=True)
class Augmentation:
    """Probabilities of HSENet's training augmentations, applied in this order; 0 switches one off."""

    rotate: float = setting(0.5, least=0, most=1)  # by 90, 180 or 270 degrees in the (H, W) plane
    flip: float = setting(0.1, least=0, most=1)  # each of D, H, W, independently
    scale: float = setting(0.5, least=0, most=1)  # v * (1 + f), f uniform in +-intensity
    shift: float = setting(0.5, least=0, most=1)  # v + o, o uniform in +-intensity
    intensity: float = setting(0.1, least=0, most=1)
    translate: int = setting(0, least=0, most=1000)  # voxels at most, each axis, background moving in; not published, for the tiny presets

    def __post_init__(self):
        check_ranges(self)


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
    questions: kind of questions that stage vqa learns to answer; templates: their wordings, of --templates; None: ours.
    frozen_dropout: frozen encoders keep their dropout in a language stage; HSENet publishes that they do.
    shard: the ranks share the weights and the optimizer's states of a language stage (sharding.py).
    max_bad: volumes that may be left out because they cannot be read, before the run stops.
    max_skipped: steps that may be skipped because a loss or a gradient is not finite, before the run stops.
    best_by: the number of the validation that chooses the best checkpoint; None: mean R@5, or the loss.
    start: of weights that nothing is loaded into: `published`, or `xavier`, from which the tiny presets train, and all earlier runs.
    calibrate: training volumes that set the start of what is trained from nothing (calibration.py); 0: plain start.
    """

    lr: float = setting(above=0, most=1e30)  # of float32
    weight_decay: float = setting(least=0, most=1e30)
    betas: tuple[float, float] = setting(least=0, most=0.999999)
    eps: float = setting(least=0, most=1)
    warmup: float = setting(least=0, most=1)
    epochs: int = setting(above=0)
    batch_size: int = setting(above=0)  # per process
    no_decay: Literal["hsenet", "reaf"] = "hsenet"
    clip_norm: float | None = setting(1.0, above=0)
    accumulate: int = setting(1, above=0)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    grad_checkpoint: bool = False
    seed: int = setting(42, least=0, most=2**31)
    augment: Augmentation = Augmentation()
    validate_every: float = setting(0.04, above=0, most=1e6)  # share of all steps
    validate_samples: int = setting(512, above=0)
    save_every: int = setting(1000, above=0)
    keep: int = setting(2, above=0)
    first_step: Literal[0, 1] = 0
    text_blocks: int | None = setting(None, least=0)
    grad_cache: int | None = setting(None, above=0)
    relation: float = setting(0.0, least=0, most=1000)
    relation_steps: int = setting(5000, above=0)
    slices_follow: bool = True
    encoder_rate: float = setting(1.0, least=0, most=1e30)
    label_epochs: int = setting(0, least=0)
    list_epochs: int = setting(0, least=0)
    questions: str = "location"
    templates: tuple[str, ...] | None = None
    frozen_dropout: bool = False
    max_bad: int = setting(0, least=0)
    shard: bool = False
    max_skipped: int = setting(10, least=0)
    best_by: str | None = None
    start: Literal["xavier", "published"] = "xavier"
    calibrate: int = setting(0, least=0)

    def __post_init__(self):
        check_ranges(self)


NO_AUGMENTATION = Augmentation(rotate=0, flip=0, scale=0, shift=0)

# The published settings of every stage, per process. HSENet's README has 8 processes for the contrastive stages, its files
# force one in clip1, mrg and vqa; REAF's example has one.
STAGES = {
    ("clip1", "hsenet"): TrainConfig(
        lr=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.999),
        eps=1e-8,
        warmup=0.03,
        epochs=50,
        batch_size=3,
        start="published",
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
        start="published",
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
    # REAF's train.sh says warmup 313, which its code reads as epochs, so that the published run of 2 epochs never leaves
    # the warm-up. Its README's example (2 of 50 epochs) is taken instead; our README has train.sh as a command.
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

# What belongs to one stage only. Text lengths are tokens, the 256 visual tokens of report generation and question
# answering included. REAF's LoRA, off in its recipe, is LoraConfig.
DECODER_LORA = {"r": 16, "alpha": 32, "dropout": 0.05, "targets": "every linear layer of the decoder but lm_head"}
PUBLISHED_VISUAL_TOKENS = 256
TEXT_LENGTH = {"clip1": 512, "clip2": 512, "mrg": 800, "vqa": 330}
GENERATION = {
    "mrg": {"new_tokens": 512, "sample": False, "prompt": "Can you summarize with findings the images presented?"},
    "vqa": {"new_tokens": 74, "sample": False, "prompt": "a location template with the name of the abnormality"},
}
