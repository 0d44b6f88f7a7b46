"""A development split: training patients that are held out, on which checkpoints are chosen."""

import json
import random
from pathlib import Path

import pytest

import evaluate
import preprocess
import train
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.patients import held_out, patient_name
from reaf_hsenet.data.sources.datasets import Case, Source
from reaf_hsenet.runs.checkpoint import Run
from tiny import language, resume, retrieval, tiny, with_slices, wrong


def prepare(root: Path, data: Path, *more) -> None:
    argv = ["--dataset", "ct-rate", "--root", root, "--out", data, "--size", 16, 32, 32, *more]
    assert preprocess.main(list(map(str, argv))) == 0


def patients(data: Path, split: str) -> set[str]:
    return {patient_name(entry) for entry in load_manifest(data).splits.get(split, [])}


@pytest.fixture
def developed(data, phantom_root) -> Path:
    prepare(phantom_root, data, "--development", 3)
    return data


@pytest.mark.parametrize(
    "volume, scan, patient",
    [
        ("train_1_a_2", "train_1_a", "train_1"),  # CT-RATE
        ("train_1/train_1_a/train_1_a_2", "train_1/train_1_a/train_1_a", "train_1"),  # REAF's layout of it
        ("train_1_a_2", "acquisition 7", "train_1"),  # a folder of NIfTI files with CT-RATE's names
        ("CT1/ct/sub-S09754_ses-E22857_run-1", "sub-S09754_ses-E22857", "sub-S09754"),  # BIMCV-R
        ("sub-01/ses-2/ct", "sub-01/ses-2/ct", "sub-01"),
        ("a/chest", "scan 7", "scan 7"),
    ],
)
def test_a_patient_is_read_off_the_names_of_a_volume(volume, scan, patient):
    assert patient_name({"id": volume, "scan": scan}) == patient


def test_who_is_held_out_depends_on_names_alone():
    names = [f"train_{i}" for i in range(50)]
    held = held_out(names, 8)
    assert len(held) == 8 and held_out(names, 5) < held
    random.Random(0).shuffle(names)
    assert held_out(names * 2, 8) == held
    assert held_out([name for name in names if name in held or name < "train_3"], 8) == held
    assert held_out(["a", "b"], 1) == {"b"}  # sha256 3e23... before ca97...


def test_no_patient_has_volumes_on_both_sides():
    names = [f"train_{p}_{scan}" for p in range(20) for scan in "abc"]
    cases = [Case(f"{scan}_{i}", scan, Path("x"), "text") for scan in names for i in (1, 2)]
    found = Source("x", {"train": cases, "validation": []}).with_development(6).splits
    train_, held = ({patient_name(vars(c)) for c in found[split]} for split in ("train", "development"))
    assert len(held) == 6 and len(train_) == 14 and not train_ & held
    assert len(found["development"]) == 36 and len(found["train"]) == 84


def test_a_development_split_changes_only_the_manifest(data, phantom_root):
    before = {path: path.stat().st_mtime_ns for path in (data / "volumes").iterdir()}
    manifest = json.loads((data / "manifest.json").read_text())
    sides = []
    for count in (3, 5):
        prepare(phantom_root, data, "--development", count)
        assert len(patients(data, "development")) == count
        assert not patients(data, "development") & patients(data, "train")
        sides.append(patients(data, "development"))
    assert (
        sides[0] < sides[1] and load_manifest(data).entries("validation") == manifest["splits"]["validation"]
    )
    prepare(phantom_root, data)
    assert json.loads((data / "manifest.json").read_text()) == manifest
    assert before == {path: path.stat().st_mtime_ns for path in (data / "volumes").iterdir()}


def test_checkpoints_are_chosen_on_the_development_split(developed, phantom_root, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main(tiny(developed, run, "--max-steps", 2, "--validate-every", 1)) == 0
    assert Run(run).read_config()["best_of"] == "development"
    assert "(chosen on the development split), taken unless" in capsys.readouterr().out
    for split, optimistic in (("validation", False), ("development", True)):
        assert evaluate.main(retrieval(run, "--split", split)) == 0
        said = capsys.readouterr().out
        assert "checkpoint best, step" in said and ("optimistic" in said) == optimistic
    prepare(phantom_root, developed)
    wrong(resume(run), "would be chosen on validation, those of .* were on development; prepare it with")


def test_a_run_keeps_its_training_volumes_and_says_that_it_may_have_seen_others(
    developed, phantom_root, tmp_path, capsys
):
    run = tmp_path / "run"
    train.main(tiny(developed, run, "--max-steps", 2))
    for count, warned in ((3, False), (5, True)):
        prepare(phantom_root, developed, "--development", count)
        evaluate.main(retrieval(run, "--split", "development"))
        assert ("was trained on other volumes" in capsys.readouterr().out) == warned
    wrong(resume(run), "has other training volumes than .*run was trained on")


def test_the_validation_split_may_be_absent_where_a_development_split_is(developed, stages, tmp_path):
    data = with_slices(developed, tmp_path / "guided")
    manifest = load_manifest(data)
    manifest.splits["validation"] = []
    manifest.save()
    assert train.main(language(stages, tmp_path / "run", "--max-steps", 1, "--data", data)) == 0
    assert Run(tmp_path / "run").read_config()["best_of"] == "development"


def test_questions_of_the_training_tables_reach_the_development_split(developed, phantom_root):
    before = load_manifest(developed).all_entries()
    argv = ["--dataset", "radgenome", "--root", phantom_root, "--out", developed]
    assert preprocess.main(list(map(str, argv))) == 0
    assert load_manifest(developed).all_entries() == before
    assert any(entry["qa"] for entry in load_manifest(developed).entries("development"))
