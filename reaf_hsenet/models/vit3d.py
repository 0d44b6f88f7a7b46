"""3D patch ViT: HSENet's stage-1 encoder, the same network as M3D-CLIP's vision encoder.

(B, 1, D, H, W) in [0, 1] -> (B, 1 + N, C). Patches plus learned positions, then the class token in front (it
has no position), pre-norm blocks without qkv bias, a final norm. Source: HSENet c7198f3 (monai 1.3 ViT,
`perceptron`).
"""

import torch
from torch import Tensor, nn

from reaf_hsenet.models.layers import Block, PatchEmbed3D, init_weights, run_blocks


class ViT3D(nn.Module):
    def __init__(
        self,
        size: tuple[int, int, int],
        patch: tuple[int, int, int],
        width: int,
        depth: int,
        heads: int,
        mlp: int,
    ):
        super().__init__()
        self.size, self.grad_checkpoint = tuple(size), False
        tokens = (size[0] // patch[0]) * (size[1] // patch[1]) * (size[2] // patch[2])
        self.patch_embed = PatchEmbed3D(patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp, qkv_bias=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, volume: Tensor) -> Tensor:
        """Return patch tokens with their positions (B, N, C) of volumes (B, 1, D, H, W)."""
        if volume.shape[2:] != self.size:
            raise ValueError(f"volume of {tuple(volume.shape[2:])}, this encoder takes {self.size}")
        return self.patch_embed(volume) + self.pos_embed

    def forward(self, volume: Tensor) -> Tensor:
        x = self.embed(volume)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)  # (B, 1 + N, C)
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpoint))
