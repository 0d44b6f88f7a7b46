"""A user's mistake: one line that names the file or flag, says what was expected and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Wrong input. Its message is one line: what (file, flag, row), what was expected, what to do."""


class OutputError(InputError):
    """A file that could not be written: a full disk, a folder without permission."""


@contextmanager
def about(path) -> Iterator[None]:
    """Let the InputErrors of a block begin with the file's name, where they do not already."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise type(error)(f"{path}: {error}") from error


def first_six(items: list[str], separator: str = ", ") -> str:
    """The items, of which those beyond six are counted only: an error is one line."""
    more = f" and {len(items) - 6} more" if len(items) > 6 else ""
    return separator.join(items[:6]) + more


def one_line(error: Exception) -> str:
    """Return an exception's message in one line of at most 160 characters, or its name where it has none."""
    return " ".join(str(error).split())[:160] or type(error).__name__
