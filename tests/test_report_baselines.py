"""Reports that no language model wrote: the nearest training scan's, and a probe's findings in sentences."""

import json

import numpy as np
import pytest
import torch

import evaluate
from language_run import WIDTH, write_language_run
from reaf_hsenet.data.loader import read_prepared
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.evaluate import language_scores
from reaf_hsenet.evaluate.embeddings import split_embeddings
from reaf_hsenet.evaluate.language_evaluation import Asked
from reaf_hsenet.evaluate.language_scores import Readers
from reaf_hsenet.evaluate.report_baselines import baseline_reports, finding_sentences, probed, written
from reaf_hsenet.runs.answering import image_features
from reaf_hsenet.runs.trained import load_trained
from test_language_evaluation import torchrun
from tiny import edited, spoil, volume, with_slices, wrong

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    return write_language_run(tmp_path_factory.mktemp("runs") / "mrg", prepared)


def scan_vectors(loaded, manifest, split: str, folder) -> torch.Tensor:
    return split_embeddings(loaded, manifest, split, ONE, folder=folder, batch=4)["image"]


def flags(run, out, *more) -> list[str]:
    short = ["--task", "mrg", "--device", "cpu", "--new-tokens", 4]
    return list(map(str, [*short, "--run", run, "--out", out, *more]))


def test_a_scans_vector_is_the_unit_mean_token_of_its_encoders_and_is_kept(run, prepared, tmp_path, capsys):
    loaded, manifest = load_trained(run), load_manifest(prepared)
    vectors = scan_vectors(loaded, manifest, "validation", tmp_path)
    entry = manifest.entries("validation")[2]
    tokens = image_features(loaded.model, read_prepared(manifest, entry)[None], None)
    expected = torch.cat([x[0].mean(0) / x[0].mean(0).norm() for x in tokens])
    assert torch.allclose(vectors[2], expected, atol=1e-5) and len(vectors) == len(
        manifest.entries("validation")
    )
    loaded.model = None  # computes nothing
    assert torch.equal(scan_vectors(loaded, manifest, "validation", tmp_path), vectors)
    assert "embeddings of" in capsys.readouterr().out


def test_a_guided_encoder_sees_the_slice_features(prepared, tmp_path):
    data = with_slices(prepared, tmp_path / "data")
    loaded = load_trained(write_language_run(tmp_path / "run", data, guided=True))
    vectors = scan_vectors(loaded, load_manifest(data), "train", tmp_path)
    assert vectors.shape == (len(load_manifest(data).entries("train")), 2 * WIDTH)


def test_the_nearest_training_scans_report_is_taken(prepared):
    manifest = load_manifest(prepared)
    reports = [clean_report(entry["text"]) for entry in manifest.entries("train")]
    train = torch.nn.functional.normalize(torch.randn(len(reports), 8), dim=1)
    found = baseline_reports(manifest, train, train[[3, 0]] + 0.01, None)
    assert found["nearest_training_scan"] == [reports[3], reports[0]]


def test_a_probe_predicts_what_the_embeddings_tell_and_no_class_that_it_cannot_learn():
    rng = np.random.default_rng(0)
    truth = rng.random((200, 3)) < (0.5, 0.5, 0)
    features = torch.from_numpy(truth[:, :2] + 0.1 * rng.standard_normal((200, 2))).float()
    held = np.arange(200) % 5 == 0
    predicted = probed(features, truth, held, features)
    assert (predicted == truth).all() and not predicted[:, 2].any()


REPORTS = [
    "Heart is normal. Effusion on the left. Nodule.",
    "Heart is normal. Effusion on the left. Atelectasis.",
    "Heart is normal. Effusion and nodule. Effusion on the right.",
    "Heart is normal. Effusion and nodule.",
    "Heart is normal.",
    "Heart is normal.",
    "Lungs are clear.",
]
TRUTH = np.array([["effusion" in t.lower(), "nodule" in t.lower(), False] for t in REPORTS])


def labeler(texts: list[str]) -> np.ndarray:
    return np.array([["effusion" in t.lower(), "nodule" in t.lower(), False] for t in texts])


