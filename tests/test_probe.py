"""Probes: their optimum, calibration and thresholds, nearest neighbours, few volumes, and the task."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
import infer
from reaf_hsenet.data.labels import load_label_set, manifest_labels
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.patients import patient_name
from reaf_hsenet.evaluate import embeddings
from reaf_hsenet.evaluate.probe import define_task
from reaf_hsenet.files import read_json, write_json
from reaf_hsenet.metrics import probe as metrics_probe
from reaf_hsenet.metrics.classification import METRICS, calibration, class_metrics
from reaf_hsenet.metrics.probe import (
    best_f1_thresholds,
    few_shot_scores,
    fit_logistic,
    fit_probe,
    nearest_votes,
    platt,
)
from tiny import wrong


def regression() -> tuple[np.ndarray, np.ndarray]:
    """120 rows of 5 features, labels of 3 classes of different frequency."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((120, 5))
    w = rng.standard_normal((5, 3))
    return x, x @ w + rng.standard_normal((120, 3)) > (0.5, -0.5, 1.5)


# scikit-learn 1.9.1, LogisticRegression(C=1 / (120 * penalty), tol=1e-10): the bias, then five weights.
SKLEARN = {
    0.1: [
        [-0.203335, -1.084841, 0.186788, -0.31298, -0.038333, -0.522211],
        [0.310631, 0.388041, -1.068171, -0.539843, 0.444461, 0.037039],
        [-1.417829, -0.123281, -0.322389, -1.07182, 0.031769, 0.461617],
    ],
    0.001: [
        [-1.114085, -3.935762, 0.422726, -1.495106, -0.251324, -2.040548],
        [1.027226, 1.535247, -4.600031, -1.725757, 2.770977, -0.155854],
        [-3.380013, -0.602698, -0.658369, -4.26472, -0.297757, 1.515242],
    ],
}


@pytest.mark.parametrize("penalty", SKLEARN)
def test_the_regressions_have_scikit_learns_optimum(penalty):
    x, y = map(torch.from_numpy, regression())
    weight, bias = fit_logistic(x[None], y.double()[None], penalty)
    found = torch.cat([bias[0], weight[0]]).T
    assert torch.allclose(found, torch.tensor(SKLEARN[penalty], dtype=torch.float64), atol=2e-5)


def test_all_regressions_at_once_equal_scikit_learn_here():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = regression()
    weight, bias = fit_logistic(torch.from_numpy(x)[None], torch.from_numpy(y).double()[None], 0.01)
    for j in range(3):
        model = linear_model.LogisticRegression(C=1 / 1.2, tol=1e-10, max_iter=10000).fit(x, y[:, j])
        assert np.allclose(weight[0, :, j], model.coef_[0], atol=1e-5)
        assert float(bias[0, 0, j]) == pytest.approx(model.intercept_[0], abs=1e-5)


def test_metrics_of_rounded_probabilities_are_scikit_learns():
    """AUROC, average precision, F1, balanced accuracy and Brier score, from scikit-learn 1.9.1."""
    x, y = regression()
    coefficients = np.array(SKLEARN[0.1])
    scores = np.round(1 / (1 + np.exp(-(x @ coefficients[:, 1:].T + coefficients[:, 0]))), 1)
    expected = {
        "auroc": [0.9313125695, 0.9711348916, 0.9602272727],
        "average_precision": [0.9170681939, 0.9682378233, 0.8827778006],
        "argmax.f1": [0.8455284553, 0.9242424242, 0.6382978723],
        "argmax.balanced_accuracy": [0.8417686318, 0.9174880315, 0.734375],
    }
    found = class_metrics(y, scores, np.zeros(3), np.ones((1, 120)))[0]
    for name, values in expected.items():
        assert np.allclose(found[METRICS.index(name)], values, atol=1e-9), name
    assert np.allclose(calibration(y, scores)[1], [0.1333333333, 0.10325, 0.0978333333], atol=1e-9)


def test_the_calibration_error_of_a_case_made_by_hand():
    """Two volumes at 0.9, one positive; two at 0.1, none: (2 |0.9 - 0.5| + 2 |0.1 - 0|) / 4."""
    labels = np.array([[True], [False], [False], [False]])
    error, brier = calibration(labels, np.array([[0.9], [0.9], [0.1], [0.1]]))
    assert error[0] == pytest.approx(0.25)
    assert brier[0] == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)


