"""Which volumes show which class: label tables, and how a data set's columns become classes.

A label set is data, label_sets/<name>.json: `columns` (class -> columns of the raw table; 1 when any of them
is 1), `scored_from` (class -> the prompts that score it, where it has none of its own) and `means` (the
classes that a mean of the published results leaves out). A table that has a column of the class's own name
needs no mapping.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.reading import stem
from reaf_hsenet.data.sources.tables import Volumes, csv_rows
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_json

LABEL_SETS = ("ct-rate", "rad-chestct")
KEYS = ("VolumeName", "NoteAcc_DEID", "id")


@dataclass(frozen=True)
class LabelSet:
    name: str
    columns: dict[str, list[str]]
    scored_from: dict[str, list[str]]
    means: dict[str, list[str]]


def load_label_set(name: str) -> LabelSet:
    values = read_json(Path(__file__).parent / "label_sets" / f"{name}.json")
    return LabelSet(name, values["columns"], values["scored_from"], values["means"])


@dataclass(frozen=True)
class LabelTable:
    """source: the file. names: its columns. rows: volume id -> {column: 0 or 1, as written there}.

    known: ids of all volumes, among which a row's name must mean one; by default those asked for.
    """

    source: Path
    names: list[str]
    rows: dict[str, dict]
    known: tuple[str, ...] = ()

    def classes(self, label_set: LabelSet) -> dict[str, list[str]]:
        """Return the classes that the table can tell, each with its columns."""
        mapped = {c: raw for c, raw in label_set.columns.items() if set(raw) <= set(self.names)}
        own = {name: [name] for name in self.names}
        return own | {name: raw for name, raw in mapped.items() if name not in own}

    def known_classes(self, label_set: LabelSet, more: Iterable[str] = ()) -> dict[str, list[str]]:
        """Return those of the classes that the label set or `more` names; all, where none is named."""
        classes, named = self.classes(label_set), {*label_set.columns, *more}
        return {name: raw for name, raw in classes.items() if name in named} or classes

    def values(self, ids: list[str], columns: list[list[str]]) -> np.ndarray:
        """Return (N, C) bool: any of a class's columns is 1. Raises InputError for an absent volume."""
        rows = self.by_volume(ids)
        for volume in ids:
            if volume not in rows:
                raise InputError(
                    f"{self.source}: has no labels of volume {volume}; add its row, or name another table "
                    f"with --labels"
                )
        found = [[any([self._value(i, rows[i], c) for c in group]) for group in columns] for i in ids]
        return np.array(found, dtype=bool).reshape(len(ids), len(columns))

    def by_volume(self, ids: list[str]) -> dict[str, dict]:
        """Return the rows of these volumes, as far as there are any; names may lack the ids' folders."""
        volumes, found = Volumes(self.known or ids), {}
        for name, row in self.rows.items():
            volume = volumes.find(name, f"{self.source}: the row of {name}")
            if volume is not None and found.setdefault(volume, row) != row:
                raise InputError(f"{self.source}: two rows are of volume {volume}; keep one")
        return {volume: found[volume] for volume in ids if volume in found}

    def _value(self, volume: str, row: dict, column: str) -> bool:
        value = row.get(column)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = None
        if number not in (0, 1):
            raise InputError(f"{self.source}: {column} of {volume} is {value!r}; expected 0 or 1")
        return number == 1


def manifest_labels(manifest: Manifest, *splits: str) -> LabelTable:
    """Return the labels in the manifest. Raises InputError when it has none."""
    source = manifest.name
    if not manifest.labels:
        raise InputError(f"{source}: its volumes have no labels; name a table of them with --labels")
    entries = [entry for split in splits for entry in manifest.entries(split)]
    labelled = [entry for entry in entries if entry["labels"] is not None]
    rows = {e["id"]: dict(zip(manifest.labels, e["labels"], strict=False)) for e in labelled}
    return LabelTable(source, manifest.labels, rows)


def label_tables(paths: Iterable[Path], manifest: Manifest, split: str) -> list[LabelTable]:
    """Return the tables of --labels, or without any the labels in the manifest."""
    known = [entry["id"] for entry in manifest.all_entries()]
    return [read_label_table(path, known) for path in paths] or [manifest_labels(manifest, split)]


def read_label_table(path: Path, known: Iterable[str] = ()) -> LabelTable:
    """Read a csv with an id column of KEYS and a column a label. known: as of LabelTable."""
    path = Path(path)
    rows: dict[str, dict] = {}
    key, header, volumes = None, [], Volumes(known)
    for _, row in csv_rows(path, (), names_volume=lambda cell: stem(cell) in volumes):
        header = header or list(row)
        key = next((k for k in KEYS if k in header), None)
        if key is None:
            raise InputError(f"--labels {path}: has no column of volume ids; expected {' or '.join(KEYS)}")
        volume = stem(row[key] or "")
        if volume in rows:
            raise InputError(
                f"--labels {path}: volume {volume} is listed twice, also as {row[key]}; keep one"
            )
        rows[volume] = row
    if key is None:
        raise InputError(f"--labels {path}: has no rows; expected one of labels a volume")
    return LabelTable(path, [name for name in header if name != key], rows, tuple(known))
