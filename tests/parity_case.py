"""A case of the published implementations' expected numbers, and what a comparison with it is made of."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import fill as kit


class NotBuilt(Exception):
    """The case is of a part that this project does not have yet."""


@dataclass
class Check:
    """One comparison: the error and what is allowed, in the same unit."""

    name: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        return self.error / self.allowed if self.allowed else float("inf") * self.error if self.error else 0.0


def equal(name: str, found, expected) -> Check:
    return Check(name, 0.0 if found == expected else float("inf"), 1.0)


class Case:
    """A case file, its tensors, and the deterministic weights and inputs it names."""

    def __init__(self, path: Path, real: Path):
        self.values = json.loads(path.read_text())
        self.path, self.folder, self.real = path, path.parent, real
        tensors = path.with_suffix(".safetensors")
        self.stored = load_file(tensors) if tensors.is_file() else {}
        self.module = self.values.get("module")
        self.name = self.values.get("case", path.stem)

    def __getitem__(self, key: str):
        return self.values[key]

    def weights(self) -> dict[str, Tensor]:
        seed = self.values["seed"]
        return {
            n: torch.from_numpy(np.array(kit.fill(n, s, seed))) for n, s in self.values["weights"].items()
        }

    def input(self, name: str) -> Tensor:
        spec = self.values["inputs"][name]
        make = {"volume": kit.volume, "features": kit.features, "fill": kit.fill}[spec["kind"]]
        return torch.from_numpy(make(spec["name"], spec["shape"], spec["seed"]))

    def compare(self, found: dict[str, Tensor], allowed: float, suffix: str = "") -> Iterator[Check]:
        """Checks of the stored samples, or of mean, std and l2 where no sample is stored.

        allowed: in units of the output's standard deviation.
        """
        for name, spec in self.values["outputs"].items():
            tensor = found[name]
            if list(tensor.shape) != spec["shape"]:
                yield Check(f"{name} shape {list(tensor.shape)}", float("inf"), 1.0)
                continue
            key = name + suffix
            if key in self.stored:
                index = spec["sample_index"]
                sample = tensor if index in ("full", None) else tensor[_index(index)]
                error = (sample.double() - self.stored[key].double()).abs().max().item()
                factor = ATTENTION32 if "attention" in name and not suffix else allowed
                yield Check(key, error, factor * (spec["std"] or 1.0))
            elif not suffix:
                values = tensor.double()
                yield Check(f"{name} mean", abs(values.mean().item() - spec["mean"]), allowed * spec["std"])
                spread = abs(values.std(correction=0).item() - spec["std"])
                yield Check(f"{name} std", spread, allowed * spec["std"])
                yield Check(f"{name} l2", abs(values.norm().item() - spec["l2"]), allowed * spec["l2"])


def _index(text: str) -> tuple:
    """`[:, ::97, :]` -> slices."""
    parts = [p.strip() for p in text.strip("[]").split(",")]
    made = []
    for part in parts:
        if ":" in part:
            made.append(slice(*(int(x) if x.strip() else None for x in part.split(":"))))
        else:
            made.append(int(part))
    return tuple(made)


STRICT32, STRICT64 = 1e-5, 1e-9  # of the output's standard deviation
ATTENTION32 = (
    2e-5  # of softmax weights, whose spread is small: what the kit measured of a plain implementation
)


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, a scalar, in float32. logits: (B, T, V).

    labels: (B, T), the ids themselves, -100 where nothing is learned; the logits at t are compared with t +
    1.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
