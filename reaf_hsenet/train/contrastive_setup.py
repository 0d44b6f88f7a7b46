"""A new run of stage clip1 or clip2, from a command line: model, data, recipe, vocabulary, initial weights.

Stage clip2 has a teacher besides, the run of stage 1 that it learns from, and an encoder that slices guide.
"""

from dataclasses import replace
from pathlib import Path

import torch

from reaf_hsenet import distributed
from reaf_hsenet.config import (
    CONTRASTIVE,
    ClipConfig,
    GuidedVisionConfig,
    LoraConfig,
    ReafVisionConfig,
    TrainConfig,
)
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.published import TEXT_FILES
from reaf_hsenet.runs.trained import Trained, is_published, load_source, load_trained
from reaf_hsenet.settings import changed, flag_values, flags
from reaf_hsenet.tokenizer.loading import has_wordpiece, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import WordPiece, train_wordpiece
from reaf_hsenet.train.command import Command
from reaf_hsenet.train.phantom_data import PHANTOM, add_phantom_slices, phantom_folder, phantom_manifest
from reaf_hsenet.train.setup import Setup, data_of, fitting_batch, located, recipe_settings
from reaf_hsenet.weights.files import SUFFIXES, read_checkpoint, read_weights
from reaf_hsenet.weights.names import BERT, import_state
from reaf_hsenet.weights.shapes import bert_config, initial_state


def new_setup(command: Command, ranks: Ranks, say) -> Setup:
    """Build the setup of a new run. Raises InputError, naming the flag, for what does not go together."""
    # Which runs it starts and learns from, and by them the model.
    if command.stage == "clip2" and command.model != "hsenet":
        raise InputError(f"--stage clip2: is a stage of hsenet, not of {command.model}")
    # A student needs its teacher's sizes and words, so these come before the preset.
    init = starting_run(command)
    teacher = find_teacher(command, init) if command.stage == "clip2" else None
    preset = find_preset(command, teacher)
    config = model_config(command, preset, teacher)

    # Data, in the recipe of all that came before.
    if teacher is not None:
        for note in teacher.origin.get("notes", ()):
            say(note)
        manifest = load_manifest(data_of(command, teacher))
        # 2E3: slice features and their width become part of the model's settings.
        if command.guidance:
            manifest = sliced(manifest, config, teacher, command=command, ranks=ranks, say=say)
            slices = {"slices": manifest.slices["slices"], "slice_width": manifest.slices["width"]}
            config = replace(config, vision=GuidedVisionConfig(**vars(config.vision), **slices))
            if init is not None and init.guided:
                manifest.require_slices(init.slices, f"--init {command.init}")
    elif command.data is None:
        say(
            f"no --data: phantom CTs of {PHANTOM} and preset {preset}; real data: preprocess.py, then --data "
            "FOLDER"
        )
        manifest = phantom_manifest(ranks, command.model, config.vision.size)
    else:
        manifest = load_manifest(command.data)
    manifest.require(
        replace(manifest.recipe, name=command.model, size=config.vision.size), f"preset {preset}"
    )
    # Weights read volumes as they were prepared for them: another window or spacing would be other inputs.
    for run in (teacher, init):
        if run is not None:
            manifest.require(run.recipe, str(run.folder))

    # Recipe and vocabulary.
    words = init or teacher  # a run whose vocabulary is taken
    settings = train_settings(command, preset, manifest, has_words=bool(words), ranks=ranks, say=say)
    # From here on weights may be drawn: a run is a function of its seed.
    torch.manual_seed(settings.seed)
    tokenizer, config, text_weights = text_side(
        command, config, manifest, words=words, preset=preset, say=say
    )
    if teacher is not None:
        named = f"--text-model {command.text_model}" if command.text_model else f"--init {command.init}"
        require_vocabulary(tokenizer, named, teacher)

    setup = Setup(
        preset=preset,
        manifest=manifest,
        model=config,
        train=settings,
        tokenizer=tokenizer,
        max_steps=command.max_steps,
        teacher=teacher,
        text_weights=text_weights,
        origin={
            "text_model": located(command.text_model) or (words.origin.get("text_model") if words else None),
            "init": located(command.init),
            "teacher": None,
        },
    )
    take_weights(setup, command, init)
    return setup


