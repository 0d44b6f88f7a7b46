"""Published checkpoints -> run folders, which evaluate.py, infer.py and train.py --init read.

config.json is written last: what an interruption leaves is no run.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save

from reaf_hsenet import __version__
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, file_sha256
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.dual import PublishedDual
from reaf_hsenet.runs.language import PublishedLanguage
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.weights.reading import State

NOT_USED = "not_used.safetensors"  # what a published file has and no model here takes; `export` gives it back


@contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """A folder that is written whole or not at all. Raises InputError when there is something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; choose a new folder")
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def write_dual_run(published: PublishedDual, out: Path) -> Path:
    """RUN/config.json, vocab.txt, checkpoints/step-000000; the stage-1 model of a 2E3 checkpoint becomes
    RUN/stage1.
    """
    with new_folder(out):
        origin = {"published": _origin(published), "text_model": None, "init": None, "teacher": None}
        if published.teacher is not None:
            teacher = write_dual_run(published.teacher, out / "stage1")
            origin |= {"teacher": str(teacher.resolve()), "teacher_sha256": run_sha256(teacher)}
        values = {"model": to_dict(published.config), "origin": origin, "slices": published.slices}
        if published.not_used:
            with atomic_write(out / NOT_USED, "wb") as file:
                file.write(save(_apart(published.not_used), {"format": "pt"}))
        _write_run(out, published, f"{published.config.model}-base", values)
    return out


def write_language_run(published: PublishedLanguage, out: Path) -> Path:
    """The same of packers and adapters. Encoders that are no runs yet become RUN/encoder (and
    RUN/encoder/stage1).
    """
    with new_folder(out):
        runs = published.encoder_runs
        if not runs:
            write_dual_run(published.encoder, out / "encoder")
            runs = (out / "encoder/stage1", out / "encoder")
        values = {
            "model": to_dict(published.config),
            "origin": {
                "published": _origin(published),
                "init": str(runs[-1].resolve()),
                "encoders": [{"run": str(run.resolve()), "sha256": run_sha256(run)} for run in runs],
                "decoder": published.decoder,
            },
            "slices": published.slices,
            "features": None,
        }
        _write_run(out, published, "hsenet-base", values)
        load_tokenizer(out)  # a vocabulary that cannot be read again (ids with gaps) is said now
    return out


def run_sha256(run: Path) -> str:
    """Of its weights, by which other runs know it."""
    return file_sha256(Run(run).choose().folder / "model.safetensors")


def _origin(published: PublishedDual | PublishedLanguage) -> dict:
    source = published.source
    return {"family": source.family.key, "file": str(source.file.resolve()), "notes": list(published.notes)}


def _apart(state: State) -> State:
    """Copies: of a pickle, two tensors may be one, which safetensors does not write."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _write_run(out: Path, published: PublishedDual | PublishedLanguage, preset: str, values: dict) -> None:
    run = Run(out)
    run.save(0, _apart(published.state), {}, keep=1, best=True)
    published.tokenizer.save(out)
    known = {
        "version": __version__,
        "stage": published.stage,
        "preset": preset,
        "recipe": to_dict(published.recipe),
    }
    untrained = {
        "train": {},
        "data": None,
        "world": 1,
        "max_steps": 0,
        "total_steps": 0,
        "torch": torch.__version__,
    }
    run.write_config({**known, **values, **untrained})
