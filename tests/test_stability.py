"""Steps whose numbers are not finite, jumps of the loss, and what a step costs."""

import gzip
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from conftest import ROOT
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.train import contrastive
from reaf_hsenet.train.contrastive import Contrastive
from reaf_hsenet.train.stability import clip_gradients, diagnosis, not_finite
from reaf_hsenet.train.step_log import Meter, count_flops, peak_flops
from reaf_hsenet.train.training_state import TrainingState
from tiny import (
    AUTO,
    EIGHT,
    assert_same,
    finish,
    language,
    log_of,
    numbers,
    one_rank,
    resume,
    same_weights,
    tiny,
    weights,
    wrong,
)

EVERY = ("--save-every", 1, "--keep", 9)

LOSS = Contrastive.loss


def spoil_loss(step: int, rank: int = 0, gradient: bool = False, times: int = 1) -> None:
    """From `step` on the loss of this process, or the gradient alone, is NaN, on one rank."""

    def spoiled(self, outputs, batch, now):
        loss, more = LOSS(self, outputs, batch, now)
        if step - 1 <= now < step - 1 + times and int(os.environ.get("RANK", "0")) == rank:
            if gradient:
                outputs[0].register_hook(lambda g: g * math.nan)
            else:
                loss = loss * math.nan
        return loss, more

    Contrastive.loss = spoiled


def one_spoiled_rank(rank: int, world: int, port: int, argv: list[str]) -> None:
    spoil_loss(3, rank=1)
    one_rank(rank, world, port, argv)


@pytest.fixture
def spoil():
    yield spoil_loss
    Contrastive.loss = LOSS


def names_of(data: Path, step: int) -> set[str]:
    """The samples of a step, in a run with seed 42 and a global batch of 4."""
    entries = load_manifest(data).entries("train")
    batches = list(GlobalBatches(len(entries), 4, 0, 1, 42))
    return {entries[row]["id"] for _, row in batches[step - 1]}


