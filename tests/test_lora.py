"""LoRA: the adapted layer is what the formula says; merging and unmerging are exact."""

from dataclasses import replace

import pytest
import torch

from networks import TINY, batch
from reaf_hsenet.config import LoraConfig
from reaf_hsenet.models.clip import adapt, build_dual_encoder
from reaf_hsenet.models.layers import FusedLinear
from reaf_hsenet.models.lora import LoraLinear, add_lora, merge_lora, merged_state, unmerge_lora

LORA = LoraConfig(towers=("vision", "text"), r=3, alpha=6, targets=("query", "value", "fc1"))


def random_adapters(model):
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def adapted(lora=LORA):
    torch.manual_seed(0)
    model = build_dual_encoder(TINY)
    adapt(model, lora)
    return model


def test_an_adapted_third_of_a_fused_matrix_is_the_formula():
    base = FusedLinear(6, {"query": 6, "key": 2, "value": 4})
    layer = random_adapters(LoraLinear(base, r=2, alpha=8, adapted=("query", "value")))
    x = torch.randn(4, 5, 6)
    y, plain = layer(x), base(x)
    assert [(start, end) for start, end, _, _ in layer.pairs()] == [(0, 6), (8, 12)]
    for start, end, a, b in layer.pairs():
        expected = plain[..., start:end] + 4 * x @ a.T @ b.T
        assert torch.allclose(y[..., start:end], expected, atol=1e-5)
    assert torch.equal(y[..., 6:8], plain[..., 6:8])


def test_an_adapted_model_starts_as_the_base():
    torch.manual_seed(0)
    base, model = build_dual_encoder(TINY).eval(), adapted().eval()
    assert all(torch.equal(a, b) for a, b in zip(base(*batch()), model(*batch()), strict=True))


def test_merging_keeps_the_outputs_and_unmerging_is_exact():
    model = random_adapters(adapted()).eval()
    before, weights = model(*batch()), {n: t.clone() for n, t in model.state_dict().items()}
    merge_lora(model)
    merged = model(*batch())
    assert all(layer.merged is not None for layer in model.modules() if isinstance(layer, LoraLinear))
    assert not all(torch.equal(a, b) for a, b in zip(before, merged, strict=True))  # computed another way
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(before, merged, strict=True))
    assert all(
        torch.equal(t, weights[n]) for n, t in model.state_dict().items()
    )  # a merged model saves its base
    unmerge_lora(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model(*batch()), strict=True))


def test_merged_state_is_that_of_a_plain_model():
    model = random_adapters(adapted()).eval()
    plain = build_dual_encoder(TINY).eval()
    plain.load_state_dict(merged_state(model))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(model(*batch()), plain(*batch()), strict=True))


def test_only_adapters_and_layer_norms_of_the_blocks_are_trained():
    model = adapted()
    model(*batch())[0].sum().backward()
    for name, parameter in model.named_parameters():
        if ".blocks." in name:
            assert parameter.requires_grad == ("lora_" in name or "norm" in name), name
    assert model.vision.cls_token.requires_grad and model.vision_proj.weight.requires_grad
    assert model.vision.blocks[0].attn.qkv.lora_b.grad.abs().max() > 0


def test_only_the_named_tower_is_adapted():
    model = adapted(replace(LORA, towers=("text",)))
    assert not any("lora" in n for n in model.vision.state_dict())
    assert sum("lora_a" in n for n in model.text.state_dict()) == 4  # qkv and fc1 of two blocks
    assert all(p.requires_grad for p in model.vision.parameters())


def test_dropout_acts_on_the_adapters_alone():
    layer = LoraLinear(torch.nn.Linear(6, 6), r=2, alpha=2, dropout=0.5).train()
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x))  # B is zero
    random_adapters(layer)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_a_target_that_names_no_layer_is_refused():
    with pytest.raises(ValueError, match="gate_proj"):
        add_lora(build_dual_encoder(TINY).text, ("query", "gate_proj"), r=2, alpha=2)
    with pytest.raises(ValueError, match="rank 0"):
        LoraLinear(torch.nn.Linear(4, 4), r=0, alpha=1)
