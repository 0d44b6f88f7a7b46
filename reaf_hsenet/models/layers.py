"""Parts that every encoder here is built of: attention, MLP, pre-norm block, 3D patch embedding.

Shapes: x (B, N, C) in and out, unless said otherwise. N tokens, C width.
"""

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


class FusedLinear(nn.Linear):
    """Several linear layers of one input as one matrix. parts: the rows of each, by name, in order."""

    def __init__(self, inputs: int, parts: dict[str, int], bias: bool = True):
        super().__init__(inputs, sum(parts.values()), bias)
        self.parts = dict(parts)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^t / sqrt(C / heads)) v, through torch's fused kernel."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = FusedLinear(width, dict.fromkeys(("query", "key", "value"), width), qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, 1, 1, N) or (B, 1, N, N), True where a key may be attended to."""
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (B, heads, N, C / heads)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is 0 with probability p, else scaled by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.p
        return branch * (kept / (1 - self.p)).to(branch.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: int,
        qkv_bias: bool = True,
        eps: float = 1e-5,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, mlp)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed3D(nn.Module):
    """Cut a volume into patches and map each to a token with one Linear.

    (B, 1, D, H, W) -> (B, d*h*w, C), depth-major; a patch is flattened as (depth, height, width).
    """

    def __init__(self, patch: tuple[int, int, int], width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(patch[0] * patch[1] * patch[2], width)

    def forward(self, volume: Tensor) -> Tensor:
        batch = volume.shape[0]
        d, h, w = (n // p for n, p in zip(volume.shape[2:], self.patch, strict=True))
        x = volume.reshape(batch, d, self.patch[0], h, self.patch[1], w, self.patch[2])
        x = x.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, d * h * w, -1)
        return self.proj(x)


def init_weights(module: nn.Module) -> None:
    """Initialise matrices Xavier-uniform, biases 0, embeddings with std 0.02.

    A run from scratch may draw others (models/clip.py: start_as_published).
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def run_block(block: nn.Module, x: Tensor, grad_checkpoint: bool, *args) -> Tensor:
    """Run a block; with `grad_checkpoint` its inner activations are computed again in the backward pass."""
    if grad_checkpoint and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(block, x, *args, use_reentrant=False)
    return block(x, *args)


def run_blocks(blocks: nn.ModuleList, x: Tensor, grad_checkpoint: bool, *args) -> Tensor:
    for block in blocks:
        x = run_block(block, x, grad_checkpoint, *args)
    return x
