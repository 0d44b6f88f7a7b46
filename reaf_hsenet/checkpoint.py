"""Run folders: what a run is made of, what it logged, and its checkpoints.

RUN/config.json, RUN/log.jsonl, RUN/checkpoints/step-000123/{model.safetensors,trainer.pt}, and the files
RUN/checkpoints/{last,best}, each of which holds the name of a step's folder. Every file is whole or absent.
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.files import atomic_write, read_json, write_json
from reaf_hsenet.pretrained import read_weights_file


class Run:
    """One training run on disk."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"

    @property
    def exists(self) -> bool:
        return (self.folder / "config.json").is_file()

    def read_config(self) -> dict:
        """Raises InputError when this is not a run."""
        if not self.exists:
            raise InputError(
                f"{self.folder}: holds no run (no config.json); train one with train.py, or name one "
                "with --run"
            )
        return read_json(self.folder / "config.json")

    def write_config(self, config: dict) -> None:
        write_json(self.folder / "config.json", config)

    def log(self, record: dict) -> None:
        try:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"{self.folder / 'log.jsonl'}: cannot be written ({error.strerror})") from error

    def read_log(self) -> list[dict]:
        path, records = self.folder / "log.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # the last line of a run that was killed while writing it
        return records

    def forget_after(self, step: int) -> None:
        """Drop log records and checkpoints of later steps, before a run starts or resumes at `step`."""
        for path in self.checkpoints.glob("step-*"):
            if _step(path) > step:
                shutil.rmtree(path, ignore_errors=True)
        records = [r for r in self.read_log() if r["step"] <= step]
        with atomic_write(self.folder / "log.jsonl") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)

    def pointer(self, name: str) -> Path | None:
        """The folder that `last` or `best` points to; None when there is none."""
        path = self.checkpoints / name
        return self.checkpoints / path.read_text().strip() if path.is_file() else None

    def save(self, step: int, model: dict, trainer: dict, keep: int, best: bool) -> None:
        """Write a checkpoint under a temporary name, rename it, then move the pointers and delete older ones."""
        target = self.checkpoints / f"step-{step:06d}"
        temporary = self.checkpoints / f".{target.name}.tmp"
        try:
            if not target.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                save_file({n: t.contiguous() for n, t in model.items()}, temporary / "model.safetensors")
                torch.save(trainer, temporary / "trainer.pt")
                for path in temporary.iterdir():
                    _sync(path)
                os.replace(temporary, target)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError of its zip writer.
            shutil.rmtree(temporary, ignore_errors=True)
            raise OutputError(
                f"{target}: cannot be written ({' '.join(str(error).split())[:120]}): free space; the "
                "checkpoints before it are kept, continue with --resume"
            ) from error
        for name in ("last", "best") if best else ("last",):
            with atomic_write(self.checkpoints / name) as file:
                file.write(target.name + "\n")
        kept = {self.pointer("last"), self.pointer("best"), *sorted(self.checkpoints.glob("step-*"), key=_step)[-keep:]}
        for path in set(self.checkpoints.glob("step-*")) - kept:
            shutil.rmtree(path, ignore_errors=True)

    def load_model(self, name: str = "best") -> tuple[dict, Path]:
        """(state_dict, its folder) of `best` (`last` where there is no best). Raises InputError when there is none."""
        folder = self.pointer(name) or self.pointer("last")
        if folder is None:
            raise InputError(
                f"{self.folder}: has no checkpoint yet; let train.py reach its first, or choose another run"
            )
        return read_weights_file(folder / "model.safetensors"), folder

    def load_trainer(self) -> tuple[dict, dict]:
        """(model, trainer state) of the last checkpoint. Raises InputError when there is none or it is damaged."""
        folder = self.pointer("last")
        if folder is None:
            raise InputError(f"{self.folder}: has no checkpoint to resume from; start it again without --resume")
        model = read_weights_file(folder / "model.safetensors")
        try:
            return model, torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(
                f"{folder / 'trainer.pt'}: is damaged; write the name of an older step's folder into "
                f"{self.checkpoints / 'last'}, or start again with another --out"
            ) from error


def _step(path: Path) -> int:
    """The number of `step-000123`."""
    return int(path.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