def assert_skipped(run: Path) -> None:
    """Step 3 changed nothing, step 4 did."""
    files = [(Run(run).at(step) / "model.safetensors").read_bytes() for step in (2, 3, 4)]
    assert files[0] == files[1] != files[2]


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_changes_nothing_and_is_logged_with_its_samples(
    prepared, tmp_path, spoil, gradient
):
    out = tmp_path / "run"
    spoil(3, gradient=gradient)
    assert train.main(tiny(prepared, out, "--max-steps", 4, *EVERY)) == 0
    (record,) = numbers(out, "skipped")
    assert record["step"] == 3 and set(record["samples"]) == names_of(prepared, 3)
    assert ("the loss is nan on rank 0" in record["skipped"]) != gradient
    assert "gradients with NaN or infinite values: " in record["skipped"] and "vision." in record["skipped"]
    assert not (gradient and "text." in record["skipped"])  # only the vision tower's
    assert_skipped(out)
    states = [torch.load(Run(out).at(step) / "trainer.pt", weights_only=True) for step in (2, 3, 4)]
    assert [state["stability"]["skipped"] for state in states] == [0, 1, 1]
    assert [state["optimizer"]["state"][0]["step"] for state in states] == [2, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_all_ranks_skip_what_one_of_them_finds(prepared, tmp_path):
    out = tmp_path / "run"
    finish(tiny(prepared, out, "--max-steps", 4, *EVERY, "--batch-size", 2), 2, one_spoiled_rank)
    (record,) = numbers(out, "skipped")
    assert record["skipped"].startswith("the loss is nan on rank 1; gradients")
    assert set(record["samples"]) == names_of(prepared, 3)
    assert_skipped(out)


@pytest.mark.slow
def test_too_many_skipped_steps_stop_the_run_with_the_reason_and_weights_from_before(
    prepared, finished, tmp_path, spoil
):
    out = tmp_path / "run"
    argv = tiny(prepared, out, "--max-steps", 8, "--save-every", 100, "--max-skipped", 1)
    spoil(4, times=99)
    said = wrong(argv, "step 5: the loss is nan on rank 0; gradients with NaN .* and .* more; ")
    assert "more than --max-skipped 1 steps" in said
    before = Run(finished).at(3) / "model.safetensors"
    assert (Run(out).pointer("last") / "model.safetensors").read_bytes() == before.read_bytes()
    assert all(t.isfinite().all() for t in weights(out).values())
    wrong([*argv, "--resume"], "step 6: .*--max-skipped 1")
    Contrastive.loss = LOSS
    assert train.main([*argv, "--resume", "--max-skipped", "3"]) == 0


@pytest.mark.slow
def test_fp16_scaling_is_part_of_the_checkpoint_and_its_overflows_are_no_trouble(
    prepared, tmp_path, monkeypatch
):
    """The scale starts far too large: the first steps overflow, and are counted apart."""
    large = partial(
        torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-12, growth_factor=4, growth_interval=2
    )
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    arguments = "--max-steps 10 --precision fp16 --max-skipped 0 --save-every 5 --validate-every 1 --keep 9"
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train.main(tiny(prepared, whole, *arguments.split())) == 0
    steps = numbers(whole, "loss")
    assert not numbers(whole, "skipped") and steps[0]["overflows"] == 1 and "grad_norm" not in steps[0]
    assert 2 < steps[-1]["overflows"] < 8 and any("grad_norm" in r for r in steps[5:])
    state = torch.load(Run(whole).at(5) / "trainer.pt", weights_only=True)
    assert 1 < state["scaler"]["scale"] < 2.0**60 and state["stability"]["overflows"] == steps[4]["overflows"]
    shutil.copytree(whole, again)
    Run(again).point("last", 5)
    assert train.main(resume(again)) == 0
    assert_same(whole, again)


def test_a_gradient_that_stays_infinite_at_the_smallest_scale_is_trouble():
    layer, scaler = nn.Linear(2, 2), torch.amp.GradScaler("cpu", init_scale=1.0)
    layer.weight.grad = torch.full((2, 2), math.inf)
    assert not_finite(layer) == ["weight"] and not scaler.get_scale() > 1
    assert diagnosis([0.5], not_finite(layer)) == "gradients with NaN or infinite values: weight"
    assert diagnosis([0.5, math.inf], []) == "the loss is inf on rank 1"


def test_gradients_are_clipped_as_torch_does_and_keep_what_is_not_finite():
    torch.manual_seed(0)
    one, two = nn.Linear(5, 3), nn.Linear(5, 3)
    for layer in (one, two):
        for p, q in zip(layer.parameters(), one.parameters(), strict=True):
            p.grad = torch.randn_like(p) if layer is one else q.grad.clone()
    assert torch.allclose(clip_gradients(one, 0.5), nn.utils.clip_grad_norm_(two.parameters(), 0.5))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad)
    one.bias.grad[1] = math.nan
    kept = one.weight.grad.clone()
    assert clip_gradients(one, 0.5).isnan() and torch.equal(one.weight.grad, kept)
    assert not_finite(one) == ["bias"]


def test_a_step_reads_from_the_device_once(prepared, tmp_path, monkeypatch):
    """What is read between two lines of the log: one small tensor a step."""
    reads, seen = [], []
    step, tolist = train.train_step, torch.Tensor.tolist

    def counted(*args):
        reads.clear()
        done = step(*args)
        seen.append(list(reads))
        return done

    monkeypatch.setattr(train, "train_step", counted)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(tuple(t.shape)) or tolist(t))
    for name in ("item", "__float__", "__bool__", "__int__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, *a, read=read, name=name: reads.append(name) or read(t, *a)
        )
    assert train.main(tiny(prepared, tmp_path / "r", "--max-steps", 3, "--clip-norm", 0.1)) == 0
    assert [[read for read in step if read != "item"] for step in seen] == [[(1, 3)]] * 3


