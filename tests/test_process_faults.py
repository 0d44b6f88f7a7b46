"""What happens to a process: its output goes, its disk fills, its workers die, its folder is moved,
somebody presses Ctrl-C.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from conftest import ROOT, error_line
from reaf_hsenet import files
from reaf_hsenet.data.pool import map_in_order, worker_pool
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import folder_lock
from reaf_hsenet.runs import checkpoint
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.script import run_script
from tiny import EIGHT, at_step, resume, same_weights, tiny, wrong


def shell(command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=ROOT, **options
    )


def started(script: str, *arguments, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], **pipes, **options)


def until(there, process: subprocess.Popen) -> None:
    while not there() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_ends_a_run_with_its_loaders(prepared, tmp_path):
    """Its end, the pipes' too, is what is tested: the loader processes hold them as well."""
    flags = ("--max-steps", 2, "--workers", 2, "--validate-every", 1)
    command = " ".join(tiny(prepared, tmp_path / "run", *flags))
    done = shell(f"ulimit -f 1000; exec {sys.executable} train.py {command}")
    assert "step-000002: cannot be written" in error_line(done)
    assert done.stderr.rstrip().endswith("free space; there is none before it")


def test_a_loader_that_is_killed_while_a_checkpoint_is_written_does_not_drop_it(
    prepared, tmp_path, monkeypatch, capsys
):
    save_file, out = checkpoint.save_file, tmp_path / "run"

    before = set(multiprocessing.active_children())  # of other tests

    def killing(tensors, path):
        (loader,) = set(multiprocessing.active_children()) - before
        loader.kill()
        # What torch raises when it hears of it, is raised here.
        while " Z " not in Path(f"/proc/{loader.pid}/stat").read_text():
            time.sleep(0.001)
        return save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", killing)
    assert train.main(tiny(prepared, out, "--max-steps", 1, "--workers", 1)) == 0
    assert Run(out).pointer("last") == Run(out).at(1) and "cannot be written" not in capsys.readouterr().out


def test_an_error_of_torch_that_is_no_full_disk_is_not_called_one(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("expected scalar type Float but found Half")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        Run(tmp_path).save(1, {}, {}, keep=1, best=True)
    assert not list(tmp_path.rglob("step-*"))


SAYS = (
    "import sys; from reaf_hsenet.script import run_script; run_script(lambda _: [print('a'*99) for _ "
    "in range(999)] and 0, [], {result})"
)


UNWRITTEN = "warning: standard output cannot be written ({}); going on without it"
FULL = "No space left on device"
UNWRITABLE = f"cannot be written ({FULL}); free space and run again"


@pytest.mark.parametrize(
    ("streams", "result", "code", "said"),
    [
        (">/dev/full", False, 0, UNWRITTEN.format(FULL)),
        (">/dev/full 2>&1", False, 0, ""),
        ("2>/dev/full", False, 0, ""),
        (">&-", False, 0, ""),
        (">&- 2>&-", False, 0, ""),
        ("| head -c 1 >/dev/null", False, 0, UNWRITTEN.format("Broken pipe")),
        ("| head -c 1 >/dev/null", True, 141, ""),
        (
            ">/dev/full",
            True,
            2,
            f"error: standard output: cannot be written ({FULL}); free space and run again",
        ),
        (">/dev/full 2>&1", True, 2, ""),
    ],
)
def test_an_output_that_is_gone_ends_a_script_only_where_it_is_the_result(streams, result, code, said):
    done = shell(f'{sys.executable} -c "{SAYS.format(result=result)}" {streams}; exit ${{PIPESTATUS[0]}}')
    assert (done.returncode, done.stderr.strip()) == (code, said)


@pytest.mark.slow
def test_a_run_outlives_its_output(prepared, tmp_path):
    flags = " ".join(tiny(prepared, tmp_path / "run", "--max-steps", 2))
    done = shell(f"{sys.executable} train.py {flags} >/dev/full 2>&1")
    assert done.returncode == 0 and Run(tmp_path / "run").pointer("last").name == "step-000002"


@pytest.mark.slow
def test_a_run_whose_folder_is_moved_ends_and_begins_no_other(prepared, finished, tmp_path, monkeypatch):
    out, moved = tmp_path / "run", tmp_path / "moved"
    argv = tiny(prepared, out, *EIGHT, "--log-every", 100)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: out.rename(moved))
        wrong(argv, f"{out}: was moved, removed or replaced while the run wrote into it.*--resume")
    assert not out.exists() and Run(moved).pointer("last").name == "step-000003"
    moved.rename(out)
    assert train.main([*argv, "--resume"]) == 0 and same_weights(out, finished)


