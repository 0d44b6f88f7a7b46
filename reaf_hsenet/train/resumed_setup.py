"""A run that is continued: everything from its config.json, and what the command line may still change."""

import argparse
from dataclasses import replace
from pathlib import Path

from reaf_hsenet.config import NO_AUGMENTATION, ClipConfig, GuidedVisionConfig, Recipe, TrainConfig
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import load_wordpiece
from reaf_hsenet.train.guided_setup import resumed_teacher
from reaf_hsenet.train.run_setup import VISION_FLAGS, Setup, located
from reaf_hsenet.train.train_flags import flag, given

# What a run keeps for good: flags that may be repeated with --resume, not changed.
FIXED_FLAGS = (
    "preset",
    "text_model",
    "init",
    "logit_scale",
    "lora",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    *VISION_FLAGS,
    "batch_size",
    "accumulate",
    "lr",
    "weight_decay",
    "warmup",
    "clip_norm",
    "no_augment",
    "unfreeze_text",
    "relation",
    "relation_steps",
    "no_guidance",
    "slices_stay",
    "seed",
    "max_steps",
    "best_by",
)
# What may change from one start of a run to the next.
KEPT_FLAGS = (
    *(
        "epochs",
        "precision",
        "grad_checkpoint",
        "grad_cache",
        "validate_every",
        "validate_samples",
        "save_every",
        "keep",
        "max_bad",
        "shard",
    ),
    "max_skipped",
)


def resumable(run: Run) -> dict:
    """The config.json of a run that was trained here. Raises InputError when there is none."""
    if not run.exists:
        raise InputError(f"{run.folder}: holds no run to resume; name one with --out, or leave --resume out")
    values = run.read_config()
    if (values.get("origin") or {}).get("published"):
        raise InputError(
            f"{run.folder}: is converted, not trained, so there is nothing to resume; start from it with "
            f"--init"
        )
    if absent := [name for name in ("train", "world", "data") if values[name] is None]:
        raise InputError(
            f"{run.folder / 'config.json'}: has no {', '.join(absent)} as a run that was trained has; put "
            f"the run's own back"
        )
    return values


def resumed_setup(args: argparse.Namespace, run: Run, ranks: Ranks) -> Setup:
    """Everything from the run's config.json; a flag that would change what is trained is refused."""
    values = resumable(run)
    config = from_dict(ClipConfig, values["model"], str(run.config))
    if (values["stage"], config.model) != (args.stage, args.model):
        raise InputError(
            f"{run.folder}: is a {values['stage']} run of {config.model}, not {args.stage} of {args.model}"
        )
    manifest = load_manifest(args.data or Path(values["data"]))
    manifest.require(from_dict(Recipe, values["recipe"], str(run.config)), str(run.folder))
    settings = from_dict(TrainConfig, values["train"], str(run.config))
    origin = values.get("origin") or {}
    fixed = {
        **vars(settings),
        **vars(config.vision),
        "logit_scale": config.logit_scale,
        "preset": values["preset"],
    }
    fixed |= {"max_steps": values["max_steps"], "unfreeze_text": settings.text_blocks, **origin}
    fixed["no_augment"] = settings.augment == NO_AUGMENTATION
    fixed |= {"slices_stay": not settings.slices_follow}
    fixed |= {"no_guidance": args.stage == "clip2" and not isinstance(config.vision, GuidedVisionConfig)}
    fixed |= {f"lora_{k}": v for k, v in vars(config.lora).items()} if config.lora else {}
    fixed["lora"] = config.lora and config.lora.towers
    refuse_changes(args, FIXED_FLAGS, fixed, run)
    settings = resumed_settings(args, run, values, ranks)
    tokenizer, steps = load_wordpiece(run.folder), values["max_steps"]
    if values.get("slices"):
        manifest.require_slices(values["slices"], str(run.folder))
    teacher = resumed_teacher(args, origin, tokenizer) if origin.get("teacher") else None
    if teacher is not None:
        origin["teacher"] = located(teacher.folder)
    return Setup(
        values["preset"], manifest, config, settings, tokenizer, steps, origin=origin, teacher=teacher
    )


def refuse_changes(args: argparse.Namespace, names: tuple[str, ...], fixed: dict, run: Run) -> None:
    """Raises InputError for a flag whose value is not the one that the run was started with."""
    for name, value in given(args, names).items():
        if name == "lora":
            value = sorted(set(value))
        elif name in ("init", "text_model", "decoder", "teacher"):
            value = located(value)
        value = tuple(value) if isinstance(value, list) else None if value in ("none", "all") else value
        if value != fixed.get(name):
            raise InputError(
                f"{flag(name)}: with --resume a run keeps its settings ({run.folder} has "
                f"{fixed.get(name)!s:.200}); leave the flag out, or start another run with --out"
            )


def resumed_settings(args: argparse.Namespace, run: Run, values: dict, ranks: Ranks) -> TrainConfig:
    """The run's own, but for what changes nothing that is learned; its global batch is shared by these
    ranks.
    """
    settings = from_dict(TrainConfig, values["train"], str(run.config))
    whole = settings.batch_size * values["world"]
    if whole % ranks.world:
        raise InputError(
            f"{run.folder}: its global batch of {whole} cannot be shared by {ranks.world} processes"
        )
    if values["max_steps"] and args.epochs not in (None, settings.epochs):
        raise InputError(
            f"--epochs {args.epochs}: {run.folder} was started with --max-steps {values['max_steps']}, which "
            "is its length; leave the flag out, or start another run with --out"
        )
    kept = {name: value for name in KEPT_FLAGS if (value := getattr(args, name)) is not None}
    return replace(settings, batch_size=whole // ranks.world, **kept)
