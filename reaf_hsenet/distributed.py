"""One process or many: process group, device, and what must agree between ranks."""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from reaf_hsenet.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process's place: rank of world, on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, items: list) -> list:
        """Return this rank's part of what all ranks do together: every world-th."""
        return items[self.rank :: self.world]


def start(device: str | None = None, hours: float = 0.5) -> Ranks:
    """Join torchrun's process group (nccl on GPUs, gloo on processors), or be the only process.

    hours: how long a rank waits for another. Between training steps that is short, after generation long.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {kind}: torch sees no GPU here; leave the flag out or say cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun started local rank {local}, but there are {torch.cuda.device_count()} GPUs"
            )
        kind = f"cuda:{local}"
        torch.cuda.set_device(local)
    try:
        place = torch.device(kind)
    except RuntimeError as error:
        raise InputError(f"--device {kind}: expected cpu, cuda or cuda:N") from error
    rank = int(os.environ.get("RANK", "0"))
    if world > 1:
        options = {"backend": "nccl" if place.type == "cuda" else "gloo", "timeout": timedelta(hours=hours)}
        if store := job_store(options["timeout"]):
            # It still has the addresses of the processes before a restart: a prefix keeps the new ones apart.
            store = dist.PrefixStore(f"start/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
            options |= {"store": store, "rank": rank, "world_size": world}
        dist.init_process_group(**options)
    return Ranks(rank, world, place)


def stop() -> None:
    """Leave the process group. No DistributedDataParallel may be in use any more.

    A DDP model that is still alive frees the group later, while it holds Python's lock. A thread of gloo's
    waits for that lock then: a deadlock.
    """
    if dist.is_initialized():
        gc.collect()  # those that only a cycle of references still holds
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(value: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def gather_objects(value) -> list:
    """Return the values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_equal(value: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all ranks, of one shape on all, stacked in rank order: (world, ...)."""
    if not dist.is_initialized():
        return value[None]
    gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, value)
    return torch.stack(gathered)


def on_main(work: Callable):
    """Return on every rank what `work` returns on rank 0. An InputError of rank 0 is raised on every rank."""
    done = error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            done = work()
        except InputError as raised:
            error = raised
    done, error = gather_objects((done, error))[0]
    if error is not None:
        raise error
    return done


def job_store(timeout: timedelta = timedelta(seconds=20)) -> dist.Store | None:
    """Return the store that all processes of a torchrun share, restarted ones too; None without torchrun.

    timeout: how long to wait for it, and for another process that has not set a value yet.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore("reaf_hsenet", dist.TCPStore(*place, timeout=timeout))


def first_to_fail() -> bool:
    """Return whether no other process of torchrun has failed yet; a later failure follows from the first."""
    try:
        store = job_store(timedelta(seconds=2))
        return store is None or store.add(f"failed/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
    except dist.DistError:  # the torchrun that held the store has ended before
        return True
