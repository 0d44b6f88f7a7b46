"""A voxel grid in mm on which phantoms are painted, in Hounsfield units.

Points are (z, y, x) in mm. z runs to Superior from the lowest slice; y to Posterior and x to Left from the
middle of the body.
"""

from itertools import pairwise

import numpy as np

AIR = -1000

Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]


class Canvas:
    """A (D, H, W) float32 array of HU, its coordinates in mm, and shapes that can be painted on it."""

    def __init__(self, shape: tuple[int, int, int], spacing: Point, shift: tuple[float, float]):
        depth, rows, columns = shape
        self.spacing = spacing
        self.hu = np.full(shape, AIR, np.float32)
        self.axes = (
            ((np.arange(depth) + 0.5) * spacing[0]).astype(np.float32),
            ((np.arange(rows) + 0.5 - rows / 2) * spacing[1] - shift[0]).astype(np.float32),
            ((np.arange(columns) + 0.5 - columns / 2) * spacing[2] - shift[1]).astype(np.float32),
        )

    def box(self, low: Point, high: Point) -> Box:
        """Return the voxels whose centres lie between two corners (mm)."""
        edges = zip(self.axes, low, high, strict=True)
        return tuple(slice(*np.searchsorted(axis, (start, stop))) for axis, start, stop in edges)

    def coordinates(self, box: Box = (slice(None),) * 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return z, y, x (mm) of a box, shaped to broadcast."""
        z, y, x = (axis[part] for axis, part in zip(self.axes, box, strict=True))
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def blend(self, box: Box, coverage: np.ndarray, hu: float) -> None:
        """Mix a value into a box, each voxel by the share (0 to 1) that is covered."""
        region = self.hu[box]
        region += coverage * (np.float32(hu) - region)

    def ellipsoid(self, center: Point, radii: Point, hu: float, within: np.ndarray | None = None) -> None:
        """Paint an ellipsoid, inside the mask `within` (D, H, W). Soft edges let even a tiny one show."""
        reach = [radius + step for radius, step in zip(radii, self.spacing, strict=True)]
        box = self.box(np.subtract(center, reach), np.add(center, reach))
        parts = zip(self.coordinates(box), center, radii, strict=True)
        terms = [((axis - middle) / radius) ** 2 for axis, middle, radius in parts]
        distance = np.sqrt(terms[0] + terms[1] + terms[2])
        coverage = np.clip((1 - distance) * (min(radii) / self.spacing[1]) + 0.5, 0, 1)
        self.blend(box, coverage if within is None else coverage * within[box], hu)

    def tube(self, points: list[Point], radius: float, hu: float, within: np.ndarray | None = None) -> None:
        """Paint a chain of round segments with soft edges."""
        reach = radius + max(self.spacing[1:]) / 2
        for start, stop in pairwise(points):
            margin = max(reach, self.spacing[0] / 2)
            box = self.box(np.minimum(start, stop) - margin, np.maximum(start, stop) + margin)
            direction = np.subtract(stop, start).astype(np.float32)
            origin = np.float32(start)
            offset = [axis - middle for axis, middle in zip(self.coordinates(box), origin, strict=True)]
            along = offset[0] * direction[0] + offset[1] * direction[1] + offset[2] * direction[2]
            along = np.clip(along / max(float(direction @ direction), 1e-3), 0, 1)
            squares = [(part - along * step) ** 2 for part, step in zip(offset, direction, strict=True)]
            distance = np.sqrt(squares[0] + squares[1] + squares[2])
            coverage = np.clip((radius - distance) / self.spacing[1] + 0.5, 0, 1)
            self.blend(box, coverage if within is None else coverage * within[box], hu)