def starting_run(command: Command) -> Trained | None:
    """Return the run that --init names, or its published folder, if that has the vocabulary to use."""
    if not command.init or not Run(command.init).exists:
        return None
    if is_published(command.init) and (command.text_model or not has_wordpiece(Path(command.init))):
        return None
    # A published folder with a vocabulary, or a run of ours: both have words of their own.
    run = load_trained(command.init, stages=CONTRASTIVE)
    if run.config.model != command.model:
        raise InputError(
            f"--init {command.init}: is a run of {run.config.model}; it cannot start --model {command.model}"
        )
    return run


def find_teacher(command: Command, init: Trained | None) -> Trained:
    """Return the stage-1 run to learn from: --teacher, or --init when it is one, or its teacher, or the
    usual.
    """
    if command.teacher is None and init is not None and init.stage == "clip1":
        return init
    # In this order: the flag, the teacher that --init learned from, the usual run.
    known, default = init.origin.get("teacher") if init else None, Path("runs/clip1-hsenet")
    if command.init and not (command.teacher or known or Run(default).exists):
        raise InputError(
            f"--init {command.init}: does not come with its stage-1 model as a run, which is the teacher of "
            "stage clip2; name a run or published file of stage 1 with --teacher, or convert a 2E3 "
            f"checkpoint that holds one (python -m reaf_hsenet.weights convert {command.init} RUN) and name "
            "RUN"
        )
    words = command.text_model or (init.origin.get("text_model") if init else None)
    had = init.origin.get("teacher_sha256") if known and not command.teacher else None
    return load_teacher(command.teacher or known or default, words, had)


def load_teacher(folder: str | Path, text_model: str | None = None, sha256: str | None = None) -> Trained:
    """Load a clip1 run, or a published stage-1 file or folder.

    text_model: where the latter's vocabulary is, if not beside it. sha256: hash of the checkpoint to take.
    """
    if not (is_published(Path(folder)) or Run(folder).exists):
        raise InputError(
            f"{folder}: no run of stage clip1, the teacher; train it first, or name one with --teacher"
        )
    teacher = load_source(folder, text_model, sha256)
    if (teacher.stage, teacher.config.model) != ("clip1", "hsenet"):
        raise InputError(
            f"{folder}: is a {teacher.stage} run of {teacher.config.model}; the teacher is hsenet's clip1"
        )
    return teacher


def resumed_teacher(command: Command, setup: Setup) -> Trained:
    """Load the teacher that a run had, wherever it lies now, and note the place."""
    origin = setup.origin
    had = origin.get("teacher_sha256")
    teacher = load_teacher(command.teacher or origin["teacher"], origin.get("text_model"), had)
    # By hash, not by name: a run that was trained on has other weights at the same path.
    if teacher.sha256() != had:
        raise InputError(
            f"{teacher.folder}: none of its checkpoints is the teacher that the run had; name that one's "
            "folder with --teacher, or start another run with --out"
        )
    require_vocabulary(setup.tokenizer, str(command.out or "the run"), teacher)
    origin["teacher"] = located(teacher.folder)
    return teacher


def require_vocabulary(tokenizer: WordPiece, source: str, teacher: Trained) -> None:
    """Raise InputError unless the student reads reports as the teacher does."""
    # Both encode the same ids of a batch.
    if tokenizer.vocab != teacher.tokenizer.vocab:
        raise InputError(
            f"{source}: has another vocabulary than the teacher, {teacher.folder}; name a stage clip1 run of "
            "the same one with --teacher, or train it first"
        )


def find_preset(command: Command, teacher: Trained | None) -> str:
    """Return --preset, the teacher's, or the usual one: tiny on phantoms, base on data."""
    # Small networks for phantoms, the published sizes for real data.
    usual = teacher.preset if teacher else f"{command.model}-{'base' if command.data else 'tiny'}"
    preset = command.preset or usual
    if preset not in PRESETS or PRESETS[preset].model != command.model:
        known = ", ".join(name for name, c in PRESETS.items() if c.model == command.model) or "none yet"
        raise InputError(f"--preset {preset}: {command.model} has {known}")
    if command.preset and teacher and PRESETS[preset].vision.width != teacher.config.vision.width:
        raise InputError(
            f"--preset {preset}: has width {PRESETS[preset].vision.width}, the teacher {teacher.folder} has "
            f"{teacher.config.vision.width}; leave the flag out, or choose another --teacher"
        )
    return preset


