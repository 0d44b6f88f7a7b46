"""HSENet's training augmentations of a volume (1, D, H, W) in [0, 1], as tensor operations.

In order: rotation by a multiple of 90 degrees in the (H, W) plane, flips of D, H and W, intensity scale, intensity
shift. Nothing is clipped, as published: values may leave [0, 1].
"""

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.config import Augmentation


def augment(volume: Tensor, config: Augmentation, rng: np.random.Generator) -> Tensor:
    """A new (1, D, H, W) volume; every decision is drawn from `rng`, whether or not it is taken."""
    rotate, *flips, scale, shift = rng.random(6)
    turns = int(rng.integers(1, 4))
    factor, offset = rng.uniform(-config.intensity, config.intensity, 2)
    if rotate < config.rotate:
        volume = torch.rot90(volume, turns, dims=(2, 3))
    volume = volume.flip([axis for axis, u in enumerate(flips, start=1) if u < config.flip])
    if scale < config.scale:
        volume = volume * (1 + factor)
    if shift < config.shift:
        volume = volume + offset
    return volume
