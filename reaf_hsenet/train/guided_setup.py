"""What stage 2 adds to a run: its teacher, and the configuration of an encoder that slices guide."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from reaf_hsenet import distributed
from reaf_hsenet.config import ClipConfig, GuidedVisionConfig
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import Trained, is_published, load_source
from reaf_hsenet.tokenizer.tokenizer import WordPiece
from reaf_hsenet.train.phantom_data import phantom_folder
from reaf_hsenet.train.phantom_slices import add_phantom_slices


def find_teacher(args: argparse.Namespace, init_run: Trained | None) -> Trained:
    """The stage-1 run that stage 2 learns from: --teacher, or --init when it is one, or its teacher, or
    the default.
    """
    if args.teacher is None and init_run is not None and init_run.stage == "clip1":
        return init_run
    known, default = init_run.origin.get("teacher") if init_run else None, Path("runs/clip1-hsenet")
    if args.init and not (args.teacher or known or Run(default).exists):
        raise InputError(
            f"--init {args.init}: does not come with its stage-1 model as a run, which is the teacher of "
            "stage clip2; name a run or published file of stage 1 with --teacher, or convert a 2E3 "
            f"checkpoint that holds one (python -m reaf_hsenet.weights convert {args.init} RUN) and name RUN"
        )
    words = args.text_model or (init_run.origin.get("text_model") if init_run else None)
    had = init_run.origin.get("teacher_sha256") if known and not args.teacher else None
    return load_teacher(args.teacher or known or default, words, had)


def load_teacher(folder: str | Path, text_model: str | None = None, sha256: str | None = None) -> Trained:
    """A clip1 run, or a published stage-1 file or folder. text_model: where the vocabulary of the latter is,
    if not beside it.

    sha256: of the checkpoint to take, where a run has had one of these.
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


def resumed_teacher(args: argparse.Namespace, origin: dict, tokenizer: WordPiece) -> Trained:
    """The teacher that a run had, wherever it lies now."""
    had = origin.get("teacher_sha256")
    teacher = load_teacher(args.teacher or origin["teacher"], origin.get("text_model"), had)
    if teacher.sha256() != had:
        raise InputError(
            f"{teacher.folder}: none of its checkpoints is the teacher that the run had; name that one's "
            "folder with --teacher, or start another run with --out"
        )
    require_vocabulary(tokenizer, str(args.out or "the run"), teacher)
    return teacher


def require_vocabulary(tokenizer: WordPiece, source: str, teacher: Trained) -> None:
    """Raises InputError unless the student reads reports as the teacher does."""
    if tokenizer.vocab != teacher.tokenizer.vocab:
        raise InputError(
            f"{source}: has another vocabulary than the teacher, {teacher.folder}; name a stage clip1 run of "
            "the same one with --teacher, or train it first"
        )


def guided_config(args, config: ClipConfig, teacher: Trained, manifest: Manifest, ranks, say) -> ClipConfig:
    """The student's configuration: the teacher's, with slice guidance. Phantoms without slice features
    get some.
    """
    if args.preset and PRESETS[args.preset].vision.width != teacher.config.vision.width:
        raise InputError(
            f"--preset {args.preset}: has width {PRESETS[args.preset].vision.width}, the teacher "
            f"{teacher.folder} has {teacher.config.vision.width}; leave the flag out, or choose another "
            "--teacher"
        )
    for name in ("size", "patch"):
        if getattr(config.vision, name) != getattr(teacher.config.vision, name):
            raise InputError(
                f"--{name}: stage clip2 has its teacher's, {getattr(teacher.config.vision, name)}"
            )
    if args.no_guidance:
        return config
    if manifest.slices is None:
        if args.data or manifest.folder.resolve() != phantom_folder("hsenet", config.vision.size).resolve():
            manifest.require_slices(
                {}, str(teacher.folder)
            )  # raises: a data set of one's own has a real encoder's
        if ranks.main:
            add_phantom_slices(manifest.folder, teacher, ranks.device, say)
        distributed.barrier()
        manifest = load_manifest(manifest.folder)
    vision = GuidedVisionConfig(
        **vars(config.vision), slices=manifest.slices["slices"], slice_width=manifest.slices["width"]
    )
    return replace(config, vision=vision)


def keep_slice_encoder(manifest: Manifest, run: Path) -> None:
    """Copy the encoder of the phantoms' slices into the run, so that it can see a single scan wherever it
    is moved.
    """
    own = manifest.folder / "slice_encoder"
    if own.is_dir():
        try:
            shutil.copytree(own, run / own.name, dirs_exist_ok=True)
        except shutil.Error as error:
            raise OutputError(
                f"{run / own.name}: cannot be written ({error.args[0][0][-1]}); free space and start again"
            ) from error
