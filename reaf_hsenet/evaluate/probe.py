"""A probe of a run's frozen embeddings: fitted on its training split, scored on another, stored with the run.

A fifth of the training patients, held out of the fit, choose penalties, calibration and thresholds. Beside
the logistic regression stand the k nearest training volumes, and regressions that see few volumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from reaf_hsenet.data.labels import LabelSet, LabelTable, label_tables, load_label_set, manifest_labels
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.patients import held_rows
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import figures
from reaf_hsenet.evaluate.command import Command
from reaf_hsenet.evaluate.embeddings import Vectors, read_tensors, write_tensors
from reaf_hsenet.evaluate.results import ClassTask, Results, class_results, named_rows, print_classes
from reaf_hsenet.evaluate.show import cell, show
from reaf_hsenet.files import named
from reaf_hsenet.metrics.classification import (
    area_under_roc,
    both_values,
    calibration,
    classification_report,
    interval,
)
from reaf_hsenet.metrics.probe import (
    NEIGHBOURS,
    Probe,
    best_f1_thresholds,
    few_shot_scores,
    fit_probe,
    moments,
    nearest_votes,
)
from reaf_hsenet.metrics.retrieval import require_finite
from reaf_hsenet.runs.trained import Trained

SHOTS, DRAWS = (1, 5, 10, 50), 5
FILE = "probe.safetensors"


@dataclass(frozen=True)
class Task(ClassTask):
    """Classes with the training volumes that a probe of them is fitted on.

    train_labels: (N, L) bool, of `rows` (N,) of the training split. held: (N,) bool, held out of the fit.
    """

    rows: list[int]
    train_labels: np.ndarray
    held: np.ndarray


def define(command: Command, manifest: Manifest) -> list[Task]:
    """Match training volumes and those to score with the labels of --labels, or of the manifest."""
    label_set = load_label_set(command.label_set)
    tables = label_tables(command.labels, manifest, command.split)
    return [define_task(table, label_set, manifest, command.split) for table in tables]


def define_task(scored: LabelTable, label_set: LabelSet, manifest: Manifest, split: str) -> Task:
    """Match the volumes of `split` and of the training split with their labels.

    A table without a training volume is scored by, and the manifest's labels are fitted. Left out are
    training volumes without labels, and classes that all or none of the fitted or of the held-out volumes
    have. Raises InputError when no class is left.
    """
    # Published tables are often of one split.
    ids, train, notes = manifest.ids("train"), scored, []
    if not scored.by_volume(ids):
        train = manifest_labels(manifest, "train")
        if scored.source != manifest.name:
            notes.append(f"{scored.source} has no training volumes; fitted on the labels of {train.source}")
    labelled, columns = train.by_volume(ids), scored.classes(label_set)
    rows = [i for i, name in enumerate(ids) if name in labelled]
    classes = {
        name: own for name, own in train.known_classes(label_set, manifest.labels).items() if name in columns
    }
    labels = train.values([ids[i] for i in rows], list(classes.values()))
    held = held_rows([manifest.entries("train")[i] for i in rows])
    usable = both_values(labels[held]) & both_values(labels[~held])
    names = [name for name, use in zip(classes, usable, strict=True) if use]
    if not names:
        raise InputError(
            f"{train.source}: no class is both present and absent among the training volumes and among the "
            f"{held.sum()} held out of them, of a fifth of the patients; label more of the training split"
        )
    present = scored.values(manifest.ids(split), [columns[n] for n in names])
    notes += [
        f"{name}: left out, all or none of the fitted training volumes have it, or of those held out"
        for name in classes
        if name not in names
    ] + [
        f"{name}: all or none of the {len(present)} volumes have it, so AUROC is undefined"
        for name, defined in zip(names, both_values(present), strict=True)
        if not defined
    ]
    return Task(
        source=scored.source,
        names=names,
        rows=rows,
        train_labels=labels[:, usable],
        held=held,
        labels=present,
        means={"mean": []} | {mean: out for mean, out in label_set.means.items() if set(out) & set(names)},
        notes=notes,
    )


def measure(
    command: Command, run: Trained, manifest: Manifest, tasks: list[Task], vectors: Vectors
) -> Results:
    """Fit probes on the training split's embeddings, and score them on another's.

    The first probe is a file for infer.py classify. Raises InputError for embeddings with NaN or infinity.
    """
    train, image = vectors["train"]["image"], vectors[command.split]["image"]
    require_finite(training=train, scored=image)
    probes = [fit_probe(train[task.rows], task.train_labels, task.held) for task in tasks]
    scores = [probe.probabilities(image) for probe in probes]
    scans = manifest.scans(command.split)
    reports = [report(command, *of, train, image, scans) for of in zip(tasks, probes, scores, strict=True)]
    results = class_results(command, manifest.ids(command.split), tasks, scores, reports)
    results.files[FILE] = StoredProbe(probes[0], tasks[0].names, run.sha256()).write
    curves = {"before calibration": probes[0].uncalibrated(image), "after": scores[0]}
    results.pictures["reliability.png"] = partial(
        figures.reliability_figure, labels=tasks[0].labels, probabilities=curves
    )
    return results


def report(
    command: Command,
    task: Task,
    probe: Probe,
    found: np.ndarray,
    train_image: Tensor,
    image: Tensor,
    scans: np.ndarray,
) -> dict:
    """Return what the results file holds of a probe's probabilities, and what stands beside them.

    scans: (N,), of the scored volumes.
    """
    train, truth, names, means = train_image[task.rows], task.train_labels, task.names, task.means
    drawn = {"resamples": command.bootstrap, "seed": command.seed}
    scored = classification_report(
        task.labels, found, names, means, **drawn, thresholds=probe.thresholds.numpy(), scans=scans
    )
    defined = both_values(task.labels)
    before, after = (calibration(task.labels, p) for p in (probe.uncalibrated(image), found))
    for name, error, brier in zip(names, *after, strict=True):
        scored["classes"][name] |= {"calibration_error": float(error), "brier": float(brier)}

    # The vote of the nearest volumes; its thresholds come from the votes for those held out of the fit.
    held = nearest_votes(train[~task.held], truth[~task.held], train[task.held])
    cuts = best_f1_thresholds(truth[task.held], held)
    votes = nearest_votes(train, truth, image)
    return {
        "volumes": {"training": len(train), "held_out": int(task.held.sum())},
        **scored,
        "calibration": {
            name: {"calibration_error": mean_of(errors[defined]), "brier": mean_of(brier[defined])}
            for name, (errors, brier) in (("before", before), ("after", after))
        },
        "nearest": classification_report(task.labels, votes, names, means, thresholds=cuts),
        "few_shot": few_shot(train, truth, image, task.labels, command.seed),
    }


def few_shot(
    train: Tensor, train_labels: np.ndarray, image: Tensor, labels: np.ndarray, seed: int
) -> dict[str, dict]:
    """Return {n: mean AUROC of regressions on n volumes with and n without a class, its 95 % over draws}."""
    mean, deviation = moments(train)
    features, queries = (train - mean) / deviation, (image - mean) / deviation
    curve = {}
    for shots in SHOTS:
        areas, used = [], 0
        for draw in range(DRAWS):
            rng = np.random.default_rng((seed, shots, draw))
            scores = few_shot_scores(features, train_labels, queries, shots, rng)
            kept = ~np.isnan(scores[0]) & both_values(labels)
            used = int(kept.sum())
            if used:
                areas.append(area_under_roc(labels[:, kept], scores[:, kept]).mean())
        ends = interval(np.array(areas))
        curve[str(shots)] = {"classes": used, "auroc": mean_of(areas), "interval_95": ends}
    return curve


def mean_of(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def print_scores(results: dict) -> None:
    """Print a line for each class and mean, then the curve over n volumes, then the calibration."""
    nearest = named_rows(results["nearest"])

    def cells(name: str, row: dict) -> list:
        found = [row["thresholded"][key] for key in ("f1", "balanced_accuracy")]
        found += [row.get(key, "") for key in ("threshold", "calibration_error", "brier")]
        return [*found, nearest[name]["auroc"]]

    print_classes(results, [(name, 7) for name in ("F1", "b.acc", "thr", "ECE", "Brier", "kNN")], cells)
    counts, made = results["volumes"], results["calibration"]
    print(
        f"fitted on {counts['training'] - counts['held_out']} training volumes; penalty, calibration and "
        f"thresholds of the {counts['held_out']} held out"
    )
    curve = {f"{n} with, {n} without": row for n, row in results["few_shot"].items()}
    mean = results["means"]["mean"]
    curve["all"] = mean | {"interval_95": mean.get("interval_95", {}).get("auroc")}
    rows = {name: [row[key] for key in ("classes", "auroc", "interval_95")] for name, row in curve.items()}
    print()
    show(rows, [("classes", 9), ("AUROC", 7), ("95%", 15)], "volumes a class")
    print(f"95 %: of all over scans, of few over {DRAWS} draws of volumes")
    print(
        f"F1, b.acc: above thr. ECE: calibration error. kNN: AUROC of the {NEIGHBOURS} nearest volumes' vote"
    )
    if "second_labels" in results:
        print("fit, few volumes and calibration: by labels [1]")
    told = ", ".join(f"{name} {cell(row['calibration_error'])}" for name, row in made.items())
    print(f"calibration error {told}; Brier score {cell(made['after']['brier'])}")


@dataclass(frozen=True)
class StoredProbe:
    """A probe in a file. names: its classes. model: sha256 of the weights whose embeddings it reads."""

    probe: Probe
    names: list[str]
    model: str

    def write(self, path: Path) -> None:
        write_tensors(path, vars(self.probe), {"classes": "\n".join(self.names), "model": self.model})

    def classify(self, image: Tensor) -> dict[str, tuple[float, float]]:
        """Return (probability, threshold) by class of a unit vector (C,), the most probable first."""
        rows = zip(self.names, self.probe.probabilities(image[None])[0], self.probe.thresholds, strict=True)
        found = {name: (float(probability), float(cut)) for name, probability, cut in rows}
        return dict(sorted(found.items(), key=lambda pair: -pair[1][0]))


def read_probe(path: Path, model: str, width: int) -> StoredProbe:
    """Read a probe of embeddings of `width` numbers.

    Raises InputError for a probe of other weights, and for a file that is none.
    """
    again = "make it again with evaluate.py --task probe"
    with named(path, "is truncated or no probe", again):
        tensors, known = read_tensors(path)
        probe = Probe(**{field.name: tensors[field.name] for field in fields(Probe)})
    names = known.get("classes", "").split("\n")
    if known.get("model") != model:
        raise InputError(
            f"{path}: is the probe of another checkpoint; {again}, or name --prompts for zero-shot"
        )
    if probe.weight.shape != (width, len(names)) or any(
        len(t) != len(names) for t in list(vars(probe).values())[1:]
    ):
        raise InputError(f"{path}: has weights of {tuple(probe.weight.shape)}; {again}")
    if not all(tensor.isfinite().all() for tensor in vars(probe).values()):
        raise InputError(f"{path}: holds NaN or infinity; {again}")
    return StoredProbe(probe, names, model)
