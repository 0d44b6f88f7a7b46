"""Progress of a long job: a bar on a terminal; elsewhere, as in a job's log, a line every 30 seconds."""

import sys
import time

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines
LINE = "{desc}: {unit} {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}"


class Lines:
    """The part of tqdm's interface that is used here, in whole lines on standard error."""

    def __init__(self, total: int, desc: str, unit: str, initial: int = 0, disable: bool = False):
        self.total, self.desc, self.unit, self.n, self.disable = total, desc, unit, initial, disable
        self.initial, self.began, self.postfix = initial, time.monotonic(), ""
        self.told = self.began

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def set_postfix_str(self, text: str) -> None:
        self.postfix = text

    def update(self, done: int = 1) -> None:
        self.n += done
        if time.monotonic() - self.told >= EVERY:
            self._tell()

    def close(self) -> None:
        if not self.disable:
            self._tell()
        self.disable = True

    def _tell(self) -> None:
        self.told = time.monotonic()
        if not self.disable:
            line = tqdm.format_meter(
                self.n,
                self.total,
                self.told - self.began,
                initial=self.initial,
                prefix=self.desc,
                unit=self.unit,
                postfix=self.postfix,
                bar_format=LINE,
            )
            print(" ".join(line.split()), file=sys.stderr, flush=True)


def progress_bar(total: int, what: str, unit: str, done: int = 0, shown: bool = True) -> "tqdm | Lines":
    """Return a context manager with update(), for steps, and set_postfix_str(), for a remark.

    done: steps of an earlier process. shown: False on ranks that stay silent.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, initial=done, disable=not shown, dynamic_ncols=True)
    return Lines(total, what, unit, done, not shown)


def say(text: str) -> None:
    """Print a line, above the bar where there is one."""
    tqdm.write(text)
    sys.stdout.flush()
