"""Probes of frozen embeddings: logistic regression, k nearest neighbours, and curves over n labelled volumes.

features: (N, C) float. labels: (N, L) bool. A probe is fitted on training volumes; its penalty, calibration
and thresholds are chosen on training volumes held out of the fit, never on what is evaluated.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted vote of Caron et al. 2021 (DINO)


@dataclass(frozen=True)
class Probe:
    """A logistic regression for each of L classes. weight: (C, L). The rest: (L,).

    slope, offset: of Platt's scaling. thresholds: of its probabilities, above which a class is present.
    """

    weight: Tensor
    bias: Tensor
    slope: Tensor
    offset: Tensor
    thresholds: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return features.to(self.weight) @ self.weight + self.bias

    def uncalibrated(self, features: Tensor) -> np.ndarray:
        return self.logits(features).double().sigmoid().numpy()

    def probabilities(self, features: Tensor) -> np.ndarray:
        """Return (N, L) float64 calibrated probabilities of (N, C) features."""
        return (self.slope * self.logits(features) + self.offset).double().sigmoid().numpy()


def fit_probe(features: Tensor, labels: np.ndarray, held: np.ndarray) -> Probe:
    """Fit on the rows outside `held`, (N,) bool; choose penalties, scaling and thresholds on those inside.

    A class's penalty is that of PENALTIES with the least cross-entropy on the held-out rows. Every class must
    be present and absent in both parts.
    """
    truth = torch.from_numpy(labels).to(features.dtype)
    held_rows, rows = torch.from_numpy(held).nonzero()[:, 0], torch.from_numpy(~held).nonzero()[:, 0]
    mean, deviation = moments(features[rows])
    # Standardised, then along the axes of their covariance: a rotation, which leaves the penalty as it is.
    standard = (features[rows] - mean) / deviation
    variance, axes = torch.linalg.eigh(standard.T @ standard / len(rows))
    standard = standard @ axes
    held_standard = (features[held_rows] - mean) / deviation @ axes

    # All classes are fitted at once; each keeps the weights of the penalty that served it best.
    best = torch.full(truth.shape[1:], torch.inf, dtype=features.dtype)
    weight, bias = features.new_zeros(features.shape[1], len(best)), torch.zeros_like(best)
    for penalty in PENALTIES:
        # In units of about one over the square root of the loss's curvature: L-BFGS then needs few steps.
        unit = (variance.clamp(min=0) / 4 + penalty).rsqrt()
        fitted, offset = fit_logistic((standard * unit)[None], truth[rows][None], penalty * unit.square())
        fitted = fitted[0] * unit[:, None]
        logits = held_standard @ fitted + offset[0]
        loss = F.binary_cross_entropy_with_logits(logits, truth[held_rows], reduction="none").mean(0)
        better = loss < best
        weight[:, better], bias[better] = fitted[:, better], offset[0, 0, better]
        best = torch.minimum(loss, best)

    # Weights for features as they come, then Platt's scaling and the thresholds of what it gives.
    weight = axes @ weight / deviation[:, None]
    bias = bias - mean @ weight
    slope, offset = platt(features[held_rows] @ weight + bias, truth[held_rows])
    probe = Probe(weight, bias, slope, offset, torch.zeros_like(bias))
    thresholds = best_f1_thresholds(labels[held], probe.probabilities(features[held_rows]))
    return Probe(weight, bias, slope, offset, torch.from_numpy(thresholds))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (C,) each, by which features are standardised."""
    return features.mean(0), features.std(0).clamp(min=1e-6)


