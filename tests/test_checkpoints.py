"""Checkpoints that are whole or absent: damage, a full disk, which are kept, which is the best."""

import shutil
from pathlib import Path

import pytest
import torch

import reaf_hsenet.runs.checkpoint as module
import train
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.files import read_json
from reaf_hsenet.runs.checkpoint import Run
from tiny import AUTO, EIGHT, assert_same, flip_last_bit, log_of, resume, tiny, wrong


def save(folder: Path, *steps: int, keep: int = 9) -> Run:
    run = Run(folder)
    for step in steps:
        tensors = {"a": torch.full((99,), float(step))}
        run.save(step, tensors, {"progress": {"step": step}}, keep, best=step == 2)
    return run


def damage(path: Path, how: str) -> None:
    if how == "absent":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        flip_last_bit(path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["trainer.pt", "model.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["truncated", "changed", "absent"])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_that_is_whole(tmp_path, file, how):
    run = save(tmp_path, 1, 3, 4)
    damage(run.at(4) / file, how)
    if (file, how) == ("checkpoint.json", "absent"):
        # As earlier versions saved: nothing is known of the files but their names.
        assert run.newest_valid() == (run.at(4), [])
        (run.at(4) / "trainer.pt").unlink()
        assert run.newest_valid() == (run.at(3), [f"{run.at(4) / 'trainer.pt'}: no such file"])
        return
    damage(run.at(3) / file, how)
    folder, reasons = run.newest_valid()
    assert folder == run.at(1) and len(reasons) == 2 and all("\n" not in reason for reason in reasons)
    assert reasons[0].startswith(f"{run.at(4) / file}: ")
    damage(run.at(1) / file, how)
    with pytest.raises(InputError, match="no other checkpoint is left"):
        run.newest_valid()


def test_a_copy_made_by_hand_is_left_alone(tmp_path):
    run = save(tmp_path, 1, 2)
    copy = shutil.copytree(run.at(1), run.checkpoints / "step-000001-good")
    save(tmp_path, 3, 4, keep=1)
    assert run.newest_valid() == (run.at(4), [])
    run.forget_after(2)
    assert run.all() == [run.at(2)] and (copy / "model.safetensors").is_file()


def test_damaged_lines_of_the_log_are_left_out(tmp_path):
    run = save(tmp_path, 1)
    run.log({"step": 1, "loss": 2.0})
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"loss": 1.0}\n[1]\n3\n\xff\xfe\n{"step": "x"}\n{"step": 1, "lo')
    run.forget_after(1)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_an_evaluation_does_not_read_damaged_weights(tmp_path):
    run = save(tmp_path, 1)
    flip_last_bit(run.at(1) / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: is damaged: its sha256"):
        run.load_model("last")


def test_last_can_be_set_back_by_hand(tmp_path):
    run = save(tmp_path, 1, 3, 4)
    (run.checkpoints / "last").write_text("step-000003\n")
    assert run.newest_valid() == (run.at(3), [])


@pytest.mark.slow
def test_a_run_resumes_from_before_a_damaged_checkpoint_and_ends_the_same(run_copy, finished, capsys):
    flip_last_bit(Run(run_copy).at(8) / "trainer.pt")
    assert train.main(resume(run_copy)) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert said.endswith("; continuing from step-000006")
    assert_same(run_copy, finished)
    assert Run(run_copy).pointer("best").name == Run(finished).pointer("best").name


def test_the_last_n_and_the_best_are_changeable(tmp_path):
    run = save(tmp_path, 1, 2, 3, 4, 5, keep=2)
    names = ["best", "last", "step-000002", "step-000004", "step-000005"]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == names
    assert run.pointer("best") == run.at(2) and run.pointer("last") == run.at(5)


def test_a_checkpoint_lists_its_files_with_sizes_and_hashes(finished):
    folder = Run(finished).pointer("last")
    written = read_json(folder / "checkpoint.json")
    assert written["step"] == 8 and set(written["files"]) == {"model.safetensors", "trainer.pt"}
    assert all(file["bytes"] == (folder / name).stat().st_size for name, file in written["files"].items())


def fill_disk(monkeypatch, *steps: int) -> None:
    """Weights of these steps cannot be written; the error is as safetensors' is."""
    save_file = module.save_file

    def full(tensors, path):
        if any(f"step-{step:06d}" in str(path) for step in steps):
            said = 'Error while serializing: IoError(Os { code: 28, message: "No space left" })'
            raise module.SafetensorError(said)
        return save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", full)


@pytest.mark.slow
def test_a_full_disk_leaves_the_run_alive_and_the_last_checkpoint_whole(
    prepared, finished, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    fill_disk(monkeypatch, 3)
    assert train.main(tiny(prepared, out, *EIGHT)) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    for words in ("step-000003: cannot be written", "No space left", "training goes on"):
        assert words in said
    assert not Run(out).at(3).exists()
    assert_same(out, finished)


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_is_an_error(prepared, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_disk(patch, 8)
        wrong(tiny(prepared, out, *EIGHT), "step-000008: cannot be written.*free space.*--resume")
    assert Run(out).pointer("last") == Run(out).at(6)
    assert train.main(resume(out)) == 0
    assert_same(out, finished)


def test_lines_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.log({"step": 1})

    class Half:
        """A file that takes half of what it is given."""

        def __init__(self, path, *rest, **options):
            self.file = open(path, "ab")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def writelines(self, lines):
            self.file.write("".join(lines).encode()[:5])
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", Half, raising=False)
        for step in (2, 3):
            with pytest.raises(OutputError, match="log.jsonl: cannot be written .No space left on device"):
                run.log({"step": step})
    run.log({"step": 4})
    assert (tmp_path / "log.jsonl").read_text() == "".join(f'{{"step": {n}}}\n' for n in (1, 2, 3, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report_to_volume/R@1", "volume_to_report/R@10"])
def test_the_best_checkpoint_is_chosen_by_the_number_that_is_named(prepared, tmp_path, name):
    out = tmp_path / "run"
    flags = ("--max-steps", 6, "--validate-every", 0.16, "--keep", 9, "--best-by", name)
    assert train.main(tiny(prepared, out, *flags)) == 0
    scores = {r["step"]: r["validation"][name] for r in log_of(out) if "validation" in r}
    first = min(step for step, score in scores.items() if score == max(scores.values()))
    assert Run(out).pointer("best") == Run(out).at(first)


def test_a_best_checkpoint_that_is_gone_is_not_held_against_the_next(run_copy, finished):
    run, best = Run(run_copy), Run(finished).pointer("best").name
    run.point("last", 6)
    for path in run.checkpoints.glob("step-*"):
        if path.name != "step-000006":
            shutil.rmtree(path)
    assert best != "step-000006" and train.main(resume(run_copy)) == 0
    assert run.pointer("best") is not None and run.pointer("best").is_dir()


@pytest.mark.parametrize("lost", ["checkpoints/last", "config.json"])
@pytest.mark.parametrize("how", [(), AUTO])
def test_no_start_deletes_the_checkpoints_of_a_run_that_has_lost_a_file(prepared, run_copy, lost, how):
    before = {path: path.stat().st_mtime_ns for path in Run(run_copy).all()}
    (run_copy / lost).unlink()
    argv = tiny(prepared, run_copy, "--max-steps", 8, *how)
    if lost == "config.json":
        advice = "put the run's own back, or choose another --out"
        wrong(argv, f"config.json: no such file beside .*checkpoints; {advice}")
    elif how:
        assert train.main(argv) == 0 and Run(run_copy).pointer("last").name == "step-000008"
    else:
        wrong(argv, "holds a run already; continue it with --resume")
    assert before == {path: path.stat().st_mtime_ns for path in Run(run_copy).all()}


def test_a_full_disk_at_a_runs_only_checkpoint_does_not_speak_of_others(prepared, tmp_path, monkeypatch):
    fill_disk(monkeypatch, 1, 2)
    with pytest.raises(OutputError, match="free space; there is none before it$"):
        train.main(tiny(prepared, tmp_path / "run", "--max-steps", 2))


@pytest.mark.parametrize("name", ["", "step-\u0662", "step-x", "Last"])
def test_a_checkpoint_of_no_such_name_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="--checkpoint.*expected last, best or a step"):
        save(tmp_path / "run", 1, 2).choose(name)


def test_a_log_writer_that_fails_ends_nothing(prepared, tmp_path, monkeypatch, capsys):
    def full(record: dict) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "make_writer", lambda *_: full)
    assert train.main(tiny(prepared, tmp_path / "run", "--max-steps", 2)) == 0
    said = "warning: --log: cannot be written (No space left on device); training goes on without it"
    assert capsys.readouterr().out.count(said) == 1
