"""Generation over a split, of reports or of answers: batched, split over ranks, resumed where it was
interrupted.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import read_prepared, read_slices
from reaf_hsenet.data.manifest import origin
from reaf_hsenet.data.workers import make_loader, worker_deaths_named
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.answered_rows import AnsweredRows
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
    """The rows of a split. A question without its own words is drawn from the templates, always the same
    one.
    """
    rows = []
    for row, (entry, _) in enumerate(dataset.rows):
        question, truth = dataset.text(row, np.random.default_rng((dataset.seed, 0, row)))
        rows.append(Asked(dataset.entries[entry]["id"], entry, question, truth))
    return rows


def fingerprint(rows: list[Asked], entries: list[dict]) -> str:
    """Of the volumes' ids and what they were made of, of questions and true answers. entries: of the
    split.
    """
    asked = [(r.id, r.question, r.truth) for r in rows]
    return hashlib.sha256(json.dumps([asked, list(map(origin, entries))]).encode()).hexdigest()


class AskedVolumes(Dataset):
    """Batches of rows: (their numbers, volume (U, 1, D, H, W) of the U volumes they are of, slices (U, S,
    C) or None, place (B,) of each row's volume among them).
    """

    def __init__(self, data: LanguageDataset, rows: list[Asked]):
        self.data, self.rows = data, rows

    def __getitems__(
        self, numbers: list[int]
    ) -> tuple[list[int], Tensor, Tensor | None, Tensor] | InputError:
        entries = [self.rows[number].entry for number in numbers]
        unique = list(dict.fromkeys(entries))
        read = [self.data.entries[entry] for entry in unique]
        try:
            volume = torch.stack([read_prepared(self.data.manifest, entry) for entry in read])
            slices = (
                torch.stack([read_slices(self.data.manifest, entry) for entry in read])
                if self.data.slices
                else None
            )
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
    new_tokens: int,
    batch: int,
    ranks: Ranks,
    folder: Path,
    task: str,
    head: dict,
    anew: bool = False,
    workers: int = 0,
) -> tuple[list[str], AnsweredRows]:
    """(the rows' answers on every rank, the files that keep them, to be removed when the results are
    written).

    head: says what is generated; answers that `folder` has to the same head are kept, whatever `rows` were
    asked for then. Every rank takes one stretch of what is missing, so that the questions of a volume are
    next to each other.
    """
    kept = AnsweredRows(folder, task, head, ranks, anew)
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
        with progress_bar(len(mine), task, "row", shown=ranks.main and bool(mine)) as bar:
            for part in loader:
                if isinstance(part, InputError):
                    raise part
                texts = _answer_batch(run, rows, part, new_tokens, ranks.device)
                kept.add(dict(zip(part[0], texts, strict=True)))
                bar.update(len(texts))
        found = kept.gather()
    except KeyboardInterrupt:
        done = len(kept.kept) + len(kept.own)
        raise KeyboardInterrupt(f"interrupted; {folder} keeps {done} answers, start again to go on") from None
    if ranks.main and missing:
        seconds = time.perf_counter() - began
        print(f"{len(missing)} answers in {seconds:.1f} s, {len(missing) / seconds:.2f} rows/s")
    return [found[number] for number in range(len(rows))], kept


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
