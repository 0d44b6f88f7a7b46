"""Worker processes that prepare or draw volumes, and what is said when one of them dies."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from reaf_hsenet.errors import InputError

AHEAD = 4  # items begun for each worker beyond the first that is not finished, which may be a large one


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave signals to this one. After an error what is in work is finished, the rest is not
    begun.

    Raises InputError when one of them is killed.
    """
    # spawn: a forked child of a process with threads can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    # One thread each, where nothing else is asked for: as many workers as cores, each with as many threads,
    # would wait for one another. They read this as they start; here the libraries are loaded already.
    threads = [name for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ]
    os.environ.update(dict.fromkeys(threads, "1"))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise InputError(
            "a worker was killed, most likely for want of memory; run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        for name in threads:
            del os.environ[name]


def map_in_order(function: Callable, items: Sequence, workers: int) -> Iterator:
    """Give function(item) of every item, in order, computed in `workers` processes, or here by one."""
    if workers == 1 or len(items) < 2:
        yield from map(function, items)
        return
    with worker_pool(min(workers, len(items))) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _begin() -> None:
    """Leave Ctrl-C and a scheduler's warning to the main process, and end when that is killed."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