@pytest.mark.slow
def test_utilisation_is_flops_per_second_over_the_devices_peak_and_counting_changes_nothing(
    prepared, finished, tmp_path, monkeypatch
):
    once = 2 * 2 * 8 * 4  # of the forward; the weight's gradient costs as much
    assert count_flops(lambda: (nn.Linear(8, 4)(torch.zeros(2, 8)),)) == 2 * once
    monkeypatch.setattr("reaf_hsenet.train.training.peak_flops", lambda device, dtype: 1e12)
    counted, flops = [], TrainingState.flops
    noted = lambda self, batch: counted.append(flops(self, batch)) or counted[-1]
    monkeypatch.setattr(TrainingState, "flops", noted)
    for name, more in (("mfu", ()), ("hfu", ("--grad-checkpoint",))):
        out = tmp_path / name
        assert train.main(tiny(prepared, out, *EIGHT, *more)) == 0
        for record in log_of(out):
            if "loss" in record:
                assert record[name] == pytest.approx(record["samples_per_s"] * counted[-1] / 1e12)
    assert len(counted) == 2 and counted[1] > counted[0]  # once a run; with what is computed again
    assert same_weights(tmp_path / "mfu", finished)


def test_a_gpus_peak_is_that_of_its_whole_name(monkeypatch):
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": 181e12,
        "NVIDIA RTX A4000": None,
        "Tesla V100-SXM2-16GB": 125e12,
        "Tesla V100-PCIE-32GB": 112e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "AMD Instinct MI250X/MI250": 191.5e12,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), None) is peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_the_share_of_waiting_is_the_time_until_a_batch_is_there(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def slow():
        for batch in "abc":
            clock[0] += 3
            yield batch

    meter = Meter(4, 2, torch.device("cpu"))
    for _ in meter.waiting(slow()):
        clock[0] += 1
        meter.steps += 1
    with meter.paused():
        clock[0] += 100
    read = meter.read(None, "mfu")
    assert read["waiting"] == 9 / 12 and read["samples_per_s"] == 3 * 4 / 12 and "mfu" not in read


@pytest.mark.slow
def test_profile_writes_a_trace_of_steps_5_to_10(prepared, tmp_path):
    flags = ("--max-steps", 11, "--validate-every", 1, "--profile")
    assert train.main(tiny(prepared, tmp_path / "r", *flags)) == 0
    with gzip.open(tmp_path / "r/profile/steps-5-10.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 6 and any(e.get("name", "").startswith("aten::") for e in events)


def test_a_trace_that_cannot_be_written_ends_no_run(prepared, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/profile").touch()
    flags = ("--max-steps", 11, "--validate-every", 1, "--profile")
    assert train.main(tiny(prepared, tmp_path / "r", *flags)) == 0
    assert "r/profile: the trace cannot be written (File exists); training goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_to_every_process_stops_the_run_with_a_checkpoint_though_its_loaders_get_it_too(
    prepared, tmp_path
):
    """As a scheduler sends it: SIGUSR1 before the end of time, then SIGTERM."""
    for number, code in ((signal.SIGUSR1, 138), (signal.SIGTERM, 143)):
        out = tmp_path / str(number)
        flags = ("--max-steps", 500, "--save-every", 2, "--workers", 2, "--validate-every", 1)
        run = subprocess.Popen([sys.executable, ROOT / "train.py", *tiny(prepared, out, *flags)])
        while not Run(out).at(2).is_dir() and run.poll() is None:
            time.sleep(0.01)
        loaders = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert len(loaders) == 2
        for pid in (*map(int, loaders), run.pid):
            os.kill(pid, number)
        assert run.wait(60) == code and Run(out).pointer("last").is_dir()
        assert Run(out).read_log()[-1]["step"] == int(Run(out).pointer("last").name[5:])


def explode(monkeypatch, step: int) -> None:
    """From this step's update on the weights are so large that what is computed with them is not finite."""
    usual = train.learning_rate
    exploding = lambda done, *rest: 1e30 if done == step - 1 else usual(done, *rest)
    monkeypatch.setattr(train, "learning_rate", exploding)


def steps_of(run: Path, name: str) -> list[int]:
    return [record["step"] for record in numbers(run, name)]


@pytest.mark.slow
def test_a_diverged_run_is_diagnosed_and_keeps_its_best_and_its_last_good_checkpoint(
    prepared, tmp_path, monkeypatch, capsys
):
    """Validations at steps 3, 6, 9; the weights break in step 6, which is itself finite."""
    out, flags = tmp_path / "run", "--max-steps 9 --save-every 1 --keep 1 --validate-every 0.33"
    argv, run = tiny(prepared, out, *flags.split()), Run(out)
    with monkeypatch.context() as patch:
        explode(patch, 6)
        said = wrong(
            argv, "^step 9: the last validation is not finite, embeddings of 7 volumes and 7 reports"
        )
    advice = f"write step-000005 into {out}/checkpoints/last and --resume"
    assert f"are NaN or infinite; the last good checkpoint is {run.at(5)}: {advice}" in said
    assert [run.pointer("best"), run.pointer("last")] == [run.at(3), run.at(9)]
    assert run.all() == [run.at(step) for step in (3, 5, 9)]
    assert steps_of(out, "validation") == [3] and steps_of(out, "not_finite") == [6, 9]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    words = [f"warning: step {n}: the validation is not finite" for n in (6, 9)]
    assert [line.split(", ")[0] for line in warnings] == words
    assert wrong([*argv, "--resume"], "^step 9") == said
    wrong(argv, "holds a run already")  # it is not finished
    run.point("last", 5)
    assert train.main([*argv, *AUTO]) == 0
    assert steps_of(out, "validation") == [3, 6, 9]


def test_skipped_steps_of_a_diverged_run_name_the_last_good_checkpoint(prepared, tmp_path, monkeypatch):
    out = tmp_path / "run"
    explode(monkeypatch, 4)
    flags = ("--max-steps", 9, "--save-every", 1, "--keep", 1, "--validate-every", 1, "--max-skipped", 2)
    said = wrong(tiny(prepared, out, *flags), "^step 7: the loss is nan on rank 0; ")
    assert f"the last good checkpoint is {Run(out).at(3)}: " in said
    assert Run(out).all() == [Run(out).at(3), Run(out).at(7)]


def test_one_validation_that_is_not_finite_ends_no_run(prepared, tmp_path, monkeypatch):
    measured = contrastive.retrieval_score
    scores = iter([FloatingPointError("the third"), None, None])

    def spoiled(*pair):
        error = next(scores)
        if error:
            raise error
        return measured(*pair)

    monkeypatch.setattr(contrastive, "retrieval_score", spoiled)
    assert train.main(tiny(prepared, tmp_path / "run", "--max-steps", 3, "--validate-every", 0.33)) == 0
    assert steps_of(tmp_path / "run", "not_finite") == [1]
    assert steps_of(tmp_path / "run", "validation") == [2, 3]


@pytest.mark.slow
def test_a_diverged_language_run_is_diagnosed_and_its_log_is_json(stages, tmp_path, monkeypatch):
    out = tmp_path / "run"
    explode(monkeypatch, 3)
    flags = ("--vision", "stage1", "--max-steps", 4, "--save-every", 1, "--keep", 1, "--validate-every", 0.5)
    said = wrong(language(stages, out, *flags, start="clip1"), "^step 4: the last validation is not finite")
    assert f", the loss is nan; the last good checkpoint is {Run(out).at(2)}: " in said
    assert Run(out).pointer("best") == Run(out).at(2) and steps_of(out, "validation") == [2]
    assert log_of(out)[-1]["not_finite"] == "the loss is nan"
