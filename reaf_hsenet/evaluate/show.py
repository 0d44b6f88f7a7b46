"""Tables on the screen, the same for every task."""

from collections.abc import Mapping, Sequence

Value = str | int | float | None


def show(
    rows: Mapping[str, Sequence[Value]], columns: Sequence[tuple[str, int]], title: str = "", width: int = 34
) -> None:
    """Print a table: a line of column names, then a line for each row; columns are aligned on the right.

    rows: the values of each row by its name; a row may end early. columns: (name, width in characters).
    title: stands above the rows' names, which have `width` characters.
    """
    for name, values in (title, [column for column, _ in columns]), *rows.items():
        cells = (f"{cell(value):>{wide}}" for value, (_, wide) in zip(values, columns, strict=False))
        print(f"{name:<{width}}" + "".join(cells))


def cell(value: Value) -> str:
    """Return a text or a count as it is, another number with three decimals, and - for what is undefined."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
