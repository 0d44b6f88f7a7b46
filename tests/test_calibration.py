"""The data-dependent start: what differs between samples is what the network starts from."""

import pytest
import torch

from networks import TINY, batch
from reaf_hsenet.models.build import build_projector
from reaf_hsenet.models.clip import build_dual_encoder, build_vision
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.train.calibration import calibrate, calibrate_tokens


def spread(features: torch.Tensor) -> float:
    """Mean cosine between samples: 1 when all are the same."""
    features = torch.nn.functional.normalize(features, dim=1)
    return ((features @ features.T).sum() - len(features)).item() / (len(features) * (len(features) - 1))


@pytest.mark.slow
def test_features_of_all_samples_point_one_way_before_and_not_after():
    torch.manual_seed(0)
    model = build_dual_encoder(TINY).eval()
    volume, ids, mask = batch(24)
    volume = 0.4 + 0.05 * volume  # as real volumes, more alike than different
    with torch.no_grad():
        assert spread(model.encode_image(volume)) > 0.95 and spread(model.text(ids, mask)[:, 0]) > 0.7
        calibrate(model, volume, ids, mask)
        assert spread(model.encode_image(volume)) < 0.3 and spread(model.text(ids, mask)[:, 0]) < 0.1
        image = model.vision(volume)[:, 0]
    assert torch.allclose(image.mean(0), torch.zeros(32), atol=1e-4) and torch.allclose(
        image.std(0), torch.ones(32), atol=1e-3
    )


def test_without_reports_the_text_encoder_is_left_alone():
    torch.manual_seed(0)
    model = build_dual_encoder(TINY)
    before = {n: p.clone() for n, p in model.text.named_parameters()}
    calibrate(model, batch(8)[0], None, None)
    assert all(torch.equal(before[n], p) for n, p in model.text.named_parameters())


def test_patch_tokens_of_a_language_model_are_standardised_about_their_place():
    torch.manual_seed(0)
    config = PRESETS["hsenet-tiny"].vision
    model = Mllm(
        [build_vision(config)], [build_projector("average_pool", 128, 16, config.grid, (1, 2, 2))], None
    )
    volumes = torch.rand(12, 1, *config.size)
    calibrate_tokens(model, volumes, None, chunk=5)
    (tokens,) = model.features(volumes)
    assert tokens.flatten(0, 1).mean(0).abs().max() < 1e-4
    deviation = (tokens - tokens.mean(0)).flatten(0, 1)
    assert torch.allclose(deviation.std(0), torch.ones(128), atol=1e-3)


def test_copies_of_one_scan_keep_the_usual_start():
    """What does not differ is not divided by, in a smoke test for example."""
    torch.manual_seed(0)
    model = build_dual_encoder(TINY).eval()
    volume, ids, mask = batch(6)
    volume = volume[:1].expand(6, -1, -1, -1, -1)
    before = model.vision.norm.weight.clone()
    calibrate(model, volume, ids[:1].expand(6, -1), mask[:1].expand(6, -1))
    assert torch.equal(model.vision.norm.weight, before)
    with torch.no_grad():
        image, text = model.encode_image(volume), model.text(ids, mask)
    assert (
        image.isfinite().all()
        and text.isfinite().all()
        and all(p.isfinite().all() for p in model.parameters())
    )
