"""Retrieval between volumes and reports: scores of a split's embeddings, a csv of every query, a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.labels import label_tables, load_label_set
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.evaluate import figures
from reaf_hsenet.evaluate.command import Command
from reaf_hsenet.evaluate.embeddings import Vectors
from reaf_hsenet.evaluate.protocols import choose_protocols
from reaf_hsenet.evaluate.results import Results, print_by_labels
from reaf_hsenet.evaluate.show import show
from reaf_hsenet.metrics.retrieval import (
    MAP_KS,
    OVERLAP_KS,
    RECALL_KS,
    average_precision,
    cross_retrieval,
    cross_retrieval_per_scan,
    label_overlap,
)
from reaf_hsenet.runs.trained import Trained

DIRECTIONS = ("report_to_volume", "volume_to_report")
OVERLAPS = {
    "as_published_accumulating": "label overlap, as published",
    "per_k": "label overlap, per k",
    "per_k_excluding_the_query_itself": "label overlap, without the query",
    "per_k_excluding_all_reconstructions_of_the_query_scan": "label overlap, without its scan",
}


@dataclass(frozen=True)
class Task:
    """protocols: the rows of each, by its name. left_out: why others are not among them.

    labels: of each table its name and (N, L) of 0 and 1, by which volumes are relevant to each other.
    """

    protocols: dict[str, list[int]]
    left_out: dict[str, str]
    labels: list[tuple[str, np.ndarray]]


def define(command: Command, manifest: Manifest) -> Task:
    """Choose the protocols and read the labels of each table.

    There are no labels where only the manifest has some, and not of all volumes.
    """
    protocols, left_out = choose_protocols(command.protocol, manifest, command.split)
    entries, classes = manifest.entries(command.split), load_label_set(command.label_set)
    labels = []
    if command.labels or all(entry["labels"] is not None for entry in entries):
        for table in label_tables(command.labels, manifest, command.split):
            columns = table.known_classes(classes, manifest.labels).values()
            labels.append((str(table.source), table.values(manifest.ids(command.split), list(columns))))
    return Task(protocols, left_out, labels)


def measure(command: Command, run: Trained, manifest: Manifest, task: Task, vectors: Vectors) -> Results:
    """Score the embeddings of volumes and reports on the model's device."""
    device = run.model.logit_scale.device
    image, text = (vectors[command.split][name].to(device) for name in ("image", "text"))
    return score(image, text, manifest.entries(command.split), task, command.bootstrap, command.seed)


def score(image: Tensor, text: Tensor, entries: list[dict], task: Task, resamples: int, seed: int) -> Results:
    """Score (N, C) unit vectors of the manifest's entries in every protocol, and by every table of labels.

    resamples, seed: of the intervals; scans are drawn, with all their volumes.
    """
    scans = torch.tensor(
        np.unique([entry["scan"] for entry in entries], return_inverse=True)[1], device=image.device
    )
    interval = partial(intervals, resamples=resamples, seed=seed)
    exact, per_scan = cross_retrieval(image, text), cross_retrieval_per_scan(image, text, scans)

    # Protocols that keep the volumes of an earlier one have its numbers.
    first = {
        name: next(other for other, same in task.protocols.items() if same == rows)
        for name, rows in task.protocols.items()
    }
    distinct = {name: rows for name, rows in task.protocols.items() if first[name] == name}
    scored = {}
    for name, rows in distinct.items():
        found = exact if len(rows) == len(image) else cross_retrieval(image[rows], text[rows])
        scored[name] = {"n": len(rows), "chance": {f"R@{k}": min(1, k / len(rows)) for k in RECALL_KS}}
        for direction, ranks in found.ranks.items():
            hits = torch.stack([ranks <= k for k in RECALL_KS], dim=1)
            ends = interval(hits, scans[rows], scored[name]["chance"])
            scored[name][direction] = {**found.tables[direction], "interval_95": ends}
    by_table, ks = [], list(map(str, MAP_KS))
    for table, values in task.labels:
        marks, maps = torch.tensor(values, device=image.device), {}
        for name, rows in distinct.items():
            queries, precision, chance = average_precision(image[rows], marks[rows])
            found = zip(ks, precision.mean(0).tolist(), strict=True) if len(queries) else ()
            maps[name] = {
                "n": len(queries),
                **{f"MAP@{k}": value for k, value in found},
                "chance": dict(zip(ks, chance.tolist(), strict=True)) if len(queries) else {},
                "interval_95": interval(precision, scans[rows][queries], ks),
            }
        overlap = {**label_overlap(image, marks, scans), "map": {name: maps[first[name]] for name in first}}
        by_table.append({"labels": {"table": table}, "volume_to_volume": overlap})
    values = {
        "scans": len(scans.unique()),
        **exact.tables,
        "per_scan": per_scan.tables,
        "protocols": {name: scored[first[name]] for name in first},
        "protocols_same": {name: other for name, other in first.items() if name != other},
        "protocols_left_out": task.left_out,
    }

    # A row a volume: the rank of its report's volume, of its own report, and the same among scans. Per scan
    # there is one report query a scan: the other reconstructions' cells are empty.
    rows = [{"id": entry["id"], "scan": entry["scan"]} for entry in entries]
    for suffix, found in (("_rank", exact), ("_rank_per_scan", per_scan)):
        for direction in DIRECTIONS:
            queries, ranks = (part[direction].tolist() for part in (found.query_rows, found.ranks))
            known = dict(zip(queries, ranks, strict=True))
            for i, row in enumerate(rows):
                row[direction + suffix] = known.get(i, "")
    pictures = {"recall.png": partial(figures.recall_figure, ranks=exact.ranks)}
    return Results(values, by_table or [{"labels": None, "volume_to_volume": None}], rows, pictures)