def test_platts_scaling_finds_the_slope_and_offset_that_made_the_labels():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((40000, 2)) * (1, 5)
    chance = 1 / (1 + np.exp(-(logits * (2, 0.3) + (-1, 0.5))))
    truth = rng.random(logits.shape) < chance
    slope, offset = platt(torch.from_numpy(logits), torch.from_numpy(truth).double())
    assert slope.tolist() == pytest.approx([2, 0.3], rel=0.03)
    assert offset.tolist() == pytest.approx([-1, 0.5], abs=0.04)


def test_platts_scaling_of_separated_classes_is_finite():
    slope, offset = platt(torch.tensor([[-1.0], [-1.0], [1.0]]), torch.tensor([[0.0], [0.0], [1.0]]))
    # At the optimum the probabilities are the targets, 1 / 4 and 2 / 3.
    assert (slope * torch.tensor([-1.0, 1.0]) + offset).sigmoid().tolist() == pytest.approx(
        [1 / 4, 2 / 3], 1e-3
    )


def test_the_threshold_gives_the_best_f1():
    labels = np.array([[1, 0, 1, 1, 0, 0]], dtype=bool).T
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.6, 0.1]]).T
    # F1 above 0.85: 1/2; above 0.75: 2/5; above 0.65: 2/3; above 0.35: 3/4; above all: 2/3.
    assert best_f1_thresholds(labels, scores)[0] == pytest.approx(0.35)
    assert best_f1_thresholds(np.ones((2, 1), bool), np.zeros((2, 1)))[0] < 0  # all of them


def test_a_probe_is_calibrated_and_cut_on_the_held_out_rows_alone():
    rng = np.random.default_rng(3)
    features = torch.from_numpy(rng.standard_normal((600, 8)))
    labels = (features[:, :2].numpy() + rng.standard_normal((600, 2))) > 0.5
    held = np.arange(600) % 5 == 0
    probe = fit_probe(features, labels, held)
    # Other labels of the rows that are fitted move the weights, those of the held-out rows only the rest.
    labels[held] = rng.permutation(labels[held])
    other = fit_probe(features, labels, held)
    assert not torch.equal(probe.thresholds, other.thresholds) and not torch.equal(probe.slope, other.slope)
    assert other.probabilities(features).std(0).max() < 0.1 < probe.probabilities(features).std(0).min()


def test_a_probe_of_correlated_features_is_at_its_optimum(monkeypatch):
    """The gradient of mean cross-entropy + penalty / 2 |w|^2 over standardised features is zero."""
    monkeypatch.setattr(metrics_probe, "PENALTIES", (1e-4,))
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((500, 30)) * np.geomspace(1, 1e-3, 30) @ rng.standard_normal((30, 30))
    features, held = torch.from_numpy(mixed), np.arange(500) % 5 == 0
    labels = mixed[:, :3] + rng.standard_normal((500, 3)) > (0, 1, 2)
    probe = fit_probe(features, labels, held)
    fitted = features[torch.from_numpy(~held)]
    standard, weight = (fitted - fitted.mean(0)) / fitted.std(0), probe.weight * fitted.std(0)[:, None]
    error = probe.logits(fitted).sigmoid() - torch.from_numpy(labels[~held]).double()
    assert (standard.T @ error / len(fitted) + 1e-4 * weight).abs().max() < 1e-6
    assert error.mean(0).abs().max() < 1e-7


def test_a_class_without_signal_keeps_the_order_of_its_logits():
    """The held-out labels contradict the logits: a scaling with its best, negative slope would turn them."""
    logits, truth = torch.linspace(-1, 1, 40)[:, None], (torch.arange(40) < 12).float()[:, None]
    slope, offset = platt(logits, truth)
    scaled = (slope * logits + offset).sigmoid()
    assert (scaled.diff(dim=0) > 0).all() and scaled.mean().item() == pytest.approx(0.31, abs=0.01)


def test_a_vote_of_the_nearest_weighs_them_by_their_cosine():
    train = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    labels = np.array([[1, 0], [0, 1], [1, 1]], dtype=bool)
    found = nearest_votes(train, labels, torch.tensor([[5.0, 0.0]]), k=2)
    weight = 1 / (1 + np.exp(-1 / 0.07))  # cosines 1 and 0
    assert found[0].tolist() == pytest.approx([weight, 1 - weight])


def test_few_volumes_a_class_leave_out_a_class_that_has_fewer():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((200, 4)))
    labels = np.stack([features[:, 0].numpy() > 0, np.arange(200) < 3], axis=1)
    found = few_shot_scores(features, labels, features, 10, np.random.default_rng(1))
    assert np.isnan(found[:, 1]).all()
    up, down = found[labels[:, 0], 0], found[~labels[:, 0], 0]
    assert (up[:, None] > down).mean() > 0.85
    again = few_shot_scores(features, labels, features, 10, np.random.default_rng(1))
    assert np.array_equal(found, again, equal_nan=True)


