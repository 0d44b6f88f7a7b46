"""REAF's 3D regional saliency enhancer: a map over tokens in which the most salient regions stand out.

tokens (B, 1 + N, C) -> map (B, 1 + N): the norm of every patch token, times 1 inside the regions with the
largest sums and times `suppression` elsewhere. The mask carries no gradient, the norms do. One topk for the
whole batch, no loop over samples or regions. Source: REAF f9475f8, model/attention_hooks.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RegionalSaliency(nn.Module):
    """Regions are blocks of `region_size` tokens that tile the grid (d, h, w) from its first corner.

    regions: how many keep their weight; all of them when there are fewer.
    class_score: what the map says of the class token. `first_patch`, as published: the norm of the first
        patch, not suppressed (the published code drops the class token before it reads its norm).
        `class_token`: its own norm.
    remainder: tokens at the far ends of the grid that fill no whole region. `suppressed`, as published, they
        belong to no region; `regions`, they are smaller regions of their own.
    Raises ValueError when no region fits the grid.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        region_size: tuple[int, int, int],
        regions: int,
        suppression: float,
        class_score: str = "first_patch",
        remainder: str = "suppressed",
    ):
        super().__init__()
        if any(r > n for r, n in zip(region_size, grid, strict=True)):
            raise ValueError(f"regions of {tuple(region_size)} tokens do not fit a grid of {tuple(grid)}")
        self.grid, self.region_size, self.suppression = tuple(grid), tuple(region_size), suppression
        self.class_score, self.partial = class_score, remainder == "regions"
        counts = [-(-n // r) if self.partial else n // r for n, r in zip(grid, region_size, strict=True)]
        self.total = counts[0] * counts[1] * counts[2]
        self.regions = min(regions, self.total)
        # The region of every token; `total` where it belongs to none.
        place = [torch.arange(n) // r for n, r in zip(grid, region_size, strict=True)]
        d, h, w = torch.meshgrid(*place, indexing="ij")
        region = (d * counts[1] + h) * counts[2] + w
        outside = (d >= counts[0]) | (h >= counts[1]) | (w >= counts[2])
        self.register_buffer(
            "region_of_token", region.masked_fill(outside, self.total).flatten(), persistent=False
        )

    def region_mask(self, norms: Tensor) -> Tensor:
        """Return (B, N), True inside the chosen regions, from norms of the patch tokens (B, N)."""
        volume = norms.detach().unflatten(1, self.grid)[:, None]  # (B, 1, d, h, w)
        sums = F.avg_pool3d(volume, self.region_size, ceil_mode=self.partial, divisor_override=1).flatten(1)
        best = sums.topk(self.regions, dim=1).indices  # (B, regions)
        chosen = torch.zeros(len(norms), self.total + 1, dtype=torch.bool, device=norms.device)
        return chosen.scatter(1, best, True)[:, self.region_of_token]

    def forward(self, tokens: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(tokens, dim=-1)  # (B, 1 + N)
        patches = norms[:, 1:]
        score = patches[:, :1] if self.class_score == "first_patch" else norms[:, :1]
        enhanced = torch.where(self.region_mask(patches), patches, self.suppression * patches)
        return torch.cat((score, enhanced), dim=1)


class PlainSaliency(nn.Module):
    """The norms alone, no region enhanced: the map without the enhancer."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tokens, dim=-1)
