"""Several evaluated runs side by side, with paired bootstrap intervals of their differences from the first.

Volumes are drawn with replacement, the same for every run, so that what is hard for all runs cancels out.
Reads what evaluate.py wrote: eval/retrieval_queries.csv, eval/zeroshot_scores.csv, eval/probe_scores.csv,
and beside them what was evaluated.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np

from reaf_hsenet.data.sources.tables import csv_rows
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.retrieval import DIRECTIONS, draws
from reaf_hsenet.evaluate.show import show
from reaf_hsenet.files import named, read_json
from reaf_hsenet.metrics.classification import (
    METRICS,
    bootstrap,
    both_values,
    class_metrics,
    find_thresholds,
    interval,
    mean_over_classes,
)

FILES = {"retrieval": "retrieval_queries.csv", "zeroshot": "zeroshot_scores.csv", "probe": "probe_scores.csv"}
RECALL_KS = (1, 5, 10, 50)
SHOWN = ("auroc", "average_precision", "thresholded.balanced_accuracy", "thresholded.f1_weighted")


def compare(task: str, folders: list[Path], resamples: int, seed: int) -> dict[str, list[dict]]:
    """{measure: [{"value", "difference", "interval_95"} per run]}; the first run has no difference.

    Raises InputError for a run that was not evaluated, or on something else than the first.
    """
    tables = [read_table(folder / "eval" / FILES[task], task, folder) for folder in folders]
    subjects = [evaluated(folder / "eval" / f"{task}.json", task, folder) for folder in folders]
    ids = list(tables[0])
    for folder, table, subject in zip(folders[1:], tables[1:], subjects[1:], strict=True):
        other = [what for what in subject if subject[what] != subjects[0][what]]
        if table.keys() != tables[0].keys():
            other = [f"volumes ({len(table)} and {len(ids)})"]
        elif any(_labels(table[i]) != _labels(tables[0][i]) for i in ids):
            other = other or ["classes or labels"]
        if other:
            raise InputError(
                f"{folder}: was evaluated on other {' and '.join(other)} than {folders[0]}; evaluate both on "
                "the same split of the same data, with the same prompts and labels"
            )
    measure, found = _recalls if task == "retrieval" else _class_scores, []
    for folder, table in zip(folders, tables, strict=True):
        # A probe's thresholds are of its held-out training patients, never of what is compared.
        classes = read_json(folder / "eval/probe.json")["classes"] if task == "probe" else {}
        cuts = {"cuts": {name: row["threshold"] for name, row in classes.items()}} if classes else {}
        found.append(measure([table[i] for i in ids], resamples, seed, **cuts))
    shared = [name for name in found[0] if all(name in run and math.isfinite(run[name][0]) for run in found)]
    if not shared:
        raise InputError(
            f"{folders[0]}: its {len(ids)} volumes are too few to compare, or of one label; evaluate more"
        )
    results: dict[str, list[dict]] = {}
    for name in shared:
        (first, first_draws), *others = (run[name] for run in found)
        results[name] = [{"value": float(first)}]
        for value, drawn in others:
            ends = interval((drawn - first_draws)[:resamples])  # a resample may lack a label
            row = {"value": float(value), "difference": float(value - first), "interval_95": ends}
            results[name].append(row)
    return results


def fingerprint(entries: list[dict]) -> str:
    """Hash the ids and reports of a manifest's entries, which do not depend on how volumes were prepared."""
    reports = json.dumps(sorted((entry["id"], entry["text"]) for entry in entries))
    return hashlib.sha256(reports.encode()).hexdigest()


def evaluated(path: Path, task: str, folder: Path) -> dict[str, object]:
    """Read what was evaluated from a results json, by what a message calls it."""
    again = f"run evaluate.py --task {task} --run {folder} again"
    with named(path, "does not say what was evaluated", again):
        values = read_json(path)
        found = {"split": values["split"], "data": values["reports_sha256"]}
        found |= {"prompts": values["prompts"]["texts"]} if task == "zeroshot" else {}
        return found | ({} if task == "retrieval" else {"label set": values["labels"]["set"]})