def test_a_findings_sentence_tells_it_alone_and_is_the_one_its_reports_use_most():
    assert finding_sentences(REPORTS, TRUTH, labeler) == ["Effusion on the left.", "Nodule.", ""]
    # Without a labeler: "Effusion and nodule." is in 2 of 3 reports with nodules and in none without.
    assert finding_sentences(REPORTS, TRUTH, None)[1] == "Effusion and nodule."


def test_without_a_finding_the_most_frequent_report_without_findings_is_written():
    predicted = np.array([[True, True, False], [False, False, False]])
    texts = written(predicted, REPORTS, TRUTH, labeler)
    assert texts == ["Effusion on the left. Nodule.", "Heart is normal."]


def test_both_stand_in_the_table_beside_the_generated_reports(run, prepared, tmp_path, capsys):
    assert evaluate.main(flags(run, tmp_path)) == 0
    scores = json.loads((tmp_path / "mrg.json").read_text())
    manifest, loaded = load_manifest(prepared), load_trained(run)
    train, queries = (
        scan_vectors(loaded, manifest, split, tmp_path / "other") for split in ("train", "validation")
    )
    labels = np.array([entry["labels"] for entry in manifest.entries("train")])
    truth = np.array([entry["labels"] for entry in manifest.entries("validation")])
    nearest = labels[(queries @ train.T).argmax(1)]
    row = scores["baselines"]["nearest_training_scan"]
    assert row["recall"] == pytest.approx((nearest & truth).sum() / truth.sum())
    assert {"crg", "micro_f1", "meteor"} <= set(scores["baselines"]["labels_to_sentences"])
    shown = capsys.readouterr().out
    assert "nearest training scan" in shown and "labels to sentences" in shown


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--no-baselines"], "--no-baselines"),
        (["--limit", 1], "--limit"),
        (["--split", "train"], "the training split is what is evaluated"),
    ],
)
def test_where_they_are_left_out_it_is_said(run, tmp_path, capsys, more, why):
    assert evaluate.main(flags(run, tmp_path, *more)) == 0
    assert f"the baselines by the run's embeddings are left out: {why}" in capsys.readouterr().out
    assert not list(tmp_path.glob("scan_vectors*"))


def test_training_scans_that_are_gone_or_damaged_are_named_with_the_way_out(run, data, tmp_path):
    path = volume(data, 1)
    content = path.read_bytes()
    spoil(path, "gone")
    words = f"{path}: .*; or do without training scans: --no-baselines"
    wrong(flags(run, tmp_path / "a", "--data", data), words, evaluate.main)
    path.write_bytes(content)
    spoil(path, "NaN")
    wrong(flags(run, tmp_path / "b", "--data", data), f"{path}: holds NaN", evaluate.main)
    with edited(data / "manifest.json") as values:
        values["splits"]["train"] = []
    assert evaluate.main(flags(run, tmp_path / "c", "--data", data)) == 0


@pytest.mark.slow
def test_two_processes_compare_with_what_one_does(run, tmp_path):
    assert evaluate.main(flags(run, tmp_path / "one")) == 0
    done = torchrun(*flags(run, tmp_path / "two"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "mrg.json").read_text()) for name in ("one", "two"))
    assert one["baselines"] == two["baselines"]


def test_the_most_frequent_report_is_the_training_splits(prepared):
    manifest = load_manifest(prepared)
    train = [clean_report(entry["text"]) for entry in manifest.entries("train")]
    usual = language_scores.usual_report(manifest)
    assert train.count(usual) == max(map(train.count, train))
    manifest.splits["train"][0]["text"] = manifest.splits["train"][1]["text"] = "Normal lungs."
    assert language_scores.usual_report(manifest) == "Normal lungs."
    rows = [Asked("a", 0, "", "Another."), Asked("b", 1, "", "Another.")]
    scores, _ = language_scores.report_scores(["x", "y"], rows, Readers(), usual="Normal lungs.")
    assert scores["baselines"]["most_frequent_report"]["report"] == "Normal lungs."
