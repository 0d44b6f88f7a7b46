"""Shared fixtures: small phantoms, raw and prepared, and tiny runs on them, each made once per test run."""

import os
import shutil
import signal
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


@pytest.fixture
def data(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """What a script does with signals ends with its test."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def forks():
    """Start the process that those of tiny.start are forked from."""
    import multiprocessing.forkserver

    from tiny import FORKS

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        FORKS.set_forkserver_preload(["tiny"])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def finished(prepared, tmp_path_factory) -> Path:
    """A finished run of stage clip1 with 8 steps; not to be changed."""
    import train
    from tiny import EIGHT, tiny

    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(tiny(prepared, out, *EIGHT)) == 0
    return out


@pytest.fixture
def run_copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def stages(prepared, tmp_path_factory) -> Path:
    """Runs clip1 (2 steps) and clip2 (6 steps), and their data with slice features; not to be changed."""
    import train
    from tiny import stage2, tiny, with_slices

    root = tmp_path_factory.mktemp("stages")
    data = with_slices(prepared, root / "data")
    assert train.main(tiny(data, root / "clip1", "--max-steps", 2, "--validate-every", 1)) == 0
    second = stage2(root / "clip1", root / "clip2", "--max-steps", 6, "--save-every", 3, "--keep", 9)
    assert train.main(second) == 0
    return root


@pytest.fixture(scope="session")
def decoder_folder(stages) -> Path:
    """A decoder with weights, beside the runs of `stages`; not to be changed."""
    from tiny import write_decoder

    return write_decoder(stages / "decoder", stages / "data")


@pytest.fixture(scope="session")
def mrg(stages, tmp_path_factory) -> Path:
    """A finished run of stage mrg with 4 steps, on the runs of `stages`; not to be changed."""
    import train
    from tiny import language

    out = tmp_path_factory.mktemp("runs") / "mrg"
    assert train.main(language(stages, out, "--max-steps", 4, "--save-every", 2, "--keep", 9)) == 0
    return out


@pytest.fixture(scope="session")
def sized_data(phantom_root, tmp_path_factory) -> Path:
    """Phantoms at the input size of the small published encoders, with slice features of their width."""
    from dataclasses import replace

    import preprocess
    import published
    from reaf_hsenet.config import RECIPES
    from reaf_hsenet.data.prepare import Options, prepare
    from reaf_hsenet.data.sources.ct_rate import read_ct_rate

    folder = tmp_path_factory.mktemp("sized")
    recipe = replace(RECIPES["hsenet"], size=tuple(published.HEADS["img_size"]))
    prepare(read_ct_rate(phantom_root), folder / "data", Options(recipe), progress=False)
    encoder = published.write(folder / "encoder.bin", published.mae(48))
    assert preprocess.main(["--slices", str(encoder), "--out", str(folder / "data"), "--device", "cpu"]) == 0
    return folder / "data"


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """A published text encoder's folder without weights: its vocabulary and settings."""
    import published

    folder = tmp_path_factory.mktemp("words") / "bert"
    return published.write_vocabulary(folder, 200, published.BERT["config"])
