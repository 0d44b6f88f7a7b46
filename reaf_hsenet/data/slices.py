"""CT in HU -> the axial slices that a 2D encoder sees: HSENet's stage 2, as pure functions of arrays (no
files).

Published: resample, take 32 evenly spaced slices, stretch each to 0..255, write a JPEG, read it, BiomedCLIP's
image preprocessing. Here only the planes that are taken are resampled, and nothing goes through JPEG unless
it is asked for. The slice axis is always the one to superior; the published script takes another for volumes
with more slices than rows.
"""

import io
from dataclasses import dataclass

import numpy as np

from reaf_hsenet.data.preprocessing import ResampledGrid, linear_neighbours
from reaf_hsenet.data.volume import Volume
from reaf_hsenet.errors import InputError

SLICES = 32
UNIT = 1 << 22  # Pillow's fixed-point weights
# CLIP's image statistics (R, G, B), which BiomedCLIP keeps.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SliceRecipe:
    """A way to take slices. turns: quarter turns counter-clockwise of the (L, P) plane.

    spacing: mm in (S, L, P) that the CT is resampled to; None keeps its own grid.
    window: HU that values are clamped to before resampling.
    stretch: `slice` maps each slice's own range to 0..255, `volume` the whole volume's.
    """

    spacing: tuple[float, float, float] | None
    window: tuple[float, float] | None
    stretch: str
    turns: int


SLICE_RECIPES = {
    "hsenet": SliceRecipe((1.5, 0.75, 0.75), (-1000.0, 1000.0), "slice", -1),
    "bimcv": SliceRecipe(None, None, "volume", 1),
    "phantom": SliceRecipe((6.0, 4.0, 4.0), (-1000.0, 1000.0), "slice", -1),  # about their own grid
}


def axial_slices(volume: Volume, recipe: SliceRecipe) -> np.ndarray:
    """(32, H, W) uint8 pictures from inferior to superior, truncated as published; a constant slice is 0."""
    voxels, (x, y, z) = volume.hu.transpose(2, 0, 1), volume.spacing
    grid = ResampledGrid(voxels, (z, x, y), recipe.spacing, recipe.window)
    depth, *plane = grid.shape
    inside = [np.arange(n) for n in plane]
    if depth >= SLICES or recipe.spacing is None:
        # Truncated, as torch.linspace gives integers: a thin volume on its own grid repeats slices.
        stack = grid.at((np.arange(SLICES) * (depth - 1) / (SLICES - 1)).astype(np.int64), *inside)
    else:
        low, high, weight = linear_neighbours(depth, SLICES)
        stack = grid.at(np.arange(depth), *inside)
        stack = stack[low] + weight[:, None, None] * (stack[high] - stack[low])
    if recipe.stretch == "slice":
        lowest, highest = stack.min((1, 2), keepdims=True), stack.max((1, 2), keepdims=True)
    else:
        lowest, highest = np.float64(volume.hu.min()), np.float64(volume.hu.max())
    # Double precision, for what is truncated should not depend on rounding.
    reach = np.float64(highest) - lowest
    grey = (stack - np.float64(lowest)) / np.where(reach > 0, reach, 1) * 255
    return np.ascontiguousarray(np.rot90(grey.astype(np.uint8), recipe.turns, (1, 2)))


def through_jpeg(slices: np.ndarray) -> np.ndarray:
    """(S, H, W) uint8 after a JPEG of quality 95, as the published pipeline stores them. Needs Pillow."""
    image = require_pillow()
    pictures = []
    for picture in slices:
        file = io.BytesIO()
        image.fromarray(picture).save(file, "JPEG", quality=95)
        pictures.append(np.asarray(image.open(file)))
    return np.stack(pictures)


def require_pillow():
    """Pillow's Image module. Raises InputError where it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("--jpeg-slices: needs Pillow to write JPEG; pip install pillow") from error
    return Image


def bicubic_weights(source: int, target: int) -> np.ndarray:
    """Return (target, source) whole numbers, Pillow's antialiased bicubic in units of 2**-22."""
    scale = source / target
    wide = max(scale, 1.0)  # the kernel widens when an axis shrinks
    centre = (np.arange(target)[:, None] + 0.5) * scale
    pixel = np.arange(source)
    x = np.abs(pixel - centre + 0.5) / wide
    kernel = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    first, end = (np.trunc(np.clip(centre + side * 2 * wide + 0.5, 0, source)) for side in (-1, 1))
    kernel = np.where((pixel >= first) & (pixel < end) & (x < 2), kernel, 0)
    weights = kernel / kernel.sum(1, keepdims=True) * UNIT
    return np.trunc(weights + np.copysign(0.5, weights))


def _weighted(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(..., n) whole numbers -> (..., m) in 0..255. The sums are exact: below 2**53."""
    return np.clip(np.floor((images @ weights.T + UNIT // 2) / UNIT), 0, 255)


def fit(slices: np.ndarray, size: int) -> np.ndarray:
    """Resize the shortest side of (S, H, W) to `size` and crop the centre, exactly as Pillow does."""
    height, width = slices.shape[1:]
    short = min(height, width)
    tall, broad = (size if n == short else int(size * n / short) for n in (height, width))
    top, left = round((tall - size) / 2), round((broad - size) / 2)
    across = bicubic_weights(width, broad)[left : left + size]
    down = bicubic_weights(height, tall)[top : top + size]
    # Along rows first, rounded to uint8 in between, as Pillow does.
    images = _weighted(_weighted(slices.astype(np.float64), across).swapaxes(1, 2), down)
    return np.ascontiguousarray(images.swapaxes(1, 2).astype(np.uint8))


def slice_images(volume: Volume, recipe: SliceRecipe, size: int, jpeg: bool = False) -> np.ndarray:
    """(32, size, size) uint8: what the encoder sees, before it is normalised."""
    slices = axial_slices(volume, recipe)
    return fit(through_jpeg(slices) if jpeg else slices, size)
