"""train.py and evaluate.py as a user meets them, on a dozen small phantoms."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from conftest import ROOT, error_line, script
from reaf_hsenet.errors import InputError
from reaf_hsenet.runs.checkpoint import Run

TINY = [
    "--stage",
    "clip1",
    "--preset",
    "hsenet-tiny",
    "--size",
    "16",
    "32",
    "32",
    "--patch",
    "8",
    "16",
    "16",
    "--batch-size",
    "4",
    "--log-every",
    "1",
    "--device",
    "cpu",
]


def tiny(data: Path, out: Path, *more) -> list[str]:
    return [*TINY, "--data", str(data), "--out", str(out), *map(str, more)]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def finished(prepared, tmp_path_factory) -> Path:
    """A run of 8 steps, whole."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(tiny(prepared, out, "--max-steps", 8, "--save-every", 3, "--keep", 9)) == 0
    return out


@pytest.fixture
def run_copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(Run(run).pointer(name) / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def assert_close_weights(a: Path, b: Path) -> None:
    """The last weights of two runs agree but for rounding.

    A bias of keys moves all scores of a row alike: its gradient is rounding, which Adam makes steps of, so it
    is left out.
    """
    one, two = weights(a), weights(b)
    for name, tensor in one.items():
        keys = name.endswith("qkv.bias")
        parts = [0, 2] if keys else [0]
        for i in parts:
            x, y = (t.tensor_split(3)[i] if keys else t for t in (tensor, two[name]))
            assert torch.allclose(x, y, atol=2e-4), name


def numbers(run: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [
        {k: v for k, v in r.items() if k not in ("samples_per_s", "memory_gb", "waiting")}
        for r in Run(run).read_log()
    ]


@pytest.mark.slow
def test_run_folder_holds_what_the_design_says(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (
        config["stage"] == "clip1" and config["total_steps"] == 8 and config["recipe"]["size"] == [16, 32, 32]
    )
    assert (finished / "checkpoints/last").read_text().strip() == "step-000008"
    assert (finished / "checkpoints" / (finished / "checkpoints/best").read_text().strip()).is_dir()
    steps = [r for r in Run(finished).read_log() if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert {"loss", "lr", "grad_norm", "samples_per_s", "memory_gb", "waiting"} <= steps[0].keys()
    assert all(0 < r["waiting"] < 1 for r in steps)
    assert not list(finished.rglob("*.tmp"))


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_every_parameter(prepared, tmp_path, finished):
    assert train.main(tiny(prepared, tmp_path / "r", "--max-steps", 40, "--lr", "2e-3")) == 0
    losses = [r["loss"] for r in numbers(tmp_path / "r") if "loss" in r]
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:5]) / 5
    start, end = weights(finished), weights(tmp_path / "r")
    assert all(not torch.equal(start[n], end[n]) for n in start)


def test_learning_rate_warms_up_from_zero_and_ends_near_zero(finished):
    rates = [r["lr"] for r in numbers(finished) if "lr" in r]
    assert rates[0] == 0 < rates[1] == max(rates) == pytest.approx(1e-3) and 0 < rates[-1] < 1e-4


def at_step(monkeypatch, step: int, then) -> None:
    """Call `then` at the beginning of a step of train.main in this process."""
    rate = train.learning_rate

    def and_then(done, *rest):
        if done == step - 1:
            then()
        return rate(done, *rest)

    monkeypatch.setattr(train, "learning_rate", and_then)


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step."""
    at_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number", "code"), [(2, signal.SIGTERM, 143), (5, signal.SIGINT, 130), (3, signal.SIGUSR1, 138)]
)
def test_an_interrupted_run_resumes_bit_for_bit(
    prepared, finished, tmp_path, monkeypatch, step, number, code
):
    out, arguments = tmp_path / "run", ("--save-every", 3, "--keep", 9)
    with monkeypatch.context() as patch:
        stop_at(patch, step, number)
        assert train.main(tiny(prepared, out, "--max-steps", 8, *arguments)) == code
    assert Run(out).pointer("last").name == f"step-{step:06d}"
    assert (
        train.main(["--stage", "clip1", "--out", str(out), "--resume", "--log-every", "1", "--device", "cpu"])
        == 0
    )
    assert same_weights(out, finished)
    assert numbers(out) == numbers(finished)


def test_a_second_ctrl_c_ends_within_the_step(prepared, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    stop_at(monkeypatch, 3, signal.SIGINT)
    stop_at(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny(prepared, out, "--max-steps", 8, "--save-every", 2))
    assert Run(out).pointer("last").name == "step-000002"
    assert "Ctrl-C again stops at once" in capsys.readouterr().out


def test_resuming_forgets_what_was_logged_after_the_checkpoint(prepared, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "checkpoints/last").write_text("step-000003\n")
    assert (
        train.main(["--stage", "clip1", "--out", str(out), "--resume", "--log-every", "1", "--device", "cpu"])
        == 0
    )
    assert same_weights(out, finished) and numbers(out) == numbers(finished)


def test_a_finished_run_started_again_says_so_and_changes_nothing(run_copy, prepared, capsys):
    before = {p: p.stat().st_mtime_ns for p in run_copy.rglob("*") if p.is_file() and p.name != ".lock"}
    assert train.main(tiny(prepared, run_copy, "--max-steps", 8, "--save-every", 3, "--keep", 9)) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {
        p: p.stat().st_mtime_ns for p in run_copy.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_a_short_trial_is_not_taken_for_the_whole_run(prepared, run_copy):
    wrong(tiny(prepared, run_copy, "--save-every", 3, "--keep", 9), "holds a run already")


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(prepared, finished, run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    assert train.main(tiny(prepared, run_copy, "--max-steps", 8, "--save-every", 3, "--keep", 9)) == 0
    assert same_weights(run_copy, finished) and numbers(run_copy) == numbers(finished)


def test_accumulation_equals_its_parts(prepared, tmp_path):
    """Two batches a step: the mean of their losses, and half as many steps an epoch."""
    assert train.main(tiny(prepared, tmp_path / "r", "--accumulate", 2, "--epochs", 2)) == 0
    rows = len(json.loads((prepared / "manifest.json").read_text())["splits"]["train"])
    assert json.loads((tmp_path / "r/config.json").read_text())["total_steps"] == (rows // 4 // 2) * 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_and_gradient_checkpointing_train(prepared, tmp_path, finished, precision):
    more = ("--max-steps", 8, "--precision", precision, "--grad-checkpoint")
    assert train.main(tiny(prepared, tmp_path / "r", *more)) == 0
    losses, reference = (
        [r["loss"] for r in numbers(run) if "loss" in r] for run in (tmp_path / "r", finished)
    )
    assert losses != reference and losses[0] == pytest.approx(reference[0], rel=0.02)
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "r").values())


def torchrun(processes: int, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        str(ROOT / "train.py"),
        *map(str, arguments),
    ]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(prepared, finished, tmp_path):
    arguments = tiny(prepared, tmp_path / "two", "--max-steps", 8, "--save-every", 3, "--keep", 9)
    arguments[arguments.index("--batch-size") + 1] = "2"
    done = torchrun(2, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = numbers(finished), numbers(tmp_path / "two")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            assert b["loss"] == pytest.approx(a["loss"], abs=2e-5) and b["grad_norm"] == pytest.approx(
                a["grad_norm"], rel=1e-3
            )
    assert "train: step 8 of 8, " in done.stderr and "step 8: validation" in done.stderr + done.stdout
    assert all(shown in done.stderr for shown in (" samples/s", "gradient ", "waiting ", " GB"))


@pytest.mark.slow
def test_more_processes_than_samples_is_one_line(prepared, tmp_path):
    values = json.loads((prepared / "manifest.json").read_text())
    data = shutil.copytree(prepared, tmp_path / "data")
    values["splits"]["train"] = values["splits"]["train"][:2]
    (data / "manifest.json").write_text(json.dumps(values))
    arguments = [a for a in tiny(data, tmp_path / "r") if a not in ("--batch-size", "4")]
    done = torchrun(3, *arguments, cwd=tmp_path)
    assert (
        done.returncode != 0 and done.stderr.count("2 training volumes for 3 processes") == 1
    )  # not once a process
    assert done.stderr.count("error: ") == 1


def test_evaluation_writes_the_table_the_json_the_ranks_and_the_embeddings(run_copy, prepared, capsys):
    assert evaluate.main(["--task", "retrieval", "--run", str(run_copy), "--device", "cpu"]) == 0
    results = json.loads((run_copy / "eval/retrieval.json").read_text())
    assert results["n"] >= 6 and results["scans"] == 6
    for direction in ("report_to_volume", "volume_to_report"):
        assert set(results[direction]) == {"R@1", "R@5", "R@10", "R@50", "R@100", "mean_rank", "median_rank"}
        assert 0 <= results[direction]["R@1"] <= results[direction]["R@5"] <= results[direction]["R@10"] == 1
        assert results["per_scan"][direction]["R@10"] == 1
    assert set(results["volume_to_volume"]["per_k"]) == {"1", "5", "10", "50"}
    embeddings = load_file(run_copy / "eval/embeddings.safetensors")
    assert embeddings["image"].shape == embeddings["text"].shape == (results["n"], 128)
    rows = (run_copy / "eval/retrieval_queries.csv").read_text().splitlines()
    assert len(rows) == results["n"] + 1
    printed = capsys.readouterr().out
    assert (
        "report to volume" in printed and "label overlap, without its scan" in printed and "R@100" in printed
    )


def test_the_tables_ranks_are_those_of_the_embeddings(run_copy):
    """The csv's ranks, recomputed plainly from the stored embeddings."""
    import csv

    evaluate.main(["--task", "retrieval", "--run", str(run_copy), "--device", "cpu"])
    embeddings = load_file(run_copy / "eval/embeddings.safetensors")
    similarity = embeddings["text"] @ embeddings["image"].T
    with open(run_copy / "eval/retrieval_queries.csv", newline="") as file:
        for i, row in enumerate(csv.DictReader(file)):
            order = sorted(range(len(similarity)), key=lambda j: (-similarity[i, j].item(), j))
            assert int(row["report_to_volume_rank"]) == order.index(i) + 1


def test_evaluation_does_not_depend_on_the_batch_size(run_copy):
    found = []
    for size in (1, 5):
        evaluate.main(
            ["--task", "retrieval", "--run", str(run_copy), "--batch-size", str(size), "--device", "cpu"]
        )
        found.append(load_file(run_copy / "eval/embeddings.safetensors"))
    assert all(torch.allclose(found[0][k], found[1][k], atol=1e-5) for k in ("image", "text"))


def wrong(argv: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        train.main(argv)
    assert "\n" not in str(caught.value)


def test_wrong_flags_are_named(prepared, tmp_path):
    out = tmp_path / "r"
    for flag, value in (
        ("--batch-size", 0),
        ("--batch-size", -1),
        ("--epochs", 0),
        ("--lr", 0),
        ("--max-steps", 0),
        ("--accumulate", 0),
        ("--workers", -1),
        ("--clip-norm", "nan"),
    ):
        wrong(tiny(prepared, out, flag, value), flag)
    wrong(["--stage", "clip9"], "--stage.*clip9.*clip1")
    wrong(["--stage", "clip1", "--model", "m3d"], "--model.*m3d")
    wrong(["--stage", "clip1", "--precision", "fp8"], "--precision.*fp8")
    wrong(["--stage", "clip1", "--learning-rate", "1"], "--learning-rate")
    wrong(tiny(prepared, out, "--preset", "huge"), "--preset huge.*hsenet-base, hsenet-tiny")
    wrong(tiny(prepared, out, "--batch-size", 500), "--batch-size 500.*there are")
    wrong(tiny(prepared, out, "--batch-size", 1), "--batch-size 1")
    wrong(tiny(prepared, out, "--accumulate", 5), "--accumulate 5: a step needs 20 samples, there are")
    wrong(tiny(prepared, out, "--seed", -1), "--seed -1")
    wrong(tiny(prepared, out, "--warmup", 2), "--warmup 2")
    wrong(tiny(prepared, out, "--patch", 5, 16, 16), "not a multiple of the patch")
    wrong(tiny(prepared, out, "--text-model", "./nowhere"), "./nowhere: no such folder")
    wrong(tiny(prepared, out, "--text-model", "some/bert"), "some/bert.*hub")
    if not torch.cuda.is_available():
        wrong(tiny(prepared, out, "--device", "cuda"), "--device cuda.*no GPU")
    wrong(tiny(prepared, out, "--log", "wandb"), "--log wandb.*not installed")
    wrong(
        tiny(prepared, out, "--best-by", "loss"),
        "--best-by loss: the validation measures report_to_volume/R@1, .*R@10$",
    )


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    line = error_line(script("train.py", "--stage", "clip1", "--batch-size", 0, cwd=tmp_path))
    assert line == "error: --batch-size 0: expected more than 0"
    assert (
        "Traceback"
        in script("train.py", "--stage", "clip1", "--batch-size", 0, "--debug", cwd=tmp_path).stderr
    )


def test_a_manifest_of_another_size_or_recipe_is_refused(prepared, tmp_path, run_copy):
    wrong(
        ["--stage", "clip1", "--data", str(prepared), "--out", str(tmp_path / "r")],
        "have size 16x32x32, but preset hsenet-base needs size 32x256x256.*preprocess.py",
    )
    other = shutil.copytree(prepared, tmp_path / "other")
    values = json.loads((other / "manifest.json").read_text())
    values["recipe"]["name"] = "reaf"
    (other / "manifest.json").write_text(json.dumps(values))
    wrong(tiny(other, tmp_path / "r"), "have recipe reaf, but preset hsenet-tiny needs recipe hsenet")
    with pytest.raises(InputError, match="have recipe reaf, but .*run needs recipe hsenet"):
        evaluate.main(["--task", "retrieval", "--run", str(run_copy), "--data", str(other)])


def test_a_window_that_the_run_was_not_trained_with_is_refused(prepared, tmp_path, run_copy):
    other = shutil.copytree(prepared, tmp_path / "other")
    values = json.loads((other / "manifest.json").read_text())
    values["recipe"]["window"] = [-1150, 350]
    (other / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="have window -1150x350, but .*run needs window -1000x200"):
        evaluate.main(["--task", "retrieval", "--run", str(run_copy), "--data", str(other)])


def test_two_runs_into_one_folder_are_refused(prepared, run_copy):
    wrong(tiny(prepared, run_copy, "--max-steps", 9), "holds a run already.*--resume")
    held = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from reaf_hsenet.files import folder_lock\n"
            f"with folder_lock({str(run_copy)!r}): print(flush=True), time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        held.stdout.readline()
        wrong(tiny(prepared, run_copy, "--max-steps", 8), f"process {held.pid} .*is writing into it")
    finally:
        held.kill()


def test_resume_keeps_the_runs_settings(run_copy, tmp_path):
    wrong(["--stage", "clip1", "--out", str(run_copy), "--resume", "--lr", "1"], "--lr: with --resume")
    wrong(["--stage", "clip1", "--out", str(run_copy), "--resume", "--seed", "0"], "--seed: with --resume")
    wrong(["--stage", "clip1", "--out", str(run_copy), "--resume", "--max-steps", "9"], "--max-steps.*has 8")
    wrong(
        ["--stage", "clip1", "--out", str(run_copy), "--resume", "--epochs", "9"],
        "--epochs 9: .* started with --max-steps 8",
    )
    wrong(
        ["--stage", "clip1", "--out", str(run_copy), "--resume", "--best-by", "loss"],
        "--best-by: with --resume",
    )
    wrong(["--stage", "clip1", "--out", str(tmp_path / "none"), "--resume"], "holds no run")
    repeated = ["--seed", "42", "--size", "16", "32", "32", "--max-steps", "8", "--batch-size", "4"]
    assert (
        train.main(["--stage", "clip1", "--out", str(run_copy), "--resume", "--device", "cpu", *repeated])
        == 0
    )


def test_a_volume_that_cannot_be_read_ends_training_with_its_name(prepared, tmp_path):
    import numpy as np

    data = shutil.copytree(prepared, tmp_path / "data")
    victim = data / "volumes/train_5_a_1.npy"
    volume = np.load(victim)
    volume[3] = np.nan
    np.save(victim, volume)
    wrong(tiny(data, tmp_path / "a", "--epochs", 1), "train_5_a_1.npy: holds NaN")
    wrong(tiny(data, tmp_path / "b", "--epochs", 1, "--workers", 1), "train_5_a_1.npy: holds NaN")
    victim.unlink()
    wrong(tiny(data, tmp_path / "c"), "train_5_a_1.npy: is in the manifest but absent")


def spoil_checkpoint(run: Path, how: str) -> str:
    path = Run(run).pointer("last") / "model.safetensors"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
        return "model.safetensors: is damaged: it has 5000 bytes"
    if how == "of another model":
        config = json.loads((run / "config.json").read_text())
        config["model"]["vision"]["depth"] = 1
        (run / "config.json").write_text(json.dumps(config))
        return "does not fit this model: vision.blocks.1"
    if how == "of another stage":
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "stage": "mrg"}))
        return "is a run of stage 'mrg'; expected a dual encoder"
    shutil.rmtree(run / "checkpoints")
    return "has no checkpoint"


@pytest.mark.parametrize("how", ["truncated", "of another model", "of another stage", "absent"])
def test_a_checkpoint_that_does_not_fit_is_refused(run_copy, how):
    words = spoil_checkpoint(run_copy, how)
    with pytest.raises(InputError, match=words):
        evaluate.main(["--task", "retrieval", "--run", str(run_copy), "--device", "cpu"])


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run.*train.py"):
        evaluate.main(["--task", "retrieval", "--run", str(tmp_path)])


def test_tensorboard_gets_the_log_when_it_is_installed(prepared, tmp_path):
    pytest.importorskip("tensorboard")
    assert train.main(tiny(prepared, tmp_path / "r", "--max-steps", 2, "--log", "tensorboard")) == 0
    assert list((tmp_path / "r/tensorboard").iterdir())
