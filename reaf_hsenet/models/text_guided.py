"""Med-2E3's projector, which weights slices by the text (see packer.py)."""

import torch
from torch import Tensor

from reaf_hsenet.models.packer import AveragePool, Size3, build_head


class TextGuidedProjector(AveragePool):
    """Med-2E3's (Shi et al. 2024): pooled 3D tokens, then S slice tokens, weighted by the text.

    p = head(mean of a cell), u_s = slice_head(z_s), v_s = mean of u_s and all p of its depth slot, t = mean
    of the text, r = softmax_s(v_s t^t), unscaled, y = [p, r_s u_s]. K = N / M + S.

    text: the decoder's embeddings of what follows the visual tokens in its input. Published, t is the mean
    of it all, with padding and, in training, the answer; a text_mask (1 or True where a token counts)
    leaves them out.
    The depth slot (of d / kd) of slice s is s mod (d / kd), as published.
    Source: SpatialPoolingProjector_med2e3, which runs in bfloat16 alone; this runs in any type.
    """

    needs = ("slices", "text")

    def __init__(
        self,
        width: int,
        out_width: int,
        grid: Size3,
        kernel: Size3 | None = None,
        slices: int = 32,
        slice_width: int | None = None,
    ):
        super().__init__(width, out_width, grid, kernel)
        self.depth_slots = self.grid[0] // self.kernel[0]
        self.register_buffer("slot_of_slice", torch.arange(slices) % self.depth_slots, persistent=False)
        self.visual_tokens += slices
        self.slice_head = build_head(slice_width or width, out_width)

    def slice_logits(
        self, packed: Tensor, slices: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Return v t^t (B, S) of p (B, N / M, C_out), u (B, S, C_out), text (B, T, C_out)."""
        slots = packed.unflatten(1, (self.depth_slots, -1))  # (B, d / kd, tokens of a slot, C_out)
        around = slots.sum(2)[:, self.slot_of_slice]  # (B, S, C_out)
        visual = (around + slices) / (slots.shape[2] + 1)
        if text_mask is None:
            mean = text.mean(1)
        else:
            kept = text_mask[..., None].to(text.dtype)
            mean = (text * kept).sum(1) / kept.sum(1)
        return (visual @ mean.to(visual.dtype)[..., None]).squeeze(-1)

    def forward(
        self,
        tokens: Tensor,
        slices: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        packed = super().forward(tokens)
        if slices is None or text is None:
            raise ValueError("the text-guided projector needs slices and text")
        if slices.shape[1] != len(self.slot_of_slice):
            raise ValueError(f"{slices.shape[1]} slices, this projector takes {len(self.slot_of_slice)}")
        planes = self.slice_head(slices)
        scores = self.slice_logits(packed, planes, text, text_mask).softmax(-1)
        return torch.cat((packed, planes * scores[..., None].to(planes.dtype)), dim=1)
