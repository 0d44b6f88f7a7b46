"""Retrieval between volumes and reports: scores of a split's embeddings, a csv of every query, a table."""

import csv
from collections.abc import Iterable, Mapping
from functools import partial
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


Labels = list[tuple[str, np.ndarray]]  # a table's name, and (N, L) of 0 and 1


def read_labels(paths: tuple[Path, ...], manifest: Manifest, split: str, label_set: str) -> Labels:
    """Return the labels of each table; none where only the manifest has some, and not of all volumes."""
    entries, classes = manifest.entries(split), load_label_set(label_set)
    if not paths and any(entry["labels"] is None for entry in entries):
        return []
    ids, tables = [entry["id"] for entry in entries], label_tables(paths, manifest, split)
    columns = [list(table.known_classes(classes, manifest.labels).values()) for table in tables]
    return [(str(t.source), t.values(ids, found)) for t, found in zip(tables, columns, strict=True)]


def score(
    image: Tensor,
    text: Tensor,
    entries: list[dict],
    protocols: Mapping[str, list[int]],
    labels: Labels,
    *,
    resamples: int,
    seed: int,
) -> tuple[dict, CrossRetrieval, CrossRetrieval]:
    """Return (scores for the json, retrieval of exact pairs, retrieval among scans).

    image, text: (N, C) unit vectors of the manifest's entries. protocols: the rows of each, by its name.
    resamples, seed: of the intervals; scans are drawn, with all their volumes.
    """
    scans = torch.tensor(
        np.unique([entry["scan"] for entry in entries], return_inverse=True)[1], device=image.device
    )
    interval = partial(intervals, resamples=resamples, seed=seed)
    exact, per_scan = cross_retrieval(image, text), cross_retrieval_per_scan(image, text, scans)
    scored = {}
    for name, rows in protocols.items():
        found = exact if len(rows) == len(image) else cross_retrieval(image[rows], text[rows])
        scored[name] = {"n": len(rows), "chance": {f"R@{k}": min(1, k / len(rows)) for k in RECALL_KS}}
        for direction, ranks in found.ranks.items():
            hits = torch.stack([ranks <= k for k in RECALL_KS], dim=1)
            ends = interval(hits, scans[rows], scored[name]["chance"])
            scored[name][direction] = {**found.tables[direction], "interval_95": ends}
    by_table = []
    for table, values in labels:
        marks, maps = torch.tensor(values, device=image.device), {}
        for name, rows in protocols.items():
            queries, precision, chance = average_precision(image[rows], marks[rows])
            ks = list(map(str, MAP_KS))
            maps[name] = {
                "n": len(queries),
                **{
                    f"MAP@{k}": v for k, v in zip(ks, precision.mean(0).tolist(), strict=True) if len(queries)
                },
                "chance": dict(zip(ks, chance.tolist(), strict=True)) if len(queries) else {},
                "interval_95": interval(precision, scans[rows][queries], ks),
            }
        overlap = {**label_overlap(image, marks, scans), "map": maps}
        by_table.append({"labels": {"table": table}, "volume_to_volume": overlap})
    first, *second = by_table or [{"labels": None, "volume_to_volume": None}]
    scores = {"scans": len(scans.unique()), **exact.tables, "per_scan": per_scan.tables, "protocols": scored}
    return {**scores, **first, **({"second_labels": second[0]} if second else {})}, exact, per_scan


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
    found = results["protocols"]
    if results["scans"] < results["n"]:
        found = {**found, "per scan": {"n": results["scans"], **results["per_scan"]}}
    rows = {}
    for name, table in found.items():
        for direction in DIRECTIONS:
            recalls = [table[direction][f"R@{k}"] for k in RECALL_KS]
            low, high = table[direction].get("interval_95", {}).get("R@5", (None, None))
            interval = None if low is None else f"{cell(low)} to {cell(high)}"
            ranks = [f"{table[direction][key]:.1f}" for key in ("mean_rank", "median_rank")]
            row = [table["n"], min(1, 5 / table["n"]), *recalls, interval, *ranks]
            rows[f"{direction.replace('_', ' ')}, {name}"] = row
    columns = [("n", 7), ("chance", 8), *((f"R@{k}", 7) for k in RECALL_KS), ("R@5 95%", 16)]
    show(rows, [*columns, ("mean rank", 11), ("median", 8)], "retrieval", max(map(len, rows)) + 1)
    left_out = results["protocols_left_out"]
    for reason in dict.fromkeys(left_out.values()):
        print(f"left out: {', '.join(name for name in left_out if left_out[name] == reason)}: {reason}")
    if results["volume_to_volume"] is None:
        print("volume to volume: left out, some volumes have no labels")
        return
    rows, columns = {}, []
    for number, table in enumerate([results, *filter(None, [results.get("second_labels")])], start=1):
        print(f"labels [{number}]: {table['labels']['table']}")
        table = table["volume_to_volume"]
        columns += [(f"n [{number}]", 7), *((f"k={k}", 15) for k in table["per_k"])]
        for key, name in OVERLAPS.items():
            rows.setdefault(name, []).extend([table["queries"], *table[key].values()])
        for name, found in table["map"].items():
            maps = [f"{found[f'MAP@{k}']:.3f} ({chance:.3f})" for k, chance in found["chance"].items()]
            maps = [None, *(maps or [None] * len(MAP_KS))]  # there is no MAP@1
            rows.setdefault(f"MAP (by chance), {name}", []).extend([found["n"], *maps])
    show(rows, columns, "volume to volume", max(map(len, rows)) + 1)
