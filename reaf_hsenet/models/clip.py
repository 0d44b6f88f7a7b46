"""Dual encoder: a CT and its report as two unit vectors of one space (HSENet section 3.1, M3D-CLIP).

volume (B, 1, D, H, W) -> class token -> Linear -> l2 norm; report ids (B, T) -> token 0 -> Linear -> l2 norm.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.layers import init_weights
from reaf_hsenet.models.text_encoder import TextEncoder
from reaf_hsenet.models.vit3d import ViT3D

MAX_LOGIT_SCALE = math.log(100)


class DualEncoder(nn.Module):
    """logit_scale `raw`: the parameter multiplies the cosines as it is, as HSENet does; `exp`: its exponential, CLIP."""

    def __init__(
        self,
        vision: ViT3D,
        text: TextEncoder,
        vision_width: int,
        text_width: int,
        embed: int,
        logit_scale: str,
    ):
        super().__init__()
        self.vision, self.text = vision, text
        self.vision_proj = nn.Linear(vision_width, embed)
        self.text_proj = nn.Linear(text_width, embed)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.scale_kind = logit_scale
        for projection in (self.vision_proj, self.text_proj):
            init_weights(projection)

    def encode_image(self, volume: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> unit vectors (B, embed)."""
        return F.normalize(self.vision_proj(self.vision(volume)[:, 0]), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T), (B, T) -> unit vectors (B, embed)."""
        return F.normalize(self.text_proj(self.text(ids, mask)[:, 0]), dim=-1)

    def scale(self) -> Tensor:
        """The factor of the cosines, a scalar."""
        if self.scale_kind == "raw":
            return self.logit_scale
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def forward(self, volume: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encode_image(volume), self.encode_text(ids, mask), self.scale()


def set_grad_checkpoint(model: DualEncoder, on: bool) -> None:
    model.vision.grad_checkpoint = model.text.grad_checkpoint = on


def build_dual_encoder(config) -> DualEncoder:
    """Build from a ClipConfig."""
    vision, text = config.vision, config.text
    return DualEncoder(
        ViT3D(vision.size, vision.patch, vision.width, vision.depth, vision.heads, vision.mlp),
        TextEncoder(**vars(text)),
        vision.width,
        text.width,
        config.embed,
        config.logit_scale,
    )
