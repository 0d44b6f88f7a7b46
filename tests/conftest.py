"""Shared fixtures: a small phantom data set, raw and prepared, made once per test run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(2)


def script(name: str, *arguments, cwd: Path | None = None, env: dict | None = None, timeout: float = 240):
    """Run a script of the repository as a user does; returns the finished process with its text output."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout
    )


def error_line(process: subprocess.CompletedProcess) -> str:
    """The one-line error of a script that must have ended with exit code 2 and no traceback."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert "Traceback" not in process.stderr, process.stderr
    assert lines and lines[-1].startswith("error: "), process.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1, process.stderr
    return lines[-1]


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory) -> Path:
    """12 + 6 small phantoms in CT-RATE's layout; some scans have two reconstructions."""
    from reaf_hsenet.data.phantom.dataset import write_phantom_dataset

    root = tmp_path_factory.mktemp("phantom") / "raw"
    write_phantom_dataset(root, 12, 6, seed=3, shape=(24, 48, 48), reconstructions=0.4)
    return root


@pytest.fixture(scope="session")
def prepared(phantom_root, tmp_path_factory) -> Path:
    """The same, prepared at 16 x 32 x 32."""
    from dataclasses import replace

    from reaf_hsenet.config import RECIPES
    from reaf_hsenet.data.prepare import Options, prepare
    from reaf_hsenet.data.sources.ct_rate import read_ct_rate

    out = tmp_path_factory.mktemp("prepared") / "data"
    recipe = replace(RECIPES["hsenet"], size=(16, 32, 32))
    prepare(read_ct_rate(phantom_root), out, Options(recipe), progress=False)
    return out