@pytest.fixture
def many(run_copy, tmp_path) -> tuple:
    """A run, and a data set of its volumes with twenty training patients, half of them with a finding."""
    manifest = load_manifest(read_json(run_copy / "config.json")["data"])
    values = read_json(manifest.folder / "manifest.json")
    volumes = [e for entries in values["splits"].values() for e in entries]
    for name, count in ("train", 20), ("validation", 4):
        values["splits"][name] = [
            volumes[i % len(volumes)]
            | {"id": f"{name}_{i}_a_1", "scan": f"{name}_{i}_a", "volume": f"volumes/{name}_{i}.npy"}
            | {"labels": [(i + j) % 2 for j in range(len(values["labels"]))]}
            for i in range(count)
        ]
        (tmp_path / "many/volumes").mkdir(parents=True, exist_ok=True)
        for i, entry in enumerate(values["splits"][name]):
            source = manifest.folder / volumes[i % len(volumes)]["volume"]
            (tmp_path / "many" / entry["volume"]).symlink_to(source.absolute())
    write_json(tmp_path / "many/manifest.json", values)
    return run_copy, tmp_path / "many"


def test_no_patient_is_both_fitted_and_held_out(many):
    """Two volumes of each patient."""
    manifest = load_manifest(many[1])
    for i, entry in enumerate(manifest.splits["train"]):
        entry |= {"id": f"train_{i // 2}_a_{i % 2}", "scan": f"train_{i // 2}_a"}
    table = manifest_labels(manifest, "validation")
    task = define_task(table, load_label_set("ct-rate"), manifest, "validation")
    names = [patient_name(manifest.entries("train")[row]) for row in task.rows]
    held, fitted = ({n for n, h in zip(names, task.held, strict=True) if h == side} for side in (True, False))
    assert len(held) == 2 and len(fitted) == 8 and not held & fitted and len(task.names) == 18


def probe(run, data, *more) -> list[str]:
    flags = ["--task", "probe", "--run", run, "--data", data, "--device", "cpu", "--bootstrap", "5"]
    return list(map(str, [*flags, *more]))


def test_the_task_keeps_embeddings_and_a_probe_that_classify_takes(many, capsys, monkeypatch):
    run, data = many
    assert evaluate.main(probe(run, data)) == 0
    printed = capsys.readouterr().out
    assert "mean of 18" in printed and "1 with, 1 without" in printed and "calibration error" in printed
    results = read_json(run / "eval/probe.json")
    assert results["volumes"] == {"training": 20, "held_out": 4}
    assert set(results["few_shot"]) == {"1", "5", "10", "50"} and results["few_shot"]["50"]["auroc"] is None

    # A second time nothing is embedded: neither split has changed, nor has the checkpoint.
    def never(*_, **__):
        raise AssertionError("embedded again")

    monkeypatch.setattr(embeddings, "embed", never)
    assert evaluate.main(probe(run, data)) == 0
    assert read_json(run / "eval/probe.json") == results
    assert (
        evaluate.main(["--task", "zeroshot", "--run", str(run), "--data", str(data), "--bootstrap", "0"]) == 0
    )
    for changed in ("--anew",), ("--checkpoint", "step-000003"):
        with pytest.raises(AssertionError, match="embedded again"):
            evaluate.main(probe(run, data, *changed))
    capsys.readouterr()

    # One scan is classified by the probe; with --prompts by prompts.
    scan = load_manifest(data).entries("validation")[0]["source"]["file"]
    command = ["classify", scan, "--run", str(run), "--device", "cpu", "--json"]
    assert infer.main(command) == 0
    found = json.loads(capsys.readouterr().out)["classes"]
    assert len(found) == 18 and all(0 <= row["probability"] <= 1 and "threshold" in row for row in found)
    with safe_open(run / "eval/probe.safetensors", "pt") as file:
        known = file.metadata()
    stored = load_file(run / "eval/probe.safetensors")
    assert {round(row["threshold"], 6) for row in found} == {
        round(x, 6) for x in stored["thresholds"].tolist()
    }
    assert infer.main([*command, "--prompts", "volume"]) == 0
    assert "threshold" not in json.loads(capsys.readouterr().out)["classes"][0]
    wrong(
        [*command, "--checkpoint", "step-000003"],
        "is the probe of another checkpoint.*--task probe",
        infer.main,
    )
    assert infer.main([*command, "--checkpoint", "step-000003", "--prompts", "organ"]) == 0
    assert json.loads(capsys.readouterr().out)["by"] == "prompts"
    save_file(stored | {"bias": stored["bias"] * torch.nan}, run / "eval/probe.safetensors", known)
    wrong(command, "probe.safetensors: holds NaN or infinity; make it again", infer.main)


