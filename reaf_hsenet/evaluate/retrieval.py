"""Retrieval between volumes and reports: scores of a split's embeddings, a csv of every query, a table."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.labels import label_tables, load_label_set
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.evaluate.show import cell, show
from reaf_hsenet.files import atomic_write
from reaf_hsenet.metrics.retrieval import (
    MAP_KS,
    RECALL_KS,
    CrossRetrieval,
    average_precision,
    cross_retrieval,
    cross_retrieval_per_scan,
    label_overlap,
)
from reaf_hsenet.runs.checkpoint import Choice

DIRECTIONS = ("report_to_volume", "volume_to_report")
OVERLAPS = {
    "as_published_accumulating": "label overlap, as published",
    "per_k": "label overlap, per k",
    "per_k_excluding_the_query_itself": "label overlap, without the query",
    "per_k_excluding_all_reconstructions_of_the_query_scan": "label overlap, without its scan",
}


def read_labels(
    paths: tuple[Path, ...], manifest: Manifest, split: str, label_set: str
) -> dict[str, np.ndarray]:
    """Return (N, L) labels by their table; none where only the manifest has some, and not of all volumes."""
    entries = manifest.entries(split)
    if not paths and any(entry["labels"] is None for entry in entries):
        return {}
    ids, classes = [entry["id"] for entry in entries], load_label_set(label_set)
    return {
        str(table.source): table.values(ids, list(table.known_classes(classes, manifest.labels).values()))
        for table in label_tables(paths, manifest, split)
    }


class Scorer:
    """Scores embeddings of a split. Intervals are of `resamples` draws of scans, all volumes of each.

    image, text: (N, C) unit vectors of the manifest's entries. protocols: the rows of each, by its name.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        entries: list[dict],
        protocols: Mapping[str, list[int]],
        *,
        resamples: int,
        seed: int,
    ):
        self.image, self.text, self.protocols = image, text, protocols
        self.resamples, self.seed = resamples, seed
        names, numbers = np.unique([entry["scan"] for entry in entries], return_inverse=True)
        self.count, self.scans = len(names), torch.tensor(numbers, device=image.device)

    def reports(self) -> tuple[dict, CrossRetrieval, CrossRetrieval]:
        """Return (scores for the json, retrieval of exact pairs, retrieval among scans)."""
        image, text = self.image, self.text
        exact, per_scan = cross_retrieval(image, text), cross_retrieval_per_scan(image, text, self.scans)
        scored = {}
        for name, rows in self.protocols.items():
            found = exact if len(rows) == len(image) else cross_retrieval(image[rows], text[rows])
            scored[name] = {"n": len(rows), "chance": {f"R@{k}": min(1, k / len(rows)) for k in RECALL_KS}}
            for direction in DIRECTIONS:
                hits = torch.stack([found.ranks[direction] <= k for k in RECALL_KS], dim=1)
                names = [f"R@{k}" for k in RECALL_KS]
                interval = dict(zip(names, self.intervals(hits, self.scans[rows]), strict=True))
                scored[name][direction] = {**found.tables[direction], "interval_95": interval}
        scores = {"scans": self.count, **exact.tables, "per_scan": per_scan.tables, "protocols": scored}
        return scores, exact, per_scan

    def volumes(self, labels: np.ndarray) -> dict:
        """Return the volume-to-volume scores by labels (N, L): overlaps, and MAP@k of every protocol."""
        marks, maps = torch.tensor(labels, device=self.image.device), {}
        for name, rows in self.protocols.items():
            queries, found, chance = average_precision(self.image[rows], marks[rows])
            interval = self.intervals(found, self.scans[rows][queries])
            maps[name] = {"n": len(queries)} | {
                str(k): {"map": value, "chance": by_chance, "interval_95": interval[j]}
                for j, (k, value, by_chance) in enumerate(
                    zip(MAP_KS, found.mean(0).tolist(), chance.tolist(), strict=True)
                )
                if len(queries)
            }
        return {**label_overlap(self.image, marks, self.scans), "map": maps}

    def intervals(self, values: Tensor, scans: Tensor) -> list[list[float | None]]:
        """Return [low, high] of the mean of each column of values (Q, M), of queries of these scans (Q,)."""
        if not (self.resamples and len(values)):
            return [[None, None]] * values.shape[1]
        _, groups, sizes = torch.unique(scans, return_inverse=True, return_counts=True)
        sums = values.new_zeros((len(sizes), values.shape[1]), dtype=torch.float64)
        sums.index_add_(0, groups, values.double())
        counts = draws(len(sizes), self.resamples, self.seed)
        means = counts @ sums.cpu().numpy() / (counts @ sizes.cpu().numpy())[:, None]
        return np.percentile(means, (2.5, 97.5), axis=0).T.tolist()


