"""BERT and RoBERTa encoders: post-norm transformers over word, position and token-type embeddings.

ids (B, T) -> (B, T, C). Source: Devlin et al. 2019 and Liu et al. 2019, as transformers 4.49 computes them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.layers import Attention, Mlp, init_weights, run_blocks


class PostNormBlock(nn.Module):
    """norm(x + attn(x)), then norm(x + mlp(x))."""

    def __init__(
        self, width: int, heads: int, mlp: int, eps: float, dropout: float, attention_dropout: float
    ):
        super().__init__()
        self.attn = Attention(width, heads, dropout=attention_dropout)
        self.norm1 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, mlp)
        self.norm2 = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.norm1(x + self.dropout(self.attn(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class TextEncoder(nn.Module):
    """kind `bert` numbers positions 0, 1, ...; `roberta` numbers real tokens from pad_id + 1."""

    def __init__(
        self,
        vocab: int,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        positions: int,
        token_types: int = 2,
        layer_norm_eps: float = 1e-12,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        pad_id: int = 0,
        kind: str = "bert",
    ):
        super().__init__()
        self.kind, self.pad_id, self.grad_checkpoint = kind, pad_id, False
        self.word_embed = nn.Embedding(vocab, width, padding_idx=pad_id)
        self.pos_embed = nn.Embedding(positions, width)
        self.type_embed = nn.Embedding(token_types, width)
        self.norm = nn.LayerNorm(width, layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            PostNormBlock(
                width,
                heads,
                mlp=mlp,
                eps=layer_norm_eps,
                dropout=dropout,
                attention_dropout=attention_dropout,
            )
            for _ in range(depth)
        )
        self.apply(init_weights)

    def position_ids(self, ids: Tensor) -> Tensor:
        """Return (B, T) rows of the position table; a RoBERTa pad gets pad_id, wherever it stands."""
        if self.kind == "bert":
            return ids.new_ones(ids.shape).cumsum(1) - 1
        real = (ids != self.pad_id).long()
        return real.cumsum(1) * real + self.pad_id

    def forward(
        self,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        token_types: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Encode ids (B, T), or `embeddings` (B, T, C) instead. mask: (B, T), nonzero at real tokens."""
        if embeddings is None:
            positions, embeddings = self.position_ids(ids), self.word_embed(ids)
        else:
            # Without ids no pad is known: every column counts.
            first = 0 if self.kind == "bert" else self.pad_id + 1
            shape = embeddings.shape[:2]
            positions = embeddings.new_ones(shape, dtype=int).cumsum(1) - 1 + first
        if token_types is None:
            token_types = positions.new_zeros(positions.shape)
        x = self.norm(embeddings + self.type_embed(token_types) + self.pos_embed(positions))
        keys = None if mask is None else mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        return run_blocks(self.blocks, self.dropout(x), self.grad_checkpoint, keys)


class Pooler(nn.Module):
    """BERT's pooler: tanh of a Linear of the first token, (B, T, C) -> (B, C); not for dual encoders."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.tanh(self.dense(hidden[:, 0]))
