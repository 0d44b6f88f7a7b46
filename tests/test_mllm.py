"""The language model that sees: where visual tokens go, what is learned, what stays frozen."""

from dataclasses import replace

import pytest
import torch

from networks import SMALL_DECODER
from parity_case import language_loss
from reaf_hsenet.models.build import build_projector
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.reaf import REAF
from reaf_hsenet.models.slice_guidance import ViT2E3
from reaf_hsenet.models.vit3d import ViT3D

SIZES = ((8, 32, 32), (2, 8, 8), 24, 2, 2, 48)  # a grid of 4 x 4 x 4
GRID, TEXT = (4, 4, 4), 9


def model(projector="spatial_packer", shared=False, encoders=("stage1", "2e3"), **options) -> Mllm:
    torch.manual_seed(0)
    made = {
        "stage1": lambda: ViT3D(*SIZES),
        "2e3": lambda: ViT2E3(*SIZES, slices=5, slice_width=16),
        "reaf": lambda: REAF(*SIZES, scan_layers=(1,), fusion="weighted_mean", saliency=None),
    }
    count = 1 if shared else len(encoders)
    projectors = [build_projector(projector, 24, SMALL_DECODER.width, GRID, **options) for _ in range(count)]
    return Mllm([made[name]() for name in encoders], projectors, Decoder(replace(SMALL_DECODER, pad_id=None)))


def inputs(mllm: Mllm, batch=2):
    generator = torch.Generator().manual_seed(1)
    length = 1 + mllm.visual_tokens + TEXT
    ids = torch.randint(1, 96, (batch, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : length - 4] = -100
    mask[0, -1] = 0
    labels[0, -1] = -100
    volume = torch.rand(batch, 1, 8, 32, 32, generator=generator)
    return {
        "ids": ids,
        "mask": mask,
        "labels": labels,
        "volume": volume,
        "slices": torch.randn(batch, 5, 16, generator=generator),
    }


def test_visual_tokens_take_the_places_after_bos_in_the_order_of_the_encoders():
    mllm = model().eval()
    given = inputs(mllm)
    features = mllm.features(given["volume"], given["slices"])
    x, words = mllm.embed(given["ids"], features), mllm.decoder.embed_tokens(given["ids"])
    k = mllm.visual_tokens // 2
    assert mllm.visual_tokens == 2 * 4 and x.shape == words.shape
    assert torch.equal(x[:, :1], words[:, :1]) and torch.equal(x[:, 1 + 2 * k :], words[:, 1 + 2 * k :])
    assert torch.equal(x[:, 1 : 1 + k], mllm.projectors[0](features[0]))
    assert torch.equal(x[:, 1 + k : 1 + 2 * k], mllm.projectors[1](features[1]))


def test_features_are_the_patch_tokens_without_the_class_token():
    mllm = model().eval()
    given = inputs(mllm)
    one, two = mllm.features(given["volume"], given["slices"])
    assert torch.equal(one, mllm.encoders[0](given["volume"])[:, 1:])
    assert torch.equal(two, mllm.encoders[1](given["volume"], given["slices"])[:, 1:])


def test_the_loss_is_the_answers_cross_entropy():
    mllm = model().eval()
    given = inputs(mllm)
    total, count, _ = mllm(**given)
    embeddings = mllm.embed(given["ids"], mllm.features(given["volume"], given["slices"]))
    logits = mllm.decoder(embeddings=embeddings, mask=given["mask"])
    assert count == 4 + 3
    assert torch.allclose(total / count, language_loss(logits, given["labels"]), atol=1e-6)


def test_known_features_give_the_same_loss_and_gradients():
    mllm = model().eval()
    given = inputs(mllm)
    found = []
    for known in (False, True):
        mllm.zero_grad()
        if known:
            given["features"] = mllm.features(given.pop("volume"), given["slices"])
        mllm(**given)[0].backward()
        found.append([p.grad.clone() for p in mllm.projectors.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_encoders_are_frozen_and_have_no_dropout_in_training():
    mllm = model().train()
    given = inputs(mllm)
    before = mllm.features(given["volume"], given["slices"])
    mllm(**given)[0].backward()
    assert all(p.grad is None for p in mllm.encoders.parameters())
    assert all(p.grad is not None for p in (*mllm.projectors.parameters(), *mllm.decoder.parameters()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, mllm.features(given["volume"], given["slices"]), strict=True)
    )
    assert mllm.projectors[0].training and not mllm.encoders[1].guidance.training


def test_the_volume_reaches_the_answers_loss():
    mllm = model().eval()
    given = inputs(mllm)
    total = mllm(**given)[0]
    given["volume"] = given["volume"].flip(2)
    assert (mllm(**given)[0] - total).abs() > 1e-4


def test_a_shared_projector_packs_every_encoders_tokens():
    mllm = model(shared=True).eval()
    given = inputs(mllm)
    assert len(mllm.projectors) == 1 and mllm.visual_tokens == 8
    features = mllm.features(given["volume"], given["slices"])
    expected = torch.cat([mllm.projectors[0](x) for x in features], dim=1)
    assert torch.equal(mllm.visual(features, None), expected)


@pytest.mark.parametrize("encoders", [("stage1",), ("2e3",), ("reaf",)])
def test_one_encoder_alone_is_enough(encoders):
    mllm = model(encoders=encoders)
    given = inputs(mllm)
    total, count, _ = mllm(**given)
    assert total.isfinite() and mllm.visual_tokens == 4 and count == 7


def test_the_text_guided_projector_sees_the_question_and_not_the_answer():
    mllm = model("text_guided", encoders=("stage1",), slices=5, slice_width=16).eval()
    given = inputs(mllm)
    features = mllm.features(given["volume"], given["slices"])

    def visual(change: int) -> torch.Tensor:
        ids = given["ids"].clone()
        ids[:, change] = ids[:, change] % 95 + 1
        asked = given["mask"].bool() & (given["labels"] == -100)
        return mllm.embed(ids, features, given["slices"], asked)[:, 1 : 1 + mllm.visual_tokens]

    plain = mllm.embed(
        given["ids"], features, given["slices"], given["mask"].bool() & (given["labels"] == -100)
    )
    plain = plain[:, 1 : 1 + mllm.visual_tokens]
    first, last = 1 + mllm.visual_tokens, given["ids"].shape[1] - 2
    assert torch.equal(visual(last), plain) and not torch.equal(visual(first), plain)


def test_a_half_precision_decoder_takes_what_float32_projectors_make_of_its_words():
    mllm = model("text_guided", encoders=("stage1",), slices=5, slice_width=16).eval()
    mllm.decoder.to(torch.bfloat16)
    given = inputs(mllm)
    x = mllm.embed(
        given["ids"], mllm.features(given["volume"], given["slices"]), given["slices"], given["mask"]
    )
    assert x.dtype == torch.bfloat16 and x.isfinite().all()


def test_wrong_numbers_of_projectors_and_tokens_are_refused():
    mllm = model()
    with pytest.raises(ValueError, match="3 projectors for 2 encoders"):
        Mllm(list(mllm.encoders), [*mllm.projectors, mllm.projectors[0]], mllm.decoder)
    with pytest.raises(ValueError, match="8 tokens, expected bos and 8 image tokens"):
        mllm.embed(inputs(mllm)["ids"][:, :8], [])
