"""What each task of a dual encoder gives to evaluate.py, and the tables that it prints by classes and labels.

A task is a module with `define(command, manifest)`: what is scored, and by which tables of labels;
`measure(command, run, manifest, task, vectors)`, its Results; `print_scores(values)`, of its json.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from reaf_hsenet.evaluate import figures
from reaf_hsenet.evaluate.command import Command
from reaf_hsenet.evaluate.show import Value, show
from reaf_hsenet.files import write_json


@dataclass(frozen=True)
class ClassTask:
    """Classes to score, with their labels (N, C) bool, and means to take, as of classification_report.

    source: where the labels are from. notes: on classes that are left out or undefined.
    """

    source: Path
    names: list[str]
    labels: np.ndarray
    means: dict[str, list[str]]
    notes: list[str]


@dataclass(frozen=True)
class Results:
    """Scores of a split. rows: of the csv. files, pictures: what writes each, by its name.

    values: for the json. by_table: what each table of labels adds to it, a second one as `second_labels`.
    """

    values: dict
    by_table: list[dict]
    rows: list[dict]
    pictures: dict[str, Callable[[Path], None]]
    files: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def json(self) -> dict:
        first, *second = self.by_table
        return {**self.values, **first, **({"second_labels": second[0]} if second else {})}


def class_results(
    command: Command, ids: list[str], tasks: list[ClassTask], scores: list[np.ndarray], reports: list[dict]
) -> Results:
    """Return Results of classes by tables of labels; files and ROC curves are of the first.

    scores: (N, C) each. reports: each classification_report, and what stands beside it.
    """
    by_table = [
        {"labels": {"table": str(task.source), "set": command.label_set}, **report, "notes": task.notes}
        for task, report in zip(tasks, reports, strict=True)
    ]
    labels, names = tasks[0].labels, tasks[0].names
    rows = [
        {"id": volume}
        | {name: f"{value:.9g}" for name, value in zip(names, found, strict=True)}
        | {f"label: {name}": int(value) for name, value in zip(names, present, strict=True)}
        for volume, found, present in zip(ids, scores[0], labels, strict=True)
    ]
    results = Results({}, by_table, rows, {})
    results.pictures["roc.png"] = partial(figures.roc_figure, labels=labels, scores=scores[0], names=names)
    if command.format:  # of VLM3D's classification task
        cases = [
            {"input_image_name": volume, "probabilities": dict(zip(names, found.tolist(), strict=True))}
            for volume, found in zip(ids, scores[0], strict=True)
        ]
        results.files["predictions.json"] = partial(write_json, value={"predictions": cases})
    return results


def named_rows(report: dict) -> dict[str, dict]:
    """Return the rows of classes and means by the names on the screen, such as `mean of 18`."""
    return report["classes"] | {f"{name} of {row['classes']}": row for name, row in report["means"].items()}


def print_classes(
    results: dict, columns: list[tuple[str, int]], cells: Callable[[str, dict], list[Value]]
) -> None:
    """Print a line for each class and mean: ranking, and in `columns` what cells(name, row) gives.

    Of two tables of labels the ranking alone is printed, side by side.
    """
    both = "second_labels" in results

    def rows_of(table: dict) -> dict[str, list[Value]]:
        rows = {}
        for name, row in named_rows(table).items():
            rows[name] = [row.get("positives", ""), row["auroc"], row["average_precision"]]
            rows[name] += [] if both else [row.get("interval_95", {}).get("auroc"), *cells(name, row)]
        return rows

    ranking, more = [("n", 6), ("AUROC", 7), ("AP", 7)], [("AUROC 95%", 15), *columns]
    print_by_labels(results, ranking if both else ranking + more, rows_of, "class")


def print_by_labels(
    results: dict, columns: list[tuple[str, int]], rows_of: Callable[[dict], dict[str, list]], title: str
) -> None:
    """Print the names of one or two tables of labels, rows_of(scores by it) side by side, and their notes."""
    tables = [results, results["second_labels"]] if "second_labels" in results else [results]
    rows, marked = {}, []
    for number, table in enumerate(tables, start=1):
        mark = f" [{number}]" if len(tables) > 1 else ""
        print(f"labels{mark}: {table['labels']['table']}")
        for name, values in rows_of(table).items():
            rows[name] = [*rows.get(name, [""] * len(marked)), *values]
        marked += [(name + mark, max(width, len(name + mark) + 1)) for name, width in columns]
    show(rows, marked, title)
    for table in tables:
        for note in table.get("notes", ()):
            print(f"note: {note}")