def model_config(command: Command, preset: str, teacher: Trained | None) -> ClipConfig:
    """Return the preset, or the teacher's configuration, with the command line's changes."""
    # A teacher's adapters are merged into what the student starts from; its own are its command line's.
    config = replace(teacher.config, lora=None) if teacher else PRESETS[preset]
    given = command.given
    if "lora" in given:
        started = command.init or command.stage == "clip2"
        # Adapters change little: around random weights they would have nothing to start from.
        if "vision" in given["lora"] and not started:
            raise InputError("--lora vision: needs weights to adapt, --init; a new encoder is trained whole")
        if "text" in given["lora"] and not (started or command.text_model):
            raise InputError(
                "--lora text: needs weights to adapt, --text-model; a new encoder is trained whole"
            )
        if "text" in given["lora"] and given.get("unfreeze_text", 0) != 0:
            raise InputError(
                "--unfreeze-text: with --lora text its blocks are trained by adapters; leave one out"
            )
        config = replace(config, lora=LoraConfig(given["lora"]))
    known = flag_values(config)
    for name in given:
        if name.startswith("lora_") and not config.lora:
            raise InputError(f"--{name.replace('_', '-')}: needs --lora vision, text or both")
        if name in flags(ReafVisionConfig) and name not in known:
            raise InputError(
                f"--{name.replace('_', '-')}: is an option of --model reaf, not of {command.model}"
            )
    config = changed(config, given)
    for name in ("size", "patch"):
        if teacher and getattr(config.vision, name) != getattr(teacher.config.vision, name):
            raise InputError(
                f"--{name}: stage clip2 has its teacher's, {getattr(teacher.config.vision, name)}"
            )
    return config


def sliced(
    manifest: Manifest, config: ClipConfig, teacher: Trained, command: Command, ranks: Ranks, say
) -> Manifest:
    """Return the manifest with slice features. Phantoms without them get some; other data must have them."""
    if manifest.slices is None:
        # Only the phantoms that this program made may get features of an untrained encoder.
        phantoms = phantom_folder("hsenet", config.vision.size).resolve()
        if command.data or manifest.folder.resolve() != phantoms:
            # Raises: a data set of one's own has a real encoder's features.
            manifest.require_slices({}, str(teacher.folder))
        if ranks.main:
            add_phantom_slices(manifest.folder, ranks.device, say)
        distributed.barrier()
        manifest = load_manifest(manifest.location)
    return manifest


def train_settings(
    command: Command, preset: str, manifest: Manifest, has_words: bool, ranks: Ranks, say
) -> TrainConfig:
    """Return the recipe for batches of this data. has_words: the text encoder has been trained."""
    config = recipe_settings(command, preset, ranks)
    rows, world = len(manifest.entries("train")), ranks.world
    # A batch of one pair has no negative: its loss is 0 whatever the weights are.
    if rows < max(2, world):
        raise InputError(
            f"{manifest.name}: {rows} training volumes for {world} processes; a contrastive batch needs at "
            "least 2, and each process 1"
        )
    if config.batch_size * world < 2:
        raise InputError("--batch-size 1 with one process: a contrastive batch needs 2 volumes or more")
    if "batch_size" in command.given and config.batch_size * world > rows:
        raise InputError(
            f"--batch-size {config.batch_size}: with {world} processes a batch needs "
            f"{config.batch_size * world} volumes, there are {rows}"
        )
    config = fitting_batch(config, rows, "volumes", ranks, say)
    # REAF freezes a pretrained text encoder. A new one that were frozen would stay noise.
    frozen = config.text_blocks is not None and "unfreeze_text" not in command.given
    if frozen and not (command.text_model or has_words):
        say("no --text-model: the text encoder starts from nothing and is trained whole, not frozen")
        config = replace(config, text_blocks=None)
    return config


