"""Checks of the spatial packer, of its attention alone, and of the projectors that it is compared with."""

from collections.abc import Iterator

import torch
from torch import Tensor

from parity_case import STRICT32, STRICT64, Case, Check, NotBuilt, equal
from reaf_hsenet.models.build import PROJECTORS as KINDS
from reaf_hsenet.models.packer import (
    AveragePool,
    CellAttention,
    M3DPool,
    Projector,
    SequencePool,
    SpatialPacker,
    cut_cells,
)
from reaf_hsenet.models.qformer import QFormer
from reaf_hsenet.models.text_guided import TextGuidedProjector
from reaf_hsenet.weights.files import load_strictly
from reaf_hsenet.weights.names import PROJECTORS, Row, export_state, import_state

PRECISIONS = ((torch.float32, STRICT32, ""), (torch.float64, STRICT64, "__f64"))
BFLOAT16 = 5e-2  # of the output's standard deviation: the kit's own tolerance


def check_packer_attention(case: Case) -> Iterator[Check]:
    grid, kernel, width = case["config"]["grid"], case["config"]["kernel_size"], case["config"]["emb_dim"]
    module = CellAttention(width).eval()
    state = import_state(
        PROJECTORS["spatial_packer"], {f"resolution_attention.{n}": t for n, t in case.weights().items()}
    )
    load_strictly(module, {n.removeprefix("cell_attn."): t for n, t in state.items()}, case.name)
    tokens = case.input("tokens").flatten(1, 3)
    for dtype, allowed, suffix in PRECISIONS:
        cells = cut_cells(tokens.to(dtype), grid, kernel)
        centroids = cells.mean(2)
        with torch.no_grad():
            module.to(dtype)
            found = {"out": module(centroids, cells), "attention": module.attention(centroids, cells)}
        found["low_res"] = centroids.unflatten(1, [n // k for n, k in zip(grid, kernel, strict=True)])
        yield from case.compare(found, allowed, suffix)


def check_spatial_packer(case: Case) -> Iterator[Check]:
    config = case["config"]
    packer = SpatialPacker(config["in_dim"], config["out_dim"], _grid(case), config["kernel_size"]).eval()
    yield from _load(packer, case)
    for dtype, allowed, suffix in PRECISIONS:
        tokens = case.input("tokens").to(dtype)
        with torch.no_grad():
            packer.to(dtype)
            found = {"out": packer(tokens), "packed": packer.pack(tokens)}
            found["attention"] = packer.attention(tokens)
        yield from case.compare(found, allowed, suffix)


def check_projector(case: Case) -> Iterator[Check]:
    projector = _build(case).eval()
    yield from _load(projector, case)
    if isinstance(projector, TextGuidedProjector):
        yield from _check_text_guided(case, projector)
        return
    for dtype, allowed, suffix in PRECISIONS:
        with torch.no_grad():
            found = {"out": projector.to(dtype)(case.input("tokens").to(dtype))}
        yield from case.compare(found, allowed, suffix)


def _check_text_guided(case: Case, projector: TextGuidedProjector) -> Iterator[Check]:
    tokens, slices, text = (case.input(n) for n in ("tokens", "slice_features", "text_feature"))
    text = text[:, projector.visual_tokens + 1 :]  # behind the first token and the visual ones
    found: dict[str, Tensor] = {}

    def run(dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            projector.to(dtype)
            inputs = tokens.to(dtype), slices.to(dtype), text.to(dtype)
            packed, planes = projector.head(projector.pack(inputs[0])), projector.slice_head(inputs[1])
            found["slice_logits"] = projector.slice_logits(packed, planes, inputs[2])
            found["slice_scores"] = found["slice_logits"].softmax(-1)
            return projector(*inputs)

    for dtype, allowed, suffix in PRECISIONS:
        found["out"] = run(dtype)
        found["out_bf16"] = case.stored["out_bf16"]  # compared below, with a tolerance of its own
        yield from case.compare(found, allowed, suffix)
    error = (run(torch.bfloat16).float() - case.stored["out_bf16"]).abs().max().item()
    yield Check("out_bf16", error, BFLOAT16 * case["outputs"]["out_bf16"]["std"])


def _grid(case: Case) -> tuple[int, int, int]:
    config = case["config"]
    return tuple(n // p for n, p in zip(config["image_size"], config["patch_size"], strict=True))


def _build(case: Case) -> Projector:
    """The published class's name says what is computed, and its settings where the class heeds them."""
    name, config, grid = case["reference"]["entry"].rpartition(".")[2], case["config"], _grid(case)
    sizes = config["in_dim"], config["out_dim"], grid
    if name == "ablation_qformerProjector":
        return QFormer(*sizes, queries=case["weights"]["query_embeds"][0])
    if name == "SpatialPoolingProjector_med2e3":
        slices = case["inputs"]["slice_features"]["shape"]
        return TextGuidedProjector(*sizes, slices=slices[1], slice_width=slices[2])
    head, size = {"layers": int(config["layer_num"]), "head": config["layer_type"]}, config["pooling_size"]
    if name == "ablation_sequencepooling_Projector":
        return SequencePool(*sizes, (1, size**2, size**2), **head)  # size**4 tokens
    if config["pooling_type"] == "sequence":
        return SequencePool(*sizes, (size, size, size), **head)
    if name == "SpatialPoolingProjector":
        return AveragePool(*sizes, (size, size, size), **head)
    pools = {
        "ablation_spatialpooling_Projector": AveragePool,
        "SpatialPoolingProjector2": AveragePool,
        "SpatialPoolingProjector_m3d": M3DPool,
    }
    if name not in pools:
        raise NotBuilt(f"projector {name}")
    return pools[name](*sizes, **head)


def _load(projector: Projector, case: Case) -> Iterator[Check]:
    """Load the case's weights, which must fit exactly and come back under their published names."""
    published, table = case.weights(), _table(projector, case)
    load_strictly(projector, import_state(table, published), case.name)
    back = export_state(table, projector.state_dict())
    same = back.keys() == published.keys() and all(torch.equal(back[n], published[n]) for n in published)
    yield equal("tensors given back", same, True)
    yield equal("visual tokens", projector.visual_tokens, case["outputs"]["out"]["shape"][1])


def _table(projector: Projector, case: Case) -> tuple[Row, ...]:
    """The names of the projector; a head of linear layers alone numbers them without gaps."""
    if case["config"].get("layer_type") == "linear":
        return tuple(Row(f"projector.{i}.", f"head.fc{i + 1}.") for i in range(3))
    return PROJECTORS[next(name for name, kind in KINDS.items() if kind is type(projector))]
