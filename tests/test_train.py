"""train.py and evaluate.py as a user meets them, on a dozen small phantoms; their refusals: tests/faults."""

import csv
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from conftest import ROOT, error_line, script
from reaf_hsenet.files import read_json
from reaf_hsenet.runs.checkpoint import Run
from tiny import (
    EIGHT,
    assert_close_logs,
    assert_same,
    config_of,
    edited,
    log_of,
    losses,
    numbers,
    resume,
    retrieval,
    run_torchrun,
    stop_at,
    tiny,
    weights,
    wrong,
)


@pytest.mark.slow
def test_run_folder_holds_what_the_design_says(finished):
    config = config_of(finished)
    assert config["stage"] == "clip1" and config["total_steps"] == 8
    assert config["recipe"]["size"] == [16, 32, 32]
    assert (finished / "checkpoints/last").read_text().strip() == "step-000008"
    assert (finished / "checkpoints" / (finished / "checkpoints/best").read_text().strip()).is_dir()
    steps = [r for r in log_of(finished) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert {"loss", "lr", "grad_norm", "samples_per_s", "memory_gb", "waiting"} <= steps[0].keys()
    assert all(0 < r["waiting"] < 1 for r in steps)
    assert not list(finished.rglob("*.tmp"))


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_every_parameter(prepared, tmp_path, finished):
    assert train.main(tiny(prepared, tmp_path / "r", "--max-steps", 40, "--lr", "2e-3")) == 0
    found = losses(tmp_path / "r")
    assert sum(found[-5:]) / 5 < 0.8 * sum(found[:5]) / 5
    start, end = weights(finished), weights(tmp_path / "r")
    assert all(not torch.equal(start[n], end[n]) for n in start)


def test_learning_rate_warms_up_from_zero_and_ends_near_zero(finished):
    rates = [r["lr"] for r in numbers(finished, "lr")]
    assert rates[0] == 0 < rates[1] == max(rates) == pytest.approx(5e-4) and 0 < rates[-1] < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number", "code"), [(2, signal.SIGTERM, 143), (5, signal.SIGINT, 130), (3, signal.SIGUSR1, 138)]
)
def test_an_interrupted_run_resumes_bit_for_bit(
    prepared, finished, tmp_path, monkeypatch, step, number, code
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        assert train.main(tiny(prepared, out, *EIGHT)) == code
    assert Run(out).pointer("last").name == f"step-{step:06d}"
    assert train.main(resume(out)) == 0
    assert_same(out, finished)


def test_a_second_ctrl_c_ends_within_the_step(prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    stop_at(monkeypatch, 3, signal.SIGINT)
    stop_at(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny(prepared, out, "--max-steps", 8, "--save-every", 2))
    assert Run(out).pointer("last").name == "step-000002"
    assert "Ctrl-C again stops at once" in capsys.readouterr().out


def test_resuming_forgets_what_was_logged_after_the_checkpoint(finished, run_copy):
    Run(run_copy).point("last", 3)
    for name in (".log.jsonl.7.tmp", "checkpoints/.last.7.tmp", "checkpoints/.step-000006.tmp/x"):
        (run_copy / name).parent.mkdir(exist_ok=True)
        (run_copy / name).write_text("of a process that was killed")
    assert train.main(resume(run_copy)) == 0
    assert_same(run_copy, finished)
    assert not list(run_copy.rglob("*.tmp"))


def test_a_finished_run_started_again_says_so_and_changes_nothing(run_copy, prepared, capsys):
    def files() -> dict:
        return {p: p.stat().st_mtime_ns for p in run_copy.rglob("*") if p.is_file() and p.name != ".lock"}

    before = files()
    assert train.main(tiny(prepared, run_copy, *EIGHT)) == 0
    assert "finished already" in capsys.readouterr().out and before == files()


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(prepared, finished, run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    assert train.main(tiny(prepared, run_copy, *EIGHT)) == 0
    assert_same(run_copy, finished)


def test_accumulation_equals_its_parts(prepared, tmp_path):
    """Two batches a step: the mean of their losses, and half as many steps an epoch."""
    assert train.main(tiny(prepared, tmp_path / "r", "--accumulate", 2, "--epochs", 2)) == 0
    rows = len(read_json(prepared / "manifest.json")["splits"]["train"])
    assert config_of(tmp_path / "r")["total_steps"] == (rows // 4 // 2) * 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_and_gradient_checkpointing_train(prepared, tmp_path, finished, precision):
    more = ("--max-steps", 8, "--precision", precision, "--grad-checkpoint")
    assert train.main(tiny(prepared, tmp_path / "r", *more)) == 0
    found, reference = losses(tmp_path / "r"), losses(finished)
    assert found != reference and found[0] == pytest.approx(reference[0], rel=0.02)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "r").values())


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(prepared, finished, tmp_path):
    done = run_torchrun(2, tiny(prepared, tmp_path / "two", *EIGHT, "--batch-size", 2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in numbers(finished)] == [r["step"] for r in numbers(tmp_path / "two")]
    assert_close_logs(finished, tmp_path / "two")
    assert "train: step 8 of 8, " in done.stderr and "step 8: validation" in done.stderr + done.stdout
    assert all(shown in done.stderr for shown in (" samples/s", "gradient ", "waiting ", " GB"))


@pytest.mark.slow
def test_more_processes_than_samples_is_one_line(data, tmp_path):
    with edited(data / "manifest.json") as manifest:
        del manifest["splits"]["train"][2:]
    arguments = [a for a in tiny(data, tmp_path / "r") if a not in ("--batch-size", "4")]
    done = run_torchrun(3, arguments, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1  # not once a process
    assert done.stderr.count("2 training volumes for 3 processes") == 1


def test_evaluation_writes_the_table_the_json_the_ranks_and_the_embeddings(run_copy, capsys):
    assert evaluate.main(retrieval(run_copy)) == 0
    results = read_json(run_copy / "eval/retrieval.json")
    assert results["n"] >= 6 and results["scans"] == 6
    for direction in ("report_to_volume", "volume_to_report"):
        assert set(results[direction]) == {"R@1", "R@5", "R@10", "R@50", "R@100", "mean_rank", "median_rank"}
        assert 0 <= results[direction]["R@1"] <= results[direction]["R@5"] <= results[direction]["R@10"] == 1
        assert results["per_scan"][direction]["R@10"] == 1
    assert set(results["volume_to_volume"]["per_k"]) == {"1", "5", "10", "50"}
    embeddings = load_file(run_copy / "eval/embeddings_validation.safetensors")
    assert embeddings["image"].shape == embeddings["text"].shape == (results["n"], 128)
    printed = capsys.readouterr().out
    assert all(w in printed for w in ("report to volume", "label overlap, without its scan", "R@100"))
    # The csv's ranks, recomputed plainly from the stored embeddings.
    similarity = embeddings["text"] @ embeddings["image"].T
    with open(run_copy / "eval/retrieval_queries.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == results["n"]
    for i, row in enumerate(rows):
        order = sorted(range(len(similarity)), key=lambda j: (-similarity[i, j].item(), j))
        assert int(row["report_to_volume_rank"]) == order.index(i) + 1


def test_evaluation_does_not_depend_on_the_batch_size(run_copy):
    found = []
    for size in (1, 5):
        evaluate.main(retrieval(run_copy, "--batch-size", size))
        found.append(load_file(run_copy / "eval/embeddings_validation.safetensors"))
    assert all(torch.allclose(found[0][k], found[1][k], atol=1e-5) for k in ("image", "text"))


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    command = ("train.py", "--stage", "clip1", "--batch-size", 0)
    assert error_line(script(*command, cwd=tmp_path)) == "error: --batch-size 0: expected more than 0"
    assert "Traceback" in script(*command, "--debug", cwd=tmp_path).stderr


def test_two_runs_into_one_folder_are_refused(prepared, run_copy):
    holding = (
        "import sys, time; from reaf_hsenet.files import folder_lock\n"
        f"with folder_lock({str(run_copy)!r}): print(flush=True), time.sleep(60)"
    )
    held = subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        held.stdout.readline()
        wrong(tiny(prepared, run_copy, "--max-steps", 8), f"process {held.pid} .*is writing into it")
    finally:
        held.kill()


def test_tensorboard_gets_the_log_when_it_is_installed(prepared, tmp_path):
    pytest.importorskip("tensorboard")
    assert train.main(tiny(prepared, tmp_path / "r", "--max-steps", 2, "--log", "tensorboard")) == 0
    assert list((tmp_path / "r/tensorboard").iterdir())
