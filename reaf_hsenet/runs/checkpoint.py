"""Run folders: what a run is made of, what it logged, and its checkpoints.

RUN/config.json, RUN/log.jsonl, RUN/checkpoints/step-000123/{model.safetensors,trainer.pt,checkpoint.json},
and the files RUN/checkpoints/{last,best}, each of which holds the name of a step's folder. checkpoint.json
has the size and the sha256 of the others. Every file and every step's folder is whole or absent, whenever the
process is killed.

A run's path means its last checkpoint; RUN/checkpoints/best and RUN/checkpoints/step-000123 mean these,
wherever weights are read.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from reaf_hsenet.errors import InputError, OutputError, first_six
from reaf_hsenet.files import atomic_write, file_sha256, folder_lock, read_json, read_object, write_json
from reaf_hsenet.pickles import load_pickle
from reaf_hsenet.settings import check_ranges, from_dict, setting
from reaf_hsenet.weights.files import read_weights_file

FILES = ("model.safetensors", "trainer.pt")  # of a step


@dataclass(frozen=True)
class EncoderOrigin:
    """A dual encoder that a language run sees through: its run, and the hash of that run's weights."""

    run: str
    sha256: str
    text_model: str | None = None


@dataclass(frozen=True)
class DecoderOrigin:
    """The published decoder below a language run, by what its files are, and the tokens that were added
    to its own.
    """

    name: str
    added: int = setting(0, least=0)
    sha256: dict[str, str] | None = None
    fingerprint: dict[str, str] | None = None

    def __post_init__(self):
        check_ranges(self)
        if self.sha256 is None and self.fingerprint is None:
            raise InputError("DecoderOrigin lacks fingerprint, by which the decoder's files are known")


@dataclass(frozen=True)
class LabelsOrigin:
    """Where the findings of --cues were read, and their hash."""

    source: str | None  # None: the data set's own labels
    sha256: str


@dataclass(frozen=True)
class Origin:
    """Names and hashes of the weights that a run started from."""

    text_model: str | None = None
    init: str | None = None
    teacher: str | None = None
    teacher_sha256: str | None = None
    published: dict | None = None
    encoders: tuple[EncoderOrigin, ...] | None = None
    decoder: DecoderOrigin | None = None
    labels: LabelsOrigin | None = None


@dataclass(frozen=True)
class RunSettings:
    """The outline of a run's config.json; `model`, `recipe` and `train` have dataclasses of their own."""

    stage: str
    model: dict
    recipe: dict
    data: str | None = None
    origin: Origin | None = None
    slices: dict | None = None
    best_of: Literal["validation", "development"] = "validation"  # the split that chose its best checkpoint
    preset: str = ""
    train: dict | None = None
    features: str | None = None
    world: int | None = setting(None, above=0)
    max_steps: int | None = setting(None, least=0)
    total_steps: int | None = setting(None, least=0)  # 0: converted, not trained

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class Choice:
    """A checkpoint's folder, the name it was asked for by, and for `best` the split that chose it."""

    folder: Path
    name: str | None = None  # None: published weights
    chosen_on: str | None = None

    @property
    def step(self) -> int | None:
        return None if self.name is None else _step(self.folder)

    def __str__(self) -> str:
        """`last, step 434`; `step 400` where a step was named; for published weights their path."""
        if self.name is None:
            return str(self.folder)
        return f"step {self.step}" if _is_step(self.name) else f"{self.name}, step {self.step}"

    def record(self) -> dict:
        """Return the entries by which results name the checkpoint."""
        return {
            "checkpoint": str(self.folder),
            "checkpoint_name": self.name,
            "checkpoint_step": self.step,
            "checkpoint_chosen_on": self.chosen_on,
        }


