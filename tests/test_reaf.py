"""REAF's encoder: hierarchy, fusion and saliency against plain loops, for grids and settings no golden
number covers.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from networks import SMALL_REAF as SMALL
from reaf_hsenet.config import FUSIONS
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.clip import build_dual_encoder, build_vision
from reaf_hsenet.models.fusion import build_fusion, layer_weights
from reaf_hsenet.models.layers import DropPath
from reaf_hsenet.models.saliency import RegionalSaliency
from reaf_hsenet.presets import PRESETS

# 3 x 4 x 2 patches, so that no two axes are alike and regions of 2 x 3 x 1 leave a remainder on two of them.


def encoder(**changes):
    torch.manual_seed(0)
    model = build_vision(replace(SMALL, **changes)).double().eval()
    with torch.no_grad():  # larger than at the start, so that norms and maps differ between tokens
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def volumes(batch=3):
    return torch.rand(batch, 1, *SMALL.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masks_by_loops(norms, size, regions, suppression, partial):
    """(B, d, h, w) norms -> factors, region by region."""
    factors = torch.full_like(norms, suppression)
    starts = [range(0, n if partial else n - r + 1, r) for n, r in zip(norms.shape[1:], size, strict=True)]
    for sample, factor in zip(norms, factors, strict=True):
        boxes = [
            tuple(slice(s, s + r) for s, r in zip(corner, size, strict=True)) for corner in product(*starts)
        ]
        for box in sorted(boxes, key=lambda b: -sample[b].sum())[:regions]:
            factor[box] = 1
    return factors


def by_loops(model, volume, config):
    """Encode one sample at a time, slices in a list, as the method reads. Returns the feature and both
    maps.
    """
    features, maps = [], {"scan": [], "slice": []}
    d = config.grid[0]
    for sample in volume:
        patches = (model.patch_embed(sample[None]) + model.pos_embed)[0]  # (N, C)
        cls_token, collected = model.cls_token[0], {"scan": [], "slice": []}
        slices = [torch.cat((cls_token, p)) for p in patches.chunk(d)]
        for i, block in enumerate(model.blocks):
            if i in config.scan_layers:
                mean = torch.stack([s[0] for s in slices]).mean(0, keepdim=True)
                x = block(torch.cat([mean, *(s[1:] for s in slices)])[None])[0]
                collected["scan"].append(x)
                slices = [torch.cat((x[:1], p)) for p in x[1:].chunk(d)]
            else:
                slices = [block(s[None])[0] for s in slices]
                class_tokens = torch.stack([s[0] for s in slices])
                first = (
                    class_tokens[:1] if config.slice_class == "first" else class_tokens.mean(0, keepdim=True)
                )
                collected["slice"].append(torch.cat([first, *(s[1:] for s in slices)]))
        pooled = []
        for name in ("scan", "slice"):
            outputs = collected[name]
            weights = layer_weights(config.fusion, len(outputs), config.fusion_seed).double()
            fused = sum(w * x for w, x in zip(weights, outputs, strict=True))
            norms = fused.norm(dim=-1)
            factors = masks_by_loops(
                norms[1:].view(1, *config.grid),
                config.region_size,
                config.regions,
                config.suppression,
                config.remainder == "regions",
            ).flatten()
            score = norms[1] if config.class_score == "first_patch" else norms[0]
            maps[name].append(torch.cat((score[None], norms[1:] * factors)))
            pooled.append(maps[name][-1].softmax(0) @ outputs[-1])
        x = x + model.fusion_layer(torch.cat(pooled))
        features.append(model.norm(x)[0])
    return torch.stack(features), {name: torch.stack(m) for name, m in maps.items()}


VARIANTS = [
    {},
    {"class_score": "class_token"},
    {"remainder": "regions", "regions": 3},
    {"slice_class": "mean"},
    {"fusion": "inverse_weighted_mean", "suppression": 0.5},
    {"regions": 100},
    {"fusion": "random_weighted_mean", "fusion_seed": 7},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_encoder_equals_one_written_with_loops(changes):
    config, model = replace(SMALL, **changes), encoder(**changes)
    with torch.no_grad():
        found, (feature, maps) = model.encode(volumes()), by_loops(model, volumes(), config)
    assert torch.allclose(found.tokens[:, 0], feature, atol=1e-12)
    for name, branch in found.branches.items():
        assert torch.allclose(branch.map, maps[name], atol=1e-12)


@pytest.mark.parametrize("changes", [c for c in VARIANTS if c], ids=str)
def test_every_variant_changes_the_feature(changes):
    with torch.no_grad():
        published, other = (encoder(**c)(volumes())[:, 0] for c in ({}, changes))
    assert (published - other).abs().max() > 1e-6


def test_a_sample_does_not_depend_on_its_batch():
    model = encoder()
    with torch.no_grad():
        whole = model(volumes())
        assert torch.allclose(torch.cat([model(v[None]) for v in volumes()]), whole, atol=1e-12)


def test_gradients_flow_through_norms_and_not_through_the_mask():
    model, volume = encoder(), volumes(2)
    model(volume)[:, 0].square().sum().backward()
    vectorised = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    by_loops(model, volume, SMALL)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(vectorised[name], parameter.grad, atol=1e-10), name
        assert parameter.grad.abs().max() > 0, name


def test_salient_regions_for_pictures_are_those_of_the_map():
    model, volume = encoder(), volumes()
    with torch.no_grad():
        regions, branches = model.salient_regions(volume), model.encode(volume).branches
    for name in ("scan", "slice"):
        assert regions[name].shape == (3, *SMALL.grid) and ((regions[name] > 0).sum((1, 2, 3)) == 6).all()
        norms = branches[name].fused[:, 1:].norm(dim=-1).unflatten(1, SMALL.grid)
        kept = torch.where(regions[name] > 0, norms, 0.1 * norms)
        assert torch.allclose(branches[name].map[:, 1:].unflatten(1, SMALL.grid), kept)
    assert encoder(regions=0).salient_regions(volume) == {} == encoder(fusion=None).salient_regions(volume)


def test_fusion_weights_are_the_named_ones():
    softmax = torch.tensor([0.0, 1.0, 2.0, 3.0]).softmax(0)
    assert torch.equal(layer_weights("weighted_mean", 4), softmax)
    assert torch.equal(layer_weights("inverse_weighted_mean", 4), softmax.flip(0))
    assert torch.equal(layer_weights("mean", 4), torch.full((4,), 0.25))
    assert layer_weights("last", 3).tolist() == [0, 0, 1]
    drawn = layer_weights("random_weighted_mean", 4, seed=3)
    assert drawn.sum() == pytest.approx(1) and drawn.min() > 0 and len(set(drawn.tolist())) == 4
    assert torch.equal(drawn, layer_weights("random_weighted_mean", 4, seed=3))
    assert not torch.equal(drawn, layer_weights("random_weighted_mean", 4, seed=4))
    with pytest.raises(ValueError, match="median"):
        layer_weights("median", 4)


def test_fusion_weights_are_stored_with_the_model():
    model, other = (
        encoder(fusion="random_weighted_mean"),
        encoder(fusion="random_weighted_mean", fusion_seed=1),
    )
    state = model.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other.fusion["slice"].weights, state["fusion.slice.weights"])


def test_max_fusion_is_elementwise():
    outputs = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0]), torch.tensor([0.0, 4.0])]
    assert build_fusion("max", 3)(outputs).tolist() == [3, 5]


@pytest.mark.parametrize("method", FUSIONS)
def test_every_fusion_method_trains_every_parameter(method):
    model = encoder(fusion=method).train()
    model(volumes())[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_without_fusion_the_feature_is_hlips():
    model = encoder(fusion=None)
    assert not any("fusion" in name for name in model.state_dict())
    seen = []
    model.blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        assert torch.equal(model(volumes()), model.norm(seen[0]))


@pytest.mark.parametrize("scan_layers", [(), (0, 1, 2, 3), (0, 2)])
def test_any_hierarchy_runs_also_one_kind_alone_or_slices_last(scan_layers):
    model = encoder(scan_layers=scan_layers)
    with torch.no_grad():
        encoding = model.encode(volumes())
    assert encoding.tokens.shape == (3, 25, 24)
    expected = ({"scan"} if scan_layers else set()) | ({"slice"} if len(scan_layers) < 4 else set())
    assert set(encoding.branches) == expected
    assert model.fusion_layer.in_features == 24 * len(expected)


def test_slices_see_only_themselves():
    model = encoder(scan_layers=(), fusion=None)
    one, other = volumes(1), volumes(1)
    other[:, :, 4:] = 0  # the last slice of patches
    tokens = []
    model.blocks[-1].register_forward_hook(lambda _, __, out: tokens.append(out))
    with torch.no_grad():
        model(one), model(other)
    assert torch.equal(tokens[0][:2], tokens[1][:2]) and not torch.equal(tokens[0][2], tokens[1][2])


def test_regions_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(InputError, match=r"--region-size \(4, 3, 1\).*grid of \(3, 4, 2\)"):
        replace(SMALL, region_size=(4, 3, 1))
    with pytest.raises(ValueError, match="do not fit"):
        RegionalSaliency((3, 4, 2), (1, 5, 1), 1, 0.1)


def test_a_volume_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(6, 16, 12\).*takes \(6, 16, 8\)"):
        encoder()(torch.rand(1, 1, 6, 16, 12, dtype=torch.float64))


def test_drop_path_drops_whole_sequences_and_keeps_the_mean():
    drop, x = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    out = drop(x)
    kept = out[:, 0, 0]
    assert sorted(set(kept.tolist())) == pytest.approx([0, 4 / 3]) and (out == kept[:, None, None]).all()
    assert kept.mean() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x


def test_drop_path_grows_linearly_over_the_published_depth():
    with torch.device("meta"):
        model = build_dual_encoder(PRESETS["reaf-base"])
    rates = [block.drop_path.p for block in model.vision.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and rates[1] == pytest.approx(0.2 / 11)


def test_base_preset_has_the_published_sizes():
    with torch.device("meta"):
        model = build_dual_encoder(PRESETS["reaf-base"])
    assert model.vision.grid == (14, 14, 14) and model.vision.pos_embed.shape == (1, 2744, 768)
    assert model.vision.patch_embed.proj.weight.shape == (768, 8 * 24 * 24)
    assert model.vision_proj.weight.shape == (512, 768) and model.vision_proj.bias is None
    assert model.vision.blocks[0].attn.qkv.bias is not None and model.vision.norm.eps == 1e-6
    assert sorted(model.vision.scan_layers) == [2, 5, 8, 11] and model.scale_kind == "exp"


class NoHostReads(TorchDispatchMode):
    """Fails on every operation whose result the host must wait for, on any device."""

    READS = {
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.nonzero,
        torch.ops.aten.equal,
        torch.ops.aten.masked_select,
        torch.ops.aten.unique_dim,
        torch.ops.aten._unique2,
    }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in self.READS, f"{function} reads a value on the host"
        return function(*args, **(kwargs or {}))


def test_forward_and_backward_never_wait_for_a_value():
    model, volume = encoder(drop_path=0.5).train(), volumes()
    with NoHostReads():
        model(volume)[:, 0].sum().backward()
    with pytest.raises(AssertionError, match="reads a value"), NoHostReads():
        volume.sum().item()


@pytest.mark.gpu
def test_forward_on_a_gpu_does_not_synchronise():
    model, volume = encoder(drop_path=0.5).train().cuda(), volumes().cuda()
    model(volume)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(volume)[:, 0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_blocks_compile_without_graph_breaks():
    model = encoder(drop_path=0.5).float().train()
    x = torch.rand(6, 9, 24)
    for block in (model.blocks[0], model.blocks[-1]):
        explained = torch._dynamo.explain(block)(x)
        assert explained.graph_break_count == 0 and explained.graph_count == 1
