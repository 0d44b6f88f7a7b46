"""Findings as words of the decoder's prompt: which a data set has, and which each volume shows.

A finding is (label, place): the label itself has the place "", its size classes, sides and lobes have theirs.
Labels are of the manifest, of a table, or read in the reports by rules (metrics/places.py), as places always
are.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.labels import load_label_set, manifest_labels, read_label_table
from reaf_hsenet.data.language import Findings
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics.places import Reading, report_reader, rule_sizes

LEAST_SHARE = 0.005  # of the training volumes, that a place must have to be predicted
REPORTS = "reports"  # --labels: the rules on the reports


class CueTable:
    """Which findings each volume of a data set shows.

    source: None, the manifest's labels; REPORTS, or a table's path. splits: those that are read, the training
    split first. places: of the findings are read too. Raises InputError for a source without labels, and for
    a table without those of a volume.
    """

    def __init__(self, manifest: Manifest, source: str | None, splits: Sequence[str], places: bool):
        self.source, self.places = source, places
        parts = [manifest.entries(split) for split in splits]
        entries = [entry for part in parts for entry in part]
        self.ids, self.train = [entry["id"] for entry in entries], len(parts[0])
        self.readings: list[dict[str, list[str]]] = [{}] * len(entries)
        if places or source == REPORTS:
            read = report_reader(manifest)
            self.readings = [told_places(read, clean_report(entry["text"])) for entry in entries]
        if source == REPORTS:
            self.names = sorted({label for reading in self.readings[: self.train] for label in reading})
            found = [[name in reading for name in self.names] for reading in self.readings]
            self.labels = np.array(found, np.float32).reshape(len(entries), len(self.names))
        else:
            self._read_labels(manifest, entries, splits)
        # A head learns nothing of labels that no volume has, and finds no threshold for what nobody knows.
        what, known = f"--labels {source}" if source else manifest.name, np.isfinite(self.labels)
        if not (self.labels[: self.train] == 1).any():
            raise InputError(
                f"{what}: no training volume has a finding; name a table of labels with --labels"
            )
        if not known[self.train :].any():
            raise InputError(
                f"{what}: no volume of the {splits[-1]} split has labels, by which thresholds are found; "
                "name a table with --labels"
            )
        if twice := [n for n, count in Counter(name.lower() for name in self.names).items() if count > 1]:
            raise InputError(f"{what}: two labels are called {twice[0]}; rename one")

    def _read_labels(self, manifest: Manifest, entries: list[dict], splits: Sequence[str]) -> None:
        """Read labels of the manifest, NaN where an entry has none, or of a table, which must have all."""
        labelled = [True] * len(entries)
        if self.source is None:
            table = manifest_labels(manifest, *splits)
            labelled = [entry["labels"] is not None for entry in entries]
        else:
            table = read_label_table(Path(self.source), [entry["id"] for entry in manifest.all_entries()])
        classes = table.known_classes(load_label_set("ct-rate"))
        self.names = list(classes)
        self.labels = np.full((len(entries), len(classes)), np.nan, np.float32)
        self.labels[labelled] = table.values([*compress(self.ids, labelled)], list(classes.values()))

    def findings(self) -> Findings:
        """Return the findings to predict: every label, and its places that enough training volumes show."""
        training = slice(self.train)
        counts = Counter(
            (label, place)
            for present, reading in zip(self.labels[training] == 1, self.readings[training], strict=True)
            for label in compress(self.names, present)
            for place in reading.get(label, ())
        )
        common = [pair for pair in sorted(counts) if counts[pair] >= LEAST_SHARE * self.train]
        return tuple((name, "") for name in self.names) + tuple(common)

    def truth(self, findings: Findings) -> dict[str, Tensor]:
        """Return (K,) float32 of 0, 1 and NaN, unknown, for each volume.

        A place is unknown where the label is there and the report's reading does not name it.
        """
        column = {name: j for j, name in enumerate(self.names)}
        if absent := [label for label, _ in findings if label not in column]:
            raise InputError(
                f"{self.source or '--labels'}: has no {absent[0]}, which the run predicts; put it back"
            )
        rows = {}
        for volume, labels, reading in zip(self.ids, self.labels, self.readings, strict=True):
            values = []
            for label, place in findings:
                value = float(labels[column[label]])
                if place and value == 1:
                    value = float(place in reading[label]) if label in reading else math.nan
                values.append(value)
            rows[volume] = torch.tensor(values)
        return rows


def label_source(named: str | None) -> str | None:
    """Return the source of --labels: REPORTS, or a table's absolute path, so that a run resumes anywhere."""
    return named if named in (None, REPORTS) else str(Path(named).resolve())


def truth_sha256(truth: dict[str, Tensor]) -> str:
    """Hash the findings of all volumes."""
    found = hashlib.sha256()
    for volume, values in sorted(truth.items()):
        found.update(f"{volume}{values.tolist()}".encode())
    return found.hexdigest()


def told_places(read: Callable[[str], Reading], report: str) -> dict[str, list[str]]:
    """Return the size classes, sides and lobes that a report tells of each finding."""
    sizes, found = rule_sizes(report), read(report)
    return {
        label: [place for told in (sizes.get(label, ()), *where) for place in sorted(told)]
        for label, where in found.items()
    }
