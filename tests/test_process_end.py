"""How a process of several ends."""

import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist

from conftest import ROOT
from reaf_hsenet import distributed

PAIRS = """
import atexit, os, sys, torch
import torch.distributed as dist
from reaf_hsenet import distributed
from reaf_hsenet.script import run_script

def main(argv):
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store{pair}", rank=rank, world_size=2)
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    for _ in range(20):  # the last reference to a tensor may be a thread's
        dist.all_gather([torch.empty(3), torch.empty(3)], torch.ones(3), async_op=True)
    distributed.stop()
    atexit.register(print, "put in order")
    return 7

os.environ["WORLD_SIZE"] = "2"
torch.set_num_threads(1)
ends = []
for pair in range(5):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            run_script(main, [])
        children.append(child)
    ends += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(ends)
"""


@pytest.mark.slow
def test_of_several_processes_each_ends_with_its_code_and_its_exit_functions(tmp_path):
    """With Python's own end most of them abort: gloo's threads outlive the process group."""
    done = subprocess.run(
        [sys.executable, "-c", PAIRS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == str([7] * 10), done.stderr
    assert done.stdout.count("put in order") == 10 and "terminate called" not in done.stderr


def test_ddp_that_a_cycle_holds_is_gone_before_its_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    held = {"ddp": torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))}
    held["itself"], ddp = held, weakref.ref(held["ddp"])
    del held
    distributed.stop()
    assert ddp() is None and not dist.is_initialized()
