"""Numerical trouble: finite gradients and losses, skipped steps, the way back to good weights."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from reaf_hsenet.errors import first_six
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import check_ranges, setting
from reaf_hsenet.train.sharding import whole


def clip_gradients(model: nn.Module, most: float | None) -> Tensor:
    """Scale the gradients down to a norm of `most`. Returns the norm before that, a scalar on their device.

    What is not finite stays as it is, so that it can be named: torch's clip_grad_norm_ would make NaN of all.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # The norm of the parameters' norms is that of all gradients together; `whole` completes it over the ranks
    # that hold parts.
    norm = whole(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
    if most is not None:
        # torch's formula, min(1, most / (norm + 1e-6)), as a tensor: an `if` would wait for the GPU.
        scale = torch.where(norm.isfinite(), (most / (norm + 1e-6)).clamp(max=1), 1)
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


def not_finite(model: nn.Module) -> list[str]:
    """Return names of the parameters whose gradients have NaN or infinite values."""
    return [
        n for n, p in model.named_parameters() if p.grad is not None and not whole(p.grad.isfinite().all())
    ]


def diagnosis(losses: list[float], names: list[str]) -> str:
    """Return in words which losses (one a rank) and gradients were not finite."""
    found = [
        f"the loss is {loss} on rank {rank}" for rank, loss in enumerate(losses) if not math.isfinite(loss)
    ]
    if names:
        found.append(f"gradients with NaN or infinite values: {first_six(names)}")
    return first_six(found, "; ") or "the gradients' norm is infinite"


@dataclass
class Stability:
    """Counts of a run's numerical trouble.

    skipped: steps left out as numerical trouble. overflows: steps left out while fp16's loss scale found its
    size. invalid: what was not finite in the last validation; empty when all was.
    saved: step of the newest checkpoint that was written while the last validation was finite.
    good: step of the newest of these whose weights have given a finite step or validation since.
    """

    skipped: int = setting(0, least=0)
    overflows: int = setting(0, least=0)
    invalid: str = ""
    saved: int = setting(0, least=0)
    good: int = setting(0, least=0)
    GONE: ClassVar = ("mean", "deviation", "seen")  # of the running loss that earlier versions kept

    def __post_init__(self):
        check_ranges(self)

    def checkpoint(self, step: int, validated: int) -> None:
        """Note a checkpoint of this step. validated: the last step that was validated."""
        # A checkpoint that was just validated is known to be good. Another one is when its weights have given
        # a finite step: until then it may be the weights that are spoiled.
        if not self.invalid:
            self.saved = step
            self.good = step if step == validated else self.good

    def way_back(self, run: Run) -> str:
        """Return in words how to continue from weights that are of use."""
        # The newest checkpoint may hold the spoiled weights; the last that is known to be good is named.
        good, anew = run.at(self.good), "start anew with a lower --lr or another --precision"
        if not self.good:
            return f"no checkpoint is known to be good: {anew}"
        return (
            f"the last good checkpoint is {good}: write {good.name} into {good.with_name('last')} and "
            f"--resume with another --precision, or {anew}"
        )
