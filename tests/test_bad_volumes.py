"""Volumes that go bad while a run trains: named, counted against --max-bad, left out, and nothing else
changes.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

import train
from reaf_hsenet.config import Augmentation
from reaf_hsenet.data.bad_volumes import Unreadable
from reaf_hsenet.data.loader import CTReportDataset, read_sample
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.data.workers import batches, make_loader
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece
from tiny import (
    assert_close_logs,
    assert_close_weights,
    at_step,
    bad_ids,
    language,
    losses,
    numbers,
    resume,
    run_torchrun,
    spoil,
    stage2,
    stop_at,
    tiny,
    torchrun,
    volume,
    wrong,
)


@pytest.mark.parametrize("shape", ["(4, 4, 4", "(9999999, 9999999, 9)", "(99999999999999999999, 4)"])
def test_a_damaged_header_is_a_bad_volume(data, shape):
    """A bracket that is not closed, more than there is memory for, more than there are numbers for."""
    manifest, path = load_manifest(data), volume(data, 0)
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4096))
    found = read_sample(manifest, manifest.entries("train")[0], slices=False)
    assert isinstance(found, Unreadable) and found.reason.startswith(f"{path}: cannot be read")
    assert "\n" not in found.reason


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
    for whole, rest in zip(*found, strict=True):
        assert rest.index == [row for row in whole.index if row not in (5, 9)]
        for j, row in enumerate(rest.index):
            i = whole.index.index(row)
            assert torch.equal(rest.volume[j], whole.volume[i])
            assert torch.equal(rest.ids[j][rest.mask[j] > 0], whole.ids[i][whole.mask[i] > 0])
    assert sorted(one.id for part in found[1] for one in part.bad) == sorted(bad)


@pytest.mark.slow
def test_bad_volumes_are_left_out_counted_once_and_logged_by_name(data, tmp_path, capsys, monkeypatch):
    known = [spoil(volume(data, 3), "absent"), spoil(volume(data, 6)), spoil(volume(data, 1, "validation"))]
    vanished = volume(data, 8)
    spoil_in_step(monkeypatch, 1, vanished, "absent")
    out = tmp_path / "run"
    assert train.main(tiny(data, out, "--epochs", 3, "--max-bad", 4)) == 0
    records = numbers(out, "bad")
    assert sorted(bad_ids(out)) == sorted([*known, vanished.stem])  # each once in three epochs
    # What the check of the manifest finds is there from the start.
    assert (records[0]["step"], records[0]["bad"]) == (0, known[0])
    printed = capsys.readouterr().out
    for number, name in enumerate(bad_ids(out), 1):
        assert f"left out, {number} of --max-bad 4: {name}: {data}" in printed
    reasons = {r["bad"]: r["reason"] for r in records}
    for name, words in ((known[0], "absent"), (known[1], "holds NaN"), (vanished.stem, "no such file")):
        assert words in reasons[name]


@pytest.mark.slow
def test_the_count_survives_a_resume(data, tmp_path, monkeypatch):
    one, two, out = volume(data, 6), volume(data, 8), tmp_path / "run"
    spoil(one)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train.main(tiny(data, out, "--max-steps", 9, "--max-bad", 1, "--no-augment")) == 143
    again = resume(out)
    words = f"--max-bad 0: this run has left out 1 volumes already .{one.stem}.; allow as many"
    wrong([*again, "--max-bad", 0], words)
    with monkeypatch.context() as patch:
        spoil_in_step(patch, 5, two, "absent")
        wrong(again, f"{two}: no such file.*bad volume 2, with --max-bad 1")
    assert train.main([*again, "--max-bad", "2"]) == 0
    assert bad_ids(out) == [one.stem, two.stem]


def assert_alike(one: Path, two: Path, bad: set[str]) -> None:
    assert set(bad_ids(one)) == bad == set(bad_ids(two))
    assert_close_logs(one, two)
    assert_close_weights(one, two)


@pytest.mark.slow
def test_two_processes_of_which_one_has_an_empty_batch_train_as_one(data, tmp_path):
    bad = {spoil(volume(data, row)) for row in (2, 7, 11)}

    def argv(name: str, size: int, *more) -> list[str]:
        flags = ("--max-steps", 8, "--max-bad", 3, "--grad-checkpoint", "--batch-size", size)
        return tiny(data, tmp_path / name, *flags, *more)

    assert train.main(argv("one", 2)) == 0
    for name, more in (("two", ()), ("cached", ("--grad-cache", 1))):
        torchrun(2, argv(name, 1, *more), cwd=tmp_path)
        assert_alike(tmp_path / "one", tmp_path / name, bad)
    done = run_torchrun(2, argv("three", 1, "--max-bad", 2), cwd=tmp_path)
    # Both ranks stop, one says why.
    assert done.returncode != 0 and done.stderr.count("(bad volume 3, with --max-bad 2)") == 1


@pytest.mark.slow
def test_stage_2_copes_with_an_empty_batch_too(stages, tmp_path):
    data = shutil.copytree(stages / "data", tmp_path / "data")
    bad = {spoil(volume(data, row)) for row in (2, 7, 11)}

    def argv(name: str, size: int, *more) -> list[str]:
        flags = ("--data", data, "--max-steps", 8, "--max-bad", 3, "--no-augment", "--batch-size", size)
        # An exponential scale would multiply rounding by 14, and its square in the relation loss.
        return stage2(stages / "clip1", tmp_path / name, *flags, "--logit-scale", "raw", *more)

    assert train.main(argv("one", 2, "--no-guidance")) == 0
    for name, more in (("two", ("--no-guidance",)), ("guided", ())):  # the guided encoder has dropout
        torchrun(2, argv(name, 1, *more), cwd=tmp_path)
        assert all("relation" in r for r in numbers(tmp_path / name, "lr"))
    assert_alike(tmp_path / "one", tmp_path / "two", bad)
    assert set(bad_ids(tmp_path / "guided")) == bad


@pytest.mark.slow
def test_language_runs_leave_bad_volumes_out_even_where_a_whole_step_is_empty(
    stages, decoder_folder, tmp_path
):
    data = shutil.copytree(stages / "data", tmp_path / "data")
    bad = {spoil(volume(data, row), how) for row, how in ((0, "NaN"), (4, "absent"))}
    bad.add(spoil(volume(data, 0, "validation")))
    flags = ("--data", data, "--max-bad", 3, "--decoder", decoder_folder, "--no-augment", "--max-steps", 18)
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    assert train.main(language(stages, plain, *flags, "--batch-size", 1)) == 0
    # Nothing is said of a step of nothing.
    assert sum(not {"loss", "grad_norm"} & set(r) for r in numbers(plain, "lr")) == 2
    more = ("--batch-size", 1, "--cache-features", tmp_path / "features")
    assert train.main(language(stages, cached, *flags, *more)) == 0
    assert set(bad_ids(plain)) == bad == set(bad_ids(cached))
    assert losses(plain) == pytest.approx(losses(cached), abs=1e-5)


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
