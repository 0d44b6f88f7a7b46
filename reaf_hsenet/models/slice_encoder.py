"""2D ViT over axial slices: the vision trunk of BiomedCLIP, timm's vit_base_patch16_224.

(S, 3, 224, 224) normalised images -> (S, C), the class token after the final norm, before CLIP's projection.
The class token is concatenated first and has a position of its own. HSENet's stage 2 uses it frozen.
"""

import torch
from torch import Tensor, nn

from reaf_hsenet.models.layers import Block, init_weights, run_blocks


class SliceEncoder(nn.Module):
    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp: int = 3072,
    ):
        super().__init__()
        self.size, self.width = size, width
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT  # (S, n, C)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        return self.norm(run_blocks(self.blocks, x, False)[:, 0])
