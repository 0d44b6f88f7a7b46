"""A bar on a terminal, lines elsewhere, for every long job."""

import io
import re
import sys

import pytest
from tqdm import tqdm

import evaluate
import train
from conftest import ROOT
from reaf_hsenet import progress
from reaf_hsenet.data.phantom.dataset import write_phantom_dataset
from reaf_hsenet.data.prepare import Options, prepare
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.presets import TINY_RECIPES
from reaf_hsenet.progress import progress_bar
from tiny import retrieval, tiny


def test_the_log_of_a_run_has_lines_and_no_carriage_returns(prepared, tmp_path, capsys):
    assert train.main(tiny(prepared, tmp_path / "run", "--max-steps", 3)) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err and "\x1b" not in out + err
    (line,) = [line for line in err.splitlines() if line.startswith("train: ")]
    clock = r"(step/s|s/step), \d\d:\d\d gone, 00:00 left"
    assert re.fullmatch(rf"train: step 3 of 3, .*{clock}, loss .* samples/s, waiting .* GB", line)


def test_a_line_comes_every_thirty_seconds_and_at_the_end(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(100, "train", "step", done=20) as bar:
        bar.set_postfix_str("loss 1.5")
        for _ in range(80):
            now[0] += 1
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "train: step 50 of 100, 1.00step/s, 00:30 gone, 00:50 left, loss 1.5",
        "train: step 80 of 100, 1.00step/s, 01:00 gone, 00:20 left, loss 1.5",
        "train: step 100 of 100, 1.00step/s, 01:20 gone, 00:00 left, loss 1.5",
    ]


def test_a_job_that_ends_early_says_how_far_it_was(capsys):
    with pytest.raises(KeyError), progress_bar(9, "volumes", "volume") as bar:
        bar.update(4)
        raise KeyError
    assert capsys.readouterr().err.startswith("volumes: volume 4 of 9, ")


def test_silent_ranks_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress_bar(2, "train", "step", shown=False) as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(2, "train", "step") as bar:
        bar.update(2)
    assert isinstance(bar, tqdm) and "\rtrain: 100%|" in sys.stderr.getvalue()


@pytest.mark.slow
def test_phantoms_volumes_and_embeddings_have_lines(tmp_path, run_copy, capsys):
    write_phantom_dataset(tmp_path / "raw", 2, 1, shape=(16, 32, 32), progress=True)
    prepare(read_ct_rate(tmp_path / "raw"), tmp_path / "data", Options(TINY_RECIPES["hsenet"]))
    assert evaluate.main(retrieval(run_copy)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines if " of " in line] == [
        *("phantoms: scan 3 of 3", "volumes: volume 3 of 3", "embed: batch 1 of 1"),
    ]
    prepare(read_ct_rate(tmp_path / "raw"), tmp_path / "data", Options(TINY_RECIPES["hsenet"]))
    assert capsys.readouterr().err == ""  # there was nothing to do


def test_no_other_module_draws_a_bar():
    files = [*ROOT.glob("*.py"), *(ROOT / "reaf_hsenet").rglob("*.py")]
    assert [file.name for file in files if "tqdm" in file.read_text()] == ["progress.py"]
