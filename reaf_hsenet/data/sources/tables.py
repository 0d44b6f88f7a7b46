"""csv tables, read with every mistake named by file and line; which volume a table's path means; texts
that are none.
"""

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import named

# What exports write for a report that is not there: pandas, ReXrank's tables, CT-RATE ("Not given.").
NO_TEXT = {"", *"nan none null nil n/a na <na> nat - -- ?".split(), "not given", "not available", "no report"}


def csv_rows(
    path: Path,
    columns: tuple[str, ...],
    rename: Callable[[str], str] = str,
    names_volume: Callable[[str], bool] = lambda cell: False,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a csv in UTF-8, with or without byte order mark.

    rename: the names that its columns get. names_volume: whether a cell is the name of a volume; a text of
    several lines in which one is a cell has swallowed a row.
    Raises InputError for an absent file, a missing or repeated column, a row of another length, and quotes
    that do not balance.
    """
    with named(path, "is not a UTF-8 csv file"), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        reader.fieldnames = names = [rename(name) for name in reader.fieldnames or ()]
        listed = f"its columns are {', '.join(names) or 'none'}"
        if missing := [c for c in columns if c not in names]:
            raise InputError(f"{path}: has no column {', '.join(missing)}; {listed}")
        if repeated := [c for c in names if c and names.count(c) > 1]:
            raise InputError(f"{path}: has two columns {repeated[0]}; keep one ({listed})")
        while True:
            first = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                last = reader.reader.line_num  # the outer reader counts rows that it could give
                lines = f"line {first}" if last <= first else f"lines {first} to {last}"
                raise InputError(
                    f"{path}: {lines}: the quotes do not balance, or a field is too long ({error}); end a "
                    "quoted text with a double quote and write one inside it twice"
                ) from error
            if row is None:
                return
            if None in row:
                raise InputError(
                    f"{path}: line {reader.line_num} has more fields than the header; put a text that holds "
                    "commas in double quotes"
                )
            if any(row[c] is None for c in columns):
                raise InputError(f"{path}: line {reader.line_num} has fewer fields than the header")
            if any("\0" in cell for cell in row.values() if cell):
                raise InputError(
                    f"{path}: line {reader.line_num} holds a NUL byte; save the table as plain text again"
                )
            if reader.line_num > first:
                for text in row.values():
                    if name := swallowed(text or "", names_volume):
                        raise InputError(
                            f"{path}: lines {first} to {reader.line_num}: a quoted text runs over the row of "
                            f"{name}; end each quoted text with a double quote and write one inside it twice"
                        )
            yield reader.line_num, row


def swallowed(text: str, names_volume: Callable[[str], bool]) -> str | None:
    """Return the volume whose row a text of several lines has swallowed: a cell of one of its lines."""
    lines = text.splitlines()
    cells = [cell.strip(' "') for line in lines if len(lines) > 1 and "," in line for cell in line.split(",")]
    return next((cell for cell in cells if cell and names_volume(cell)), None)


def read_csv(
    path: Path, columns: tuple[str, ...], key: str, names_volume: Callable[[str], bool] = lambda cell: False
) -> dict[str, dict[str, str]]:
    """Return the rows of a csv by the column `key`. Raises InputError as csv_rows, and for a repeated key."""
    rows: dict[str, dict[str, str]] = {}
    for line, row in csv_rows(path, columns, names_volume=names_volume):
        if row[key] in rows:
            raise InputError(
                f"{path}: {key} {row[key]} is listed twice, the second time in line {line}; keep one"
            )
        rows[row[key]] = row
    return rows


def given(text: str) -> str:
    """Return a report without white space at its ends; empty where it only says that there is none."""
    text = text.strip()
    return "" if text.lower().rstrip(".") in NO_TEXT else text


def plain_path(name: str, where: str) -> str:
    """Return a relative path without `.` and doubled slashes. Raises InputError, which begins with
    `where`, for one that is absolute or leaves its folder, and for characters that no report of files can
    hold.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or not name.isprintable():
        raise InputError(f"{where} {name!r:.100} is not a path below its folder")
    return str(path)


def nifti_stem(name: str) -> str:
    """Return a file's name without .nii.gz or .nii."""
    return name.removesuffix(".gz").removesuffix(".nii")


class Volumes:
    """Finds which of some volumes the path in a table means.

    A path means the volume whose path ends in it, or that it ends in, folder by folder: "/data/x/s1/ct" and
    "ct" may mean s1/ct, "s2/ct" never.
    """

    def __init__(self, ids: Iterable[str]):
        self.by_last: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        self.ids: dict[tuple[str, ...], str] = {}
        for volume in ids:
            parts = PurePosixPath(volume).parts
            self.ids[parts] = volume
            self.by_last[parts[-1]].append(parts)

    def __contains__(self, name: str) -> bool:
        return PurePosixPath(name).parts in self.ids

    def find(self, name: str, where: str) -> str | None:
        """Return the volume's id, if there is one. Raises InputError, beginning with `where`, for several."""
        parts = PurePosixPath(name).parts
        if parts in self.ids or not parts:
            return self.ids.get(parts)
        # A name without folders says too little of a path with some, where other volumes have folders.
        flat = all(len(p) == 1 for p in self.ids)
        fitting = [
            p
            for p in self.by_last.get(parts[-1], ())
            if p[-len(parts) :] == parts or parts[-len(p) :] == p and (flat or len(p) > 1)
        ]
        # Of several that the path ends in, the longest says most.
        longest = max((len(p) for p in fitting if len(p) < len(parts)), default=0)
        fitting = [p for p in fitting if len(p) >= longest]
        if len(fitting) > 1:
            several = " or ".join(self.ids[p] for p in fitting[:2])
            raise InputError(f"{where} may be {several}; give the path of the volume")
        return self.ids[fitting[0]] if fitting else None
