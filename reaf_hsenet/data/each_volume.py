"""Work over many volumes that may be stopped at any time: worker processes, a journal, refused.csv.

`each_volume` is under both preparation (prepare.py) and slice features (slice_features.py). The journal is a
file of JSON lines. The first says how all volumes are made, each other that one is finished.
"""

import csv
import json
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from reaf_hsenet.data.pool import map_in_order
from reaf_hsenet.data.sources.tables import csv_rows
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.files import atomic_write, named
from reaf_hsenet.progress import progress_bar

Item, Result = TypeVar("Item"), TypeVar("Result")
Refused = list[tuple[str, str]]  # of file and reason


@dataclass(frozen=True)
class Journal:
    """Records of finished volumes at `path`, below the settings that all of them are made with.

    holds: what the folder then has, in words. ignored: settings that may differ from the file's.
    """

    path: Path
    settings: dict
    holds: str
    ignored: tuple[str, ...] = ()

    def read(self, whole: Callable[[dict], bool]) -> dict[str, dict]:
        """Return the records by id that `whole` accepts, and write the file without the others.

        Raises InputError when the file is of other settings, or does not say of which.
        """
        old, *records = self.lines() or [self.settings]
        names = [name for name in {**self.settings, **old} if name not in self.ignored]
        if changed := [name for name in names if old.get(name) != self.settings.get(name)]:
            raise InputError(
                f"{self.path.parent}: holds {self.holds} with another {', '.join(changed)}; choose another "
                "--out"
            )
        done = {r["id"]: r for r in records if isinstance(r.get("id"), str) and whole(r)}
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(line) + "\n" for line in (self.settings, *done.values()))
        return done

    def lines(self) -> list[dict]:
        """Return the settings and the records of the file, without damaged ones: a kill can cut the last."""
        if not self.path.exists():
            return []
        with named(self.path):
            text = self.path.read_text(encoding="utf-8", errors="replace")
        found = [_object(line) for line in text.splitlines()]
        if found and found[0] is None:
            raise InputError(
                f"{self.path}: its first line is damaged, which says how {self.holds} were made; choose "
                "another --out"
            )
        return [line for line in found if line is not None]

    def add(self, record: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}): free space and run again"
            ) from error


def _object(line: str) -> dict | None:
    """Return the object of a JSON line; None for another line, and for one with NaN."""
    try:
        value = json.loads(line, parse_constant=int)  # no int is NaN
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def each_volume(
    items: dict[str, Item],
    work: Callable[[Item], Result],
    journal: Journal,
    whole: Callable[[dict], bool],
    *,
    what: str,
    workers: int = 1,
    progress: bool = True,
    finish: Callable[[list[tuple[Item, Result]]], Iterable[dict]] | None = None,
    together: int = 1,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Do the work of every item, by id, that the journal has no whole record of. The folder must be locked.

    work: runs in one of `workers` processes and returns the volume's record, with its id. An InputError
        refuses the volume; an OutputError ends all.
    finish: gives the records, in this process, of what `work` returned for the next `together` items.
    Returns the records of all that is done, and the reasons of what is refused, by id. Items are taken in
    their order, so that finish sees the same groups with any number of workers.
    """
    folder = journal.path.parent
    for path in (p for part in ("", "volumes/**/", "slices/**/") for p in folder.glob(f"{part}.*.tmp")):
        path.unlink(missing_ok=True)  # half written, by a process that was killed
    done, refused, waiting = journal.read(whole), {}, []
    todo = {i: item for i, item in items.items() if i not in done}

    def finish_waiting() -> None:
        for record in finish(waiting):
            journal.add(record)
            done[record["id"]] = record
        waiting.clear()

    attempt = partial(_attempt, work, journal if finish is None else None)
    with (
        progress_bar(len(todo), what, "volume", shown=progress and bool(todo)) as bar,
        closing(map_in_order(attempt, list(todo.values()), workers)) as outcomes,
    ):
        for i, (result, reason) in zip(todo, outcomes, strict=True):
            if reason is not None:
                refused[i] = reason
            elif finish is None:
                done[i] = result
            else:
                waiting.append((todo[i], result))
            if len(waiting) >= together:
                finish_waiting()
            bar.update()
        if waiting:
            finish_waiting()
    return done, refused


def _attempt(work: Callable[[Item], Result], journal: Journal | None, item: Item):
    """Return (result, None), or (None, why the volume is refused).

    A worker ends what it has begun when Ctrl-C ends the process that waits for it. So a record is added to
    the journal here.
    """
    try:
        result = work(item)
    except OutputError:
        raise
    except InputError as error:
        return None, str(error)
    except MemoryError:
        return None, "needs more memory than there is; use fewer --workers"
    if journal is not None:
        journal.add(result)
    return result, None


def write_refused(folder: Path, refused: Refused, step: str = "") -> None:
    """Replace the lines of refused.csv whose reasons begin with `step`; without one, all of them."""
    others = [line for line in read_refused(folder) if not line[1].startswith(step)] if step else []
    with atomic_write(folder / "refused.csv") as file:
        csv.writer(file).writerows([("file", "reason"), *others, *refused])


def read_refused(folder: Path) -> Refused:
    """Return the (file, reason) pairs of refused.csv, none where there is no such file."""
    path = folder / "refused.csv"
    rows = csv_rows(path, ("file", "reason")) if path.is_file() else ()
    return [(row["file"], row["reason"]) for _, row in rows]
