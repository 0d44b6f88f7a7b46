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
    """Which findings each volume of a data set shows. source: `manifest`, REPORTS or a table's path.

    names: its labels. splits: those that are read. Raises InputError for a source without labels, and for a
    table without those of a volume.
    """

    def __init__(self, manifest: Manifest, source: str, splits: Sequence[str]):
        self.source = source
        entries = [entry for split in splits for entry in manifest.entries(split)]
        self.ids = [entry["id"] for entry in entries]
        read = report_reader(manifest)
        self.readings = [told_places(read, clean_report(entry["text"])) for entry in entries]
        if source == REPORTS:
            self.names = sorted({label for reading in self.readings for label in reading})
            if not self.names:
                raise InputError(
                    f"--labels {REPORTS}: the rules read no finding in the reports of {manifest.name}; name "
                    "a table of labels"
                )
            self.labels = np.array([[name in r for name in self.names] for r in self.readings], np.float32)
            return
        table, unlabelled = None, set()
        if source == "manifest":
            table = manifest_labels(manifest, *splits)
            unlabelled = {entry["id"] for entry in entries if entry["labels"] is None}
        else:
            table = read_label_table(Path(source), [entry["id"] for entry in manifest.all_entries()])
        classes = table.known_classes(load_label_set("ct-rate"))
        self.names = list(classes)
        labelled = [volume not in unlabelled for volume in self.ids]
        found = table.values([*compress(self.ids, labelled)], list(classes.values()))
        self.labels = np.full((len(entries), len(classes)), np.nan, np.float32)
        self.labels[labelled] = found

    def findings(self, places: bool) -> Findings:
        """Return the findings to predict: every label, and its places that enough volumes show."""
        counts = Counter(
            (label, place)
            for present, reading in zip(self.labels == 1, self.readings, strict=True)
            for label in compress(self.names, present)
            for place in reading.get(label, ())
        )
        common = [pair for pair in sorted(counts) if counts[pair] >= LEAST_SHARE * len(self.ids)]
        return tuple((name, "") for name in self.names) + tuple(common if places else ())

    def truth(self, findings: Findings) -> dict[str, Tensor]:
        """Return (K,) float32 of 0, 1 and NaN, unknown, for each volume.

        A place is unknown where the label is there and the report's reading does not name it.
        """
        column = {name: j for j, name in enumerate(self.names)}
        if absent := [label for label, _ in findings if label not in column]:
            raise InputError(f"--labels: the run predicts {absent[0]}, which these labels do not have")
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
