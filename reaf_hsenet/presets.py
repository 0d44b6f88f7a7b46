"""Named sizes of dual encoders: `-base`, as published, and `-tiny`, which train within minutes."""

from dataclasses import replace

from reaf_hsenet.config import (
    NO_AUGMENTATION,
    RECIPES,
    STAGES,
    ClipConfig,
    ReafVisionConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from reaf_hsenet.errors import InputError

# Small enough for a laptop's processor. The text encoder trains on its own vocabulary, from the reports.
TINY_TEXT = TextConfig(
    vocab=1000, width=128, depth=1, heads=4, mlp=512, positions=320, dropout=0.0, attention_dropout=0.0
)
PRESETS = {
    "hsenet-base": ClipConfig(),
    "hsenet-tiny": ClipConfig(
        vision=VisionConfig(size=(16, 32, 32), patch=(4, 8, 8), width=128, depth=2, heads=4, mlp=512),
        text=TINY_TEXT,
        embed=128,
        logit_scale="exp",
        max_text=320,
    ),
    "reaf-base": ClipConfig(
        model="reaf", vision=ReafVisionConfig(), embed=512, projection_bias=False, logit_scale="exp"
    ),
    "reaf-tiny": ClipConfig(
        model="reaf",
        vision=ReafVisionConfig(
            size=(16, 32, 32),
            patch=(4, 8, 8),
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

# What the tiny presets change, so that a stage ends within minutes on two cores. No augmentation: flips
# contradict the sides that phantom reports name, and a shift of all voxels is larger than most findings in a
# mean over tokens.
_TINY = {
    "lr": 5e-4,
    "betas": (0.9, 0.98),
    "weight_decay": 0.3,
    "warmup": 0.1,
    "batch_size": 64,
    "precision": "fp32",
}
_TINY |= {"start": "xavier", "validate_every": 0.125, "augment": NO_AUGMENTATION}
_TINY_REAF = {"clip_norm": 1.0, "grad_checkpoint": False, "text_blocks": None}
TINY_STAGES = {
    ("clip1", "hsenet"): {**_TINY, "epochs": 8, "calibrate": 256},
    ("clip2", "hsenet"): {**_TINY, "epochs": 5, "relation_steps": 150},
    ("clip1", "reaf"): {**_TINY, **_TINY_REAF, "epochs": 10, "calibrate": 256},
}
# A decoder from scratch, whose encoders are trained on.
TINY_LANGUAGE = {
    "lr": 2e-3,
    "encoder_rate": 0.5,
    "weight_decay": 0.1,
    "betas": (0.9, 0.98),
    "warmup": 0.05,
    "batch_size": 16,
    "precision": "fp32",
    "validate_every": 0.1,
    "validate_samples": 160,
    "augment": NO_AUGMENTATION,
    "calibrate": 256,
}
for _model in ("hsenet", "reaf"):
    TINY_STAGES["mrg", _model] = {**TINY_LANGUAGE, "epochs": 4}
    TINY_STAGES["vqa", _model] = {**TINY_LANGUAGE, "epochs": 5, "validate_samples": 400}
# Phantoms for the tiny presets: coarse enough that the whole chest is in the crop.
TINY_RECIPES = {
    "hsenet": replace(RECIPES["hsenet"], size=PRESETS["hsenet-tiny"].vision.size),
    "reaf": replace(RECIPES["reaf"], size=PRESETS["reaf-tiny"].vision.size, spacing=(21.0, 11.0, 11.0)),
}


def stage_config(stage: str, model: str, preset: str) -> TrainConfig:
    """Return the recipe of a stage, with a tiny preset's changes."""
    if (stage, model) not in STAGES:
        known = ", ".join(sorted({s for s, m in STAGES if m == model}))
        raise InputError(f"--stage {stage}: {model} has the stages {known}")
    config = STAGES[stage, model]
    return replace(config, **TINY_STAGES.get((stage, model), {})) if preset.endswith("-tiny") else config
