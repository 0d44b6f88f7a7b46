"""What a training run is made of: model, data, recipe and tokenizer, from a command line or from a run's config.json."""

import argparse
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from reaf_hsenet import __version__, distributed
from reaf_hsenet.checkpoint import Run
from reaf_hsenet.config import (
    NO_AUGMENTATION,
    PRESETS,
    TINY_RECIPES,
    ClipConfig,
    GuidedVisionConfig,
    LoraConfig,
    Recipe,
    TrainConfig,
    from_dict,
    stage_config,
    to_dict,
)
from reaf_hsenet.data.datasets import read_ct_rate
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.phantom.dataset import write_phantom_dataset
from reaf_hsenet.data.prepare import Options, prepare
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.embedding import DualEncoderRun, load_dual_encoder
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.phantom_slices import add_phantom_slices
from reaf_hsenet.pretrained import (
    bert_config,
    bert_state,
    find_folder,
    initial_state,
    read_checkpoint,
    read_weights,
)
from reaf_hsenet.tokenizer import WordPiece, load_wordpiece, train_wordpiece

VISION_FLAGS = (
    "size",
    "patch",
    "scan_layers",
    "fusion",
    "fusion_seed",
    "regions",
    "region_size",
    "suppression",
    "class_score",
    "remainder",
    "slice_class",
    "drop_path",
)
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
    "teacher",
    "relation",
    "relation_steps",
    "no_guidance",
    "slices_stay",
    "seed",
    "max_steps",
)
PHANTOM = Path("data/phantom")
PHANTOM_TRAIN, PHANTOM_VALID, PHANTOM_SEED = 2000, 160, 0


@dataclass
class Setup:
    """All that a run is made of, whether new or resumed."""

    preset: str
    manifest: Manifest
    model_config: ClipConfig
    settings: TrainConfig
    tokenizer: WordPiece
    max_steps: int | None = None
    text_weights: dict | None = None
    origin: dict | None = None  # what the weights started from
    teacher: DualEncoderRun | None = None
    init_state: dict | None = None

    @property
    def guided(self) -> bool:
        return isinstance(self.model_config.vision, GuidedVisionConfig)

    def to_json(self, args: argparse.Namespace, ranks: Ranks, total: int) -> dict:
        return {
            "version": __version__,
            "stage": args.stage,
            "preset": self.preset,
            "model": to_dict(self.model_config),
            "recipe": to_dict(self.manifest.recipe),
            "origin": self.origin,
            "slices": self.manifest.slices if self.guided else None,
            "train": to_dict(self.settings),
            "world": ranks.world,
            "max_steps": args.max_steps or self.max_steps,
            "total_steps": total,
            "data": str(self.manifest.location.absolute()),
            "torch": torch.__version__,
        }


def new_setup(args: argparse.Namespace, ranks: Ranks, say) -> Setup:
    init_run = load_dual_encoder(Path(args.init)) if args.init and Run(args.init).exists else None
    teacher = find_teacher(args, init_run) if args.stage == "clip2" else None
    preset = args.preset or (teacher.preset if teacher else f"{args.model}-{'base' if args.data else 'tiny'}")
    if preset not in PRESETS or PRESETS[preset].model != args.model:
        known = ", ".join(name for name, c in PRESETS.items() if c.model == args.model) or "none yet"
        raise InputError(f"--preset {preset}: {args.model} has {known}")
    config = model_config(args, teacher.config if teacher else PRESETS[preset])
    if teacher is not None:
        manifest = load_manifest(args.data or teacher.data)
        config = guided_config(args, config, teacher, manifest, ranks, say)
        manifest = load_manifest(manifest.location)  # with slice features that were missing
    elif args.data is None:
        say(
            f"no --data: phantom CTs of {PHANTOM} and preset {preset}; real data: preprocess.py, then --data FOLDER"
        )
        manifest = phantom_manifest(ranks, args.model, config.vision.size)
    else:
        manifest = load_manifest(args.data)
    manifest.require(replace(manifest.recipe, name=args.model, size=config.vision.size), f"preset {preset}")
    settings = train_settings(args, stage_config(args.stage, args.model, preset), ranks, manifest, say)
    words = init_run or teacher  # a run whose vocabulary is taken
    if settings.text_blocks is not None and args.unfreeze_text is None and not (args.text_model or words):
        say("no --text-model: the text encoder starts from nothing and is trained whole, not frozen")
        settings = replace(settings, text_blocks=None)
    torch.manual_seed(settings.seed)
    tokenizer, config, weights = text_side(args, config, manifest, words, teacher, preset, say)
    known_words = args.text_model or (words.origin.get("text_model") if words else None)
    origin = {"text_model": known_words, "init": args.init, "teacher": str(teacher.folder) if teacher else None}
    start, state = init_run or (teacher if not args.init else None), None
    if start is not None:
        origin["init"] = str(start.folder)
        state = initial_state(merged_state(start.model), origin["init"], args.model, None, None)
        if tokenizer.vocab != start.tokenizer.vocab:
            state = without_text(state)
    elif args.init:
        state = initial_state(
            read_checkpoint(args.init), args.init, args.model, config.vision.patch, config.vision.grid
        )
        # Published text encoders know the words of a published vocabulary only.
        state = state if known_words else without_text(state)
    return Setup(
        preset, manifest, config, settings, tokenizer, args.max_steps, weights, origin, teacher, init_state=state
    )


