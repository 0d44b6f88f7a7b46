"""evaluate.py --predictions, --format vlm3d: reports made elsewhere are read and scored, own ones written."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import evaluate
from language_run import write_language_run
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.phantom.findings import LABELS
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.evaluate.predictions import read_predictions, write_vlm3d
from tiny import wrong

IDS = ["valid_1_a_1", "valid_2_a_1"]
CASES = [
    {"input_image_name": "valid_2_a_1.nii.gz", "report": "two"},
    {"input_image_name": IDS[0], "report": ""},
]


def plain(cases: list) -> dict:
    version = {"major": 1, "minor": 0}
    return {
        "name": "Generated reports",
        "type": "Report generation",
        "version": version,
        "generated_reports": cases,
    }


def written(folder: Path, content, name: str = "p.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [plain(CASES), [{"pk": "7", "outputs": [{"file": None, "value": plain(CASES)}]}]],
    ids=["the challenge's", "wrapped"],
)
def test_the_challenges_forms_are_read_in_the_order_of_the_volumes(tmp_path, content):
    assert read_predictions(written(tmp_path, content), IDS) == (["", "two"], None)


@pytest.mark.parametrize("key", ["labels", "probabilities"])
def test_labels_and_probabilities_of_half_and_more_are_findings(tmp_path, key):
    rows = [[0.49] * 17 + [0.5], [1.0] + [0] * 17]
    cases = [case | {key: dict(zip(LABELS, row, strict=True))} for case, row in zip(CASES, rows, strict=True)]
    labels = read_predictions(written(tmp_path, plain(cases)), IDS)[1]
    assert labels.tolist() == [[1] + [0] * 17, [0] * 17 + [1]]


def test_what_is_written_is_read_back_and_wrapped_as_the_challenge_reads_it(tmp_path):
    labels = np.eye(2, 18, dtype=int)
    write_vlm3d(tmp_path / "p.json", IDS, ["one", "two"], labels)
    texts, found = read_predictions(tmp_path / "p.json", IDS)
    assert texts == ["one", "two"] and (found == labels).all()
    value = json.loads((tmp_path / "p.json").read_text())[0]["outputs"][0]["value"]
    assert value | {"generated_reports": []} == plain([])
    assert value["generated_reports"][0]["input_image_name"] == IDS[0]


def test_a_runs_reports_score_the_same_when_read_from_its_files(prepared, tmp_path, capsys):
    run = write_language_run(tmp_path / "run", prepared)
    flags = ["--task", "mrg", "--device", "cpu"]
    made = ["--run", run, "--out", tmp_path / "a", "--new-tokens", 12, "--format", "vlm3d", "--no-baselines"]
    assert evaluate.main(list(map(str, [*flags, *made]))) == 0
    own = json.loads((tmp_path / "a/mrg.json").read_text())
    out = tmp_path / "b"
    read = ["--predictions", tmp_path / "a/predictions.json", "--data", prepared, "--out", out]
    assert evaluate.main(list(map(str, [*flags, *read]))) == 0
    again = json.loads((out / "mrg.json").read_text())
    for part in ("text", "clinical", "baselines", "places", "attributes", "not_beaten", "labeler"):
        assert again[part] == own[part], part
    assert "the baselines by a run's embeddings need a run" in capsys.readouterr().out


def test_given_labels_are_scored_in_place_of_the_labelers(prepared, tmp_path):
    entries = load_manifest(prepared).entries("validation")
    cases = [
        {
            "input_image_name": e["id"],
            "report": "Normal.",
            "labels": dict(zip(LABELS, e["labels"], strict=True)),
        }
        for e in entries
    ]
    path = written(tmp_path, plain(cases))
    flags = ["--task", "mrg", "--predictions", path, "--data", prepared, "--out", tmp_path / "out"]
    assert evaluate.main([*map(str, flags), "--device", "cpu", "--places"]) == 0
    scores = json.loads((tmp_path / "out/mrg.json").read_text())
    assert scores["generated"]["micro_f1"] == scores["clinical"]["crg"] == 1
    assert scores["places"]["presence"]["recall"] == 0 and scores["predictions"] == str(path)
    with open(tmp_path / "out/mrg.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["Ground Truth"] for row in rows] == [clean_report(e["text"]) for e in entries]


def test_findings_are_scored_by_another_table_of_labels(prepared, tmp_path):
    entries = load_manifest(prepared).entries("validation")
    cases = [{"input_image_name": e["id"], "report": clean_report(e["text"])} for e in entries]
    rows = [[e["id"], *([1] * len(LABELS))] for e in entries]
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["VolumeName", *LABELS], *rows])
    argv = ["--task", "mrg", "--predictions", written(tmp_path, plain(cases)), "--data", prepared]
    argv = list(map(str, [*argv, "--out", tmp_path / "out", "--labels", tmp_path / "labels.csv"]))
    assert evaluate.main(argv) == 0
    classes = json.loads((tmp_path / "out/mrg.json").read_text())["clinical"]["classes"]
    assert {row["support"] for row in classes.values()} == {len(entries)}
    wrong([*argv, tmp_path / "labels.csv"], "--labels: expected one table, found 2", evaluate.main)


def test_labels_are_of_all_cases_or_of_none(tmp_path):
    path = written(tmp_path, plain([CASES[0] | {"labels": dict.fromkeys(LABELS, 0)}, CASES[1]]))
    words = f"p.json: has no labels of {IDS[0]}; give those of all or none"
    wrong([path], words, lambda argv: read_predictions(Path(argv[0]), IDS))


@pytest.mark.parametrize(
    "content", [plain([]) | {"generated_reports": 5}, [5], 5, CASES, [[{}]], [{"outputs": []}]]
)
def test_another_form_is_named(tmp_path, content):
    path = written(tmp_path, content)
    wrong([path], "p.json: ", lambda argv: read_predictions(Path(argv[0]), IDS))


def test_predictions_take_no_flag_of_a_run(prepared, tmp_path):
    path = written(tmp_path, plain(CASES))
    for flag in (["--run", "x"], ["--limit", 1], ["--no-baselines"]):
        argv = ["--task", "mrg", "--predictions", path, "--data", prepared, *flag]
        wrong(argv, "is of a run, and --predictions has none", evaluate.main)


def test_probabilities_of_classes_are_written_as_the_classification_challenge_reads_them(run_copy, tmp_path):
    flags = [
        "--task",
        "zeroshot",
        "--run",
        run_copy,
        "--out",
        tmp_path,
        "--format",
        "vlm3d",
        "--device",
        "cpu",
    ]
    assert evaluate.main(list(map(str, [*flags, "--bootstrap", 0]))) == 0
    cases = json.loads((tmp_path / "predictions.json").read_text())["predictions"]
    with open(tmp_path / "zeroshot_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [case["input_image_name"] for case in cases] == [row["id"] for row in rows]
    for case, row in zip(cases, rows, strict=True):
        assert set(case["probabilities"]) == set(LABELS)
        assert all(p == pytest.approx(float(row[name])) for name, p in case["probabilities"].items())
