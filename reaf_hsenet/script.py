"""How a script begins and ends: flags, signals, exit codes, and an output that is gone or full."""

import argparse
import atexit
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from reaf_hsenet.errors import InputError, OutputError


class Terminated(BaseException):
    """SIGTERM as an exception, so that temporary files are removed and locks released."""


def _terminate(number, frame):
    raise Terminated


_early: list[int] = []  # signals that wait


def start_script(*later: signal.Signals) -> None:
    """Prepare a script for its slow imports, during which Ctrl-C ends it in one line.

    later: signals that are only noted from now on, for early_signal().
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _leave)
    for number in later:
        signal.signal(number, lambda number, frame: _early.append(number))
    # A standard stream that is closed must not become a file of the run, into which libraries would then
    # print.
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)


def early_signal() -> int:
    """Return the number of a signal that came since start_script and was to wait, else 0."""
    return _early[-1] if _early else 0


def _leave(number, frame) -> None:
    """End at once: an exception that some import catches would not."""
    with suppress(OSError):
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"interrupted\n")
    os._exit(130)


class Output(io.FileIO):
    """Standard output or error. What a closed pipe or a full disk does not take is lost, and ends nothing.

    result: the output is what the script is for. Then a closed pipe ends it with 141, a full disk with an
    OutputError.
    """

    def __init__(self, number: int, result: bool):
        super().__init__(number, "wb", closefd=False)
        self.result, self.lost = result, False

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            first, self.lost = not self.lost, True
            if first and self.result:
                if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
                    raise SystemExit(141) from None
                raise OutputError(
                    f"standard output: cannot be written ({error.strerror}); free space and run again"
                ) from error
            if first and self.fileno() == 1:
                print(
                    f"warning: standard output cannot be written ({error.strerror}); going on without it",
                    file=sys.stderr,
                )
            return len(data)


def _guard_output(result: bool) -> None:
    """Put Output below the process's own standard output and error; streams that were replaced stay."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the process started
            setattr(sys, name, open(os.devnull, "w"))
        elif stream is getattr(sys, f"__{name}__"):
            raw = Output(number, result and number == 1)
            # A file name that is not of the stream's encoding is shown with its bytes escaped.
            kept = {
                "encoding": stream.encoding,
                "errors": "backslashreplace",
                "line_buffering": stream.line_buffering,
            }
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **kept))


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
    """Flags of one command of a script that has several."""

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


def _ending(error: BaseException) -> tuple[int, str]:
    """Return the exit code for an exception, and its line; 1 for a bug, which has a traceback."""
    if (
        isinstance(error, OSError) and error.filename is not None
    ):  # a disk that is full, a permission, a name too long
        return 2, f"error: {error.filename}: {error.strerror}"
    if isinstance(error, InputError):
        return 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, str(error) or "interrupted"
    return (143, "interrupted") if isinstance(error, Terminated) else (1, "")


def run_script(
    main: Callable[[list[str]], int | None], argv: list[str] | None = None, result: bool = False
) -> None:
    """Run a script's main and exit.

    The code is 2, with one line, for an InputError or an OSError that names a file; 130 for Ctrl-C, 143 for
    SIGTERM. result: what main prints is what the script is for (Output). `--debug` shows tracebacks. Of
    torchrun's
    processes only the first that fails speaks.
    """
    arguments = sys.argv[1:] if argv is None else argv
    _guard_output(result)
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main(arguments)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt, Terminated) as error:
        code, message = _ending(error)
        speaks = _first_to_fail()
        if code == 1 and speaks:
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        if speaks:
            print(
                message.replace("\n", "\\n"), file=sys.stderr, flush=True
            )  # a file's name may have such; an error is one line
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what follows must not be interrupted by an exception
    if not _alone():
        # DDP keeps gloo's threads past the process group, and one that frees a tensor while Python ends
        # aborts the process.
        atexit._run_exitfuncs()  # ends loader processes; what sys.exit would call has no public name
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