def draws(n: int, resamples: int, seed: int) -> np.ndarray:
    """(R, N): how often each volume or scan is in a resample."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)] or [np.ones(n)]
    )


def write_queries(
    path: Path, entries: list[dict], exact: CrossRetrieval, per_scan: CrossRetrieval, checkpoint: Choice
) -> None:
    """One row a volume: the rank of its report's volume, of its own report, and the same among scans."""
    columns = {
        f"{direction}{suffix}": dict(
            zip(table.query_rows[direction].tolist(), table.ranks[direction].tolist(), strict=True)
        )
        for suffix, table in (("_rank", exact), ("_rank_per_scan", per_scan))
        for direction in DIRECTIONS
    }
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "scan", *columns, "checkpoint"])
        # Per scan there is one report query a scan: the other reconstructions' cells are empty.
        writer.writerows(
            [e["id"], e["scan"], *(c.get(i, "") for c in columns.values()), checkpoint]
            for i, e in enumerate(entries)
        )


def print_scores(results: dict) -> None:
    """Print recalls of every protocol and direction, and volume to volume by each table of labels."""
    print(f"{results['n']} volumes of {results['scans']} scans; chance: R@5 of a random order")
    tables = {
        f"{direction.replace('_', ' ')}, {name}": (found["n"], found[direction])
        for name, found in results["protocols"].items()
        for direction in DIRECTIONS
    }
    if results["scans"] < results["n"]:
        tables |= {
            f"{direction.replace('_', ' ')}, per scan": (results["scans"], results["per_scan"][direction])
            for direction in DIRECTIONS
        }
    recalls = [f"R@{k}" for k in RECALL_KS]
    rows = {}
    for name, (n, table) in tables.items():
        low, high = table.get("interval_95", {}).get("R@5", (None, None))
        interval = None if low is None else f"{low:.3f} to {high:.3f}"
        ranks = [f"{table[key]:.1f}" for key in ("mean_rank", "median_rank")]
        rows[name] = [n, min(1, 5 / n), *(table[key] for key in recalls), interval, *ranks]
    columns = [("n", 7), ("chance", 8), *((key, 7) for key in recalls), ("R@5 95%", 16)]
    show(rows, [*columns, ("mean rank", 11), ("median", 8)], "retrieval", max(map(len, rows)) + 1)
    left_out = results["protocols_left_out"]
    for reason in dict.fromkeys(left_out.values()):
        print(f"left out: {', '.join(name for name in left_out if left_out[name] == reason)}: {reason}")
    if results["volume_to_volume"] is None:
        print("volume to volume: left out, some volumes have no labels")
        return
    tables = [results, *([results["second_labels"]] if "second_labels" in results else [])]
    for number, table in enumerate(tables, start=1):
        print(f"labels [{number}]: {table['labels']['table']}")
    found = [table["volume_to_volume"] for table in tables]
    rows = {
        name: [v for t in found for v in (t["queries"], *t[key].values())] for key, name in OVERLAPS.items()
    }
    for name in results["protocols"]:
        rows[f"MAP (by chance), {name}"] = [
            value for table in found for value in (table["map"][name]["n"], None, *_maps(table["map"][name]))
        ]
    columns = [(f"n [{number}]", 7) for number in range(1, len(tables) + 1)]
    ks = [(f"k={k}", 15) for k in found[0]["per_k"]]
    show(rows, [c for n in columns for c in (n, *ks)], "volume to volume", max(map(len, rows)) + 1)


def _maps(table: dict) -> list[str | None]:
    found = [table.get(str(k)) for k in MAP_KS]
    return [one and f"{cell(one['map'])} ({cell(one['chance'])})" for one in found]
