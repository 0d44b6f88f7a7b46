"""Weight-only int8: a matrix as int8 with one scale a row, W = scale * q, dequantised in the product.

A frozen decoder in half the memory of bfloat16; the counterpart of the published 8-bit loading (which
quantises activations too, by another library, on GPUs only). Eight bits a weight cost a product of Gaussian
weights 0.7 % (rows of 512) to 0.9 % (3,072) of its norm: largest / 127 / sqrt(12) of their standard
deviation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8  # of a step; a processor's kernel then multiplies without writing the dequantised matrix down


class _Product(torch.autograd.Function):
    """x W^t. W is dequantised again in the backward pass: only the int8 matrix is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, quantised: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(quantised, scale)
        return F.linear(x, dequantise(quantised, scale, x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient @ dequantise(*ctx.saved_tensors, gradient.dtype), None, None


def dequantise(quantised: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (quantised * scale[:, None]).to(dtype)


class Int8Linear(nn.Module):
    """x (..., in) -> (..., out): x W^t + bias, W = scale * q. Made of a Linear. Not trained."""

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
        """The dequantised matrix, in the Linear's type."""
        return dequantise(self.quantised, self.scale, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.numel() // x.shape[-1]
        if x.is_cpu and x.dtype == torch.bfloat16 and rows <= FEW_ROWS and not torch.is_grad_enabled():
            y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.quantised, self.scale.to(x.dtype))
            y = y.unflatten(0, x.shape[:-1])
        else:
            y = _Product.apply(x, self.quantised, self.scale)
        return y if self.bias is None else y + self.bias


def quantise(module: nn.Module, name: str) -> None:
    """Put an Int8Linear in the place of the Linear called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, Int8Linear(module.get_submodule(name)))


def quantise_decoder(decoder: nn.Module) -> None:
    """Quantise every linear layer but the head, whose logits would suffer most, as published loading does."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            quantise(decoder, name)
