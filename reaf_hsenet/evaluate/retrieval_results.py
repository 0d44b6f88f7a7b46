"""The tables of an evaluated retrieval: a csv of every query's ranks, and what is printed."""

import csv
from pathlib import Path

from reaf_hsenet.files import atomic_write
from reaf_hsenet.metrics.retrieval import CrossRetrieval
from reaf_hsenet.runs.checkpoint import Choice

OVERLAPS = {
    "as_published_accumulating": "label overlap, as published",
    "per_k": "label overlap, per k",
    "per_k_excluding_the_query_itself": "label overlap, without the query",
    "per_k_excluding_all_reconstructions_of_the_query_scan": "label overlap, without its scan",
}


def write_queries(
    path: Path, entries: list[dict], exact: CrossRetrieval, per_scan: CrossRetrieval, checkpoint: Choice
) -> None:
    """One row a volume: the rank of its report's volume, of its own report, and the same among scans."""
    columns = {
        f"{direction}{suffix}": dict(
            zip(table.query_rows[direction].tolist(), table.ranks[direction].tolist(), strict=True)
        )
        for suffix, table in (("_rank", exact), ("_rank_per_scan", per_scan))
        for direction in table.ranks
    }
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "scan", *columns, "checkpoint"])
        # Per scan there is one report query a scan: the other reconstructions' cells are empty.
        writer.writerows(
            [e["id"], e["scan"], *(c.get(i, "") for c in columns.values()), checkpoint]
            for i, e in enumerate(entries)
        )


def print_table(results: dict, exact: CrossRetrieval, per_scan: CrossRetrieval) -> None:
    n, scans = results["n"], results["scans"]
    print(f"{n} volumes of {scans} scans; by chance R@5 is {min(1, 5 / n):.3f}")
    keys = list(exact.tables["report_to_volume"])
    print(f"{'retrieval':<34}" + "".join(f"{k:>12}" for k in keys))
    kinds = [("", exact)] + ([(", per scan", per_scan)] if scans < n else [])
    for suffix, found in kinds:
        for direction, table in found.tables.items():
            cells = "".join(f"{v:>12.3f}" if k.startswith("R@") else f"{v:>12.1f}" for k, v in table.items())
            print(f"{direction.replace('_', ' ') + suffix:<34}{cells}")
    overlap = results["volume_to_volume"]
    if overlap is None:
        print("volume to volume: left out, some volumes have no labels")
        return
    ks = list(overlap["per_k"])
    print(f"{'volume to volume':<34}" + "".join(f"{'k=' + k:>12}" for k in ks))
    for key, name in OVERLAPS.items():
        print(
            f"{name:<34}"
            + "".join(f"{'-' if v is None else format(v, '.3f'):>12}" for v in overlap[key].values())
        )