def test_probes_of_two_runs_are_compared_on_the_same_volumes(many, capsys, tmp_path):
    run, data = many
    evaluate.main(probe(run, data))
    other = shutil.copytree(run, tmp_path / "other")
    compared = [
        "--task",
        "probe",
        "--compare",
        str(run),
        str(other),
        "--bootstrap",
        "5",
        "--out",
        str(tmp_path),
    ]
    evaluate.main(compared)
    assert "mean auroc" in capsys.readouterr().out
    # Thresholds are the probe's own, not found on what is compared.
    name = "thresholded.balanced_accuracy"
    found = read_json(run / "eval/probe.json")["means"]["mean"]["thresholded"]["balanced_accuracy"]
    assert read_json(tmp_path / "comparison_probe.json")[f"mean {name}"][0]["value"] == pytest.approx(found)


def test_what_a_probe_cannot_be_fitted_on_is_one_line(many, tmp_path):
    run, data = many
    values = read_json(data / "manifest.json")
    for entry in values["splits"]["train"]:
        entry["labels"] = [0] * len(values["labels"])
    write_json(data / "manifest.json", values)
    wrong(probe(run, data), "no class is both present and absent among the training volumes", evaluate.main)
    wrong(probe(run, data, "--split", "train"), "--split train: is what a probe is fitted on", evaluate.main)
    table = tmp_path / "labels.csv"
    table.write_text("VolumeName,Cardiomegaly\ntrain_0_a_1,1\ntrain_1_a_1,0\n")
    wrong(probe(run, data, "--labels", table), "labels.csv: no class is both present", evaluate.main)


def test_a_table_of_one_split_is_scored_by_and_the_manifests_labels_are_fitted(many, tmp_path, capsys):
    run, data = many
    table = tmp_path / "labels.csv"
    rows = [f"validation_{i}_a_1,{i % 2},0" for i in range(4)]
    table.write_text("\n".join(["VolumeName,Cardiomegaly,Emphysema", *rows]))
    assert evaluate.main(probe(run, data, "--labels", table)) == 0
    assert "labels.csv has no training volumes; fitted on the labels of" in capsys.readouterr().out
    found = read_json(run / "eval/probe.json")
    assert found["labels"]["table"] == str(table) and set(found["classes"]) == {"Cardiomegaly", "Emphysema"}
    assert found["classes"]["Cardiomegaly"]["positives"] == 2 and found["means"]["mean"]["classes"] == 1
    assert any("Emphysema: all or none of the 4 volumes" in note for note in found["notes"])


@pytest.mark.parametrize("change", ["volume", "report", "vocabulary"])
def test_embeddings_of_changed_files_reports_or_words_are_computed_again(many, change, monkeypatch):
    run, data = many
    command = ["--task", "retrieval", "--run", str(run), "--data", str(data), "--device", "cpu"]
    assert evaluate.main(command) == 0
    monkeypatch.setattr(embeddings, "embed", lambda *_, **__: pytest.fail("embedded again"))
    assert evaluate.main(command) == 0
    entry = load_manifest(data).entries("validation")[0]
    if change == "volume":
        path = data / entry["volume"]
        voxels = np.load(path)
        path.unlink()  # a link
        np.save(path, voxels)
    elif change == "report":
        values = read_json(data / "manifest.json")
        values["splits"]["validation"][0]["text"] += " The heart is large."
        write_json(data / "manifest.json", values)
    else:
        words = (run / "vocab.txt").read_text().splitlines()
        (run / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    with pytest.raises(pytest.fail.Exception, match="embedded again"):
        evaluate.main(command)


@pytest.mark.parametrize("task", ["probe", "zeroshot"])
def test_intervals_of_classes_draw_whole_scans(many, task):
    """With one scan every resample is the split itself."""
    run, data = many
    values = read_json(data / "manifest.json")
    for entry in values["splits"]["validation"]:
        entry["scan"] = "validation_0_a"
    first = values["splits"]["validation"][0]
    first["labels"] = [1 - label for label in first["labels"]]  # or all would be right, in every resample
    write_json(data / "manifest.json", values)
    assert evaluate.main([*probe(run, data), "--task", task]) == 0
    for row in read_json(run / f"eval/{task}.json")["classes"].values():
        assert row["interval_95"]["average_precision"] == pytest.approx([row["average_precision"]] * 2)