def intervals(
    values: Tensor, scans: Tensor, names: Iterable[str], resamples: int, seed: int
) -> dict[str, list[float | None]]:
    """Return [low, high] of the mean of each column of values (Q, M), of queries of the scans (Q,)."""
    if not (resamples and len(values)):
        return {name: [None, None] for name in names}
    _, groups, sizes = torch.unique(scans, return_inverse=True, return_counts=True)
    sums = values.new_zeros((len(sizes), values.shape[1]), dtype=torch.float64)
    sums.index_add_(0, groups, values.double())
    counts = draws(len(sizes), resamples, seed)
    means = counts @ sums.cpu().numpy() / (counts @ sizes.cpu().numpy())[:, None]
    return dict(zip(names, np.percentile(means, (2.5, 97.5), axis=0).T.tolist(), strict=True))


def draws(n: int, resamples: int, seed: int) -> np.ndarray:
    """(R, N): how often each volume or scan is in a resample."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)] or [np.ones(n)]
    )


def print_scores(results: dict) -> None:
    """Print recalls of every protocol and direction, and volume to volume by each table of labels."""
    print(f"{results['n']} volumes of {results['scans']} scans; chance: R@5 of a random order")
    same, left_out = results["protocols_same"], results["protocols_left_out"]
    found = {name: table for name, table in results["protocols"].items() if name not in same}
    if results["scans"] < results["n"]:
        found["per scan"] = {"n": results["scans"], **results["per_scan"]}
    rows = {}
    for name, table in found.items():
        for direction in DIRECTIONS:
            scores = table[direction]
            rows[f"{direction.replace('_', ' ')}, {name}"] = [
                *(table["n"], min(1, 5 / table["n"]), *(scores[f"R@{k}"] for k in RECALL_KS)),
                scores.get("interval_95", {}).get("R@5"),
                *(f"{scores[key]:.1f}" for key in ("mean_rank", "median_rank")),
            ]
    columns = [("n", 7), ("chance", 8), *((f"R@{k}", 7) for k in RECALL_KS), ("R@5 95%", 16)]
    show(rows, [*columns, ("mean rank", 11), ("median", 8)], "retrieval")
    for other in dict.fromkeys(same.values()):
        print(f"{', '.join(name for name in same if same[name] == other)}: the volumes of {other}")
    for reason in dict.fromkeys(left_out.values()):
        print(f"left out: {', '.join(name for name in left_out if left_out[name] == reason)}: {reason}")
    if results["volume_to_volume"] is None:
        print("volume to volume: left out, some volumes have no labels")
        return

    def rows_of(table: dict) -> dict[str, list]:
        scores = table["volume_to_volume"]
        rows = {name: [scores["queries"], *scores[key].values()] for key, name in OVERLAPS.items()}
        for name, found in scores["map"].items():
            if name not in same:  # there is no MAP@1
                maps = [f"{found[f'MAP@{k}']:.3f} ({chance:.3f})" for k, chance in found["chance"].items()]
                rows[f"MAP (by chance), {name}"] = [found["n"], None, *(maps or [None] * len(MAP_KS))]
        return rows

    columns = [("n", 7), *((f"k={k}", 15) for k in OVERLAP_KS)]
    print_by_labels(results, columns, rows_of, "volume to volume")
