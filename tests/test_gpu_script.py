"""benchmarks/gpu.py without a GPU: it runs to its end, and a part that fails, hangs or dies does not end
the others. benchmarks/report.py runs on a tiny case.
"""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import ROOT, script
from reaf_hsenet.models.layers import Attention

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import report  # noqa: E402
from gpu_speed import whole_scores  # noqa: E402
from gpu_training import HostReads  # noqa: E402

BROKEN = """
import os, signal, time
from pathlib import Path

def fails(report, setting):
    with report.guard("inner"):
        raise ValueError("the first line\\nthe second")
    report.row("after", "measured", value=1)
    raise RuntimeError("outer")

def dies(report, setting):
    report.row("before", "measured")
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(report, setting):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (setting.work / "pid").write_text(str(os.getpid()))
    report.row("before", "measured")
    time.sleep(600)

def works(report, setting):
    report.row("last", "measured", left=report.left())
"""


@pytest.mark.slow
def test_a_dry_run_ends_with_a_table_and_json(tmp_path):
    done = script(
        "benchmarks/gpu.py", "--dry", "--parts", "machine,grad-cache", "--out", tmp_path / "out", timeout=400
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    assert found["dry"] and [part["part"] for part in found["parts"]] == ["machine", "grad-cache"]
    assert all(part["ended"] == "done" for part in found["parts"])
    rows = [row for part in found["parts"] for row in part["rows"]]
    assert not any(row.get("failed") for row in rows), rows
    gaps = {row["what"]: row["gap"] for row in rows if "gap" in row}
    assert gaps["fp32, batch 4 in chunks of 2"] < 1e-4 < gaps["bf16, batch 4 in chunks of 2"] < 0.2
    table = done.stdout.split("part  ")[1]
    assert all(row["result"] in table for row in rows)


@pytest.mark.slow
def test_a_part_that_fails_dies_or_hangs_leaves_its_rows_and_the_rest(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "ENDING", 1)
    limits = {"hangs": 4, "fails": 60, "dies": 60, "works": 60}  # what a part leaves is the next one's
    parts = tuple(gpu.Part(name, f"broken:{name}", seconds) for name, seconds in limits.items())
    setting = gpu.Setting("", "cpu", True, tmp_path, None)
    records = {
        r["part"]: r for r in gpu.run_parts(parts, setting, tmp_path, sum(limits.values()), {"dry": True})
    }
    results = {name: [(row["what"], row["result"]) for row in r["rows"]] for name, r in records.items()}
    assert results["fails"] == [
        ("inner", "failed: ValueError: the first line"),
        ("after", "measured"),
        ("fails", "failed: RuntimeError: outer"),
    ]
    assert results["dies"] == results["hangs"] == [("before", "measured")]
    assert records["dies"]["ended"] == "died with exit code -9"
    assert records["works"]["ended"] == "done" and records["works"]["rows"][0]["left"] > 50
    assert records["hangs"]["ended"].startswith("stopped at its limit")
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved == {"dry": True, "parts": list(records.values())}
    assert "ValueError: the first line" in (tmp_path / "gpu.log").read_text()
    text = gpu.table(list(records.values()))
    assert "stopped at its limit" in text and "died with exit code -9" in text and text.count("measured") == 4


def test_what_comes_after_the_last_minute_is_said_to_be_left_out(tmp_path):
    parts = (gpu.Part("one", "nowhere:nothing", 10), gpu.Part("two", "nowhere:nothing", 10))
    records = gpu.run_parts(parts, gpu.Setting("", "cpu", True, tmp_path, None), tmp_path, 1, {})
    assert [r["ended"] for r in records] == ["not reached: the time was used up"] * 2


@pytest.mark.slow
def test_without_a_gpu_one_line_says_what_to_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = script("benchmarks/gpu.py", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(
        "--dry runs everything at tiny sizes on a processor"
    )


def test_wheels_are_used_for_what_is_not_installed(tmp_path):
    for name in ("torch-1.0-py3-none-any.whl", "notinstalled-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "value = 5")
    assert gpu.unpack_wheels(tmp_path, tmp_path / "made") == ["notinstalled-1.0-py3-none-any.whl"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["notinstalled"]


def test_plain_attention_computes_what_the_fused_kernel_does():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention(24, 3, qkv_bias=False).double()

    blocks = torch.nn.ModuleList([Block()])
    x = torch.rand(2, 7, 24, dtype=torch.float64)
    fused = blocks[0].attn(x)
    with whole_scores(blocks):
        plain = blocks[0].attn(x)
    assert torch.allclose(plain, fused, atol=1e-12) and not torch.equal(plain, fused)
    assert torch.equal(blocks[0].attn(x), fused)


def test_values_that_a_step_reads_are_seen():
    seen, x = [], torch.arange(4.0)
    with HostReads(lambda: seen.append(1)):
        x.sum().sqrt().reshape(1)
        assert not seen
        for read in (
            Tensor.tolist,
            lambda t: float(t[0]),
            lambda t: bool(t.sum() > 0),
            lambda t: t[t > 1],
            Tensor.cpu,
        ):
            before = len(seen)
            read(x)
            assert len(seen) > before


@pytest.mark.slow
def test_the_benchmark_of_reports_times_the_first_word_and_those_after_it(monkeypatch, capsys):
    infer = str(ROOT / "infer.py")
    monkeypatch.setattr("sys.argv", ["report.py", *"--dry --runs 1 --tokens 3 --infer".split(), infer])
    report.main()
    line = capsys.readouterr().out
    assert re.fullmatch(rf"{infer}: first word after [\d.]+ s, then [\d.]+ tokens/s .medians of 1.\n", line)
