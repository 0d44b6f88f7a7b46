"""A stage as the training loop takes it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.utils.data import Dataset

from reaf_hsenet.data.bad_volumes import BadVolumes


@dataclass
class Job:
    """A stage as the training loop takes it.

    encode(model, batch) returns outputs, each a scalar or with one row per sample. loss(outputs, batch, step)
    returns (loss, {name: number or 0-d tensor}). validate(model) returns (score, {name: number}), where a
    higher
    score is better, and raises FloatingPointError when what it measures is not finite.

    saved: returns the tensors that a checkpoint holds. measured: names of the validation's numbers, of which
    --best-by takes one; a `loss` is better when lower. after_step: called after every optimizer step. blocks:
    modules that --compile compiles. bad: volumes that could not be read so far.
    """

    model: nn.Module
    train_set: Dataset
    encode: Callable
    loss: Callable
    validate: Callable
    blocks: list[nn.Module]
    bad: BadVolumes
    measured: tuple[str, ...] = ()
    saved: Callable[[nn.Module], dict] = nn.Module.state_dict
    after_step: Callable[[], None] = lambda: None
