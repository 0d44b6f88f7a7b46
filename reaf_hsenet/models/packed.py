"""Linear layers whose matrix lies as the processor's kernels read it, for inference on CPUs.

torch rearranges a matrix for every product, or takes a kernel that uses one core when there are few rows.
Arranged once (oneDNN, what torch.compile does to frozen weights), a decoder's step takes half the time, in
the same memory and with the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.lora import LoraLinear

ROWS = 4  # of a typical step: the arrangement is chosen for it


def packable(weight: Tensor) -> bool:
    """Return whether this torch has the kernel for a matrix of this type and place."""
    if (
        weight.device.type != "cpu"
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    ):
        return False
    return (
        weight.dtype == torch.float32
        or weight.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """x (..., in) -> (..., out). Not trained."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    @property
    def weight(self) -> Tensor:
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "a packed layer has no gradient: pack() is for inference, under torch.inference_mode()"
            )
        if x.dtype != self.packed.dtype:  # under autocast
            x = x.to(self.packed.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class WidenedLinear(nn.Linear):
    """A Linear in half precision that computes products of more than ROWS rows in float32.

    A processor without instructions for bfloat16 (all that end at AVX2) multiplies it 7 times as slowly as
    float32, while few rows wait for the matrix from memory anyway.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= ROWS * x.shape[-1]:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(self.weight.dtype)


def pack(decoder: nn.Module) -> None:
    """Replace every Linear that can be packed, and every merged adapter, by a PackedLinear. Export before.

    A Linear in half precision that the processor is slow in becomes a WidenedLinear. The head of a tied
    decoder gets a matrix of its own beside the embedding.
    """
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, LoraLinear) and layer.merged is not None and packable(layer.merged):
            _replace(decoder, name, PackedLinear(layer.merged, layer.base.bias))
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, nn.Linear) and packable(layer.weight):
            _replace(decoder, name, PackedLinear(layer.weight, layer.bias))
        elif (
            isinstance(layer, nn.Linear)
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype in (torch.bfloat16, torch.float16)
        ):
            with torch.device("meta"):
                widened = WidenedLinear(layer.in_features, layer.out_features, layer.bias is not None)
            widened.weight, widened.bias = layer.weight, layer.bias
            _replace(decoder, name, widened)
    if decoder.lm_head is None and packable(decoder.embed_tokens.weight):
        decoder.lm_head = PackedLinear(decoder.embed_tokens.weight)


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)
