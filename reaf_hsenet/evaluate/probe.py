"""A probe of a run's frozen embeddings: fitted on its training split, scored on another, stored with the run.

A fifth of the training patients, held out of the fit, choose penalties, calibration and thresholds. Beside
the logistic regression stand the k nearest training volumes, and regressions that see few volumes.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reaf_hsenet.data.labels import LabelSet, LabelTable
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.patients import held_rows
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.show import cell, show
from reaf_hsenet.evaluate.zeroshot import print_second_labels
from reaf_hsenet.files import atomic_write
from reaf_hsenet.metrics.classification import area_under_roc, both_values, calibration, classification_report
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

SHOTS, DRAWS = (1, 5, 10, 50), 5
FILE = "probe.safetensors"


@dataclass(frozen=True)
class Task:
    """Labels of the training volumes and of those to score, (N, L) bool each, of the classes `names`.

    rows: (N,) of the training volumes in their split. held: (N,) bool, those held out of the fit. means: as
    of classification_report. source: where the labels are from. notes: on classes that are left out.
    """

    source: Path
    names: list[str]
    rows: list[int]
    train_labels: np.ndarray
    held: np.ndarray
    labels: np.ndarray
    means: dict[str, list[str]]
    notes: list[str]


def define_task(
    train: LabelTable, scored: LabelTable, label_set: LabelSet, manifest: Manifest, split: str
) -> Task:
    """Match the volumes of the training split and of `split` with their labels.

    Training volumes for which the manifest has no labels are left out, and classes that all or none of the
    fitted or of the held-out volumes have. Raises InputError when none is left.
    """
    classes = train.known_classes(label_set, manifest.labels)
    entries = manifest.entries("train")
    rows = [i for i, e in enumerate(entries) if train.source != manifest.name or e["id"] in train.rows]
    labels = train.values([entries[i]["id"] for i in rows], list(classes.values()))
    held = held_rows([entries[i] for i in rows])
    usable = np.zeros(len(classes), dtype=bool)
    if held.any():
        usable = both_values(labels[held]) & both_values(labels[~held])
    names = [name for name, use in zip(classes, usable, strict=True) if use]
    if not names:
        raise InputError(
            f"{train.source}: no class is both present and absent among the training volumes and among the "
            f"{held.sum()} held out of them; label more of the training split"
        )
    notes = [
        f"{name}: left out, all or none of the fitted training volumes have it, or of those held out"
        for name in classes
        if name not in names
    ]
    return Task(
        source=train.source,
        names=names,
        rows=rows,
        train_labels=labels[:, usable],
        held=held,
        labels=scored.values([e["id"] for e in manifest.entries(split)], [classes[n] for n in names]),
        means={"mean": []} | {mean: out for mean, out in label_set.means.items() if set(out) & set(names)},
        notes=notes,
    )


def score(
    task: Task, train_image: Tensor, image: Tensor, resamples: int, seed: int
) -> tuple[Probe, np.ndarray, dict]:
    """Fit a probe on the embeddings of the training split, (N, C), and score it on those of another.

    Returns the probe, its probabilities of the scored volumes, and what the results file holds. Raises
    InputError for embeddings with NaN or infinity.
    """
    require_finite(training=train_image, scored=image)
    train, truth, names = train_image[task.rows], task.train_labels, task.names
    probe = fit_probe(train, truth, task.held)
    found = probe.probabilities(image)
    scored = classification_report(
        task.labels, found, names, task.means, resamples, seed, probe.thresholds.numpy()
    )
    before = calibration(task.labels, probe.logits(image).double().sigmoid().numpy())
    after = calibration(task.labels, found)
    for name, error, brier in zip(names, *after, strict=True):
        scored["classes"][name] |= {"calibration_error": float(error), "brier": float(brier)}

    # The vote of the nearest volumes; its thresholds come from the votes for those held out of the fit.
    held = nearest_votes(train[~task.held], truth[~task.held], train[task.held])
    cuts = best_f1_thresholds(truth[task.held], held)
    votes = nearest_votes(train, truth, image)

    results = {
        "volumes": {"training": len(train), "held_out": int(task.held.sum())},
        **scored,
        "calibration": {
            name: {"calibration_error": float(errors.mean()), "brier": float(brier.mean())}
            for name, (errors, brier) in (("before", before), ("after", after))
        },
        "nearest": classification_report(task.labels, votes, names, task.means, thresholds=cuts),
        "few_shot": few_shot(train, truth, image, task.labels, seed),
    }
    return probe, found, results


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
        interval = np.percentile(areas, (2.5, 97.5)).tolist() if areas else [None, None]
        value = float(np.mean(areas)) if areas else None
        curve[str(shots)] = {"classes": used, "auroc": value, "interval_95": interval}
    return curve


def print_scores(results: dict) -> None:
    """Print a line for each class and mean, then the curve over n volumes, then the calibration."""
    rows = {**results["classes"], **{f"{k} of {v['classes']}": v for k, v in results["means"].items()}}
    nearest = [*results["nearest"]["classes"].values(), *results["nearest"]["means"].values()]
    values, width = {}, max(map(len, rows)) + 1
    for (name, row), voted in zip(rows.items(), nearest, strict=True):
        low, high = row["interval_95"]["auroc"] if "interval_95" in row else (None, None)
        interval = None if low is None else f"{cell(low)} to {cell(high)}"
        values[name] = [row.get("positives", ""), row["auroc"], interval, row["average_precision"]]
        values[name] += [row["thresholded"]["f1"], row["thresholded"]["balanced_accuracy"]]
        values[name] += [row.get(key, "") for key in ("threshold", "calibration_error", "brier")]
        values[name].append(voted["auroc"])
    columns = [("n", 6), ("AUROC", 7), ("95%", 15), ("AP", 7), ("F1", 7), ("b.acc", 7), ("thr", 7)]
    show(values, [*columns, ("ECE", 7), ("Brier", 7), ("kNN", 7)], "class", width)
    counts, made = results["volumes"], results["calibration"]
    print(
        f"fitted on {counts['training'] - counts['held_out']} training volumes; penalty, calibration and "
        f"thresholds of the {counts['held_out']} held out"
    )
    curve = {
        f"{n} with, {n} without": [row["classes"], row["auroc"], *row["interval_95"]]
        for n, row in results["few_shot"].items()
    }
    everything = results["means"]["mean"]
    curve["all"] = [
        everything["classes"],
        everything["auroc"],
        *everything.get("interval_95", {}).get("auroc", []),
    ]
    print()
    show(curve, [("classes", 9), ("AUROC", 7), ("from", 7), ("to", 7)], "volumes a class", 24)
    print(
        f"kNN: AUROC of the {NEIGHBOURS} nearest training volumes' vote. labels: {results['labels']['table']}"
    )
    for note in results["notes"]:
        print(f"note: {note}")
    print_second_labels(results, width)
    told = ", ".join(f"{name} {cell(row['calibration_error'])}" for name, row in made.items())
    print(f"calibration error {told}; Brier score {cell(made['after']['brier'])}")


@dataclass(frozen=True)
class StoredProbe:
    """A probe in a file. names: its classes. model: sha256 of the weights whose embeddings it reads."""

    probe: Probe
    names: list[str]
    model: str

    def write(self, path: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in vars(self.probe).items()}
        with atomic_write(path, "wb") as file:
            file.write(save(tensors, {"classes": "\n".join(self.names), "model": self.model}))

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
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            probe = Probe(**{field.name: file.get_tensor(field.name) for field in fields(Probe)})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is truncated or no probe; {again}") from error
    names = known.get("classes", "").split("\n")
    if known.get("model") != model:
        raise InputError(
            f"{path}: is the probe of another checkpoint; {again}, or name --prompts for zero-shot"
        )
    if probe.weight.shape != (width, len(names)) or any(
        len(t) != len(names) for t in list(vars(probe).values())[1:]
    ):
        raise InputError(f"{path}: has weights of {tuple(probe.weight.shape)}; {again}")
    return StoredProbe(probe, names, model)
