"""csv tables, read with every mistake named by file and line."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

from reaf_hsenet.errors import InputError


def csv_rows(
    path: Path, columns: tuple[str, ...], rename: Callable[[str], str] = str
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a csv in UTF-8, with or without byte order mark. rename: the names that its columns get.

    Raises InputError for an absent file, a missing or repeated column, and a row of another length.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = names = [rename(name) for name in reader.fieldnames or ()]
            listed = f"its columns are {', '.join(names) or 'none'}"
            if missing := [c for c in columns if c not in names]:
                raise InputError(f"{path}: has no column {', '.join(missing)}; {listed}")
            if repeated := [c for c in columns if names.count(c) > 1]:
                raise InputError(f"{path}: has two columns {repeated[0]}; keep one ({listed})")
            for row in reader:
                if None in row:
                    raise InputError(
                        f"{path}: line {reader.line_num} has more fields than the header; put a text that holds "
                        "commas in double quotes"
                    )
                if any(row[c] is None for c in columns):
                    raise InputError(f"{path}: line {reader.line_num} has fewer fields than the header")
                if any("\0" in row[c] for c in columns):
                    raise InputError(f"{path}: line {reader.line_num} holds a NUL byte; save the table as plain text again")
                yield reader.line_num, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a UTF-8 csv file ({error})") from error


def read_csv(path: Path, columns: tuple[str, ...], key: str) -> dict[str, dict[str, str]]:
    """The rows of a csv by the column `key`. Raises InputError as csv_rows does, and for a repeated key."""
    rows: dict[str, dict[str, str]] = {}
    for line, row in csv_rows(path, columns):
        if row[key] in rows:
            raise InputError(f"{path}: {key} {row[key]} is listed twice, the second time in line {line}; keep one")
        rows[row[key]] = row
    return rows