def text_side(
    args: argparse.Namespace,
    config: ClipConfig,
    manifest: Manifest,
    words: DualEncoderRun | None,
    teacher: DualEncoderRun | None,
    preset: str,
    say,
) -> tuple[WordPiece, ClipConfig, dict | None]:
    """Tokenizer, the configuration with its text encoder, and that encoder's weights where --text-model has them."""
    if args.text_model:
        patterns = ["config.json", "vocab.txt", "tokenizer_config.json", "*.safetensors", "pytorch_model.bin"]
        folder = find_folder(args.text_model, patterns)
        tokenizer, text = load_wordpiece(folder), bert_config(folder)
        if teacher is not None and tokenizer.vocab != teacher.tokenizer.vocab:
            raise InputError(
                f"--text-model {args.text_model}: has another vocabulary than the teacher, {teacher.folder}; train "
                "stage clip1 with it first, or leave the flag out"
            )
        config = replace(config, text=text, max_text=min(config.max_text, text.positions))
        return tokenizer, config, bert_state(read_weights(folder))
    if words is not None:
        return words.tokenizer, replace(config, text=words.config.text, max_text=words.config.max_text), None
    reports = sorted({entry["text"] for entry in manifest.entries("train")})
    tokenizer = train_wordpiece([clean_report(r) for r in reports], config.text.vocab)
    if preset.endswith("-base"):
        say(
            "no --text-model: the text encoder starts from nothing; the published one starts from a BERT, "
            "for example --text-model google-bert/bert-base-uncased"
        )
    return tokenizer, replace(config, text=replace(config.text, vocab=len(tokenizer.vocab))), None


def without_text(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("text")}


def find_teacher(args: argparse.Namespace, init_run: DualEncoderRun | None) -> DualEncoderRun:
    """The stage-1 run that stage 2 learns from: --teacher, or --init when it is one, or the default run."""
    if args.model != "hsenet":
        raise InputError(f"--stage clip2: is a stage of hsenet, not of {args.model}")
    if args.teacher is None and init_run is not None and init_run.stage == "clip1":
        return init_run
    folder = args.teacher or Path("runs/clip1-hsenet")
    if not Run(folder).exists:
        raise InputError(f"{folder}: no run of stage clip1, the teacher; train it first, or name one with --teacher")
    teacher = load_dual_encoder(folder)
    if (teacher.stage, teacher.config.model) != ("clip1", "hsenet"):
        raise InputError(f"{folder}: is a {teacher.stage} run of {teacher.config.model}; the teacher is hsenet's clip1")
    return teacher


