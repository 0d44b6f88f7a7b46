"""Low-rank adapters (Hu et al. 2021): y = W x + b + (alpha / r) B A dropout(x), W and b frozen.

A starts as peft 0.14 starts it (Kaiming-uniform, a = sqrt(5)), B as zeros, so that an adapted model starts as the base.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """An adapted nn.Linear. Of a matrix of `parts` stacked ones (a fused qkv has 3) only those in `adapted` change.

    x (..., in) -> (..., out). A: (len(adapted), r, in), B: (len(adapted), out / parts, r).
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        parts: int = 1,
        adapted: tuple[int, ...] = (0,),
    ):
        super().__init__()
        if r < 1 or base.out_features % parts or not all(0 <= i < parts for i in adapted):
            raise ValueError(f"rank {r}, parts {adapted} of {parts}: do not fit {base.out_features} outputs")
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.parts, self.adapted = parts, tuple(adapted)
        self.dropout = nn.Dropout(dropout)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(len(adapted), r, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(len(adapted), base.out_features // parts, r, **like))
        for a in self.lora_a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.register_buffer("merged", None, persistent=False)

    def update(self) -> Tensor:
        """What the adapters add to the matrix, (out, in)."""
        delta = torch.zeros_like(self.base.weight).unflatten(0, (self.parts, -1))
        delta[list(self.adapted)] = self.scale * self.lora_b @ self.lora_a
        return delta.flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None:
            return F.linear(x, self.merged, self.base.bias)
        y = self.base(x).unflatten(-1, (self.parts, -1))
        out, x = list(y.unbind(-2)), self.dropout(x)
        for i, a, b in zip(self.adapted, self.lora_a, self.lora_b, strict=True):
            out[i] = out[i] + self.scale * F.linear(F.linear(x, a), b)
        return torch.cat(out, dim=-1)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with W + (alpha / r) B A, as fast as the base. W itself stays, and is what state_dict holds."""
        self.merged = self.base.weight + self.update()

    def unmerge(self) -> None:
        """Back to W and its adapters."""
        self.merged = None


QKV = {"query": 0, "key": 1, "value": 2}


def add_lora(module: nn.Module, targets: tuple[str, ...], r: int, alpha: float, dropout: float = 0.0) -> int:
    """Adapt the Linear layers of `module` that `targets` name, and freeze them. Returns how many were adapted.

    A target is the last part of a layer's name (proj, fc1, ...), or query, key or value: that third of a fused qkv.
    Raises ValueError for a target that names no layer.
    """
    adapted, unused = 0, set(targets)
    for name, child in list(module.named_modules()):
        if not isinstance(child, nn.Linear):
            continue
        leaf = name.rpartition(".")[2]
        wanted = [t for t in targets if t == leaf or (leaf == "qkv" and t in QKV)]
        if not wanted:
            continue
        thirds = tuple(sorted(QKV[t] for t in wanted if t in QKV)) if leaf not in wanted else ()
        layer = LoraLinear(child, r, alpha, dropout, *((3, thirds) if thirds else ()))
        module.get_submodule(name.rpartition(".")[0]).register_module(leaf, layer)
        adapted, unused = adapted + 1, unused - set(wanted)
    if unused:
        raise ValueError(f"LoRA targets {', '.join(sorted(unused))} name no linear layer of this model")
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
    """The state_dict of the same model without adapters, which are added to the matrices they adapt."""
    state = module.state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            state[f"{name}.base.weight"] = layer.base.weight + layer.update()
            del state[f"{name}.lora_a"], state[f"{name}.lora_b"]
    return {name.replace(".base.", "."): tensor for name, tensor in state.items()}
