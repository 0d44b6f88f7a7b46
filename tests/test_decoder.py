"""The decoder beyond the golden numbers: grouped heads, masks, training, int8 weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from networks import SMALL_DECODER
from parity_case import language_loss
from reaf_hsenet.errors import InputError
from reaf_hsenet.models import packed
from reaf_hsenet.models.decoder import Decoder, KVCache
from reaf_hsenet.models.decoder_config import RopeConfig
from reaf_hsenet.models.int8 import Int8Linear, quantise_decoder
from reaf_hsenet.models.lora import LoraLinear, add_lora, merge_lora
from reaf_hsenet.models.packed import PackedLinear, WidenedLinear, pack, packable
from reaf_hsenet.weights.decoder import save_decoder


def small(**changes) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(SMALL_DECODER, **changes)).eval()


def ids(batch=2, tokens=20) -> torch.Tensor:
    return torch.randint(1, 96, (batch, tokens), generator=torch.Generator().manual_seed(3))


def test_logits_of_the_last_token_are_the_last_of_all_logits():
    decoder = small()
    assert torch.allclose(decoder(ids(), last=True), decoder(ids())[:, -1:], atol=1e-6)


def test_tokens_given_in_pieces_to_a_cache_give_the_logits_of_the_whole():
    decoder, given = small(window=7), ids(tokens=21)
    cache = KVCache(decoder.config, 2, 24)
    with torch.no_grad():
        whole = decoder(given)
        found = torch.cat([decoder(piece, cache=cache) for piece in given.split((9, 1, 5, 6), dim=1)], dim=1)
    assert (found - whole).abs().max() < 1e-6
    with pytest.raises(ValueError, match="21 \\+ 4 tokens do not fit a cache of 24"):
        decoder(given[:, :4], cache=cache)


def test_padding_changes_nothing_at_real_tokens_on_either_side():
    decoder, given = small(), ids(1, 12)
    pads = torch.zeros(1, 5, dtype=torch.long)
    plain = decoder(given)
    ones = torch.ones_like(given)
    right = decoder(torch.cat((given, pads), 1), mask=torch.cat((ones, pads), 1))[:, :12]
    positions = torch.cat((pads + 1, torch.arange(12)[None]), 1)
    left = decoder(torch.cat((pads, given), 1), mask=torch.cat((pads, ones), 1), positions=positions)[:, 5:]
    assert (right - plain).abs().max() < 1e-6 and (left - plain).abs().max() < 1e-6


def test_a_padded_row_has_finite_logits_and_gradients():
    decoder = small().train()
    mask = torch.ones(2, 20)
    mask[0, :15] = 0
    loss = decoder(ids(), mask=mask).square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in decoder.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for again in (False, True):
        decoder = small().train()
        decoder.grad_checkpoint = again
        language_loss(decoder(ids()), ids()).backward()
        found.append([p.grad for p in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradient_checkpointing_computes_the_blocks_again():
    decoder, calls = small().train(), []
    decoder.grad_checkpoint = True
    decoder.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    language_loss(decoder(ids()), ids()).backward()
    assert len(calls) == 2


def test_the_rotary_frequencies_stay_float32_in_a_bfloat16_model():
    decoder = small().to(torch.bfloat16)
    cos, _ = decoder.rope(torch.tensor([[1000]]), torch.float32)
    expected = torch.cos(1000 * torch.tensor(decoder.config.rope.frequencies[0]))
    assert torch.allclose(cos[0, 0, 0, :3], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_packed_weights_compute_the_same(dtype, tied):
    decoder = small(tied=tied).to(dtype)
    if not packable(next(decoder.parameters())):  # a processor without the instructions: all stays as it is
        assert dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        pack(decoder)
        assert not any(isinstance(m, PackedLinear) for m in decoder.modules())
        return
    with torch.inference_mode():
        expected, weight = decoder(ids()), decoder.layers[0].mlp.down_proj.weight.clone()
        pack(decoder)
        found = decoder(ids())
    layers = [m for m in decoder.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 4 * 2 + 1 and isinstance(decoder.lm_head, PackedLinear)
    assert torch.equal(decoder.layers[0].mlp.down_proj.weight, weight)
    assert torch.equal(found, expected) if dtype == torch.bfloat16 else (found - expected).abs().max() < 1e-5


def test_a_type_that_cannot_be_packed_stays():
    decoder = small().double()
    pack(decoder)
    assert not packable(next(decoder.parameters())) and not any(
        isinstance(m, PackedLinear) for m in decoder.modules()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_processor_slow_in_half_precision_multiplies_a_prompt_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(packed, "packable", lambda weight: False)
    decoder = small().to(dtype)
    layer = decoder.layers[0].mlp.down_proj
    x = torch.randn(1, 9, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    pack(decoder)
    wide = decoder.layers[0].mlp.down_proj
    assert sum(isinstance(m, WidenedLinear) for m in decoder.modules()) == 4 * 2 + (
        decoder.lm_head is not None
    )
    with torch.inference_mode():
        prompt, step = wide(x), wide(x[:, :1])
    assert torch.equal(prompt, (x.float() @ layer.weight.float().T).to(dtype)) and step.dtype == dtype
    assert (prompt[:, :1] - step).abs().max() <= 0.01 * prompt.abs().max()
    assert wide.weight is layer.weight  # no copy of the weights stays in memory


def test_packing_takes_merged_adapters_in_and_keeps_those_that_are_not_merged():
    for merged in (True, False):
        decoder = small()
        add_lora(decoder.layers, ("qkv_proj", "down_proj"), r=2, alpha=4)
        for layer in (m for m in decoder.modules() if isinstance(m, LoraLinear)):
            torch.nn.init.normal_(layer.lora_b, std=0.1)
        if merged:
            merge_lora(decoder)
        with torch.inference_mode():
            expected = decoder(ids())
            pack(decoder)
            found = decoder(ids())
        assert (found - expected).abs().max() < 1e-5
        assert sum(isinstance(m, PackedLinear) for m in decoder.modules()) == 9
        assert any(isinstance(m, LoraLinear) for m in decoder.modules()) != merged


def test_a_packed_decoder_says_that_it_has_no_gradient():
    decoder = small()
    pack(decoder)
    x = decoder.embed_tokens(ids()).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="packed layer has no gradient"):
        decoder(embeddings=x)
    with pytest.raises(ValueError, match="a packed one cannot"):
        add_lora(decoder.layers, ("down_proj",), r=2, alpha=4)


def test_a_packed_decoder_is_not_exported(tmp_path):
    decoder = small()
    pack(decoder)
    with pytest.raises(InputError, match="packed decoder is not exported"):
        save_decoder(decoder, tmp_path / "out")


def test_int8_weights_take_half_the_memory_and_change_logits_by_what_eight_bits_cost():
    torch.manual_seed(0)
    config = replace(
        SMALL_DECODER,
        vocab=512,
        width=512,
        heads=8,
        kv_heads=4,
        head_dim=64,
        mlp=1024,
        layers=4,
        tied=False,
        rope=RopeConfig(dims=48),
    )
    decoder = Decoder(config).eval().to(torch.bfloat16)
    tokens = torch.randint(1, 512, (2, 32))
    with torch.no_grad():
        expected = decoder(tokens).float()
        layers = [m for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        before = sum(m.weight.nbytes for m in layers)
        quantise_decoder(decoder)
        made = [m for m in decoder.modules() if isinstance(m, Int8Linear)]
        found = decoder(tokens).float()
    after = sum(t.nbytes for m in made for t in m.buffers())
    assert len(made) == len(layers) == 16 and after < 0.51 * before  # bfloat16 before
    # 0.7 % a product, through four blocks of four products each: measured 2.3 % of the norm in bfloat16, 0.6
    # % of the largest logit.
    assert (found - expected).norm() / expected.norm() < 0.025
    assert (found - expected).square().mean().sqrt() / expected.abs().max() < 0.01
    assert not torch.equal(found, expected) and isinstance(decoder.lm_head, torch.nn.Linear)


def test_int8_matrices_are_within_half_a_step_of_their_rows():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    made = Int8Linear(layer)
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((made.weight - layer.weight).abs() <= step * 0.501).all()
    x = torch.randn(3, 64)
    assert torch.allclose(made(x), F.linear(x, made.weight, layer.bias), atol=1e-5)


def test_int8_products_of_a_few_and_of_many_rows_agree(monkeypatch):
    torch.manual_seed(0)
    made = Int8Linear(torch.nn.Linear(64, 32).to(torch.bfloat16))
    x, calls, kernel = torch.randn(2, 40, 64, dtype=torch.bfloat16), [], torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *a: calls.append(1) or kernel(*a))
    with torch.inference_mode():
        many, few = made(x), made(x[:, :3])
    assert (
        (few - many[:, :3]).abs().max() <= 0.01 * many.abs().max()
        and few.shape == (2, 3, 32)
        and len(calls) == 1
    )


def test_int8_products_of_float16_do_not_overflow():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3072, 64, bias=False).half()
    torch.nn.init.normal_(layer.weight, std=0.02)
    x = 30 * torch.randn(4, 3072).half()
    expected, found = layer(x).float(), Int8Linear(layer)(x).float()
    assert found.isfinite().all() and (found - expected).norm() / expected.norm() < 0.01


def test_training_over_int8_keeps_no_dequantised_matrix_and_has_its_gradient():
    torch.manual_seed(0)
    made = Int8Linear(torch.nn.Linear(64, 48, bias=False))
    x, kept = torch.randn(2, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = made(x)
    assert not any(t.is_floating_point() and t.numel() >= 48 * 64 for t in kept)
    y.square().sum().backward()
    plain = x.detach().clone().requires_grad_()
    F.linear(plain, made.weight).square().sum().backward()
    assert torch.allclose(x.grad, plain.grad, atol=1e-5)


def test_int8_costs_a_product_of_gaussian_weights_less_than_a_hundredth():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(3072, 256, bias=False), torch.randn(8, 3072)
    torch.nn.init.normal_(layer.weight)
    expected = layer(x)
    assert 0.005 < (Int8Linear(layer)(x) - expected).norm() / expected.norm() < 0.01


def test_adapters_train_over_int8_weights():
    decoder = small(tied=False)
    quantise_decoder(decoder)
    decoder.requires_grad_(False)
    assert add_lora(decoder.layers, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), r=2, alpha=4) == 8
    optimizer = torch.optim.SGD([p for p in decoder.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = language_loss(decoder(ids()), ids())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    before = decoder(ids())
    merge_lora(decoder)
    assert (decoder(ids()) - before).abs().max() < 1e-5


def test_merged_and_adapted_logits_agree_with_parts_of_fused_matrices():
    decoder = small(family="llama")
    add_lora(decoder.layers, ("q_proj", "v_proj", "up_proj", "down_proj"), r=3, alpha=6)
    for layer in (m for m in decoder.modules() if isinstance(m, LoraLinear)):
        torch.nn.init.normal_(layer.lora_b, std=0.05)
    plain, adapted = small(family="llama")(ids()), decoder(ids())
    merge_lora(decoder)
    merged = decoder(ids())
    assert (merged - adapted).abs().max() < 1e-5 and (adapted - plain).abs().max() > 1e-3
    assert decoder.layers[0].self_attn.qkv_proj.adapted == ("q_proj", "v_proj")
    assert decoder.layers[0].mlp.gate_up_proj.adapted == ("up_proj",)
