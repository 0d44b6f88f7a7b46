"""Reports that no language model wrote, from what a run's own encoders see: the report of the nearest
training scan, and sentences for the findings that a probe predicts.
"""

import re
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.patients import held_rows
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.command import Command
from reaf_hsenet.evaluate.language_scores import Labeler, true_labels
from reaf_hsenet.metrics.classification import both_values
from reaf_hsenet.metrics.probe import fit_probe
from reaf_hsenet.runs.trained import Trained

CANDIDATES = 200  # sentences of a finding that are read to choose one


def baseline_splits(command: Command, run: Trained, manifest: Manifest, ranks: Ranks) -> tuple[str, ...]:
    """Return the splits whose scans the baselines look at; none where these are left out, which is said."""
    reasons = {
        "--no-baselines": not command.baselines,
        "--limit": command.limit is not None,
        "the training split is what is evaluated": command.split == "train",
        "there is no training split": not manifest.splits.get("train"),
    }
    why = next((reason for reason, holds in reasons.items() if holds), None)
    if why and command.task == "mrg" and ranks.main:
        print(f"the baselines by the run's embeddings are left out: {why}")
    if why or command.task != "mrg":
        return ()
    try:
        manifest.check(["train"], slices=run.guided)
    except InputError as error:
        raise InputError(f"{error}; or do without training scans: --no-baselines") from error
    return "train", command.split


def baseline_reports(
    manifest: Manifest, train: Tensor, queries: Tensor, labeler: Labeler | None
) -> dict[str, list[str]]:
    """Return a report for each of the queries (Q, C), by each way. train: (N, C) of the training split.

    Labels are the manifest's, else the labeler's; without either nothing is probed.
    """
    entries = manifest.entries("train")
    reports, truth = [clean_report(entry["text"]) for entry in entries], true_labels(manifest, entries)
    nearest = torch.cat([(part @ train.T).argmax(1) for part in queries.split(256)])
    found = {"nearest_training_scan": [reports[i] for i in nearest.tolist()]}
    if truth is None and labeler:
        truth = labeler(reports)
    if truth is not None:
        predicted = probed(train, truth.astype(bool), held_rows(entries), queries)
        found["labels_to_sentences"] = written(predicted, reports, truth.astype(bool), labeler)
    return found


def probed(train: Tensor, truth: np.ndarray, held: np.ndarray, queries: Tensor) -> np.ndarray:
    """Return (Q, L) bool: the labels of a probe; a class that either part has all or none of is absent."""
    predicted = np.zeros((len(queries), truth.shape[1]), dtype=bool)
    known = both_values(truth[held]) & both_values(truth[~held])
    if known.any():
        probe = fit_probe(train, truth[:, known], held)
        predicted[:, known] = probe.probabilities(queries) > probe.thresholds.numpy()
    return predicted


def written(
    predicted: np.ndarray, reports: list[str], truth: np.ndarray, labeler: Labeler | None
) -> list[str]:
    """Return reports of the sentences of (Q, L) findings; where there are none, the most frequent without."""
    sentences = finding_sentences(reports, truth, labeler)
    normal = [report for report, row in zip(reports, truth, strict=True) if not row.any()] or reports
    without = Counter(normal).most_common(1)[0][0]
    return [" ".join(sentences[j] for j in np.flatnonzero(row)) or without for row in predicted]


def finding_sentences(reports: list[str], truth: np.ndarray, labeler: Labeler | None) -> list[str]:
    """Return the sentence that reports use most for each of L findings; empty for one that none has.

    Of the sentences that most exceed, in standard deviations, what a finding's rate would give, the first in
    which the labeler reads this finding alone, else this and others, else the first.
    """
    counts, every = [Counter() for _ in range(truth.shape[1])], Counter()
    for report, row in zip(reports, truth, strict=True):
        told = sorted(set(re.split(r"(?<=[.!?])\s+", report.strip())))
        every.update(told)
        for j in np.flatnonzero(row):
            counts[j].update(told)
    found = []
    for j, (own, n) in enumerate(zip(counts, truth.sum(0).tolist(), strict=True)):
        rate = n / len(reports)
        excess = {s: (k - rate * every[s]) / max(every[s] * (1 - rate), 1e-6) ** 0.5 for s, k in own.items()}
        best = sorted(excess, key=excess.get, reverse=True)[:CANDIDATES]
        read = labeler(best) if labeler and best else np.zeros((len(best), truth.shape[1]))
        rank = [2 - int(row[j]) - int(row[j] and row.sum() == 1) for row in read]
        found.append(min(zip(rank, range(len(best)), best, strict=True))[2] if best else "")
    return found
