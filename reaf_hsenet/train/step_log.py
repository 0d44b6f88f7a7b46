"""Measurements of a step: samples per second, waiting for data, FLOPs utilisation, memory, a trace."""

import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.progress import say
from reaf_hsenet.runs.checkpoint import Run

# Peak FLOP/s of dense 16-bit matrix products, from the vendor's data sheets; the first name that stands in a
# device's as whole words.
PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100-PCIE": 112e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # half a card is a device
}
PROFILED = (5, 10)  # first and last step of --profile, counted from where the process starts


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Return the peak FLOP/s in 16 bit of a GPU that PEAKS has; None for others."""
    # A share of a 16-bit peak says nothing about products in float32.
    if device.type != "cuda" or dtype is None:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


class Meter:
    """A clock of the steps between two lines of the log. samples: number in a step, over all ranks."""

    def __init__(self, samples: int, world: int, device: torch.device):
        self.samples, self.world, self.device = samples, world, device
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0
        self.flops: float | None = None  # of a sample, forward and backward, once they have been counted

    def waiting(self, batches: Iterable) -> Iterator:
        """Yield the batches; the time until each is there counts as waiting."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            # Near 0 when the loader keeps up; a share of 0.5 means that --workers or the disk bound the run.
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during a block that is not training, such as a validation."""
        began = time.perf_counter()
        yield
        # Shifting the start leaves out the pause, and keeps a difference of two clocks the only arithmetic.
        self.started += time.perf_counter() - began

    def read(self, peak: float | None, name: str) -> dict[str, float]:
        """Return what was measured since the last call. name: key of the share of `peak` that was used."""
        # The device is in step with the host here: train_step has just read the losses from it.
        now = time.perf_counter()
        seconds = now - self.started
        rate = self.samples * self.steps / seconds
        measured = {
            "samples_per_s": rate,
            "waiting": self.waited / seconds,
            "memory_gb": peak_memory_gb(self.device),
        }
        if peak and self.flops:
            # Model FLOPs utilisation (PaLM, Chowdhery et al. 2022): FLOPs of the samples of one device in a
            # second, over its peak.
            measured[name] = rate / self.world * self.flops / peak
        self.started, self.waited, self.steps = now, 0.0, 0
        return measured


def count_flops(forward: Callable[[], tuple[Tensor, ...]]) -> int:
    """Return the FLOPs of a forward and its backward pass. Gradients are left behind.

    Matrix products, convolutions and attention are counted.
    """
    # The sum gives every output a gradient, as a loss would; its own FLOPs are next to nothing.
    with FlopCounterMode(display=False) as counter:
        sum(out.float().sum() for out in forward() if out.requires_grad).backward()
    return counter.get_total_flops()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: the GPU's where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def profiler(folder: Path) -> profile:
    """Return a profiler that writes a trace of the PROFILED steps into `folder`; step() ends a step.

    The trace is for chrome://tracing or ui.perfetto.dev.
    """
    first, last = PROFILED

    def write(done: profile) -> None:
        try:
            folder.mkdir(exist_ok=True)
            done.export_chrome_trace(str(folder / f"steps-{first}-{last}.json.gz"))
        except OSError as error:  # a full disk
            say(f"warning: {folder}: the trace cannot be written ({error.strerror}); training goes on")

    steps = schedule(wait=first - 2, warmup=1, active=last - first + 1, repeat=1)
    return profile(schedule=steps, on_trace_ready=write)


def make_writer(name: str | None, run: Run, ranks: Ranks) -> Callable[[dict], None] | None:
    """Return a function that also sends log records to TensorBoard or Weights & Biases."""
    if name is None or not ranks.main:
        return None
    try:
        if name == "wandb":
            import wandb

            session = wandb.init(project="reaf_hsenet", name=run.folder.name, dir=run.folder)
            return lambda record: session.log(record, step=record["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"--log {name}: is not installed; pip install {name}, or leave the flag out"
        ) from error
    writer = SummaryWriter(run.folder / "tensorboard")

    def write(record: dict) -> None:
        for key, value in {**record, **record.get("validation", {})}.items():
            if isinstance(value, int | float):
                writer.add_scalar(key, value, record["step"])
        writer.flush()

    return write
