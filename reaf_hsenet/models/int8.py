"""Weight-only int8: a matrix as int8 with one scale a row, W = scale * q, dequantised in the product.

A frozen decoder in half the memory of bfloat16; the counterpart of the published 8-bit loading (which quantises
activations too, by another library, on GPUs only). Eight bits a weight cost a product of Gaussian weights 0.7 % (rows
of 512) to 0.9 % (3,072) of its norm: largest / 127 / sqrt(12) of their standard deviation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8  # of a step; a processor's kernel then multiplies without writing the dequantised matrix down


class Int8Linear(nn.Module):
    """x (..., in) -> (..., out): (x q^t) * scale + bias. Made of a Linear. Not trained."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.parts = getattr(linear, "parts", {})
        self.register_buffer("quantised", (weight / scale[:, None]).round().to(torch.int8))  # (out, in)
        self.register_buffer("scale", scale)  # (out,)
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """The matrix itself, in the Linear's type."""
        return (self.quantised * self.scale[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        scale, rows = self.scale.to(x.dtype), x.numel() // x.shape[-1]
        if x.is_cpu and x.dtype == torch.bfloat16 and rows <= FEW_ROWS and not torch.is_grad_enabled():
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.quantised, scale).unflatten(0, x.shape[:-1])
        else:
            y = F.linear(x, self.quantised.to(x.dtype)) * scale
        return y if self.bias is None else y + self.bias


def quantise(module: nn.Module, name: str) -> None:
    """Put an Int8Linear in the place of the Linear called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, Int8Linear(module.get_submodule(name)))


def quantise_decoder(decoder: nn.Module) -> None:
    """Every linear layer but the head, whose logits would suffer most (the published loading leaves it too)."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            quantise(decoder, name)
