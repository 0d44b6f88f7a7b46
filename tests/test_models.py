"""Facts about the encoders that no golden number covers."""

import pytest
import torch

from networks import TINY, batch
from reaf_hsenet.config import ClipConfig
from reaf_hsenet.models.clip import build_dual_encoder, set_grad_checkpoint
from reaf_hsenet.models.layers import PatchEmbed3D
from reaf_hsenet.models.vit3d import ViT3D


def test_base_configuration_has_the_published_sizes():
    with torch.device("meta"):
        model = build_dual_encoder(ClipConfig())
    assert model.vision.pos_embed.shape == (1, 2048, 768)
    assert model.vision.patch_embed.proj.weight.shape == (768, 1024)
    assert model.text.pos_embed.weight.shape == (512, 768)
    assert model.vision.blocks[0].attn.qkv.bias is None and model.vision.norm.eps == 1e-5


def test_patches_are_depth_major_and_flattened_depth_height_width():
    embed = PatchEmbed3D((2, 2, 2), 8)
    with torch.no_grad():
        embed.proj.weight.copy_(torch.eye(8))
        embed.proj.bias.zero_()
    volume = torch.arange(4 * 4 * 4.0).reshape(1, 1, 4, 4, 4)
    patches = embed(volume)
    assert patches.shape == (1, 8, 8)
    assert torch.equal(patches[0, 1], volume[0, 0, 0:2, 0:2, 2:4].flatten())
    assert torch.equal(patches[0, 4], volume[0, 0, 2:4, 0:2, 0:2].flatten())


def test_features_are_unit_vectors_and_ignore_padding():
    model = build_dual_encoder(TINY).eval()
    volume, ids, mask = batch()
    image, text, _ = model(volume, ids, mask)
    assert torch.allclose(image.norm(dim=1), torch.ones(3)) and torch.allclose(
        text.norm(dim=1), torch.ones(3)
    )
    other = ids.clone()
    other[0, 7:] = 3
    assert torch.allclose(model.encode_text(other, mask), text, atol=1e-6)
    assert torch.allclose(model.encode_text(ids[:1, :7], mask[:1, :7])[0], text[0], atol=1e-6)


def test_logit_scale_is_raw_as_published_or_clipped_exponential():
    from dataclasses import replace

    raw, exp = build_dual_encoder(TINY), build_dual_encoder(replace(TINY, logit_scale="exp"))
    assert raw.scale().item() == pytest.approx(2.659260036932778)
    assert exp.scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    for model in (raw, exp):
        model.logit_scale.data.fill_(9.0)
        model.clamp_scale()
    assert raw.scale().item() == 9
    assert exp.scale().item() == pytest.approx(100, rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(1)
    model = build_dual_encoder(TINY).train()
    gradients = []
    for on in (False, True):
        set_grad_checkpoint(model, on)
        model.zero_grad()
        image, text, scale = model(*batch())
        (scale * (image * text).sum()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_gradient_checkpointing_recomputes_the_blocks():
    model = build_dual_encoder(TINY).train()
    calls = []
    model.vision.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    set_grad_checkpoint(model, True)
    image, _, _ = model(*batch())
    image.sum().backward()
    assert len(calls) == 2


def test_every_parameter_gets_a_gradient():
    model = build_dual_encoder(TINY)
    image, text, scale = model(*batch())
    (scale * (image[:, :8] @ text[:, :8].T)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_volume_of_another_size_is_refused():
    model = ViT3D((8, 16, 16), (4, 8, 8), width=32, depth=1, heads=4, mlp=64)
    with pytest.raises(ValueError, match=r"\(8, 16, 24\).*\(8, 16, 16\)"):
        model(torch.rand(1, 1, 8, 16, 24))
