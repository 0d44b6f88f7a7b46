"""Low-rank adapters (Hu et al. 2021): y = W x + b + (alpha / r) B A dropout(x), W and b frozen.

A starts as peft 0.14 starts it (Kaiming-uniform, a = sqrt(5)), B as zeros, so that an adapted model starts as
the base.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reaf_hsenet.models.int8 import Int8Linear


class LoraLinear(nn.Module):
    """An adapted Linear, (..., in) -> (..., out).

    adapted: parts of a fused matrix that change, each with an adapter of its own; none: all of it, with one.
    lora_a: (n * r, in), lora_b: (rows of the n adapted parts, r), part after part. Adapters are float32;
    outside
    autocast they compute in the type of x.
    """

    def __init__(
        self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0, adapted: tuple[str, ...] = ()
    ):
        super().__init__()
        parts = getattr(base, "parts", {})
        if r < 1 or not all(name in parts for name in adapted):
            raise ValueError(
                f"rank {r}, parts {adapted} of {tuple(parts)}: do not fit {base.out_features} outputs"
            )
        self.base, self.r, self.scale, self.adapted = base.requires_grad_(False), r, alpha / r, tuple(adapted)
        self.dropout = nn.Dropout(dropout)
        ends, start = {"": (0, base.out_features)}, 0
        for name, size in parts.items():
            ends[name] = (start, start + size)
            start += size
        self.spans = [ends[name] for name in self.adapted or ("",)]
        rows = sum(end - start for start, end in self.spans)
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        self.lora_a = nn.Parameter(torch.empty(len(self.spans) * r, base.in_features, device=device))
        self.lora_b = nn.Parameter(torch.zeros(rows, r, device=device))
        for a in self.lora_a.split(r):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.register_buffer("merged", None, persistent=False)
        self.train(base.training)

    def pairs(self) -> list[tuple[int, int, Tensor, Tensor]]:
        """Yield (first row, end row, A (r, in), B (rows, r)) of each adapter."""
        b = self.lora_b.split([end - start for start, end in self.spans])
        return [
            (*span, *ab)
            for span, ab in zip(self.spans, zip(self.lora_a.split(self.r), b, strict=True), strict=True)
        ]

    def merged_weight(self) -> Tensor:
        """Return W + (alpha / r) B A, (out, in)."""
        weight = self.base.weight.detach().clone()
        for start, end, a, b in self.pairs():
            weight[start:end] += (self.scale * b @ a).to(weight.dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, self.merged, self.base.bias)
        y = self.base(x)
        low = F.linear(self.dropout(x), self.lora_a.to(x.dtype)) * self.scale  # (..., n * r)
        if not self.adapted:
            return y + F.linear(low, self.lora_b.to(x.dtype))
        added, last = [], 0
        for (start, end, _, b), part in zip(self.pairs(), low.split(self.r, dim=-1), strict=True):
            added += [y[..., last:start], y[..., start:end] + F.linear(part, b.to(x.dtype))]
            last = end
        return torch.cat((*added, y[..., last:]), dim=-1)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W + (alpha / r) B A from now on, as fast as the base. state_dict still holds W."""
        self.merged = self.merged_weight()

    def unmerge(self) -> None:
        """Compute with W and its adapters again."""
        self.merged = None


def add_lora(module: nn.Module, targets: tuple[str, ...], r: int, alpha: float, dropout: float = 0.0) -> int:
    """Adapt and freeze the Linear layers of `module` that `targets` name. Returns how many were adapted.

    A target is the last part of a layer's name (proj, fc1, qkv_proj, ...), or a part of a fused matrix (query
    of qkv, gate_proj of gate_up_proj). Raises ValueError for a target that names no layer.
    """
    adapted, unused = 0, set(targets)
    for name, child in list(module.named_modules()):
        if not isinstance(child, (nn.Linear, Int8Linear)):
            continue
        leaf = name.rpartition(".")[2]
        parts = tuple(part for part in getattr(child, "parts", ()) if part in targets)
        if leaf not in targets and not parts:
            continue
        wanted = () if leaf in targets else parts
        module.get_submodule(name.rpartition(".")[0]).register_module(
            leaf, LoraLinear(child, r, alpha, dropout, wanted)
        )
        adapted, unused = adapted + 1, unused - {leaf, *parts}
    if unused:
        raise ValueError(
            f"LoRA targets {', '.join(sorted(unused))} name no linear layer of this model that can be "
            f"trained (a packed one cannot)"
        )
    return adapted


def merge_lora(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, LoraLinear):
            layer.merge()


def unmerge_lora(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, LoraLinear):
            layer.unmerge()


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of a model without adapters: they are added to the matrices that they adapt."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            state[f"{name}.base.weight"] = layer.merged_weight()
            del state[f"{name}.lora_a"], state[f"{name}.lora_b"]
    return {name.replace(".base.", "."): tensor for name, tensor in state.items()}