def guided_config(args, config: ClipConfig, teacher: DualEncoderRun, manifest: Manifest, ranks, say) -> ClipConfig:
    """The student's configuration: the teacher's, with slice guidance. Phantoms without slice features get some."""
    if args.preset and PRESETS[args.preset].vision.width != teacher.config.vision.width:
        raise InputError(
            f"--preset {args.preset}: has width {PRESETS[args.preset].vision.width}, the teacher {teacher.folder} has "
            f"{teacher.config.vision.width}; leave the flag out, or choose another --teacher"
        )
    for name in ("size", "patch"):
        if getattr(config.vision, name) != getattr(teacher.config.vision, name):
            raise InputError(f"--{name}: stage clip2 has its teacher's, {getattr(teacher.config.vision, name)}")
    if args.no_guidance:
        return config
    if manifest.slices is None:
        if args.data is not None or manifest.folder.parent.name != PHANTOM.name:
            raise InputError(
                f"{manifest.name}: has no slice features; make them with preprocess.py --slices ENCODER --out "
                f"{manifest.folder}"
            )
        if ranks.main:
            add_phantom_slices(manifest.folder, teacher, ranks.device, say)
        distributed.barrier()
        manifest = load_manifest(manifest.folder)
    vision = GuidedVisionConfig(
        **vars(config.vision), slices=manifest.slices["slices"], slice_width=manifest.slices["width"]
    )
    return replace(config, vision=vision)


def model_config(args: argparse.Namespace, config: ClipConfig) -> ClipConfig:
    """The preset with the command line's changes."""
    known = {f.name for f in fields(config.vision)}
    vision = {name: getattr(args, name) for name in VISION_FLAGS if getattr(args, name) is not None}
    for name in vision:
        if name not in known:
            raise InputError(f"--{name.replace('_', '-')}: is an option of --model reaf, not of {config.model}")
    if vision.get("fusion") == "none":
        vision["fusion"] = None
    vision = {name: tuple(v) if isinstance(v, list) else v for name, v in vision.items()}
    config = replace(config, vision=replace(config.vision, **vision))
    if args.logit_scale:
        config = replace(config, logit_scale=args.logit_scale)
    settings = {
        name: value for name in ("r", "alpha", "dropout", "targets") if (value := getattr(args, f"lora_{name}")) is not None
    }
    if settings and not args.lora:
        raise InputError(f"--lora-{next(iter(settings))}: needs --lora vision, text or both")
    if args.lora:
        for tower, started in (("vision", args.init), ("text", args.text_model or args.init or args.stage == "clip2")):
            if tower in args.lora and not started:
                flag = "--init" if tower == "vision" else "--text-model"
                raise InputError(f"--lora {tower}: needs weights to adapt, {flag}; a new encoder is trained whole")
        if "text" in args.lora and args.unfreeze_text not in (None, 0):
            raise InputError("--unfreeze-text: with --lora text its blocks are trained by adapters; leave one out")
        settings["targets"] = tuple(settings.get("targets", LoraConfig.targets))
        config = replace(config, lora=LoraConfig(tuple(sorted(set(args.lora))), **settings))
    return config


