"""REAF's layer-wise fusion: the outputs of several blocks become one, (B, 1 + N, C) each.

The published "attention" is the blocks' outputs themselves. Its code takes a fusion method on the command
line and always computes `weighted_mean`, softmax(0, 1, ..., L - 1), so that the last layer weighs most; the
other names are computed here as they read. Source: REAF f9475f8, model/attention_hooks.py.
"""

from functools import reduce

import torch
from torch import Tensor, nn

METHODS = ("mean", "max", "weighted_mean", "inverse_weighted_mean", "random_weighted_mean", "last")


def layer_weights(method: str, layers: int, seed: int = 0) -> Tensor:
    """Return (L,) float32 weights of the layers, first block first; they sum to 1.

    `inverse_weighted_mean` weighs the first layer most, `random_weighted_mean` is a softmax of normal numbers
    drawn from `seed`, `last` (no fusion) is the last layer alone. Raises ValueError for another name.
    """
    order = torch.arange(layers, dtype=torch.float32)
    if method == "mean":
        return torch.full((layers,), 1 / layers)
    if method == "weighted_mean":
        return order.softmax(0)
    if method == "inverse_weighted_mean":
        return order.flip(0).softmax(0)
    if method == "random_weighted_mean":
        return torch.randn(layers, generator=torch.Generator().manual_seed(seed)).softmax(0)
    if method == "last":
        return (order == layers - 1).float()
    raise ValueError(f"fusion method {method!r}, expected max or one of {', '.join(METHODS)}")


class WeightedFusion(nn.Module):
    """sum_i w_i x_i with fixed weights, which are stored with the model."""

    def __init__(self, method: str, layers: int, seed: int = 0):
        super().__init__()
        self.register_buffer("weights", layer_weights(method, layers, seed))

    def forward(self, outputs: list[Tensor]) -> Tensor:
        return sum(weight * x for weight, x in zip(self.weights.unbind(), outputs, strict=True))


class MaxFusion(nn.Module):
    """The largest value over layers, of every channel of every token."""

    def forward(self, outputs: list[Tensor]) -> Tensor:
        return reduce(torch.maximum, outputs)


def build_fusion(method: str, layers: int, seed: int = 0) -> nn.Module:
    return MaxFusion() if method == "max" else WeightedFusion(method, layers, seed)
