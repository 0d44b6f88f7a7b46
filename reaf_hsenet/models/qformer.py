"""A Q-Former as projector: learned queries attend to the patch tokens (see packer.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.layers import Attention
from reaf_hsenet.models.packer import Projector, Size3


class BatchAttention(Attention):
    """Self-attention over the batch axis, where all samples have the same queries.

    That is a mean of equal values, proj(value(x)). W_q and W_k change nothing; they are parameters because
    published weights have them.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.qkv.weight.chunk(3)[2], self.qkv.bias.chunk(3)[2]
        return self.proj(F.linear(x, weight, bias))


class CrossAttention(Attention):
    """(B, K, C) attend to (B, N, C): softmax(q k^t / sqrt(C / heads)) v, with k and v of the second."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        width = x.shape[-1]
        (w_q, w_kv), (b_q, b_kv) = (p.split((width, 2 * width)) for p in (self.qkv.weight, self.qkv.bias))
        q = F.linear(x, w_q, b_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, K, C / heads)
        k, v = F.linear(context, w_kv, b_kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QFormerBlock(nn.Module):
    """norm(x + self_attn(x)), then norm(x + fc2(relu(fc1(x)))), torch's TransformerEncoderLayer."""

    def __init__(self, width: int, heads: int, mlp: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(width, heads, dropout=dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        return self.norm2(x + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x))))))


class QFormer(Projector):
    """K learned queries: s = self_attn(queries), z = cross_attn(s, x), `depth` blocks over z, y = head(z).

    The two attentions have no residual and no norm. kernel: as many queries as cells; None, as published: 32.
    The queries' self-attention is over the batch axis, as published (see BatchAttention). dropout: in the
    blocks, in training. Source: ablation_qformerProjector.
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        grid: Size3,
        kernel: Size3 | None = None,
        queries: int = 32,
        depth: int = 2,
        heads: int = 8,
        mlp: int = 2048,
        dropout: float = 0.1,
        **kwargs,
    ):
        super().__init__(width, out_width, grid, kernel or grid, **kwargs)  # a grid divides itself
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.visual_tokens = self.visual_tokens if kernel else queries
        self.queries = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.visual_tokens, width)))
        self.self_attn = BatchAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.blocks = nn.ModuleList(QFormerBlock(width, heads, mlp, dropout) for _ in range(depth))

    def pack(self, tokens: Tensor) -> Tensor:
        queries = self.self_attn(self.queries[None]).expand(len(tokens), -1, -1)
        x = self.cross_attn(queries, tokens)  # (B, K, C)
        for block in self.blocks:
            x = block(x)
        return x