def resumed_setup(args: argparse.Namespace, run: Run, ranks: Ranks) -> Setup:
    """Everything from the run's config.json; a flag that would change what is trained is refused."""
    values = run.read_config()
    config = from_dict(ClipConfig, values["model"])
    if (values["stage"], config.model) != (args.stage, args.model):
        raise InputError(
            f"{run.folder}: is a {values['stage']} run of {config.model}, not {args.stage} of {args.model}"
        )
    manifest = load_manifest(args.data or Path(values["data"]))
    manifest.require(from_dict(Recipe, values["recipe"]), str(run.folder))
    settings = from_dict(TrainConfig, values["train"])
    origin = values.get("origin") or {}
    fixed = {**vars(settings), **vars(config.vision), "logit_scale": config.logit_scale, "preset": values["preset"]}
    fixed |= {"max_steps": values["max_steps"], "unfreeze_text": settings.text_blocks, **origin}
    fixed["no_augment"] = settings.augment == NO_AUGMENTATION
    fixed |= {"slices_stay": not settings.slices_follow}
    fixed |= {"no_guidance": args.stage == "clip2" and not isinstance(config.vision, GuidedVisionConfig)}
    fixed |= {f"lora_{k}": v for k, v in vars(config.lora).items()} if config.lora else {}
    fixed["lora"] = config.lora and config.lora.towers
    for flag in FIXED_FLAGS:
        given = getattr(args, flag)
        if given is None or given is False:
            continue
        given = sorted(set(given)) if flag == "lora" else given
        given = tuple(given) if isinstance(given, list) else None if given in ("none", "all") else given
        if given != fixed.get(flag):
            raise InputError(
                f"--{flag.replace('_', '-')}: with --resume a run keeps its settings ({run.folder} has "
                f"{fixed.get(flag)}); leave the flag out, or start another run with --out"
            )
    whole = settings.batch_size * values["world"]
    if whole % ranks.world:
        raise InputError(
            f"{run.folder}: its global batch of {whole} cannot be shared by {ranks.world} processes"
        )
    kept = {
        k: v
        for k in (
            "epochs",
            "precision",
            "grad_checkpoint",
            "grad_cache",
            "validate_every",
            "validate_samples",
            "save_every",
            "keep",
        )
        if (v := getattr(args, k)) is not None
    }
    settings = replace(settings, batch_size=whole // ranks.world, **kept)
    tokenizer, steps = load_wordpiece(run.folder), values["max_steps"]
    if values.get("slices"):
        manifest.require_slices(values["slices"], str(run.folder))
    teacher = load_dual_encoder(Path(origin["teacher"])) if origin.get("teacher") else None
    return Setup(values["preset"], manifest, config, settings, tokenizer, steps, origin=origin, teacher=teacher)


def train_settings(
    args: argparse.Namespace, config: TrainConfig, ranks: Ranks, manifest: Manifest, say
) -> TrainConfig:
    names = {f.name for f in fields(TrainConfig)}
    changes = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.slices_stay:
        changes["slices_follow"] = False
    if args.no_augment:
        changes["augment"] = NO_AUGMENTATION
    if args.unfreeze_text is not None:
        changes["text_blocks"] = None if args.unfreeze_text == "all" else args.unfreeze_text
    if args.precision is None and ranks.device.type == "cpu":
        changes["precision"] = "fp32"
    config = replace(config, **changes)
    rows = len(manifest.entries("train"))
    if rows < max(2, ranks.world):
        raise InputError(
            f"{manifest.folder / 'manifest.json'}: {rows} training volumes for {ranks.world} processes; "
            "a contrastive batch needs at least 2, and each process 1"
        )
    if config.batch_size * ranks.world < 2:
        raise InputError("--batch-size 1 with one process: a contrastive batch needs 2 volumes or more")
    if config.batch_size * ranks.world > rows:
        if args.batch_size is not None:
            raise InputError(
                f"--batch-size {args.batch_size}: with {ranks.world} processes a batch needs "
                f"{config.batch_size * ranks.world} volumes, there are {rows}"
            )
        say(
            f"batch size {rows // ranks.world} in place of {config.batch_size}: there are {rows} training volumes"
        )
        config = replace(config, batch_size=rows // ranks.world)
    return config


def phantom_manifest(ranks: Ranks, model: str, size: tuple[int, int, int]) -> Manifest:
    """The built-in phantom data set in the method's recipe, made by the first rank when it is missing."""
    recipe, shape = TINY_RECIPES[model], "x".join(map(str, size))
    out = PHANTOM / (shape if model == "hsenet" else f"{model}-{shape}")
    if recipe.fit == "crop":  # another size shows the same part of the chest
        spacing = tuple(s * n / m for s, n, m in zip(recipe.spacing, recipe.size, size, strict=True))
        recipe = replace(recipe, spacing=spacing)
    if ranks.main and not (out / "manifest.json").is_file():
        cores = len(os.sched_getaffinity(0))
        write_phantom_dataset(
            PHANTOM / "raw", PHANTOM_TRAIN, PHANTOM_VALID, PHANTOM_SEED, workers=cores, progress=True
        )
        prepare(read_ct_rate(PHANTOM / "raw"), out, Options(replace(recipe, size=size)), workers=cores)
    distributed.barrier()
    return load_manifest(out)
