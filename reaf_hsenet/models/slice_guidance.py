"""HSENet's 2E3 encoder (stage 2): slice features score the patches of the 3D ViT (HSENet section 3.2).

volume (B, 1, D, H, W), slice features z (B, S, C_2d) -> (B, 1 + N, C). Patch embeddings p (with positions)
attend to the slices; a = norm(W_q p + W_o softmax(W_q p (W_k z)^t / sqrt(C)) W_v z), score = sigmoid(w a),
and the blocks see p * score behind an unweighted class token. One head; the residual is W_q p, not p. Source:
HSENet c7198f3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.layers import init_weights, run_blocks
from reaf_hsenet.models.vit3d import ViT3D


class SliceGuidedAttention(nn.Module):
    """Attention of patches to slices. dropout: of its weights and of the output projection, in training."""

    def __init__(self, width: int, slice_width: int, dropout: float = 0.1):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(n, width) for n in (width, slice_width, slice_width))
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, patches: Tensor, slices: Tensor) -> Tensor:
        """(B, N, C), (B, S, C_2d) -> (B, N, C)."""
        query, key, value = self.query(patches), self.key(slices), self.value(slices)
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.norm(query + self.dropout(self.proj(attended)))

    def attention(self, patches: Tensor, slices: Tensor) -> Tensor:
        """Return the weights of the slices for every patch, (B, N, S); for pictures and checks."""
        query, key = self.query(patches), self.key(slices)
        return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)


class ViT2E3(ViT3D):
    """ViT3D whose patches are weighted by slices; the other names are ViT3D's."""

    def __init__(self, *args, slices: int = 32, slice_width: int = 768, dropout: float = 0.1):
        super().__init__(*args)
        self.slices, self.slice_width = slices, slice_width
        width = self.pos_embed.shape[-1]
        self.guidance = SliceGuidedAttention(width, slice_width, dropout)
        self.score = nn.Linear(width, 1)
        self.guidance.apply(init_weights)
        init_weights(self.score)

    def patch_scores(self, patches: Tensor, slices: Tensor) -> Tensor:
        """Return scores (B, N) in (0, 1) of patches (B, N, C), from slices (B, S, C_2d)."""
        if slices.shape[1:] != (self.slices, self.slice_width):
            expected = (self.slices, self.slice_width)
            raise ValueError(f"slice features of {tuple(slices.shape[1:])}, this encoder takes {expected}")
        return self.score(self.guidance(patches, slices)).squeeze(-1).sigmoid()

    def forward(self, volume: Tensor, slices: Tensor) -> Tensor:
        patches = self.embed(volume)
        x = patches * self.patch_scores(patches, slices)[..., None]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)  # (B, 1 + N, C)
        return self.norm(run_blocks(self.blocks, x, self.grad_checkpoint))