def test_a_run_whose_folder_is_replaced_writes_nothing_into_the_other(prepared, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def replaced() -> None:
        out.rename(tmp_path / "moved")
        out.mkdir()
        (out / "log.jsonl").write_text("another's\n")

    at_step(monkeypatch, 3, replaced)
    wrong(tiny(prepared, out, "--max-steps", 8), "was moved, removed or replaced")
    assert [path.name for path in out.iterdir()] == ["log.jsonl"]
    assert (out / "log.jsonl").read_text() == "another's\n"


SCRIPTS = {
    "train.py": ["--stage", "clip1"],
    "evaluate.py": ["--task", "retrieval"],
    "preprocess.py": ["--dataset", "phantom", "--out", "out"],
    "infer.py": ["embed", "scan.nii"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_a_script_imports_is_one_line(tmp_path, name):
    for library in ("numpy", "torch"):  # whichever is imported first
        (tmp_path / library).mkdir()
        (tmp_path / library / "__init__.py").write_text(
            "import time\ntry:\n    open('importing', 'w').close(), time.sleep(60)\n"
            "except BaseException:\n    time.sleep(60)\n"
        )
    (tmp_path / "scan.nii").touch()
    script = started(name, *SCRIPTS[name], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    until((tmp_path / "importing").exists, script)
    script.send_signal(signal.SIGINT)
    assert script.communicate(timeout=30) == ("", "interrupted\n") and script.returncode == 130


@pytest.mark.slow
def test_sigusr1_before_the_first_step_waits_for_a_checkpoint(prepared, tmp_path):
    """Its exit code says that there is one. It is sent as soon as the process would not die of it, before
    torch is there.
    """
    out = tmp_path / "run"
    script = started("train.py", *tiny(prepared, out, "--max-steps", 500, "--validate-every", 1))

    def catches() -> bool:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{script.pid}/status").read_text())
        return bool(int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    until(catches, script)
    script.send_signal(signal.SIGUSR1)
    said = script.communicate(timeout=60)[0]
    assert script.returncode == 138 and "stopped by SIGUSR1 at step 1: checkpoint written" in said
    assert Run(out).pointer("last") == Run(out).at(1)


def test_a_worker_that_is_killed_is_one_line():
    words = "a worker was killed, most likely for want of memory; run again with fewer --workers"
    with pytest.raises(InputError, match=words):
        list(map_in_order(os._exit, [1, 1], 2))


WORKS = """
import os, time
from reaf_hsenet.data.pool import worker_pool
with worker_pool(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60).result()
"""


def test_a_worker_ends_with_the_process_that_is_killed():
    main = subprocess.Popen(
        [sys.executable, "-c", WORKS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    worker = Path(f"/proc/{main.stdout.readline().strip()}")
    assert worker.exists()
    main.kill()
    main.wait()
    for _ in range(500):
        if not worker.exists() or " Z " in (worker / "stat").read_text():
            return
        time.sleep(0.01)
    pytest.fail("the worker went on")


def test_workers_leave_signals_to_the_main_process():
    with worker_pool(1) as pool:
        for number in (signal.SIGINT, signal.SIGUSR1):
            assert pool.submit(signal.getsignal, number).result() == signal.SIG_IGN


def test_a_file_that_the_system_refuses_is_one_line(tmp_path, capsys):
    path = tmp_path / ("x" * 300)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda _: open(path), [])
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: {path}: File name too long\n"
    with pytest.raises(OSError, match="of the program's own"):
        run_script(lambda _: (_ for _ in ()).throw(OSError("of the program's own")), [])


def test_a_folder_is_locked_though_its_disk_is_full(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", full)
        with folder_lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == ""


def test_a_checkpoint_that_lists_no_files_is_passed_over_for_an_older_one(run_copy, finished, capsys):
    (Run(run_copy).at(8) / "checkpoint.json").write_text('{"step": 8, "files": {}}')
    assert train.main(resume(run_copy)) == 0
    assert "step-000008/checkpoint.json: is damaged; continuing from step-000006" in capsys.readouterr().out
    assert same_weights(run_copy, finished)


@pytest.mark.slow
def test_a_run_goes_on_in_fp16_where_it_was_in_fp32(run_copy):
    """Its checkpoint has no loss scale."""
    Run(run_copy).point("last", 6)
    assert train.main(resume(run_copy, "--precision", "fp16")) == 0
    assert Run(run_copy).pointer("last") == Run(run_copy).at(8)
