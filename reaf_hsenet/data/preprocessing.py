"""CT in HU -> network input, both recipes, as pure functions of arrays (no files).

The published pipelines resample the whole CT and keep a small part: HSENet's 32 x 256 x 256 output reads at
most 64 of some 400 resampled planes, REAF crops. Trilinear interpolation (align_corners False, no
antialiasing) is one pair of neighbours and one weight per axis, so here the resampled grid is a function that
is evaluated only at the planes, rows and columns which the result needs. The numbers are the published ones.
"""

import math

import numpy as np

from reaf_hsenet.config import Recipe
from reaf_hsenet.data.volume import Volume
from reaf_hsenet.errors import InputError


def linear_neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, weight), each (target,): position i of a resized axis is low + weight * (high - low)."""
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    low = np.minimum(position.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    return low, high, (position - low).astype(np.float32)


def _lerp(array: np.ndarray, axis: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    shape = [1, 1, 1]
    shape[axis] = -1
    # a + w (b - a) is exact where a equals b, so that air stays air. Sums are made in place: volumes are
    # large.
    start = np.take(array, low, axis).astype(np.float32, copy=False)
    step = np.take(array, high, axis).astype(np.float32, copy=False)
    step -= start
    step *= weight.reshape(shape)
    step += start
    return step


def _pick(array: np.ndarray, indices: list[np.ndarray]) -> np.ndarray:
    """The voxels at the given indices of each axis; a view where these are ranges."""
    for axis, index in enumerate(indices):
        span = slice(int(index[0]), int(index[0]) + len(index))
        is_range = np.array_equal(index, np.arange(span.start, span.stop))
        array = array[(slice(None),) * axis + (span if is_range else index,)]
    return array


class ResampledGrid:
    """The CT resampled to a spacing: (D, H, W) voxels, computed only where they are asked for.

    voxels: (d, h, w) HU in the recipe's axes, clamped on the fly to `window` when it is given. The size of an
    axis is int(n * spacing / target), as published.
    """

    def __init__(self, voxels: np.ndarray, spacing, target, window: tuple[float, float] | None):
        target = spacing if target is None else target
        self.voxels, self.window = voxels, window
        ratios = zip(voxels.shape, spacing, target, strict=True)
        self.shape = tuple(max(1, int(n * s / t)) for n, s, t in ratios)
        self.neighbours = [linear_neighbours(n, m) for n, m in zip(voxels.shape, self.shape, strict=True)]

    def at(self, *indices: np.ndarray) -> np.ndarray:
        """(len(d), len(h), len(w)) float32 voxels at the given indices of each axis."""
        picked = [[part[i] for part in n] for n, i in zip(self.neighbours, indices, strict=True)]
        if not any(weight.any() for _, _, weight in picked):  # on the target grid already: no arithmetic
            return self._clamped(_pick(self.voxels, [low for low, _, _ in picked]).copy())
        block = self.voxels
        # The axis that shrinks most first: least work for the others.
        for axis in sorted(range(3), key=lambda a: len(indices[a]) / self.voxels.shape[a]):
            first = block is self.voxels
            block = self._first(axis, *picked[axis]) if first else _lerp(block, axis, *picked[axis])
        return block

    def _first(self, axis, low, high, weight):
        used, places = np.unique(np.concatenate((low, high)), return_inverse=True)
        # Not np.take: it copies the whole array first unless that is in C order, and a turned CT is not.
        block = self._clamped(self.voxels[(slice(None),) * axis + (used,)])
        return _lerp(block, axis, places[: len(low)], places[len(low) :], weight)

    def _clamped(self, block: np.ndarray) -> np.ndarray:
        """A fresh block of voxels as float32 in C order."""
        block = block.astype(np.float32, order="C", copy=False)
        if self.window is not None:
            np.clip(block, *self.window, out=block)
        return block

    def plane(self, axis: int, index: int) -> np.ndarray:
        """One resampled plane, perpendicular to `axis`."""
        wanted = [np.arange(n) for n in self.shape]
        wanted[axis] = np.array([index])
        return self.at(*wanted)

    def range(self) -> tuple[float, float]:
        """Minimum and maximum of the resampled voxels.

        Interpolation cannot leave the clamped source's range, so the search stops when both ends are reached,
        which a CT does within a few planes: outside air, and bone.
        """
        bounds = float(self.voxels.min()), float(self.voxels.max())
        if self.window is not None:
            bounds = tuple(float(np.clip(b, *self.window)) for b in bounds)
        low, high = np.inf, -np.inf
        middle = self.shape[0] // 2
        for index in sorted(range(self.shape[0]), key=lambda i: abs(i - middle)):
            plane = self.plane(0, index)
            low, high = min(low, float(plane.min())), max(high, float(plane.max()))
            if (low, high) == bounds:
                break
        return low, high

    def foreground(self, level: float) -> list[tuple[int, int]]:
        """Return (start, end) per axis of the box of voxels above `level`."""
        box = []
        for axis, n in enumerate(self.shape):
            above = (i for i in range(n) if self.plane(axis, i).max() > level)
            start = next(above)
            end = next(i for i in range(n - 1, -1, -1) if self.plane(axis, i).max() > level)
            box.append((start, end + 1))
        return box


def preprocess(volume: Volume, recipe: Recipe) -> np.ndarray:
    """(1, D, H, W) float32 input of `recipe.size`. Raises InputError when nothing is left after clamping."""
    grid = resampled_grid(volume, recipe)
    if recipe.scale == "minmax":
        low, high = grid.range()
        if low == high:
            raise InputError(f"every voxel is {low:g} HU after clamping to {recipe.window}; expected a CT")
    else:
        low, high = recipe.window

    def scaled(block: np.ndarray) -> np.ndarray:
        block -= np.float32(low)  # in place, as below: the block is fresh and large
        block /= np.float32(high - low)
        return block if recipe.scale == "minmax" else np.clip(block, 0, 1, out=block)

    if recipe.fit == "crop":
        image = _centre_crop(grid, recipe.size, scaled)
    else:
        box = grid.foreground(low) if recipe.fit == "foreground" else [(0, n) for n in grid.shape]
        image = _resize(grid, box, recipe.size, scaled)
    image -= np.float32(recipe.mean)
    image /= np.float32(recipe.std)
    return image[None]


def resampled_grid(volume: Volume, recipe: Recipe) -> ResampledGrid:
    """Return the volume on the recipe's axes and spacing, clamped where the recipe clamps first."""
    order = ["LPS".index(letter) for letter in recipe.axes]
    voxels = volume.hu.transpose(order)
    spacing = [volume.spacing[i] for i in order]
    target = recipe.spacing or spacing
    extents = [n * s / t for n, s, t in zip(voxels.shape, spacing, target, strict=True)]
    if max(extents) > 2**14 or math.prod(extents) > 2**32:  # a human at 0.5 mm has a quarter of that
        raise InputError(
            f"its {_x(voxels.shape)} voxels of {_x(spacing)} mm would be {_x(extents)} at the spacing of "
            f"{_x(target)} mm; mend the header's spacing, or choose a larger --spacing"
        )
    return ResampledGrid(voxels, spacing, recipe.spacing, recipe.window if recipe.clamp == "before" else None)


def _x(numbers) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)


def _resize(grid: ResampledGrid, box, size, scaled) -> np.ndarray:
    """The box of the grid, resized: needs two grid planes per output plane."""
    pairs = [linear_neighbours(end - start, n) for (start, end), n in zip(box, size, strict=True)]
    needed = [np.unique(np.concatenate((low, high))) for low, high, _ in pairs]
    block = scaled(grid.at(*(start + n for (start, _), n in zip(box, needed, strict=True))))
    for axis, (low, high, weight) in enumerate(pairs):
        low, high = (np.searchsorted(needed[axis], index) for index in (low, high))
        block = _lerp(block, axis, low, high, weight)
    return block


def _centre_crop(grid: ResampledGrid, size, scaled) -> np.ndarray:
    """Centre crop; where the grid is smaller, zeros on both sides (an odd one at the end)."""
    image = np.zeros(size, np.float32)
    inside, wanted = [], []
    for have, want in zip(grid.shape, size, strict=True):
        before, start, length = max(want - have, 0) // 2, max(have - want, 0) // 2, min(have, want)
        inside.append(slice(before, before + length))
        wanted.append(np.arange(start, start + length))
    image[tuple(inside)] = scaled(grid.at(*wanted))
    return image
