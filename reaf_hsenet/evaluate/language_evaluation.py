"""Generation of reports or answers over a split: batched, split over ranks, resumed where it was interrupted.

FOLDER/TASK.rows-RANK.jsonl keeps answers as they are made: first the head, which says what is evaluated, then
{"row", "answer"} for every finished row. The files are removed when the results are written.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from reaf_hsenet import distributed
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import read_prepared, read_slices
from reaf_hsenet.data.manifest import Manifest, origin
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.data.workers import make_loader, worker_deaths_named
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.files import atomic_write, named
from reaf_hsenet.progress import progress_bar
from reaf_hsenet.runs.answering import answer, image_features
from reaf_hsenet.runs.trained import Trained


@dataclass(frozen=True)
class Asked:
    """A row: its volume's id and place in the split, the question put to the model, the true answer."""

    id: str
    entry: int
    question: str
    truth: str


def asked_rows(dataset: LanguageDataset) -> list[Asked]:
    """Return the rows of a split. A question without own words is drawn from the templates, always alike."""
    rows = []
    for row, (entry, _) in enumerate(dataset.rows):
        question, truth = dataset.text(row, np.random.default_rng((dataset.seed, 0, row)))
        rows.append(Asked(dataset.entries[entry]["id"], entry, question, truth))
    return rows


def report_rows(manifest: Manifest, split: str) -> list[Asked]:
    """Return a row for each report of a split, which nothing is asked about."""
    entries = manifest.entries(split)
    return [Asked(entry["id"], i, "", clean_report(entry["text"])) for i, entry in enumerate(entries)]


def fingerprint(rows: list[Asked], entries: list[dict]) -> str:
    """Hash the rows and what the volumes of the split's entries were made of."""
    asked = [(r.id, r.question, r.truth) for r in rows]
    return hashlib.sha256(json.dumps([asked, list(map(origin, entries))]).encode()).hexdigest()


class AnsweredRows:
    """Answers of all ranks so far. head: JSON; answers that were made to another head are not used."""

    def __init__(self, folder: Path, task: str, head: dict, ranks: Ranks, anew: bool = False):
        self.folder, self.task, self.head = Path(folder), task, head
        self.path = self.folder / f"{task}.rows-{ranks.rank}.jsonl"
        found = self._collect(anew) if ranks.main else {}
        self.kept: dict[int, str] = distributed.gather_objects(found)[0]
        if not ranks.main:
            self._write({})
        self.own: dict[int, str] = {}

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.task}.rows-*.jsonl"))

    def _collect(self, anew: bool) -> dict[int, str]:
        """Bring the rows of all files, of any number of ranks, into one, and remove the others."""
        found, others = {}, 0
        for path in self._files():
            head, rows = _read_answers(path)
            if anew or head != self.head:
                others += len(rows)
            else:
                found |= rows
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
            file.write(json.dumps(self.head) + "\n" + _lines(rows))

    def add(self, rows: dict[int, str]) -> None:
        """Keep what this rank has just answered, on disk before it returns."""
        self.own |= rows
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_lines(rows))
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}): free space; the answers before it are "
                f"kept, start again"
            ) from error

    def gather(self) -> dict[int, str]:
        """Return every row's answer, of all ranks and of before, on every rank."""
        found = dict(self.kept)
        for part in distributed.gather_objects(self.own):
            found |= part
        return found

    def finish(self, rows: int) -> None:
        """Remove the files when results of the first `rows` are written, unless they hold answers to more."""
        if all(row < rows for row in self.kept):
            for path in self._files():
                path.unlink()


def _lines(rows: dict[int, str]) -> str:
    return "".join(json.dumps({"row": row, "answer": text}) + "\n" for row, text in rows.items())


def _read_answers(path: Path) -> tuple[object, dict[int, str]]:
    """Return a file's head and rows, up to a line that was cut off when its writer was killed."""
    with named(path, advice="delete it and run again"):
        lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    head, rows = records[0] if records else None, {}
    for record in records[1:]:
        match record:  # a row that is not as it was written is answered again
            case {"row": int(row), "answer": str(text)} if row >= 0:
                rows[row] = text
    return head, rows


class AskedVolumes(Dataset):
    """Batches of B rows on U different volumes: (numbers, volume, slices, place).

    numbers: of the rows. volume: (U, 1, D, H, W). slices: (U, S, C) or None. place: (B,), each row's volume.
    """

    def __init__(self, data: LanguageDataset, rows: list[Asked]):
        self.data, self.rows = data, rows

    def __getitems__(self, numbers: list[int]) -> tuple | InputError:
        entries = [self.rows[number].entry for number in numbers]
        unique = list(dict.fromkeys(entries))
        read = [self.data.entries[entry] for entry in unique]
        manifest, slices = self.data.manifest, None
        try:
            volume = torch.stack([read_prepared(manifest, entry) for entry in read])
            if self.data.slices:
                slices = torch.stack([read_slices(manifest, entry) for entry in read])
        except InputError as error:
            return error  # raised by the main process: a worker's exception would carry its traceback
        return numbers, volume, slices, torch.tensor([unique.index(entry) for entry in entries])

    def collate(self, batch: tuple | InputError) -> tuple | InputError:
        return batch


@worker_deaths_named()
def generate_answers(
    run: Trained,
    data: LanguageDataset,
    rows: list[Asked],
    kept: AnsweredRows,
    new_tokens: int,
    batch: int,
    ranks: Ranks,
    workers: int = 0,
) -> list[str]:
    """Return the rows' answers on every rank, generating those that `kept` does not hold.

    Every rank takes one stretch of what is missing, so that the questions of a volume are next to each other.
    """
    missing = [number for number in range(len(rows)) if number not in kept.kept]
    if ranks.main and len(missing) < len(rows):
        done = len(rows) - len(missing)
        print(f"{done} of {len(rows)} answers are there already, {len(missing)} are generated", flush=True)
    first, end = (len(missing) * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1))
    mine = missing[first:end]
    batches = [mine[i : i + batch] for i in range(0, len(mine), batch)]
    loader = make_loader(AskedVolumes(data, rows), batches, workers)
    began = time.perf_counter()
    try:
        with progress_bar(len(mine), kept.task, "row", shown=ranks.main and bool(mine)) as bar:
            for part in loader:
                if isinstance(part, InputError):
                    raise part
                texts = _answer_batch(run, rows, part, new_tokens, ranks.device)
                kept.add(dict(zip(part[0], texts, strict=True)))
                bar.update(len(texts))
        found = kept.gather()
    except KeyboardInterrupt:
        done = len(kept.kept) + len(kept.own)
        message = f"interrupted; {kept.folder} keeps {done} answers, start again to go on"
        raise KeyboardInterrupt(message) from None
    if ranks.main and missing:
        seconds = time.perf_counter() - began
        print(f"{len(missing)} answers in {seconds:.1f} s, {len(missing) / seconds:.2f} rows/s")
    return [found[number] for number in range(len(rows))]


@torch.inference_mode()
def _answer_batch(
    run: Trained, rows: list[Asked], part: tuple, new_tokens: int, device: torch.device
) -> list[str]:
    numbers, volume, slices, place = part
    slices, place = None if slices is None else slices.to(device), place.to(device)
    features = image_features(run.model, volume.to(device), slices)  # of each volume once
    return answer(
        run.model,
        run.tokenizer,
        [rows[number].question for number in numbers],
        None,
        None if slices is None else slices[place],
        new_tokens,
        features=[x[place] for x in features],
        compiled=run.compiled,
    )
