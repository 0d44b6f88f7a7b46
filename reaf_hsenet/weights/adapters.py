"""Adapters of a decoder from and to peft's folders: adapter_config.json and adapter_model.safetensors.

A tensor `base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight` is A (r, in), `lora_B` is B (out,
r); in a model's memory, and in checkpoints of named parameters, peft says `lora_A.default.weight`. Neither
holds alpha.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.files import find_folder, read_object, write_json
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.int8 import Int8Linear
from reaf_hsenet.models.lora import LoraLinear, add_lora
from reaf_hsenet.weights.files import read_weights_file, write_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Settings that change no output of a trained adapter, and those of which some values are implemented. All
# others must be off: null, false or empty.
INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
}
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}


class Place(NamedTuple):
    """Where an adapter goes: our layer, the part of it ("" for all), its inputs and rows, and whether the
    published model has a layer of this name.
    """

    layer: str
    part: str
    inputs: int
    rows: int
    published: bool


def load_adapter(decoder: Decoder, source: str) -> None:
    """Adapt the layers that the tensors of a peft folder or hub id name, with the r, alpha and dropout of its
    config.

    Raises InputError, before anything is changed, for what is missing, not known, of another shape or not
    implemented.
    """
    folder = find_folder(source, [CONFIG, WEIGHTS])
    r, alpha, dropout, targets = adapter_settings(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        found = (
            "; adapter_model.bin is a pickle, which is not read"
            if (folder / "adapter_model.bin").is_file()
            else ""
        )
        raise InputError(f"{folder}: has no {WEIGHTS}{found}: save the adapter as safetensors")
    state, source = read_weights_file(folder / WEIGHTS), str(folder / WEIGHTS)
    load_adapter_state(decoder, state, alpha, dropout, source=source, targets=targets, r=r)


def adapter_settings(path: Path) -> tuple[int, float, float, tuple[str, ...]]:
    """Return r, alpha, dropout and target layers (none for a pattern) of an adapter_config.json."""
    config = read_object(path)
    for key, value in {"peft_type": None, **config}.items():
        if value not in ONLY[key] if key in ONLY else value and key not in INERT:
            raise InputError(
                f"{path}: {key} {value!r:.80} is not implemented; export the adapter as plain LoRA, or merged"
            )
    values = {"lora_dropout": 0, **config}
    for key, kinds, fits, expected in (
        ("r", (int,), lambda x: x > 0, "a positive whole number"),
        ("lora_alpha", (int, float), lambda x: abs(x) < 1e9, "a number"),
        ("lora_dropout", (int, float), lambda x: 0 <= x < 1, "a probability below 1"),
    ):
        value = values.get(key)
        if type(value) not in kinds or not fits(value):
            raise InputError(f"{path}: {key} is {value!r:.80}; expected {expected}")
    targets = config.get("target_modules")
    targets = tuple(t for t in targets if isinstance(t, str)) if isinstance(targets, list) else ()
    return values["r"], values["lora_alpha"], values["lora_dropout"], targets


def load_adapter_state(
    decoder: Decoder,
    state: dict[str, Tensor],
    alpha: float,
    dropout: float = 0.0,
    source: str = "adapter",
    targets: tuple[str, ...] = (),
    r: int | None = None,
) -> None:
    """Adapt and fill the layers that tensors under either form of peft's names name; all is checked first.

    targets: names of layers that all must have an adapter. r: None takes that of the first A. Raises
    InputError.
    """
    r = first_rank(state) if r is None else r
    for layer, (parts, a, b) in _match(decoder, state, r, source, targets).items():
        parent, _, leaf = layer.rpartition(".")
        add_lora(decoder.get_submodule(parent), parts or (leaf,), r, alpha, dropout)
        adapted = decoder.get_submodule(layer)
        with torch.no_grad():
            adapted.lora_a.copy_(a)
            adapted.lora_b.copy_(b)


def first_rank(state: dict[str, Tensor]) -> int:
    """Return the rank of the first A; 0 without one."""
    return next((t.shape[0] for name, t in state.items() if ".lora_A." in name and t.ndim == 2), 0)


def adapter_parameters(decoder: Decoder, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the adapters' tensors under the names of an adapted decoder's parameters.

    The decoder is not touched and may be without data (meta).
    """
    found = {}
    for layer, (_, a, b) in _match(decoder, state, first_rank(state), source).items():
        found[f"{layer}.lora_a"], found[f"{layer}.lora_b"] = a, b
    return found


