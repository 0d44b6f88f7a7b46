"""Which checkpoint of a run is evaluated and handed on: the last, as published, unless another one is
named.
"""

import csv
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from reaf_hsenet.evaluate.scan_model import ScanModel
from reaf_hsenet.files import read_json
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.published import open_source
from reaf_hsenet.runs.trained import is_published, load_trained
from tiny import (
    AUTO,
    config_of,
    edited,
    language,
    resume,
    retrieval,
    same_weights,
    stage2,
    tiny,
    weights,
    with_slices,
    wrong,
)


@pytest.fixture
def run(run_copy) -> Path:
    """A run of 8 steps whose best is step 3."""
    Run(run_copy).point("best", 3)
    return run_copy


def evaluated(run: Path, out: Path, *more) -> tuple:
    """Name and step of the checkpoint, and the split it was chosen on."""
    assert evaluate.main(retrieval(run, "--out", out, *more)) == 0
    found = read_json(out / "retrieval.json")
    assert found["checkpoint"] == str(Run(run).at(found["checkpoint_step"]))
    return found["checkpoint_name"], found["checkpoint_step"], found["checkpoint_chosen_on"]


@pytest.mark.slow
def test_the_last_checkpoint_is_evaluated_and_the_results_say_so(run, tmp_path, capsys):
    assert evaluated(run, tmp_path / "eval") == ("last", 8, None)
    assert f"{run}: checkpoint last, step 8\n" in capsys.readouterr().out
    with open(tmp_path / "eval/retrieval_queries.csv", newline="") as file:
        assert {row["checkpoint"] for row in csv.DictReader(file)} == {"last, step 8"}


def test_the_best_is_taken_by_name_and_called_optimistic_on_the_split_that_chose_it(run, tmp_path, capsys):
    assert evaluated(run, tmp_path / "eval", "--checkpoint", "best") == ("best", 3, "validation")
    said = "checkpoint best, step 3, chosen on this very split: its scores are optimistic\n"
    assert said in capsys.readouterr().out
    evaluated(run, tmp_path / "train", "--checkpoint", "best", "--split", "train")
    assert "optimistic" not in capsys.readouterr().out


def test_a_comparison_says_which_checkpoints_were_evaluated(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    evaluated(run, run / "eval", "--checkpoint", "step-000006")
    evaluated(other, other / "eval")
    assert evaluate.main(["--task", "retrieval", "--compare", str(run), str(other), "--bootstrap", "0"]) == 0
    shown = capsys.readouterr().out
    assert f"[1] {run} (step-000006, step 6)\n" in shown and f"[2] {other} (last, step 8)\n" in shown


@pytest.mark.parametrize("name, step", [("last", 8), ("best", 3), ("step-000006", 6)])
def test_a_flag_and_a_path_name_a_checkpoint_alike(run, name, step):
    path, last = run / "checkpoints" / name, weights(run)["logit_scale"]
    for loaded in (load_trained(run, name), load_trained(path)):
        assert (loaded.checkpoint.name, loaded.checkpoint.step) == (name, step)
        assert torch.equal(loaded.model.state_dict()["logit_scale"], last) == (step == 8)
    assert not is_published(path) and open_source(str(path)).file == Run(run).at(step) / "model.safetensors"
    assert ScanModel(path).checkpoint == ScanModel(run, checkpoint=name).checkpoint == Run(path).choose()


def test_the_best_is_the_default_where_a_development_split_chose_it(run):
    values = Run(run).read_config()
    assert values["best_of"] == "validation"
    Run(run).write_config({**values, "best_of": "development"})
    assert (Run(run).choose().name, Run(run).choose().chosen_on) == ("best", "development")
    assert Run(run).choose("last").step == 8


def test_a_folder_named_checkpoints_is_no_run(tmp_path):
    assert Run(tmp_path / "checkpoints/last").named is None
    assert Run(tmp_path / "checkpoints/a").folder.name == "a"


def test_a_run_starts_from_the_checkpoint_that_its_path_names_and_resumes_with_the_same_command(
    run, prepared, tmp_path
):
    for name in ("last", "best"):
        start = tiny(prepared, tmp_path / name, "--init", run / "checkpoints" / name, "--max-steps", 1)
        assert train.main(start) == 0  # the first step's rate is 0
        assert same_weights(tmp_path / name, run) == (name == "last")
        assert train.main([*start, *AUTO]) == 0
    found, best = weights(tmp_path / "best"), weights(run, "best")
    assert torch.equal(found["vision.pos_embed"], best["vision.pos_embed"])


@pytest.mark.slow
def test_what_a_run_was_made_from_is_found_by_its_hash_whichever_checkpoint_that_is(run, prepared, tmp_path):
    """Runs of before took `best`, and the last one moves when a run is trained on."""
    data = with_slices(prepared, tmp_path / "data")
    second, third = tmp_path / "second", tmp_path / "third"
    best = run / "checkpoints/best"
    flags = ("--max-steps", 2, "--save-every", 1, "--keep", 9, "--data", data)
    assert train.main(stage2(best, second, *flags)) == 0
    kept = weights(second)
    with edited(second / "config.json") as config:
        config["origin"] |= {"teacher": str(run), "init": str(run)}  # as before paths named checkpoints
    Run(second).point("last", 1)
    assert train.main(resume(second, stage="clip2")) == 0
    assert all(torch.equal(kept[n], t) for n, t in weights(second).items())
    flags = ("--data", data, "--max-steps", 1, "--no-train-vision")
    assert train.main(language(tmp_path, third, *flags, start="second")) == 0
    sha256 = config_of(third)["origin"]["encoders"][0]["sha256"]
    assert sha256 == config["origin"]["teacher_sha256"] == load_trained(best).sha256()
    found = load_trained(third).model.encoders[0].pos_embed
    assert torch.equal(found, weights(run, "best")["vision.pos_embed"])
    shutil.rmtree(Run(run).at(3))
    wrong(resume(second, stage="clip2"), "none of its checkpoints is the teacher that the run had")
