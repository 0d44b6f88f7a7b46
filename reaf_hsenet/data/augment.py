"""HSENet's training augmentations of a volume (1, D, H, W) in [0, 1] and its slice features, as tensor
operations.

In order: rotation by a multiple of 90 degrees in the (H, W) plane, flips of D, H and W, intensity scale,
intensity shift; and a translation by whole voxels, which is not published. Nothing is clipped, as published:
values may leave [0, 1]. Slice features follow a flip of D alone: they are one vector a slice, encoded once,
so that turns in the plane and intensities leave them as they are.
"""

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.config import Augmentation


def augment(volume: Tensor, config: Augmentation, rng: np.random.Generator) -> Tensor:
    """A new (1, D, H, W) volume; every decision is drawn from `rng`, whether or not it is taken."""
    return augment_with_slices(volume, None, config, rng)[0]


def augment_with_slices(
    volume: Tensor, slices: Tensor | None, config: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Return a new volume, and the slice features (S, C) in the order that it has them."""
    rotate, *flips, scale, shift = rng.random(6)
    turns = int(rng.integers(1, 4))
    factor, offset = rng.uniform(-config.intensity, config.intensity, 2)
    if rotate < config.rotate:
        volume = torch.rot90(volume, turns, dims=(2, 3))
    flipped = [axis for axis, u in enumerate(flips, start=1) if u < config.flip]
    volume = volume.flip(flipped)
    if slices is not None and 1 in flipped:
        slices = slices.flip(0)
    if scale < config.scale:
        volume = volume * (1 + factor)
    if shift < config.shift:
        volume = volume + offset
    return volume, slices
