"""Runs that are killed with SIGKILL at random moments, some in the midst of a checkpoint, and continued
by the same command.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT
from reaf_hsenet.runs.checkpoint import Run
from tiny import (
    AUTO,
    assert_close_logs,
    assert_close_weights,
    assert_same,
    finish,
    language,
    start,
    tiny,
)

pytestmark = pytest.mark.usefixtures("forks")


def kill_when(moment: Callable[[], bool], delay: float, argv: list[str], world: int = 1) -> bool:
    """Start, and kill all ranks `delay` seconds after the moment has come. Whether they were still
    running then.
    """
    ranks = start(argv, world)
    while not moment() and all(rank.is_alive() for rank in ranks):
        time.sleep(0.0005)
    time.sleep(delay)
    running = all(rank.is_alive() for rank in ranks)
    for rank in ranks:
        rank.kill()
        rank.join()
    return running


def kill_often(argv: list[str], out: Path, times: int, world: int = 1, seed: int = 0) -> None:
    """Kill a run while it sets up, while it writes a checkpoint, and after its next one; then let it end."""
    dice = random.Random(seed)
    for i in range(times):
        had = sorted(out.glob("checkpoints/step-*"))
        moments = (
            (lambda: True, dice.uniform(0, 0.6)),
            (lambda: any(out.glob("checkpoints/.step-*.tmp")), dice.uniform(0, 0.02)),
            (lambda: sorted(out.glob("checkpoints/step-*")) > had, dice.uniform(0, 0.1)),  # noqa: B023
        )
        assert kill_when(*moments[i % 3], argv, world), "the run ended before it was killed often enough"
    finish(argv, world)


@pytest.mark.slow
def test_twenty_kills_change_no_weight_and_no_number_of_the_log(prepared, tmp_path):
    """With accumulation, gradient caching, mixed precision and gradient checkpointing."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = "--max-steps 30 --save-every 1 --validate-every 0.2 --precision bf16 --grad-checkpoint".split()
    more += ["--accumulate", 2, "--grad-cache", 3, *AUTO]
    finish(tiny(prepared, whole, *more))
    kill_often(tiny(prepared, killed, *more), killed, 20)
    assert_same(whole, killed)
    assert Run(whole).pointer("best").name == Run(killed).pointer("best").name
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", ["clip2", "mrg", "vqa"])
def test_every_stage_survives_kills(stages, tmp_path, stage, world):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--max-steps", 6, "--save-every", 1, "--validate-every", 0.5, "--batch-size", 4 // world, *AUTO)
    more += ("--questions", "presence") if stage == "vqa" else ()
    first = "clip1" if stage == "clip2" else "clip2"
    finish(language(stages, whole, *more, stage=stage, start=first), world)
    kill_often(language(stages, killed, *more, stage=stage, start=first), killed, 3, world)
    assert_same(whole, killed)


def two(data: Path, out: Path, *more) -> list[str]:
    return tiny(data, out, "--max-steps", 8, "--save-every", 1, "--batch-size", 2, *more)


@pytest.fixture(scope="module")
def two_whole(prepared, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "two"
    finish(two(prepared, out), 2)
    return out


@pytest.mark.slow
def test_two_processes_survive_kills(prepared, two_whole, tmp_path):
    kill_often(two(prepared, tmp_path / "killed", *AUTO), tmp_path / "killed", 4, 2)
    assert_same(two_whole, tmp_path / "killed")


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_resumes_on_two_and_on_one(prepared, tmp_path):
    """The same command, whose --batch-size is of the four: the global batch is kept."""
    one, out = tmp_path / "one", tmp_path / "out"
    more = ("--max-steps", 9, "--save-every", 3, "--keep", 9)
    finish(tiny(prepared, one, *more))
    argv = tiny(prepared, out, *more, "--batch-size", 1, *AUTO)
    for world, step in ((4, 3), (2, 6)):
        assert kill_when(Run(out).at(step).is_dir, 0, argv, world)
    finish(argv)
    assert_close_logs(one, out)
    assert_close_weights(one, out)


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank_and_ends_with_the_same_weights(prepared, two_whole, tmp_path):
    out = tmp_path / "run"
    command = "-m torch.distributed.run --nproc-per-node 2 --standalone --max-restarts 1".split()
    command = [sys.executable, *command, str(ROOT / "train.py"), *two(prepared, out, *AUTO)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not Run(out).at(2).is_dir() and job.poll() is None:
            time.sleep(0.01)
        ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        said = job.communicate(timeout=240)[0]
    finally:
        job.kill()
    assert job.returncode == 0, said
    assert_same(two_whole, out)