class Run:
    """One training run on disk. named: the checkpoint that the path named, such as RUN/checkpoints/best;
    else None.
    """

    def __init__(self, path: Path | str):
        self.folder, self.named = Path(path), None
        run = self.folder.parent.parent
        if (
            self.folder.parent.name == "checkpoints"
            and _is_name(self.folder.name)
            and (run / "config.json").is_file()
        ):
            self.folder, self.named = run, self.folder.name
        self.checkpoints = self.folder / "checkpoints"
        self.lines = 0  # of the log
        self.unwritten: list[str] = []  # those of them that a full disk has not taken yet
        self.held: int | None = None  # descriptor of the folder, while this process writes into it

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder for this process, and hold on to it: a write notices when another one has taken
        its name.
        """
        with folder_lock(self.folder):
            self.held = os.open(self.folder, os.O_RDONLY)
            try:
                yield
            finally:
                os.close(self.held)
                self.held = None

    def require_place(self) -> None:
        """Raises InputError when the folder was moved, removed or replaced since writing() began."""
        try:
            there = self.held is None or os.path.samestat(os.fstat(self.held), os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            there = False
        except OSError:
            return  # a file system that does not answer, which the write itself will say
        if not there:
            raise InputError(
                f"{self.folder}: was moved, removed or replaced while the run wrote into it; nothing more is "
                "written. Put it back and continue with --resume"
            )

    @property
    def config(self) -> Path:
        return self.folder / "config.json"

    @property
    def exists(self) -> bool:
        return self.config.is_file()

    def read_config(self) -> dict:
        """Return the config.json, with what it leaves out. Raises InputError when this is not a run."""
        if not self.exists:
            raise InputError(
                f"{self.folder}: holds no run (no config.json); train one with train.py, or name one "
                "with --run"
            )
        values = read_object(self.config)
        known = [field.name for field in fields(RunSettings)]
        outline = from_dict(
            RunSettings, {name: values[name] for name in known if name in values}, str(self.config)
        )
        return {**vars(outline), **values}

    def write_config(self, config: dict) -> None:
        self.require_place()
        write_json(self.config, config)

    def log(self, *records: dict) -> None:
        """Append to log.jsonl. Raises OutputError on a full disk: the records wait and are written with
        the next.
        """
        self.lines += len(records)
        self.unwritten += [json.dumps(record) + "\n" for record in records]
        if not self.unwritten:
            return
        self.require_place()
        path = self.folder / "log.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(self.unwritten)
        except OSError as error:
            with suppress(OSError):  # half a line
                os.truncate(path, size)
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
        self.unwritten.clear()

    def read_log(self) -> list[dict]:
        """Return the records, each with its step. Other lines are left out."""
        path, records = self.folder / "log.jsonl", []
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed while writing it
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
        return records

    def forget_after(self, step: int, lines: int | None = None) -> None:
        """Drop checkpoints of later steps, and what was logged since, before a run starts or resumes at
        `step`.

        lines: of the log, when the step's checkpoint was written. None, as earlier versions saved: by the
        records' steps.
        """
        # What a process that was killed had not finished.
        for path in (*self.folder.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in self.all():
            if _step(path) > step:
                _remove(path)
        records = [r for r in self.read_log()[:lines] if r["step"] <= step]
        self.lines = len(records)
        with atomic_write(self.folder / "log.jsonl") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)

    def pointer(self, name: str) -> Path | None:
        """Return the folder that `last` or `best` points to; None when there is none."""
        path = self.checkpoints / name
        if not path.is_file():
            return None
        step = path.read_text(errors="replace").strip()
        if not _is_step(step):
            raise InputError(
                f"{path}: holds {step!r:.60}; write the name of a step's folder into it, such as step-000100"
            )
        return self.checkpoints / step

    def point(self, name: str, step: int) -> None:
        """Let `last` or `best` point to a step's checkpoint; to none when it is not there."""
        if not self.at(step).is_dir():
            (self.checkpoints / name).unlink(missing_ok=True)
            return
        with atomic_write(self.checkpoints / name) as file:
            file.write(self.at(step).name + "\n")

    def at(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.checkpoints / f"step-{step:06d}"

    def all(self) -> list[Path]:
        """Return the steps' folders, in order. Others, such as a copy that somebody made, are left alone."""
        return sorted((path for path in self.checkpoints.glob("step-*") if _is_step(path.name)), key=_step)

    def save(self, step: int, model: dict, trainer: dict, keep: int, best: bool, good: int = 0) -> None:
        """Write a checkpoint under a temporary name, rename it, then move the pointers and delete older ones.

        The last `keep` are left, `best`, and that of step `good`.

        Raises OutputError when the disk is full: what was complete before is kept. Raises InputError when the
        folder is no longer there.
        """
        self.require_place()
        target = self.at(step)
        temporary = self.checkpoints / f".{target.name}.tmp"
        try:
            self.log()
            if not target.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                save_file({n: t.contiguous() for n, t in model.items()}, temporary / "model.safetensors")
                torch.save(trainer, temporary / "trainer.pt")
                files = {
                    p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in temporary.iterdir()
                }
                write_json(temporary / "checkpoint.json", {"step": step, "files": files})
                for path in (*self.folder.glob("log.jsonl"), *temporary.iterdir(), temporary):
                    _sync(path)
                os.replace(temporary, target)
                _sync(self.checkpoints)
            for name in ("last", "best") if best else ("last",):
                self.point(name, step)
        except (OSError, RuntimeError, SafetensorError, OutputError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self.require_place()
            # A full disk is a RuntimeError of torch's zip writer and a SafetensorError of the other.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            kept = "the checkpoints before it are kept" if self.all() else "there is none before it"
            raise OutputError(
                f"{target}: cannot be written ({' '.join(str(error).split())[:120]}): free space; {kept}"
            ) from error
        steps = self.all()
        for path in set(steps) - {self.pointer("last"), self.pointer("best"), self.at(good), *steps[-keep:]}:
            _remove(path)

    def choose(self, name: str | None = None) -> Choice:
        """Find the checkpoint `name` (last, best, step-000123), or the path's own; by default the last one,
        as published.

        `best` is the default only where config.json says that a development split chose it. Raises InputError
        when the checkpoint is not there.
        """
        if name and self.named and name != self.named:
            raise InputError(
                f"--checkpoint {name}: the path names another, {self.named}; leave one of them out"
            )
        chosen_on = self.read_config()["best_of"] if self.exists else "validation"
        if name == "":
            raise InputError("--checkpoint: is empty; expected last, best or a step such as step-000100")
        name = name or self.named or ("best" if chosen_on == "development" else "last")
        if not _is_name(name):
            raise InputError(f"--checkpoint {name}: expected last, best or a step such as step-000100")
        folder = self.checkpoints / name if _is_step(name) else self.pointer(name)
        if folder is None or not folder.is_dir():
            there = [path.name for path in self.all()]
            advice = (
                f"there are {first_six(there)}"
                if there
                else "let train.py reach its first, or choose another run"
            )
            raise InputError(f"{self.folder}: has no checkpoint{' ' + name if there else ' yet'}; {advice}")
        return Choice(folder, name, chosen_on if name == "best" else None)

    def holding(self, sha256: str) -> str | None:
        """Return the name of the checkpoint whose weights have this hash; None when there is none."""
        for path in reversed(self.all()):
            with suppress(InputError, OSError):
                if weights_sha256(path / "model.safetensors") == sha256:
                    return path.name
        return None

    def load_model(self, name: str | None = None) -> tuple[dict, Choice]:
        """Return the state_dict of the checkpoint that `choose` finds, and the checkpoint.

        Raises InputError when the weights are not as they were written.
        """
        found = self.choose(name)
        if reason := damage(found.folder, ("model.safetensors",)):
            raise InputError(f"{reason}; put the file back, or name another checkpoint")
        return read_weights_file(found.folder / "model.safetensors"), found

    def newest_valid(self) -> tuple[Path, list[str]]:
        """Return (the newest checkpoint that is as it was written, not later than `last`; why those after it
        are not taken).

        Raises InputError when there is none.
        """
        last, reasons = self.pointer("last"), []
        newest = _step(last) if last is not None and last.is_dir() else math.inf
        for folder in reversed(self.all()):
            if _step(folder) <= newest:
                reason = damage(folder)
                if reason is None:
                    return folder, reasons
                reasons.append(reason)
        if reasons:
            raise InputError(
                f"{first_six(reasons, '; ')}; no other checkpoint is left, start again with another --out"
            )
        raise InputError(f"{self.folder}: has no checkpoint to resume from; start it again without --resume")

    def load_trainer(self, folder: Path) -> tuple[dict, dict]:
        """Return (model, trainer state) of a checkpoint."""
        return read_weights_file(folder / "model.safetensors"), load_pickle(folder / "trainer.pt")


def damage(folder: Path, names: tuple[str, ...] | None = None) -> str | None:
    """Say which of a checkpoint's files (or of `names`) is not as it was written; None when all are.

    Without a checkpoint.json, as earlier versions saved, only what is absent is found.
    """
    record = folder / "checkpoint.json"
    if not record.is_file():
        absent = next((folder / name for name in names or FILES if not (folder / name).is_file()), None)
        return absent and f"{absent}: no such file"
    try:
        files = read_json(record)["files"]
        written = {folder / name: (files[name]["bytes"], files[name]["sha256"]) for name in names or FILES}
    except (InputError, LookupError, TypeError):
        return f"{record}: is damaged"
    for path, (size, digest) in written.items():
        try:
            if path.stat().st_size != size:
                return f"{path}: is damaged: it has {path.stat().st_size} bytes, {size} were written"
            # One rank reads them whole for all: the others would read the same files.
            if os.environ.get("RANK", "0") == "0" and file_sha256(path) != digest:
                return f"{path}: is damaged: its sha256 is not that of what was written"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror})"
    return None


def _is_step(name: str) -> bool:
    return name.startswith("step-") and name.isascii() and name.removeprefix("step-").isdecimal()


def _is_name(name: str) -> bool:
    """Return whether a file of RUN/checkpoints can be a checkpoint's name."""
    return name in ("last", "best") or _is_step(name)


def weights_sha256(weights: Path) -> str:
    """Return the sha256 of weights: what checkpoint.json beside them says, which load_model compares, else
    the file's own.

    Raises InputError or OSError when neither can be read.
    """
    record = weights.parent / "checkpoint.json"
    try:
        return (
            read_json(record)["files"][weights.name]["sha256"] if record.is_file() else file_sha256(weights)
        )
    except (LookupError, TypeError) as error:
        raise InputError(f"{record}: is damaged") from error


def _step(path: Path) -> int:
    """Return the number of `step-000123`."""
    return int(path.name.removeprefix("step-"))


def _remove(folder: Path) -> None:
    """Delete a checkpoint, renamed first so that a half-deleted folder is never read as one."""
    hidden = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    with suppress(OSError):
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> None:
    """Write a file, or a folder's names, onto the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