def fit_logistic(x: Tensor, y: Tensor, penalty: float | Tensor) -> tuple[Tensor, Tensor]:
    """Fit B x K logistic regressions with L-BFGS. x: (B, N, C). y: (B, N, K), in [0, 1].

    Each minimises mean cross-entropy + penalty / 2 |w|^2, the bias free: scikit-learn's with C = 1 / (N
    penalty). penalty: one, or (C,). Returns weight (B, C, K) and bias (B, 1, K).
    """
    batch, rows, width = x.shape
    weight = x.new_zeros(batch, width, y.shape[2], requires_grad=True)
    bias = x.new_zeros(batch, 1, y.shape[2], requires_grad=True)
    penalty = torch.as_tensor(penalty, dtype=x.dtype).expand(width)[:, None]
    tolerance = 1e-6 if x.dtype == torch.float32 else 1e-9  # of the gradient
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=300,
        tolerance_grad=tolerance,
        tolerance_change=tolerance / 1000,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.binary_cross_entropy_with_logits(torch.baddbmm(bias, x, weight), y, reduction="sum") / rows
        total = fit + (penalty / 2 * weight.square()).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def platt(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Fit p = sigmoid(slope * logit + offset) for each class on held-out (N, L) logits and labels.

    Targets are those of Platt 1999: (P + 1) / (P + 2) for P positives, 1 / (M + 2) for M negatives, so that
    classes which the logits separate have an optimum too. Where the best slope is negative, the held-out
    volumes show no signal: all get about the mean target, in the order of their logits.
    """
    positives = truth.sum(0)
    high, low = (positives + 1) / (positives + 2), 1 / (len(truth) - positives + 2)
    targets = torch.where(truth > 0, high, low)
    # Logits of one size for all classes: the solver's steps are shared.
    size = logits.std(0).clamp(min=1e-6)
    slope, offset = (
        found.flatten() for found in fit_logistic((logits / size).T[..., None], targets.T[..., None], 0.0)
    )
    offset = torch.where(slope > 0, offset, targets.mean(0).logit())
    return slope.clamp(min=1e-3) / size, offset


def best_f1_thresholds(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return (L,) thresholds above which F1 is highest; of equal ones the largest.

    A threshold lies between two scores that occur, or below all of them.
    """
    found = np.zeros(labels.shape[1])
    for j, (truth, values) in enumerate(zip(labels.T, scores.T, strict=True)):
        order = np.argsort(-values, kind="stable")
        values, hits = values[order], np.cumsum(truth[order])
        f1 = 2 * hits / (np.arange(1, len(values) + 1) + truth.sum())
        below = np.append(values[1:], values[-1] - 2 * abs(values[-1]) - 1e-6)
        f1[values == below] = -1  # equal scores enter together
        cut = np.argmax(f1)
        found[j] = (values[cut] + below[cut]) / 2
    return found


def nearest_votes(train: Tensor, labels: np.ndarray, queries: Tensor, k: int = NEIGHBOURS) -> np.ndarray:
    """Return (Q, L) scores: the labels of the k nearest training volumes by cosine, weighted exp(cosine / T).

    train: (N, C), queries: (Q, C), of any length. Source: DINO's evaluation by nearest neighbours.
    """
    train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    truth, votes = torch.from_numpy(labels).float(), []
    for block in queries.split(1024):
        cosine, rows = (block @ train.T).topk(min(k, len(train)), dim=1)
        weight = (cosine / TEMPERATURE).softmax(1)  # (q, k)
        votes.append((weight[..., None] * truth[rows]).sum(1))
    return torch.cat(votes).double().numpy()


def few_shot_scores(
    features: Tensor, labels: np.ndarray, queries: Tensor, shots: int, rng: np.random.Generator
) -> np.ndarray:
    """Return (Q, L) logits of regressions that see `shots` volumes with and without each class.

    features, queries: standardised. The penalty is scikit-learn's default, C = 1. NaN for a class with fewer
    volumes of either kind.
    """
    found = np.full((len(queries), labels.shape[1]), np.nan)
    counts = np.minimum(labels.sum(0), (~labels).sum(0))
    classes = np.flatnonzero(counts >= shots)
    if len(classes) == 0:
        return found
    drawn = [
        np.concatenate([rng.choice(np.flatnonzero(side), shots, replace=False) for side in (has, ~has)])
        for has in labels[:, classes].T
    ]
    x = features[torch.from_numpy(np.stack(drawn))]  # (classes, 2 shots, C)
    y = (torch.arange(2 * shots) < shots).to(x.dtype).expand(len(classes), -1)[..., None]
    weight, bias = fit_logistic(x, y, penalty=1 / (2 * shots))
    found[:, classes] = (queries @ weight[..., 0].T + bias[:, 0, 0]).double().numpy()
    return found
