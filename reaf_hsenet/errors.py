"""A user's mistake: one line that names the file or flag, says what was expected and what to do."""

import argparse
import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable


class InputError(Exception):
    """Wrong input. Its message is one line: what (file, flag, row), what was expected, what to do."""


class OutputError(InputError):
    """A file that could not be written: a full disk, a folder without permission."""


def first_six(items: list[str], separator: str = ", ") -> str:
    """The items, of which those beyond six are counted only: an error is one line."""
    more = f" and {len(items) - 6} more" if len(items) > 6 else ""
    return separator.join(items[:6]) + more


def one_line(error: Exception) -> str:
    """Return an exception's message in one line of at most 160 characters, or its name where it has none."""
    return " ".join(str(error).split())[:160] or type(error).__name__


class Terminated(BaseException):
    """SIGTERM, raised where the program can still put things in order."""


def raise_on_sigterm() -> None:
    """Turn SIGTERM into an exception, so that temporary files are removed and locks released."""

    def handler(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes are one line, and whose help keeps the script's own layout."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


class Command(Parser):
    """The flags of one command of a script that has several."""

    def __init__(self, prog: str, description: str | None = None):
        super().__init__(description)
        self.prog = prog


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _first_to_fail() -> bool:
    if _alone():
        return True
    from reaf_hsenet import distributed  # with torch, which an error in a flag does not need

    return distributed.first_to_fail()


def run_script(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> None:
    """Run a script's main and exit: 2 and one line for an InputError, 130 for Ctrl-C, 143 for SIGTERM.

    `--debug` shows tracebacks. Of torchrun's processes only the first that fails speaks.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = main(arguments)
    except (InputError, KeyboardInterrupt, Terminated) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code = 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 143
        message = f"error: {error}" if code == 2 else str(error) or "interrupted"
        if _first_to_fail():
            print(message, file=sys.stderr, flush=True)
    except Exception:
        if _first_to_fail():
            raise
        code = 1
    if not _alone():
        # DDP keeps gloo's threads past the process group, and one that frees a tensor while Python ends aborts the process.
        atexit._run_exitfuncs()  # ends loader processes; what sys.exit would call has no public name
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
