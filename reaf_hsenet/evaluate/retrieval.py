"""Retrieval between volumes and reports: scores of a split's embeddings, a csv of every query, a table."""

import csv
from pathlib import Path

import torch
from torch import Tensor

from reaf_hsenet.evaluate.show import show
from reaf_hsenet.files import atomic_write
from reaf_hsenet.metrics.retrieval import (
    CrossRetrieval,
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


def score(image: Tensor, text: Tensor, entries: list[dict]) -> tuple[dict, CrossRetrieval, CrossRetrieval]:
    """Return (scores for the json, retrieval of exact pairs, retrieval among scans).

    image, text: (N, C) unit vectors of the manifest's entries.
    """
    names = sorted({entry["scan"] for entry in entries})
    number = {name: i for i, name in enumerate(names)}
    scans = torch.tensor([number[entry["scan"]] for entry in entries], device=image.device)
    exact, per_scan = cross_retrieval(image, text), cross_retrieval_per_scan(image, text, scans)
    overlap = None
    if all(entry["labels"] is not None for entry in entries):
        labels = torch.tensor([entry["labels"] for entry in entries], device=image.device)
        overlap = label_overlap(image, labels, scans)
    scores = {**exact.tables, "per_scan": per_scan.tables, "volume_to_volume": overlap}
    return {"scans": len(names), **scores}, exact, per_scan


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
    n, scans, overlap = results["n"], results["scans"], results["volume_to_volume"]
    print(f"{n} volumes of {scans} scans; by chance R@5 is {min(1, 5 / n):.3f}")
    tables = {name.replace("_", " "): results[name] for name in DIRECTIONS}
    if scans < n:
        tables |= {f"{name.replace('_', ' ')}, per scan": results["per_scan"][name] for name in DIRECTIONS}
    # Ranks have one decimal.
    rows = {
        name: [value if key.startswith("R@") else f"{value:.1f}" for key, value in table.items()]
        for name, table in tables.items()
    }
    show(rows, [(key, 12) for key in results[DIRECTIONS[0]]], "retrieval")
    if overlap is None:
        print("volume to volume: left out, some volumes have no labels")
        return
    rows = {name: list(overlap[key].values()) for key, name in OVERLAPS.items()}
    show(rows, [(f"k={k}", 12) for k in overlap["per_k"]], "volume to volume")
