"""Volumes that go bad while a run trains: named, counted against --max-bad, left out, and nothing else
changes.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from reaf_hsenet.config import Augmentation
from reaf_hsenet.data.bad_volumes import Unreadable
from reaf_hsenet.data.loader import CTReportDataset, read_sample
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.data.workers import batches, make_loader
from reaf_hsenet.errors import InputError
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece
from test_clip2_runs import stage2
from test_language_runs import decoder_folder, language, stages  # noqa: F401  (fixtures)
from test_train import (  # noqa: F401  (a fixture)
    assert_close_weights,
    at_step,
    keep_signal_handlers,
    numbers,
    same_weights,
    stop_at,
    tiny,
    torchrun,
    weights,
    wrong,
)


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "data")


def volume(data: Path, row: int, split: str = "train") -> Path:
    return data / load_manifest(data).entries(split)[row]["volume"]


def spoil(path: Path, how: str = "NaN") -> str:
    """Make a volume bad; returns its id."""
    if how == "NaN":
        voxels = np.load(path)
        voxels[3] = np.nan
        np.save(path, voxels)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.unlink()
    return path.stem


@pytest.mark.parametrize("shape", ["(4, 4, 4", "(9999999, 9999999, 9)", "(99999999999999999999, 4)"])
def test_a_damaged_header_is_a_bad_volume(data, shape):
    """A bracket that is not closed, more than there is memory for, more than there are numbers for."""
    manifest, path = load_manifest(data), volume(data, 0)
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4096))
    found = read_sample(manifest, manifest.entries("train")[0], slices=False)
    assert (
        isinstance(found, Unreadable)
        and found.reason.startswith(f"{path}: cannot be read")
        and "\n" not in found.reason
    )


def bad_records(run: Path) -> list[tuple[int, str]]:
    return [(r["step"], r["bad"]) for r in Run(run).read_log() if "bad" in r]


def spoil_in_step(monkeypatch, step: int, path: Path, how: str) -> None:
    """Make a volume bad while a run is in `step`."""
    at_step(monkeypatch, step, lambda: path.exists() and spoil(path, how))


def test_a_bad_volume_leaves_its_batch_and_changes_no_other_item(prepared, data):
    bad = [spoil(volume(data, 5)), spoil(volume(data, 9), "truncated")]
    found = []
    for folder in (prepared, data):
        manifest = load_manifest(folder)
        tokenizer = train_wordpiece([e["text"] for e in manifest.entries("train")], 400)
        dataset = CTReportDataset(manifest, "train", tokenizer, 24, Augmentation(), seed=3)
        loader = make_loader(dataset, GlobalBatches(len(dataset), 6, 0, 1, 7), 2)
        found.append(list(batches(loader, torch.device("cpu"), tolerant=True)))
    rows = lambda part: {
        row: (part.volume[i], part.ids[i][part.mask[i] > 0]) for i, row in enumerate(part.index)
    }
    for whole, rest in zip(*found, strict=True):
        assert rest.index == [row for row in whole.index if row not in (5, 9)]
        for row, item in rows(rest).items():
            assert all(torch.equal(a, b) for a, b in zip(item, rows(whole)[row], strict=True))
    assert sorted(one.id for part in found[1] for one in part.bad) == sorted(bad)


@pytest.mark.slow
def test_bad_volumes_are_left_out_counted_once_and_logged_by_name(data, tmp_path, capsys, monkeypatch):
    known = [spoil(volume(data, 3), "absent"), spoil(volume(data, 6)), spoil(volume(data, 1, "validation"))]
    vanished = volume(data, 8)
    spoil_in_step(monkeypatch, 1, vanished, "absent")
    out = tmp_path / "run"
    assert train.main(tiny(data, out, "--epochs", 3, "--max-bad", 4)) == 0
    records = bad_records(out)
    assert sorted(name for _, name in records) == sorted([*known, vanished.stem])  # each once in three epochs
    assert records[0] == (0, known[0])  # what the check of the manifest finds is there from the start
    printed = capsys.readouterr().out
    for number, (_, name) in enumerate(records, 1):
        assert f"left out, {number} of --max-bad 4: {name}: {data}" in printed
    reasons = {r["bad"]: r["reason"] for r in Run(out).read_log() if "bad" in r}
    assert (
        "absent" in reasons[known[0]]
        and "holds NaN" in reasons[known[1]]
        and "no such file" in reasons[vanished.stem]
    )


def test_one_volume_more_than_allowed_ends_the_run_with_its_name(data, tmp_path):
    spoil(volume(data, 3)), spoil(volume(data, 6))
    wrong(
        tiny(data, tmp_path / "a", "--epochs", 1, "--max-bad", 1),
        r"holds NaN.*\(bad volume 2, with --max-bad 1\)",
    )
    wrong(tiny(data, tmp_path / "b", "--epochs", 1, "--max-bad", 0), f"{volume(data, 3)}: holds NaN")
    spoil(volume(data, 1, "validation"), "truncated")
    wrong(tiny(data, tmp_path / "c", "--epochs", 1), "has 5000 bytes, expected")


@pytest.mark.slow
def test_the_count_survives_a_resume(data, tmp_path, monkeypatch):
    one, two, out = volume(data, 6), volume(data, 8), tmp_path / "run"
    spoil(one)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main(tiny(data, out, "--max-steps", 9, "--max-bad", 1, "--no-augment")) == 143
    again = ["--stage", "clip1", "--out", str(out), "--resume", "--device", "cpu"]
    wrong(
        [*again, "--max-bad", 0],
        f"--max-bad 0: this run has left out 1 volumes already .{one.stem}.; allow as many",
    )
    with monkeypatch.context() as patch:
        spoil_in_step(patch, 5, two, "absent")
        wrong(again, f"{two}: no such file.*bad volume 2, with --max-bad 1")
    assert train.main([*again, "--max-bad", "2"]) == 0
    assert [name for _, name in bad_records(out)] == [one.stem, two.stem]


def at_batch(arguments: list[str], out: Path, size: int, *more) -> list[str]:
    """The same command into another folder, with another batch size."""
    arguments = [*arguments, *map(str, more)]
    arguments[arguments.index("--batch-size") + 1] = str(size)
    arguments[arguments.index("--out") + 1] = str(out)
    return arguments


def assert_alike(one: Path, two: Path, bad: set[str]) -> None:
    assert {name for _, name in bad_records(one)} == bad == {name for _, name in bad_records(two)}
    for a, b in zip(*([r for r in numbers(run) if "lr" in r] for run in (one, two)), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-3, abs=1e-6
        )
    assert_close_weights(one, two)


@pytest.mark.slow
def test_two_processes_of_which_one_has_an_empty_batch_train_as_one(data, tmp_path):
    bad = {spoil(volume(data, row)) for row in (2, 7, 11)}
    arguments = tiny(data, tmp_path / "one", "--max-steps", 8, "--max-bad", 3, "--grad-checkpoint")
    assert train.main(at_batch(arguments, tmp_path / "one", 2)) == 0
    for name, more in (("two", ()), ("cached", ("--grad-cache", 1))):
        done = torchrun(2, *at_batch(arguments, tmp_path / name, 1, *more), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert_alike(tmp_path / "one", tmp_path / name, bad)
    done = torchrun(2, *at_batch(arguments, tmp_path / "three", 1, "--max-bad", 2), cwd=tmp_path)
    assert (
        done.returncode != 0 and done.stderr.count("(bad volume 3, with --max-bad 2)") == 1
    )  # both ranks stop, one says why


@pytest.mark.slow
def test_stage_2_copes_with_an_empty_batch_too(stages, tmp_path):
    root = shutil.copytree(stages, tmp_path / "stages")
    bad = {spoil(volume(root / "data", row)) for row in (2, 7, 11)}
    arguments = stage2(
        root / "clip1",
        root / "one",
        "--data",
        root / "data",
        "--max-steps",
        8,
        "--max-bad",
        3,
        "--no-augment",
    )
    assert train.main(at_batch(arguments, root / "one", 2, "--no-guidance")) == 0
    for name, more in (("two", ("--no-guidance",)), ("guided", ())):  # the guided encoder has dropout
        done = torchrun(2, *at_batch(arguments, root / name, 1, *more), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert all("relation" in r for r in numbers(root / name) if "lr" in r)
    assert_alike(root / "one", root / "two", bad)
    assert {name for _, name in bad_records(root / "guided")} == bad


@pytest.mark.slow
def test_language_runs_leave_bad_volumes_out_even_where_a_whole_step_is_empty(
    stages, decoder_folder, tmp_path
):
    root = shutil.copytree(stages, tmp_path / "stages")
    bad = {spoil(volume(root / "data", row), how) for row, how in ((0, "NaN"), (4, "absent"))}
    bad.add(spoil(volume(root / "data", 0, "validation")))
    more = (
        "--data",
        root / "data",
        "--max-bad",
        3,
        "--decoder",
        decoder_folder,
        "--no-augment",
        "--max-steps",
        18,
    )
    arguments = language(root, root / "plain", *more)
    arguments[arguments.index("--batch-size") + 1] = "1"
    assert train.main(arguments) == 0
    steps = [r for r in Run(root / "plain").read_log() if "lr" in r]
    assert sum(not {"loss", "grad_norm"} & set(r) for r in steps) == 2  # nothing is said of a step of nothing
    assert {name for _, name in bad_records(root / "plain")} == bad
    arguments[arguments.index(str(root / "plain"))] = str(root / "cached")
    assert train.main([*arguments, "--cache-features", str(root / "features")]) == 0
    assert {name for _, name in bad_records(root / "cached")} == bad
    losses = [[r["loss"] for r in Run(root / name).read_log() if "loss" in r] for name in ("plain", "cached")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_new_decoder_that_no_volume_can_be_read_for_is_one_line(stages, tmp_path):
    root = shutil.copytree(stages, tmp_path / "stages")
    for row in range(len(load_manifest(root / "data").entries("train"))):
        spoil(volume(root / "data", row))
    wrong(
        language(root, tmp_path / "r", "--data", root / "data", "--max-bad", 99),
        "of its first 18 training volumes, .* none can be read",
    )


def test_a_loader_process_that_is_killed_is_one_line(prepared, tmp_path, monkeypatch):
    read = CTReportDataset.__getitem__

    def killed(self, key):
        if torch.utils.data.get_worker_info() is not None and key[1] == 7:
            os.kill(os.getpid(), 9)
        return read(self, key)

    monkeypatch.setattr(CTReportDataset, "__getitem__", killed)
    wrong(
        tiny(prepared, tmp_path / "r", "--epochs", 1, "--workers", 2),
        r"loader worker \(pid.*fewer --workers.*/dev/shm",
    )


@pytest.mark.slow
def test_a_full_shared_memory_is_one_line_and_no_hang(prepared, tmp_path, monkeypatch):
    def full(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    wrong(
        tiny(prepared, tmp_path / "r", "--epochs", 1, "--workers", 2),
        r"loader worker 0 \(of 2\): unable to allocate shared memory.*fewer --workers.*/dev/shm",
    )


def test_an_entry_without_a_report_is_never_left_out(data, tmp_path):
    values = json.loads((data / "manifest.json").read_text())
    values["splits"]["train"][4]["text"] = " "
    (data / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="the report of .* is empty"):
        train.main(tiny(data, tmp_path / "r", "--max-bad", 9))
