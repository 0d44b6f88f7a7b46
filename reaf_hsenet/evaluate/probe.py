"""A probe of a run's frozen embeddings: fitted on its training split, scored on another, stored with the run.

A fifth of the training patients, held out of the fit, choose penalties, calibration and thresholds. Beside
the logistic regression stand the k nearest training volumes, and regressions that see few volumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reaf_hsenet.data.labels import LabelSet, LabelTable
from reaf_hsenet.data.patients import held_out, patient_name
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.show import cell, show
from reaf_hsenet.files import atomic_write
from reaf_hsenet.metrics.classification import area_under_roc, both_values, calibration, classification_report
from reaf_hsenet.metrics.probe import (
    Probe,
    best_f1_thresholds,
    few_shot_scores,
    fit_probe,
    moments,
    nearest_votes,
)

HELD_OUT = 0.2  # of the training patients
SHOTS, DRAWS = (1, 5, 10, 50), 5
FILE = "probe.safetensors"


@dataclass(frozen=True)
class Examples:
    """Volumes of the training split with their labels, and which of them are held out of the fit.

    image: (N, C). labels: (N, L) bool. held: (N,) bool. names: of the classes.
    """

    image: Tensor
    labels: np.ndarray
    held: np.ndarray
    names: list[str]


def known_classes(table: LabelTable, label_set: LabelSet) -> dict[str, list[str]]:
    """Return the label set's classes that the table can tell, else all its columns; each with its columns."""
    known = table.classes(label_set)
    return {name: known[name] for name in label_set.columns if name in known} or known


def training_examples(
    image: Tensor, entries: list[dict], table: LabelTable, classes: dict[str, list[str]]
) -> tuple[Examples, list[str]]:
    """Match embeddings of the training split with labels; return them, and a note for a class left out.

    Raises InputError unless a class is both present and absent in both parts.
    """
    labels = table.values([entry["id"] for entry in entries], list(classes.values()))
    patients = [patient_name(entry) for entry in entries]
    out = held_out(patients, round(HELD_OUT * len(set(patients))))
    held = np.array([patient in out for patient in patients])
    usable = both_values(labels[held]) & both_values(labels[~held]) if held.any() else held[:0]
    notes = [
        f"{name}: all or none of the training volumes have it, or of those held out: left out"
        for name, use in zip(classes, usable, strict=False)
        if not use
    ]
    if not usable.any():
        raise InputError(
            f"{table.source}: no class is both present and absent among the training volumes and among the "
            f"{held.sum()} held out of them; label more of the training split"
        )
    names = [name for name, use in zip(classes, usable, strict=True) if use]
    return Examples(image, labels[:, usable], held, names), notes


def score(
    train: Examples, image: Tensor, labels: np.ndarray, means: dict, resamples: int, seed: int
) -> tuple[Probe, np.ndarray, dict]:
    """Fit a probe and score it on other volumes.

    image: (N, C). labels: (N, L) bool. Returns the probe, its (N, L) probabilities, and what the results
    file holds.
    """
    probe = fit_probe(train.image, train.labels, train.held)
    found = probe.probabilities(image)
    scored = classification_report(
        labels, found, train.names, means, resamples, seed, probe.thresholds.numpy()
    )
    before = calibration(labels, probe.logits(image).double().sigmoid().numpy())
    after = calibration(labels, found)
    for j, name in enumerate(train.names):
        scored["classes"][name] |= {"calibration_error": float(after[0][j]), "brier": float(after[1][j])}

    # The vote of the nearest volumes; its thresholds come from the votes for those held out of the fit.
    fitted = train.image[~train.held], train.labels[~train.held]
    held = nearest_votes(*fitted, train.image[train.held])
    cuts = best_f1_thresholds(train.labels[train.held], held)
    votes = nearest_votes(train.image, train.labels, image)
    nearest = classification_report(labels, votes, train.names, means, thresholds=cuts)

    results = {
        "volumes": {"training": len(train.image), "held_out": int(train.held.sum())},
        **scored,
        "calibration": {
            name: {"calibration_error": float(errors.mean()), "brier": float(brier.mean())}
            for name, (errors, brier) in (("before", before), ("after", after))
        },
        "nearest": nearest,
        "few_shot": few_shot(train, image, labels, seed),
    }
    return probe, found, results


def few_shot(train: Examples, image: Tensor, labels: np.ndarray, seed: int) -> dict[str, dict]:
    """Return {n: mean AUROC of regressions on n volumes with and n without a class, its 95 % over draws}."""
    mean, deviation = moments(train.image)
    features, queries = (train.image - mean) / deviation, (image - mean) / deviation
    curve = {}
    for shots in SHOTS:
        areas, used = [], 0
        for draw in range(DRAWS):
            rng = np.random.default_rng((seed, shots, draw))
            scores = few_shot_scores(features, train.labels, queries, shots, rng)
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
        values[name] += [voted["auroc"], voted["thresholded"]["f1"]]
    columns = [("n", 6), ("AUROC", 7), ("95%", 15), ("AP", 7), ("F1", 7), ("b.acc", 7), ("thr", 7)]
    show(values, [*columns, ("ECE", 7), ("Brier", 7), ("kNN AUROC", 11), ("kNN F1", 8)], "class", width)
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


def mean_names(label_set: LabelSet, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the means to take: over all classes, and those of the label set that leave some out."""
    return {"mean": []} | {mean: out for mean, out in label_set.means.items() if set(out) & set(names)}
