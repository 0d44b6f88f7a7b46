"""Tables on the screen and as csv files, the same for every task."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from reaf_hsenet.files import atomic_write
from reaf_hsenet.runs.checkpoint import Choice

Value = str | int | float | list[float | None] | None


def show(rows: Mapping[str, Sequence[Value]], columns: Sequence[tuple[str, int]], title: str = "") -> None:
    """Print a table: a line of column names, then a line for each row; columns are aligned on the right.

    rows: the values of each row by its name; a row may end early. columns: (name, width in characters).
    title: stands above the rows' names.
    """
    width = 1 + max(map(len, [title, *rows]))
    for name, values in (title, [column for column, _ in columns]), *rows.items():
        cells = (f"{cell(value):>{wide}}" for value, (_, wide) in zip(values, columns, strict=False))
        print(f"{name:<{width}}" + "".join(cells))


def cell(value: Value) -> str:
    """Return a text or a count as it is, another number with three decimals, - for what is undefined.

    An interval, [low, high], is `low to high`.
    """
    if isinstance(value, list):
        return "-" if None in value else " to ".join(map(cell, value))
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_rows(path: Path, rows: Sequence[Mapping[str, Value]], source: Choice | Path) -> None:
    """Write a csv with the columns of the first row, and the checkpoint or file that made the rows."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, [*rows[0], "checkpoint"])
        writer.writeheader()
        writer.writerows({**row, "checkpoint": source} for row in rows)
