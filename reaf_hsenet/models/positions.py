"""Sine-cosine position tables in one, two and three dimensions, and their resampling (REAF, HLIP; MAE).

Positions are 0, 1, ...; frequencies 10000^(-j / (C / 2)); an axis has all its sines, then all its cosines.
With several axes each has an equal share of the channels, the last grid axis first: width, height, depth.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_1d(count: int, width: int) -> Tensor:
    """Return (count, C) of the positions 0 .. count - 1."""
    if width % 2:
        raise ValueError(f"width {width} is odd; sines and cosines need an even one")
    # numpy's float32 throughout, as the published tables were made: a table rounded from float64 differs by
    # 1e-6.
    frequency = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2)
    frequency = np.float32(1) / np.float32(10000) ** frequency
    angle = np.outer(np.arange(count, dtype=np.float32), frequency)
    return torch.from_numpy(np.concatenate((np.sin(angle), np.cos(angle)), axis=1))


def sincos_grid(grid: tuple[int, ...], width: int) -> Tensor:
    """grid (h, w) or (d, h, w) -> (*grid, C)."""
    if width % (2 * len(grid)):
        raise ValueError(f"width {width} cannot be shared by {len(grid)} axes of sines and cosines")
    share = width // len(grid)
    axes = []
    for axis in reversed(range(len(grid))):
        shape = [1] * len(grid) + [share]
        shape[axis] = grid[axis]
        axes.append(sincos_1d(grid[axis], share).view(shape).expand(*grid, share))
    return torch.cat(axes, dim=-1)


def resample_3d(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(1, d, h, w, C) -> (1, *grid, C), trilinear, float32."""
    if tuple(table.shape[1:4]) == tuple(grid):
        return table
    channels_first = table.float().permute(0, 4, 1, 2, 3)
    return F.interpolate(channels_first, size=grid, mode="trilinear", align_corners=False).permute(
        0, 2, 3, 4, 1
    )


def resample_2d(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, n*n, C) row-major without class token -> (1, h, w, C); bicubic with antialiasing, as timm does."""
    side = round(table.shape[1] ** 0.5)
    if side * side != table.shape[1]:
        raise ValueError(f"a position table of {table.shape[1]} rows is not square")
    table = table.float().unflatten(1, (side, side))
    if (side, side) == tuple(grid):
        return table
    channels_first = table.permute(0, 3, 1, 2)
    return F.interpolate(channels_first, size=grid, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def depth_plus_2d(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Return (1, d, h, w, C) of a 2D table (1, n*n, C): the plane's rows plus sines over depth."""
    plane = resample_2d(table, grid[1:])[:, None]  # (1, 1, h, w, C)
    depth = sincos_1d(grid[0], table.shape[-1])[None, :, None, None]  # (1, d, 1, 1, C)
    return plane + depth
