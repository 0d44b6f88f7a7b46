"""What a training run is made of: model, data, recipe and tokenizer, from a command line
(resumed_setup.py: from a run's).
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from reaf_hsenet.config import NO_AUGMENTATION, ClipConfig, GuidedVisionConfig, LoraConfig, TrainConfig
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.presets import PRESETS, stage_config
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.published import TEXT_FILES
from reaf_hsenet.runs.trained import DUAL, Trained, is_published, load_trained
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.loading import has_wordpiece, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import WordPiece, train_wordpiece
from reaf_hsenet.train.guided_setup import find_teacher, guided_config, require_vocabulary
from reaf_hsenet.train.phantom_data import PHANTOM, phantom_manifest
from reaf_hsenet.weights.files import SUFFIXES, read_checkpoint, read_weights
from reaf_hsenet.weights.names import BERT, import_state
from reaf_hsenet.weights.shapes import bert_config, initial_state

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
    teacher: Trained | None = None
    init_state: dict | None = None
    init_account: str = ""  # what of --init was left out of init_state

    @property
    def guided(self) -> bool:
        return isinstance(self.model_config.vision, GuidedVisionConfig)

    def values(self) -> dict:
        """What config.json says of the run, besides its stage, length and place."""
        return {
            "model": to_dict(self.model_config),
            "recipe": to_dict(self.manifest.recipe),
            "origin": self.origin,
            "slices": self.manifest.slices if self.guided else None,
            "train": to_dict(self.settings),
            "data": str(self.manifest.location.absolute()),
        }


def new_setup(args: argparse.Namespace, ranks: Ranks, say) -> Setup:
    if args.stage == "clip2" and args.model != "hsenet":
        raise InputError(f"--stage clip2: is a stage of hsenet, not of {args.model}")
    init_run = starting_run(args)
    if init_run is not None and init_run.config.model != args.model:
        raise InputError(
            f"--init {args.init}: is a run of {init_run.config.model}; it cannot start --model {args.model}"
        )
    teacher = find_teacher(args, init_run) if args.stage == "clip2" else None
    preset = args.preset or (teacher.preset if teacher else f"{args.model}-{'base' if args.data else 'tiny'}")
    if preset not in PRESETS or PRESETS[preset].model != args.model:
        known = ", ".join(name for name, c in PRESETS.items() if c.model == args.model) or "none yet"
        raise InputError(f"--preset {preset}: {args.model} has {known}")
    # A teacher's adapters are merged into what the student starts from; its own are its own command line's.
    config = model_config(args, replace(teacher.config, lora=None) if teacher else PRESETS[preset])
    if teacher is not None:
        for note in teacher.origin.get("notes", ()):
            say(note)
        manifest = load_manifest(data_of(args, teacher))
        config = guided_config(args, config, teacher, manifest, ranks, say)
        manifest = load_manifest(manifest.location)  # with slice features that were missing
        if init_run is not None and init_run.guided and not args.no_guidance:
            manifest.require_slices(init_run.slices, f"--init {args.init}")
    elif args.data is None:
        say(
            f"no --data: phantom CTs of {PHANTOM} and preset {preset}; real data: preprocess.py, then "
            f"--data FOLDER"
        )
        manifest = phantom_manifest(ranks, args.model, config.vision.size)
    else:
        manifest = load_manifest(args.data)
    manifest.require(replace(manifest.recipe, name=args.model, size=config.vision.size), f"preset {preset}")
    for start in (teacher, init_run):
        if start is not None:
            manifest.require(start.recipe, str(start.folder))
    settings = train_settings(args, stage_config(args.stage, args.model, preset), ranks, manifest, say)
    words = init_run or teacher  # a run whose vocabulary is taken
    if settings.text_blocks is not None and args.unfreeze_text is None and not (args.text_model or words):
        say("no --text-model: the text encoder starts from nothing and is trained whole, not frozen")
        settings = replace(settings, text_blocks=None)
    torch.manual_seed(settings.seed)
    tokenizer, config, weights = text_side(args, config, manifest, words, preset, say)
    if teacher is not None:
        source = f"--text-model {args.text_model}" if args.text_model else f"--init {args.init}"
        require_vocabulary(tokenizer, source, teacher)
    known_words = located(args.text_model) or (words.origin.get("text_model") if words else None)
    origin = {"text_model": known_words, "init": located(args.init), "teacher": None}
    start, state, account = init_run or (teacher if not args.init else None), None, ""
    if start is not None:
        origin["init"] = located(start.folder)
        state = initial_state(merged_state(start.model), origin["init"], args.model, None, None)
        same_words = tokenizer.vocab == start.tokenizer.vocab
        if args.text_model and not args.init:  # it starts the text encoder in the teacher's place
            state = without_text(state)
    elif args.init:
        published = read_checkpoint(args.init)
        state = initial_state(published, args.init, args.model, config.vision.patch, config.vision.grid)
        same_words = bool(
            known_words
        )  # published text encoders know the words of a published vocabulary only
        account += resampled(published, config.vision.grid)
        inner = [name for name in published if "stage1_pretrained_CLIP." in name]
        account += f"; not used: stage1_pretrained_CLIP.* ({len(inner)})" if inner else ""
    if state is not None and not same_words:
        text = [name for name in state if name.startswith("text")]
        state = without_text(state)
        account += f"; not used, of another vocabulary: text* ({len(text)})" if text else ""
    if teacher is not None:
        origin |= {"teacher": located(teacher.folder), "teacher_sha256": teacher.sha256()}
        if weights is None and not any(name.startswith("text") for name in state):
            own = merged_state(teacher.model)
            state |= {name: tensor for name, tensor in own.items() if name.startswith("text")}
            account += f"; text encoder: of the teacher, {teacher.folder}"
    return Setup(
        preset,
        manifest,
        config,
        settings,
        tokenizer,
        args.max_steps,
        weights,
        origin,
        teacher,
        state,
        account,
    )


def data_of(args: argparse.Namespace, run: Trained) -> Path:
    """--data, or the data set that a run was trained on."""
    if args.data is None and run.data is None:
        raise InputError(f"--data: {run.folder} has no data set of its own; name a prepared one")
    return args.data or run.data


def starting_run(args: argparse.Namespace) -> Trained | None:
    """The run of --init; or its published folder that has a vocabulary, unless --text-model names another."""
    if not args.init or not Run(args.init).exists:
        return None
    if is_published(args.init) and (args.text_model or not has_wordpiece(Path(args.init))):
        return None
    return load_trained(args.init, stages=DUAL)


def resampled(published: dict, grid: tuple[int, int, int]) -> str:
    """What is said of a position table that became one of another grid."""
    tables = [t.shape for n, t in published.items() if n.endswith("spatial_posemb")]
    if not tables or tuple(tables[0][1:4]) == tuple(grid):
        return ""
    return f"; its position table is resampled from the grid {tuple(tables[0][1:4])} to {tuple(grid)}"


def located(name: str | Path | None) -> str | None:
    """The absolute path of what is a file or a folder, so that a run resumes from anywhere; a hub id as
    it is.
    """
    return str(Path(name).resolve()) if name and Path(name).exists() else name and str(name)


def text_side(
    args: argparse.Namespace,
    config: ClipConfig,
    manifest: Manifest,
    words: Trained | None,
    preset: str,
    say,
) -> tuple[WordPiece, ClipConfig, dict | None]:
    """Tokenizer, the configuration with its text encoder, and that encoder's weights where --text-model
    has them.
    """
    if args.text_model:
        folder = find_folder(args.text_model, [*TEXT_FILES, "*.safetensors", "pytorch_model.bin"])
        tokenizer = load_wordpiece(folder)
        # Beside a start with a text encoder of its own a vocabulary alone is enough.
        bare = (words or args.init) and not any(path.suffix in SUFFIXES for path in folder.iterdir())
        text = words.config.text if bare and words else bert_config(folder)
        if len(tokenizer.vocab) > text.vocab:
            raise InputError(
                f"--text-model {args.text_model}: vocab.txt has {len(tokenizer.vocab)} tokens, its encoder "
                f"{text.vocab}; fetch both again"
            )
        config = replace(config, text=text, max_text=min(config.max_text, text.positions))
        return tokenizer, config, None if bare else import_state(BERT, read_weights(folder))
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


def model_config(args: argparse.Namespace, config: ClipConfig) -> ClipConfig:
    """The preset with the command line's changes."""
    known = {f.name for f in fields(config.vision)}
    vision = {name: getattr(args, name) for name in VISION_FLAGS if getattr(args, name) is not None}
    for name in vision:
        if name not in known:
            raise InputError(
                f"--{name.replace('_', '-')}: is an option of --model reaf, not of {config.model}"
            )
    if vision.get("fusion") == "none":
        vision["fusion"] = None
    vision = {name: tuple(v) if isinstance(v, list) else v for name, v in vision.items()}
    config = replace(config, vision=replace(config.vision, **vision))
    if args.logit_scale:
        config = replace(config, logit_scale=args.logit_scale)
    settings = {
        name: value
        for name in ("r", "alpha", "dropout", "targets")
        if (value := getattr(args, f"lora_{name}")) is not None
    }
    if settings and not args.lora:
        raise InputError(f"--lora-{next(iter(settings))}: needs --lora vision, text or both")
    if args.lora:
        started_whole = args.init or args.stage == "clip2"
        for tower, started in (("vision", started_whole), ("text", args.text_model or started_whole)):
            if tower in args.lora and not started:
                needed = "--init" if tower == "vision" else "--text-model"
                raise InputError(
                    f"--lora {tower}: needs weights to adapt, {needed}; a new encoder is trained whole"
                )
        if "text" in args.lora and args.unfreeze_text not in (None, 0):
            raise InputError(
                "--unfreeze-text: with --lora text its blocks are trained by adapters; leave one out"
            )
        settings["targets"] = tuple(settings.get("targets", LoraConfig.targets))
        config = replace(config, lora=LoraConfig(tuple(sorted(set(args.lora))), **settings))
    return config


def changed_settings(args: argparse.Namespace, config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """A stage's recipe with the command line's changes."""
    names = {f.name for f in fields(TrainConfig)}
    changes = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.slices_stay:
        changes["slices_follow"] = False
    if args.no_augment:
        changes["augment"] = NO_AUGMENTATION
    if args.precision is None and ranks.device.type == "cpu":
        changes["precision"] = "fp32"
    return replace(config, **changes)


def train_settings(
    args: argparse.Namespace, config: TrainConfig, ranks: Ranks, manifest: Manifest, say
) -> TrainConfig:
    config = changed_settings(args, config, ranks)
    if args.unfreeze_text is not None:
        config = replace(config, text_blocks=None if args.unfreeze_text == "all" else args.unfreeze_text)
    rows = len(manifest.entries("train"))
    if rows < max(2, ranks.world):
        raise InputError(
            f"{manifest.name}: {rows} training volumes for {ranks.world} processes; a contrastive batch "
            "needs at least 2, and each process 1"
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
            f"batch size {rows // ranks.world} in place of {config.batch_size}: there are {rows} training "
            f"volumes"
        )
        config = replace(config, batch_size=rows // ranks.world)
    return config
