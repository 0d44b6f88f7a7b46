"""Time and peak memory of a function in a process of its own, several times, in turn with another's."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def peak_mb() -> float:
    """Peak resident memory of this process. getrusage would count the parent's, which a new process
    inherits.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _run(function: Callable, arguments: tuple, queue) -> None:
    prepare = function(*arguments)  # what is not to be timed; returns the work
    before = peak_mb()
    started = time.perf_counter()
    prepare()
    seconds = time.perf_counter() - started
    queue.put((seconds, before, peak_mb()))


def measure(function: Callable, *arguments) -> tuple[float, float, float]:
    """(seconds, MB before the work, peak MB) of the callable that function(*arguments) returns, in a new
    process.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_run, args=(function, arguments, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}")
    return queue.get()


def compare(
    names: tuple[str, str], functions: tuple[Callable, Callable], arguments: tuple, pairs: int
) -> None:
    """Run both in turn, `pairs` times after one uncounted pair, and print medians and the ratios pair by
    pair.
    """
    runs = [[measure(f, *arguments) for f in functions] for _ in range(pairs + 1)][1:]
    for i, name in enumerate(names):
        seconds = [pair[i][0] for pair in runs]
        peak = [pair[i][2] for pair in runs]
        print(
            f"{name:<28} {statistics.median(seconds):8.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
            f" {statistics.median(peak):8.0f} MB peak, of which {runs[0][i][1]:.0f} before the work"
        )
    speed = [b[0] / a[0] for a, b in runs]
    memory = [a[2] / b[2] for a, b in runs]
    print(
        f"{names[0]} is {statistics.median(speed):.2f}x as fast ({min(speed):.2f} to {max(speed):.2f}), "
        f"with {statistics.median(memory):.2f}x the peak memory ({min(memory):.2f} to {max(memory):.2f})"
    )
