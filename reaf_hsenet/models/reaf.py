"""REAF's encoder: a 3D ViT whose blocks attend within slices or within the scan, and pool what is salient.

(B, 1, D, H, W) -> (B, 1 + N, C); token 0 is the feature. d slices of h * w patches, N = d * h * w. Slice
blocks see B * d sequences of 1 + h * w tokens, scan blocks B sequences of 1 + N. Of both kinds the block
outputs are fused over layers (fusion.py), the fused tokens' norms give a map in which the most salient
regions stand out (saliency.py), its softmax pools the last output of that kind, and a Linear of the two
pooled vectors is added to every token before the final norm. Without fusion it is the encoder of HLIP.
Source: REAF f9475f8 and HLIP 70ef68d, model/visual_encoder.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reaf_hsenet.models.fusion import build_fusion
from reaf_hsenet.models.layers import Block, PatchEmbed3D, init_weights, run_block
from reaf_hsenet.models.positions import sincos_grid
from reaf_hsenet.models.saliency import PlainSaliency, RegionalSaliency

LAYER_NORM_EPS = 1e-6


@dataclass
class Branch:
    """One kind of blocks: fused (B, 1 + N, C), map (B, 1 + N) before its softmax, pooled (B, C)."""

    fused: Tensor
    map: Tensor
    pooled: Tensor


@dataclass
class Encoding:
    """tokens (B, 1 + N, C); branches by name, `scan` and `slice`, as far as there are such blocks."""

    tokens: Tensor
    branches: dict[str, Branch]


class REAF(nn.Module):
    """scan_layers: indices of the blocks that attend within the scan; the others attend within slices.

    fusion: a method of fusion.py, or None for HLIP's encoder. saliency: RegionalSaliency's settings
    (region_size, regions, suppression, class_score, remainder), or None for no regions. slice_class: which
    class token stands first in the slice branch, whose slices have one each: that of the `first` slice, as
    published, or their `mean`.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        patch: tuple[int, int, int],
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        scan_layers: tuple[int, ...],
        fusion: str | None = "weighted_mean",
        fusion_seed: int = 0,
        saliency: dict | None = None,
        slice_class: str = "first",
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.size, self.grad_checkpoint = tuple(size), False
        self.grid = tuple(s // p for s, p in zip(size, patch, strict=True))
        self.scan_layers, self.slice_class = frozenset(scan_layers), slice_class
        self.patch_embed = PatchEmbed3D(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        # Fixed, but part of the model: it may come from a pretrained 2D table.
        self.register_buffer("pos_embed", sincos_grid(self.grid, width).reshape(1, -1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp, eps=LAYER_NORM_EPS, drop_path=drop_path * i / max(1, depth - 1))
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

        counts = {"scan": len(self.scan_layers), "slice": depth - len(self.scan_layers)}
        self.fusion = nn.ModuleDict(
            {name: build_fusion(fusion, n, fusion_seed) for name, n in counts.items() if fusion and n}
        )
        self.enhancer = RegionalSaliency(self.grid, **saliency) if saliency else PlainSaliency()
        if self.fusion:
            self.fusion_layer = nn.Linear(len(self.fusion) * width, width)
            init_weights(self.fusion_layer)

    def to_slices(self, x: Tensor) -> Tensor:
        """(B, 1 + N, C) -> (B * d, 1 + h * w, C); every slice gets a copy of the class token."""
        cls_token, patches = x[:, None, :1], x[:, 1:].unflatten(1, (self.grid[0], -1))
        return torch.cat((cls_token.expand(-1, self.grid[0], -1, -1), patches), dim=2).flatten(0, 1)

    def to_scan(self, x: Tensor, slice_class: str = "mean") -> Tensor:
        """(B * d, 1 + h * w, C) -> (B, 1 + N, C); the class token is the slices' mean, or the first one's."""
        x = x.unflatten(0, (-1, self.grid[0]))  # (B, d, 1 + h * w, C)
        cls_token = x[:, :, 0].mean(1, keepdim=True) if slice_class == "mean" else x[:, :1, 0]
        return torch.cat((cls_token, x[:, :, 1:].flatten(1, 2)), dim=1)

    def encode(self, volume: Tensor) -> Encoding:
        """Return the tokens, and the branches' parts on the way."""
        if volume.shape[2:] != self.size:
            raise ValueError(f"volume of {tuple(volume.shape[2:])}, this encoder takes {self.size}")
        x = self.patch_embed(volume) + self.pos_embed  # (B, N, C)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        outputs: dict[str, list[Tensor]] = {"scan": [], "slice": []}
        in_slices = False
        for i, block in enumerate(self.blocks):
            kind = "scan" if i in self.scan_layers else "slice"
            if in_slices and kind == "scan":
                x = self.to_scan(x)
            elif not in_slices and kind == "slice":
                x = self.to_slices(x)
            in_slices = kind == "slice"
            x = run_block(block, x, self.grad_checkpoint)
            outputs[kind].append(x)
        if in_slices:
            x = self.to_scan(x)
        branches = {name: self.pool(name, outputs[name]) for name in self.fusion}
        if branches:
            pooled = torch.cat([branch.pooled for branch in branches.values()], dim=-1)  # (B, 2 C)
            x = x + self.fusion_layer(pooled)[:, None]
        return Encoding(self.norm(x), branches)

    def pool(self, name: str, outputs: list[Tensor]) -> Branch:
        """Fuse the outputs of one kind of blocks, and pool the last of them by the fused tokens' saliency."""
        fused, last = self.fusion[name](outputs), outputs[-1]
        if (
            name == "slice"
        ):  # fused slice by slice, which is the same and needs one rearrangement, not one a layer
            fused, last = (self.to_scan(t, self.slice_class) for t in (fused, last))
        scores = self.enhancer(fused)
        pooled = scores.softmax(-1)[:, None] @ last  # (B, 1, C)
        return Branch(fused, scores, pooled[:, 0])

    def forward(self, volume: Tensor) -> Tensor:
        return self.encode(volume).tokens

    def salient_regions(self, volume: Tensor) -> dict[str, Tensor]:
        """Return norms of the fused tokens inside the chosen regions, 0 elsewhere: {branch: (B, d, h, w)}.

        For pictures. Empty when no regions are chosen.
        """
        found = {}
        if not isinstance(self.enhancer, RegionalSaliency):
            return found
        for name, branch in self.encode(volume).branches.items():
            norms = torch.linalg.vector_norm(branch.fused[:, 1:], dim=-1)
            found[name] = (norms * self.enhancer.region_mask(norms)).unflatten(1, self.grid)
        return found