def _match(
    decoder, state: dict[str, Tensor], r: int, source: str, targets=()
) -> dict[str, tuple[tuple[str, ...], Tensor, Tensor]]:
    """Our layer -> the parts that are adapted (none for all of it), A and B, all checked."""
    if any(isinstance(layer, LoraLinear) for layer in decoder.modules()):
        raise InputError(
            f"{source}: the decoder has adapters already; load one adapter, or export the other one merged"
        )
    places, found, problems = _places(decoder), {}, []
    for name, tensor in state.items():
        match = NAME.fullmatch(name)
        if not match or match[1] not in places:
            problems.append(f"{name} is not known")
        elif match.groups() in found:
            problems.append(f"{name} is there under peft's other name too")
        else:
            found[match.groups()] = name, tensor
    paths = dict.fromkeys(path for path, _ in found)
    wanted = [
        path
        for path, place in places.items()
        if place.published and f".{path}".endswith(tuple(f".{t}" for t in targets))
    ]
    for path in dict.fromkeys((*paths, *wanted)):
        place = places[path]
        for matrix, shape in (("A", (r, place.inputs)), ("B", (place.rows, r))):
            name, tensor = found.get((path, matrix), (f"base_model.model.{path}.lora_{matrix}.weight", None))
            if tensor is None:
                problems.append(f"{name} is missing")
            elif tuple(tensor.shape) != shape or not r:
                problems.append(f"{name} is {tuple(tensor.shape)}, expected {shape}")
            elif not tensor.is_floating_point():
                problems.append(
                    f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected floating point"
                )
    layers: dict[
        str, list[str]
    ] = {}  # our layers, and the published paths of their adapters in the order of the rows
    for path, place in places.items():
        if path in paths:
            layers.setdefault(place.layer, []).append(path)
    problems += [
        f"{' and '.join(p)} change the same matrix"
        for p in layers.values()
        if len(p) > 1 and not places[p[0]].part
    ]
    if problems or not found:
        raise InputError(
            f"{source}: does not fit this decoder: {first_six(problems, '; ') or 'it has no adapters'}"
        )
    return {
        layer: (
            tuple(filter(None, (places[path].part for path in pieces))),
            torch.cat([found[path, "A"][1] for path in pieces]),
            torch.cat([found[path, "B"][1] for path in pieces]),
        )
        for layer, pieces in layers.items()
    }


def _places(decoder: Decoder) -> dict[str, Place]:
    """Published paths of linear layers, those of fused matrices both whole and in parts."""
    found = {}
    for layer, module in decoder.named_modules():
        if not isinstance(module, (nn.Linear, Int8Linear)):
            continue
        layer = layer.removesuffix(".base")
        path, parts = _published(layer), getattr(module, "parts", {})
        split = bool(parts) and decoder.config.family == "llama"
        found[path] = Place(layer, "", module.in_features, module.out_features, not split)
        for part, rows in parts.items():
            found[f"{path.rpartition('.')[0]}.{part}"] = Place(layer, part, module.in_features, rows, split)
    return found


def _published(layer: str) -> str:
    return layer if layer == "lm_head" else f"model.{layer}"


def adapter_state(decoder: Decoder) -> dict[str, Tensor]:
    """Return the adapters under the names of peft's files. One adapter of a whole matrix that Llama has in
    parts becomes one of each part, with the same A. (Phi's matrices, where adapted in parts, are written
    so; only this project reads that.)
    """
    state = {}
    for layer, module in decoder.named_modules():
        if not isinstance(module, LoraLinear):
            continue
        parent, _, leaf = _published(layer).rpartition(".")
        pairs, parts = [(a, b) for _, _, a, b in module.pairs()], module.adapted
        if not parts and decoder.config.family == "llama" and hasattr(module.base, "parts"):
            sizes = module.base.parts
            parts, pairs = tuple(sizes), [(pairs[0][0], b) for b in pairs[0][1].split(list(sizes.values()))]
        for part, (a, b) in zip(parts or (leaf,), pairs, strict=True):
            name = ".".join(filter(None, ("base_model.model", parent, part)))  # lm_head has no parent
            state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = a.detach(), b.detach()
    return state


def save_adapter(decoder: Decoder, folder: Path, base: str = "") -> None:
    """Write a folder that peft reads. base: the folder or hub id of the decoder without adapters, for the
    reader.
    """
    folder, state = Path(folder), adapter_state(decoder)
    kinds = {(m.r, m.scale, m.dropout.p) for m in decoder.modules() if isinstance(m, LoraLinear)}
    if len(kinds) != 1:
        raise ValueError(
            f"expected adapters of one rank, alpha and dropout; the decoder has {len(kinds)} kinds"
        )
    r, scale, dropout = kinds.pop()
    alpha = round(scale * r, 6)
    adapted = {NAME.fullmatch(name)[1] for name in state}
    leaves = tuple({path.rpartition(".")[2] for path in adapted})
    everywhere = adapted == {p for p in _places(decoder) if p.rpartition(".")[2] in leaves}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(leaves if everywhere else adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_weights(folder / WEIGHTS, state)
    write_json(folder / CONFIG, config)