def evaluated_run(folder: Path, task: str) -> str:
    """Name a run and the checkpoint that its results are of: `RUN (last, step 434)`."""
    values = read_json(folder / "eval" / f"{task}.json")
    name = values.get("checkpoint_name")  # None: published weights, or results of an earlier version
    return str(folder) if name is None else f"{folder} ({name}, step {values.get('checkpoint_step')})"


def read_table(path: Path, task: str, folder: Path) -> dict[str, dict[str, float]]:
    """Rows of a results csv by id: ranks of both directions, or scores and labels of all classes."""
    again = f"run evaluate.py --task {task} --run {folder}"
    if not path.is_file():
        raise InputError(f"{path}: no such file; {again} first")
    # Every column of a table of classes but these two is a number, of a retrieval's only the ranks.
    wanted, rows = tuple(f"{d}_rank" for d in DIRECTIONS) if task == "retrieval" else (), {}
    with named(path, "is damaged", f"{again} again"):
        for _, row in csv_rows(path, ("id", *wanted)):
            names = wanted or [name for name in row if name not in ("id", "checkpoint")]
            rows[row["id"]] = {name: float(row[name]) for name in names}
    if not rows:
        raise InputError(f"{path}: is empty; {again} again")
    return rows


def _labels(row: dict[str, float]) -> dict[str, float | None]:
    """Return a row's classes and whether the volume has them; of a row of ranks the names alone."""
    return {name: value if name.startswith("label: ") else None for name, value in row.items()}


def _recalls(rows: list[dict], resamples: int, seed: int) -> dict[str, tuple]:
    """R@K of both directions: (value, (R,) bootstrap values)."""
    counts, found = draws(len(rows), resamples, seed), {}
    for direction in DIRECTIONS:
        ranks = np.array([int(row[f"{direction}_rank"]) for row in rows])
        for k in (k for k in RECALL_KS if k < len(rows)):
            hit = ranks <= k
            found[f"{direction.replace('_', ' ')}, R@{k}"] = (hit.mean(), counts @ hit / len(rows))
    return found


def _class_scores(rows: list[dict], resamples: int, seed: int, cuts: dict | None = None) -> dict[str, tuple]:
    """Mean over classes of the metrics SHOWN, and every class's AUROC.

    cuts: thresholds by class; without them they are found on the rows themselves, as published.
    """
    names = [name for name in rows[0] if f"label: {name}" in rows[0]]
    scores = np.array([[row[n] for n in names] for row in rows], dtype=np.float32)
    labels = np.array([[row[f"label: {n}"] == 1 for n in names] for row in rows])
    thresholds = np.array([cuts[name] for name in names]) if cuts else find_thresholds(labels, scores)
    kept = both_values(labels)
    values = class_metrics(labels, scores, thresholds, np.ones((1, len(rows))))[0]
    draws = bootstrap(labels, scores, thresholds, resamples, seed) if resamples else values[None]
    mean, mean_draws = mean_over_classes(values, kept), mean_over_classes(draws, kept)
    found = {f"mean {m}": (mean[METRICS.index(m)], mean_draws[:, METRICS.index(m)]) for m in SHOWN}
    auroc = METRICS.index("auroc")
    return found | {
        f"AUROC, {n}": (values[auroc, j], draws[:, auroc, j]) for j, n in enumerate(names) if kept[j]
    }


def print_comparison(results: dict[str, list[dict]], runs: list[str]) -> None:
    for k, run in enumerate(runs, start=1):
        print(f"[{k}] {run}")
    columns = [("[1]", 7)]
    for k in range(2, len(runs) + 1):
        columns += [(f"[{k}]", 7), ("difference, 95%", 26)]
    rows = {}
    for name, (first, *others) in results.items():
        rows[name] = [first["value"]]
        for run in others:
            low, high = run["interval_95"]
            ends = "" if low is None else f" ({low:+.3f} to {high:+.3f})"
            rows[name] += [run["value"], f"{run['difference']:+.3f}{ends}"]
    show(rows, columns)
