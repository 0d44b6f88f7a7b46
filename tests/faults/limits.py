"""A limit of time and memory on what is run in this process: more of either is an error that no reader
catches.
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS, BYTES = 10, 2 << 30


class TooLong(BaseException):
    """Not an Exception, so that nothing takes it for a file's fault."""


@contextmanager
def limited(seconds: float = SECONDS, more: int = BYTES) -> Iterator[None]:
    """more: bytes of address space beyond what the process has now; an allocation above it is a
    MemoryError.
    """

    def stop(number, frame):
        raise TooLong(f"longer than {seconds} s")

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def no_file_above(most: int | None) -> Iterator[None]:
    """Writing a file beyond `most` bytes fails, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
