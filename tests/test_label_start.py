"""Encoders of a new language model learn the scans' labels before its decoder learns to write."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reaf_hsenet.config import VisionConfig
from reaf_hsenet.data.bad_volumes import BadVolumes, Unreadable
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.build import build_projector
from reaf_hsenet.models.clip import build_vision
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.presets import stage_config
from reaf_hsenet.train import label_start
from reaf_hsenet.train.calibration import calibrate_vision
from reaf_hsenet.train.label_start import learn_labels

CPU = torch.device("cpu")
SETTINGS = stage_config("mrg", "hsenet", "hsenet-tiny")


@pytest.fixture
def scans(monkeypatch):
    """96 noisy volumes, every other one with a brighter corner: (volumes, labels, the manifest of the
    first 64).
    """
    torch.manual_seed(0)
    volumes, labels = 0.3 * torch.randn(96, 1, 16, 32, 32), torch.arange(96) % 2
    volumes[1::2, 0, :8, :16, :16] += 0.5
    entries = [{"id": i, "labels": [int(label), 0]} for i, label in enumerate(labels[:64])]
    monkeypatch.setattr(
        label_start, "read_sample", lambda manifest, entry, slices: (volumes[entry["id"]], None)
    )
    return volumes, labels, SimpleNamespace(entries=lambda split: entries, labels=["bright", "never"])


def new_model() -> Mllm:
    torch.manual_seed(1)
    config = VisionConfig((16, 32, 32), (8, 16, 16), width=32, depth=1, heads=2, mlp=64)
    return Mllm(
        [build_vision(config)], [build_projector("average_pool", 32, 16, config.grid, (1, 1, 1))], None
    ).train()


def learned(manifest, epochs: int, limit: int = 0) -> Mllm:
    model = new_model()
    calibrate_vision(model.encoders[0], 0.3 * torch.randn(16, 1, 16, 32, 32))
    model.encoders.requires_grad_(True)
    learn_labels(
        model,
        manifest,
        replace(SETTINGS, label_epochs=epochs),
        guided=False,
        bad=BadVolumes(limit, Ranks(0, 1, CPU)),
        device=CPU,
    )
    return model


@torch.no_grad()
def separation(model: Mllm, volumes: torch.Tensor, labels: torch.Tensor) -> float:
    """Distance between the mean patch tokens of volumes with the label and without, in standard
    deviations of either.
    """
    told = model.eval().features(volumes)[0].mean(1)
    ones, zeros = told[labels == 1], told[labels == 0]
    spread = torch.cat((ones - ones.mean(0), zeros - zeros.mean(0))).square().sum(1).mean().sqrt()
    return ((ones.mean(0) - zeros.mean(0)).norm() / spread).item()


@pytest.mark.slow
def test_the_mean_token_of_an_unseen_volume_tells_its_label(scans):
    volumes, labels, manifest = scans
    before, after = (
        separation(model, volumes[64:], labels[64:]) for model in (new_model(), learned(manifest, 60))
    )
    assert before < 1 and after > 3 * before and after > 2


def test_the_start_is_a_function_of_the_seed(scans):
    one, two = (learned(scans[2], 2).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_volume_that_cannot_be_read_counts_as_bad(scans, monkeypatch):
    read = label_start.read_sample
    spoilt = lambda m, entry, s: Unreadable("5", "5.npy: is cut") if entry["id"] == 5 else read(m, entry, s)
    monkeypatch.setattr(label_start, "read_sample", spoilt)
    with pytest.raises(InputError, match="5.npy: is cut"):
        learned(scans[2], 1)
    learned(scans[2], 1, limit=1)