def text_side(
    command: Command, config: ClipConfig, manifest: Manifest, words: Trained | None, preset: str, say
) -> tuple[WordPiece, ClipConfig, dict | None]:
    """Return tokenizer, configuration with a text encoder, and the weights of it that --text-model has."""
    if command.text_model:
        folder = find_folder(command.text_model, [*TEXT_FILES, "*.safetensors", "pytorch_model.bin"])
        tokenizer = load_wordpiece(folder)
        # Beside a start with a text encoder of its own a vocabulary alone is enough.
        # A folder without weights then gives its words alone.
        bare = (words or command.init) and not any(path.suffix in SUFFIXES for path in folder.iterdir())
        text = words.config.text if bare and words else bert_config(folder)
        if len(tokenizer.vocab) > text.vocab:
            raise InputError(
                f"--text-model {command.text_model}: vocab.txt has {len(tokenizer.vocab)} tokens, its "
                f"encoder {text.vocab}; fetch both again"
            )
        config = replace(config, text=text, max_text=min(config.max_text, text.positions))
        return tokenizer, config, None if bare else import_state(BERT, read_weights(folder))
    if words is not None:
        return words.tokenizer, replace(config, text=words.config.text, max_text=words.config.max_text), None
    # No published vocabulary: one is trained on the training reports, never on those of the validation split.
    reports = sorted({entry["text"] for entry in manifest.entries("train")})
    tokenizer = train_wordpiece([clean_report(r) for r in reports], config.text.vocab)
    if preset.endswith("-base"):
        say(
            "no --text-model: the text encoder starts from nothing; the published one starts from a BERT, "
            "for example --text-model google-bert/bert-base-uncased"
        )
    return tokenizer, replace(config, text=replace(config.text, vocab=len(tokenizer.vocab))), None


def take_weights(setup: Setup, command: Command, init: Trained | None) -> None:
    """Read the weights of --init, or else of the teacher, into the setup, with a note of what is left out."""
    start, origin, teacher = init, setup.origin, setup.teacher
    # As without --init: the student of stage 2 starts as its teacher.
    if init is None and not command.init:
        start = teacher
    if start is not None:
        origin["init"] = located(start.folder)
        # Adapters are added into the weights that they adapt: the student has none of its own yet.
        state = initial_state(merged_state(start.model), origin["init"], command.model, None, None)
        same_words = setup.tokenizer.vocab == start.tokenizer.vocab
        if command.text_model and not command.init:  # it starts the text encoder in the teacher's place
            state = without_text(state)
    elif command.init:
        vision, published = setup.model.vision, read_checkpoint(command.init)
        state = initial_state(published, command.init, command.model, vision.patch, vision.grid)
        # Published text encoders know the words of a published vocabulary only.
        same_words = bool(origin["text_model"])
        setup.init_note = resampled(published, vision.grid)
        inner = [name for name in published if "stage1_pretrained_CLIP." in name]
        setup.init_note += f"; not used: stage1_pretrained_CLIP.* ({len(inner)})" if inner else ""
    else:
        return
    # An embedding table of other words would give each token the vector of some other one.
    if not same_words:
        text = [name for name in state if name.startswith("text")]
        state = without_text(state)
        setup.init_note += f"; not used, of another vocabulary: text* ({len(text)})" if text else ""
    if teacher is not None:
        origin |= {"teacher": located(teacher.folder), "teacher_sha256": teacher.sha256()}
        # A vision-only start has no text encoder: the student takes its teacher's.
        if setup.text_weights is None and not any(name.startswith("text") for name in state):
            own = merged_state(teacher.model)
            state |= {name: tensor for name, tensor in own.items() if name.startswith("text")}
            setup.init_note += f"; text encoder: of the teacher, {teacher.folder}"
    setup.init_state = state


def resampled(published: dict, grid: tuple[int, int, int]) -> str:
    """Return the note on a position table that becomes one of another grid."""
    # A position table has a grid; for another input size it is interpolated, which a user should know.
    tables = [t.shape for n, t in published.items() if n.endswith("spatial_posemb")]
    if not tables or tuple(tables[0][1:4]) == tuple(grid):
        return ""
    return f"; its position table is resampled from the grid {tuple(tables[0][1:4])} to {tuple(grid)}"


def without_text(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("text")}
