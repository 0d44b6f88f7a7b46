"""Loader processes: a data set's batches, read ahead; and what is said when such a process dies."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from reaf_hsenet.data.loader import with_tensors
from reaf_hsenet.errors import InputError

ADVICE = (
    "start with fewer --workers, or give this machine or container more memory and /dev/shm (docker "
    "run --shm-size)"
)


def make_loader(dataset: Dataset, sampler: Sampler, workers: int, pin: bool = False) -> DataLoader:
    """Batches of `dataset.collate`; what a batch holds does not depend on the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(_collate, dataset),
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals,
    )


def _collate(dataset: Dataset, items: list):
    """Return the batch of some items, in a loader process in shared memory.

    Sent from memory of its own, in a thread of torch's, a full /dev/shm would lose it and the run would wait
    forever. Here the failure still has a message.
    """
    batch, worker = dataset.collate(items), get_worker_info()
    if worker is not None:
        try:
            with_tensors(batch, Tensor.share_memory_)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return InputError(f"loader worker {worker.id} (of {worker.num_workers}): {reason}; {ADVICE}")
    return batch


def batches(loader: DataLoader, device: torch.device, tolerant: bool = False) -> Iterator:
    """Give batches on `device`. Raises a sample's InputError, unless `tolerant` also what is unreadable."""
    # What a loader process had sent and no longer holds open, when it dies before torch has noticed.
    cut_off = (EOFError, ConnectionError, FileNotFoundError) if loader.num_workers else ()
    source = iter(loader)
    while True:
        try:
            batch = next(source, None)
        except cut_off as error:
            raise InputError(f"loader worker died ({type(error).__name__}); {ADVICE}") from error
        if batch is None:
            return
        if isinstance(batch, InputError):
            raise batch
        if batch.bad and not tolerant:
            raise InputError(batch.bad[0].reason)
        yield batch.to(device)


@atexit.register
def _end_workers() -> None:
    """Kill the workers that an exception has left running: they ignore the one SIGTERM of Python."""
    _quiet_deaths()
    for process in multiprocessing.active_children():
        process.kill()


def _quiet_deaths():
    """Switch off what torch raises when a loader process dies; returns the handler that does."""
    return signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def worker_deaths_later():
    """Ignore loader processes that die during a block that must end. The next batch raises the error."""
    handler = _quiet_deaths()
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


@contextmanager
def worker_deaths_named():
    """Make one line of what torch raises, anywhere in the main process, when a loader process has died."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].strip() if str(error) else ""
        if not reason.startswith("DataLoader worker (pid"):
            raise
        raise InputError(
            f"loader{reason.removeprefix('DataLoader').split('. ')[0].rstrip('.')}; {ADVICE}"
        ) from error


def _leave_signals(worker: int) -> None:
    """Ignore Ctrl-C, SIGUSR1 and the first SIGTERM: the main process still needs batches for its step.

    The second SIGTERM, which torch sends at shutdown, ends the process.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
