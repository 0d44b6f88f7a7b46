"""Answers that are kept as they are made, so that an interrupted evaluation goes on where it was.

FOLDER/TASK.rows-RANK.jsonl: first the head, what is evaluated, then {"row", "answer"} for every finished row.
"""

import json
from pathlib import Path

from reaf_hsenet import distributed
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import OutputError
from reaf_hsenet.files import atomic_write, named


class AnsweredRows:
    """The rows answered so far, of all ranks. head: JSON; answers to another head are not used."""

    def __init__(self, folder: Path, task: str, head: dict, ranks: Ranks, anew: bool = False):
        self.folder, self.task, self.head = Path(folder), task, head
        self.path = self._path(ranks.rank)
        found: dict[int, str] = {}
        if ranks.main:
            found = self._collect(anew)
        self.kept: dict[int, str] = distributed.gather_objects(found)[0]
        if not ranks.main:
            self._write({})
        self.own: dict[int, str] = {}

    def _path(self, rank: int) -> Path:
        return self.folder / f"{self.task}.rows-{rank}.jsonl"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.task}.rows-*.jsonl"))

    def _collect(self, anew: bool) -> dict[int, str]:
        """Bring the rows of all files, of whatever number of ranks, into one, and remove the others."""
        found, others = {}, 0
        for path in self._files():
            head, *records = _read(path) or [None]
            if anew or head != self.head:
                others += len(records)
            else:
                found |= {record["row"]: record["answer"] for record in records}
        if others:
            reason = "as --anew says" if anew else "they are of another checkpoint, data set or setting"
            print(f"{self.folder}: {others} answers of before are not used: {reason}")
        self._write(found)
        for path in self._files():
            if path != self.path:
                path.unlink()
        return found

    def _write(self, rows: dict[int, str]) -> None:
        with atomic_write(self.path) as file:
            file.writelines(_line(record) for record in (self.head, *_records(rows)))

    def add(self, rows: dict[int, str]) -> None:
        """Keep what this rank has just answered, on disk before it returns."""
        self.own |= rows
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(map(_line, _records(rows)))
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}): free space; the answers before it are "
                f"kept, start again"
            ) from error

    def gather(self) -> dict[int, str]:
        """Every row's answer, of all ranks and of before, on every rank."""
        return {
            row: text
            for part in (self.kept, *distributed.gather_objects(self.own))
            for row, text in part.items()
        }

    def finish(self, rows: int) -> None:
        """The results of the first `rows` are written: the files are removed, unless they have answers to
        more.
        """
        if all(row < rows for row in self.kept):
            for path in self._files():
                path.unlink()


def _records(rows: dict[int, str]) -> list[dict]:
    return [{"row": row, "answer": text} for row, text in rows.items()]


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _read(path: Path) -> list[dict]:
    """The records of a file, up to a line that was cut off when its writer was killed."""
    with named(path, advice="delete it and run again"):
        lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        # The first is the head, of any form; a row that is not as it was written is answered again.
        if not records or isinstance(record, dict) and _is_row(record.get("row"), record.get("answer")):
            records.append(record)
    return records


def _is_row(row, answer) -> bool:
    return type(row) is int and row >= 0 and isinstance(answer, str)
