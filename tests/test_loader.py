"""What a training step sees: samples, augmentation, text."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reaf_hsenet.config import NO_AUGMENTATION, Augmentation
from reaf_hsenet.data.augment import augment, augment_with_slices
from reaf_hsenet.data.loader import CTReportDataset, read_prepared, read_slices
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.samplers import GlobalBatches, InOrder
from reaf_hsenet.data.text import clean_report, shorten_report
from reaf_hsenet.data.workers import batches, make_loader
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.loading import load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import WordPiece, train_wordpiece

EXAMPLES = json.loads((Path(__file__).parent / "golden/augmentation_examples.json").read_text())
ALWAYS = dict.fromkeys(("rotate", "flip", "scale", "shift"), 0.0)


class Chosen:
    """A random source whose draws are written down: six decisions, the number of turns, factor and offset."""

    def __init__(self, decisions, turns=1, factor=0.0, offset=0.0):
        self.decisions, self.turns, self.pair = decisions, turns, (factor, offset)

    def random(self, n):
        return np.array(self.decisions)

    def integers(self, low, high):
        assert (low, high) == (1, 4)
        return self.turns

    def uniform(self, low, high, n):
        assert (low, high) == (-0.1, 0.1)
        return self.pair


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_the_published_one(turns):
    found = augment(torch.tensor(EXAMPLES["input"]), Augmentation(), Chosen([0, 1, 1, 1, 1, 1], turns))
    assert torch.equal(found, torch.tensor(EXAMPLES[f"rot90_k{turns}"]))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips_are_the_published_ones(axis):
    decisions = [1.0] * 6
    decisions[1 + axis] = 0.0
    found = augment(torch.tensor(EXAMPLES["input"]), Augmentation(), Chosen(decisions))
    assert torch.equal(found, torch.tensor(EXAMPLES[f"flip_axis{axis}"]))


def test_scale_comes_before_shift_and_nothing_is_clipped():
    volume = torch.linspace(0, 1, 18).reshape(1, 2, 3, 3)
    found = augment(volume, Augmentation(), Chosen([1, 1, 1, 1, 0, 0], factor=0.1, offset=0.05))
    assert torch.allclose(found, volume * 1.1 + 0.05) and found.max() > 1.0


def test_augmentations_happen_as_often_as_the_recipe_says():
    volume = torch.arange(27.0).reshape(1, 3, 3, 3)
    rng = np.random.default_rng(0)
    only = {
        name: np.mean(
            [
                not torch.equal(augment(volume, Augmentation(**{**ALWAYS, name: p}), rng), volume)
                for _ in range(2000)
            ]
        )
        for name, p in (("rotate", 0.5), ("flip", 0.1), ("scale", 0.5), ("shift", 0.5))
    }
    assert only["flip"] == pytest.approx(1 - 0.9**3, abs=0.04)
    assert all(only[name] == pytest.approx(0.5, abs=0.04) for name in ("rotate", "scale", "shift"))
    assert torch.equal(augment(volume, NO_AUGMENTATION, rng), volume)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_depth_flip_reverses_slice_features(axis):
    decisions = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # and a rotation and both intensities, which do not touch them
    decisions[1 + axis] = 0.0
    volume, slices = torch.tensor(EXAMPLES["input"]), torch.arange(12.0).reshape(4, 3)
    turned, found = augment_with_slices(
        volume, slices, Augmentation(), Chosen(decisions, factor=0.1, offset=0.1)
    )
    assert torch.equal(found, slices.flip(0) if axis == 0 else slices)
    assert torch.equal(turned, augment(volume, Augmentation(), Chosen(decisions, factor=0.1, offset=0.1)))


def epoch(rows, per_rank, world, seed=1, number=0, first=0):
    """The batches of all ranks, concatenated in rank order."""
    ranks = [GlobalBatches(rows, per_rank, r, world, seed) for r in range(world)]
    for sampler in ranks:
        sampler.start_at(number, first)
    return [sum(parts, []) for parts in zip(*ranks, strict=True)]


def test_the_order_of_samples_does_not_depend_on_the_number_of_ranks():
    assert epoch(50, 12, 1) == epoch(50, 6, 2) == epoch(50, 3, 4)


def test_an_epoch_reads_no_sample_twice_and_the_next_has_another_order():
    one, two = (sum(epoch(48, 12, 1, number=n), []) for n in (0, 1))
    assert sorted(row for _, row in one) == sorted(row for _, row in two) == list(range(48))
    assert [row for _, row in one] != [row for _, row in two]
    assert {number for number, _ in two} == {1}


def test_an_epoch_started_in_the_middle_yields_the_rest():
    assert epoch(50, 4, 1, first=5) == epoch(50, 4, 1)[5:]


def test_evaluation_covers_every_row_once_over_ranks():
    rows = [key for rank in range(3) for batch in InOrder(10, 2, rank, 3) for key in batch]
    assert sorted(rows) == [(0, row) for row in range(10)]


@pytest.fixture
def dataset(prepared):
    manifest = load_manifest(prepared)
    tokenizer = train_wordpiece([e["text"] for e in manifest.entries("train")], 400)
    return CTReportDataset(manifest, "train", tokenizer, 64, Augmentation(), seed=3)


def test_a_sample_is_a_function_of_seed_epoch_and_row(dataset):
    one, again, other = dataset[2, 5], dataset[2, 5], dataset[3, 5]
    assert one.row == 5 and torch.equal(one.volume, again.volume) and one.text == again.text
    assert not torch.equal(one.volume, other.volume)


@pytest.fixture
def with_slices(prepared, tmp_path):
    """The prepared volumes by reference, with features (4, 3) that name volume and slice."""
    manifest = load_manifest(prepared)
    manifest.slices = {"encoder": "numbers", "sha256": "0", "slices": 4, "width": 3}
    for row, entry in enumerate(manifest.entries("train")):
        entry["slices"] = str(tmp_path / f"{row}.npy")
        np.save(entry["slices"], (10 * row + np.arange(4)[:, None] * np.ones(3)).astype(np.float16))
    return manifest


def data_with_slices(manifest, dataset, **options):
    return CTReportDataset(
        manifest, "train", dataset.tokenizer, 64, Augmentation(flip=0.5), seed=3, **options
    )


def test_slice_features_come_with_their_volume_and_follow_its_depth(dataset, with_slices):
    plain, following, stiff = (
        data_with_slices(with_slices, dataset, **options)
        for options in ({}, {"slices": True}, {"slices": True, "slices_follow": False})
    )
    reversed_rows = 0
    for row in range(len(plain)):
        sample, slices = following[0, row], following[0, row].slices
        assert torch.equal(sample.volume, plain[0, row].volume) and sample.text == plain[0, row].text
        assert slices.dtype == torch.float32
        rows = (10 * row + torch.arange(4.0))[:, None].expand(4, 3)
        assert torch.equal(stiff[0, row].slices, rows)
        assert torch.equal(slices, rows) or torch.equal(slices, rows.flip(0))
        reversed_rows += torch.equal(slices, rows.flip(0))
    assert 0 < reversed_rows < len(plain)


def test_a_batch_moves_and_splits_its_slice_features(dataset, with_slices):
    with_features = data_with_slices(with_slices, dataset, slices=True)
    batch = with_features.collate([with_features[0, row] for row in range(5)]).to(torch.device("cpu"))
    assert batch.slices.shape == (5, 4, 3)
    parts = batch.split(2)
    assert [p.slices.shape[0] for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.slices for p in parts]), batch.slices)
    plain = dataset.collate([dataset[0, row] for row in range(3)])
    assert plain.to(torch.device("cpu")).slices is None and [p.slices for p in plain.split(2)] == [None, None]


def test_wrong_slice_features_are_refused_by_name(with_slices, tmp_path):
    entry = {"id": "x", "slices": str(tmp_path / "x.npy")}
    wrong = {
        r"x.npy: holds torch.float16 \(3, 3\); expected slice features \(4, 3\)": np.zeros(
            (3, 3), np.float16
        ),
        r"x.npy: holds torch.float16 \(4, 5\)": np.zeros((4, 5), np.float16),
        "x.npy: holds torch.int64": np.zeros((4, 3), np.int64),
        "x.npy: holds NaN or infinite": np.full((4, 3), np.nan, np.float16),
    }
    for words, array in wrong.items():
        np.save(entry["slices"], array)
        with pytest.raises(InputError, match=words):
            read_slices(with_slices, entry)
    Path(entry["slices"]).write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="x.npy: cannot be read .*preprocess.py --slices again"):
        read_slices(with_slices, entry)
    with pytest.raises(InputError, match="y has no slice features; make them with preprocess.py --slices"):
        read_slices(with_slices, {"id": "y"})


def test_a_prepared_volume_is_read_exactly_and_checked(prepared, tmp_path):
    manifest = replace(load_manifest(prepared), folder=tmp_path)
    voxels = np.random.default_rng(0).normal(size=(16, 32, 32)).astype(np.float16)
    for dtype in ("float16", "float32"):
        np.save(tmp_path / "a.npy", voxels.astype(dtype))
        found = read_prepared(replace(manifest, dtype=dtype), {"volume": "a.npy"})
        assert found.dtype == torch.float32 and np.array_equal(found[0].numpy(), voxels.astype(np.float32))
    bad = voxels.copy()
    for value in (np.nan, np.inf, -np.inf):
        bad[3, 4, 5] = value
        np.save(tmp_path / "b.npy", bad)
        with pytest.raises(InputError, match="b.npy: holds NaN or infinite"):
            read_prepared(manifest, {"volume": "b.npy"})
    for name, array, words in (
        ("c", voxels.view(np.int16), "holds int16, the manifest says float16"),
        ("d", voxels[:-1], "has shape"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(InputError, match=f"{name}.npy: {words}"):
            read_prepared(manifest, {"volume": f"{name}.npy"})


def test_loader_processes_change_nothing(dataset):
    found = []
    for workers in (0, 2):
        loader = make_loader(dataset, GlobalBatches(len(dataset), 4, 0, 1, 7), workers)
        found.append(list(batches(loader, torch.device("cpu"))))
    assert len(found[0]) == len(found[1]) >= 3
    for one, two in zip(*found, strict=True):
        assert (
            one.index == two.index and torch.equal(one.volume, two.volume) and torch.equal(one.ids, two.ids)
        )


def test_reports_are_cleaned_as_published():
    assert clean_report('a "large" nodule (8 mm), patient\'s left') == "a large nodule 8 mm, patients left"


def test_a_long_report_keeps_its_first_sentence_and_whole_others():
    text = ".".join(f" sentence number {i}" for i in range(40))
    count = lambda t: len(t.split()) + 2
    short = shorten_report(text, 50, count, np.random.default_rng(0))
    parts = short.split(".")
    assert (
        parts[0] == " sentence number 0"
        and set(parts) <= set(text.split("."))
        and len(set(parts)) == len(parts)
    )
    assert sum(count(p) for p in parts[1:]) <= 50 < sum(count(p) for p in parts[1:]) + 5
    assert short != shorten_report(text, 50, count, np.random.default_rng(1))
    assert shorten_report(text, 500, count, np.random.default_rng(0)) == text


def test_a_trained_vocabulary_depends_on_the_texts_alone():
    texts = ["pleural effusion 12 mm", "no pleural effusion", "nodule in the left lobe"] * 3
    one, two = train_wordpiece(texts, 60), train_wordpiece(list(reversed(texts)), 60)
    assert one.vocab == two.vocab and len(one.vocab) <= 60 and one.vocab[:2] == ["[PAD]", "[UNK]"]
    ids = one.encode("no pleural effusion, 12 mm")
    assert "pleural" in one.vocab and one.vocab[ids[0]] == "[CLS]" and one.vocab[ids[-1]] == "[SEP]"
    assert one.decode(one.encode("melon"), skip_special_tokens=True) == "melon"  # spelled by characters


def test_truncation_keeps_the_separator(tmp_path):
    tokenizer = train_wordpiece(["a b c d e f"], 40)
    ids = tokenizer.encode("a b c d e f", 5)
    assert (
        len(ids) == 5
        and ids[-1] == tokenizer.vocab.index("[SEP]")
        and ids[:4] == tokenizer.encode("a b c")[:4]
    )


def test_a_saved_vocabulary_reads_back_the_same(tmp_path):
    tokenizer = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Ab", "##c"], do_lower_case=False)
    tokenizer.save(tmp_path)
    again = load_wordpiece(tmp_path)
    assert again.vocab == tokenizer.vocab and again.encode("Abc") == tokenizer.encode("Abc") == [2, 5, 6, 3]
