"""The batch files of docs/clusters.md, run without Slurm: its commands are stand-ins that note what they
are asked for.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import ROOT
from reaf_hsenet.runs.checkpoint import Run

FILES = [
    block
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs/clusters.md").read_text(), re.S)
    if "#SBATCH" in block
]
COMMANDS = {
    "torchrun": f"#!{sys.executable}\nfrom torch.distributed.run import main\nmain()\n",
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> asked\n',
    "srun": '#!/bin/bash\nshift\nexec "$@"\n',
}


def submit(folder: Path, text: str) -> subprocess.Popen:
    environment = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "4711", "SLURM_NNODES": "1"}
    environment["SLURM_JOB_NODELIST"] = "localhost"
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        ["bash", "-c", text], env={**os.environ, **environment}, start_new_session=True, **output
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", FILES, ids=["one node", "several nodes"])
def test_a_batch_file_that_is_warned_requeues_with_a_checkpoint_and_its_second_start_finishes(
    prepared, tmp_path, text
):
    (tmp_path / "bin").mkdir()
    for name, script in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    small = (
        "--preset hsenet-tiny --size 16 32 32 --patch 8 16 16 --batch-size 2 --max-steps 60 "
        "--log-every 1 --device cpu"
    )
    for old, new in (
        ("--nproc-per-node 8", "--nproc-per-node 2"),
        (":29500", f":{port}"),
        (" && . .venv/bin/activate", ""),
        ("/scratch/ct-rate", str(prepared)),
        ("--text-model google-bert/bert-base-uncased", small),
        ("OMP_NUM_THREADS=8", "OMP_NUM_THREADS=1"),
        ("--workers 6", "--workers 1"),
        ("train.py", str(ROOT / "train.py")),
    ):
        text = text.replace(old, new)
    job, run = submit(tmp_path, text), Run(tmp_path / "runs/ct-rate")
    try:
        while not any(record["step"] >= 2 for record in run.read_log()):
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=120)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0 and (tmp_path / "asked").read_text() == "requeue 4711\n", said
    step = json.loads((run.pointer("last") / "checkpoint.json").read_text())["step"]
    assert "stopped by SIGUSR1" in said and 0 < step < 60
    again = submit(tmp_path, text)
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0, said
    assert run.pointer("last").name == "step-000060"
    assert [r["step"] for r in run.read_log() if "loss" in r] == list(range(1, 61))
