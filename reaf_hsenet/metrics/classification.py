"""Classification scores: ranking, argmax and threshold metrics per class, means, bootstrap intervals,
calibration.

labels: (N, C) bool, scores: (N, C) probabilities of N volumes and C classes, compared in float64. Metrics are
arrays (..., M, C) in the order of METRICS, NaN where undefined. Source of the argmax and threshold rules: the
published evaluation of REAF, HLIP and fVLM on CT-RATE. Its "acc (balanced)" is `thresholded.accuracy` here.

A set of volumes is given as counts (R, N): how often volume n is in resample r. Ones give the metrics of the
data itself. Scores are sorted once a class; a resample only changes the weights of the sorted volumes.
"""

import numpy as np

AT_A_CUT = ("balanced_accuracy", "accuracy", "f1_weighted", "recall", "precision", "f1")
METRICS = (
    "auroc",
    "average_precision",
    *(f"argmax.{name}" for name in AT_A_CUT),
    *(f"thresholded.{name}" for name in AT_A_CUT),
)
BINS = 15  # of the expected calibration error
PER_BLOCK = 2**21  # counts of resamples held at a time


def classification_report(
    labels: np.ndarray,
    scores: np.ndarray,
    names: list[str],
    means: dict[str, list[str]],
    resamples: int = 0,
    seed: int = 0,
    thresholds: np.ndarray | None = None,
    scans: np.ndarray | None = None,
) -> dict[str, dict]:
    """{"classes": {name: metrics}, "means": {name: metrics}}, ready for JSON: an undefined metric is None.

    means: for each mean the classes it leaves out. A class with one label value is in none; `classes` counts
    what is. With resamples, `interval_95` holds [low, high] of every metric (percentile bootstrap). scans:
    (N,), drawn with all their volumes; without them volumes are. thresholds: (C,); without them they are
    found on the data itself, as published. They stay fixed in resamples.
    """
    thresholds = find_thresholds(labels, scores) if thresholds is None else thresholds
    values = class_metrics(labels, scores, thresholds, np.ones((1, len(labels))))[0]
    draws = bootstrap(labels, scores, thresholds, resamples, seed, scans) if resamples else None
    usable = both_values(labels)
    report = {"classes": {}, "means": {}}
    for j, name in enumerate(names):
        report["classes"][name] = {
            "positives": int(labels[:, j].sum()),
            **_nested(values[:, j]),
            "threshold": or_none(thresholds[j]),
            **_intervals(None if draws is None else draws[:, :, j]),
        }
    for mean, left_out in means.items():
        kept = usable & np.array([name not in left_out for name in names])
        report["means"][mean] = {
            "classes": int(kept.sum()),
            **_nested(mean_over_classes(values, kept)),
            **_intervals(None if draws is None else mean_over_classes(draws, kept)),
        }
    return report


def both_values(labels: np.ndarray) -> np.ndarray:
    """(C,) bool: the class has volumes with and without it. Without that most metrics are undefined."""
    return labels.any(0) & ~labels.all(0)


def class_metrics(
    labels: np.ndarray, scores: np.ndarray, thresholds: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """(R, M, C): every metric of every class on every resample.

    argmax: positive when the score is above 0.5, so that a tie goes to the negative prompt. thresholded: when
    it is above the class's threshold, NaN where that is NaN. Precision without any volume predicted positive
    is 0.
    """
    scores, counts = scores.astype(np.float64), counts.astype(np.float64)
    ranked = [_ranking(labels[:, j], scores[:, j], counts) for j in range(labels.shape[1])]
    parts = [np.array(ranked).transpose(2, 1, 0)]  # (C, 2, R) -> (R, 2, C)
    parts += [_at_a_cut(labels, scores > cut, counts) for cut in (0.5, np.nan_to_num(thresholds))]
    parts[2][..., np.isnan(thresholds)] = np.nan
    return np.concatenate(parts, axis=1)


def area_under_roc(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return (C,) AUROC, of classes with and without positives."""
    return class_metrics(labels, scores, np.zeros(labels.shape[1]), np.ones((1, len(labels))))[0, 0]


def find_thresholds(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(C,): of linspace(0, 1, 100) the threshold whose (false, true positive rate) is nearest to (0, 1).

    The published rule: searched on the evaluated data itself, and among equally near ones the largest. NaN
    for a class with one label value.
    """
    grid = np.linspace(0, 1, 100)
    found = np.full(labels.shape[1], np.nan)
    for j in np.flatnonzero(both_values(labels)):
        rates = []
        for side in (labels[:, j], ~labels[:, j]):
            ordered = np.sort(scores[side, j].astype(np.float64))
            rates.append(1 - np.searchsorted(ordered, grid, side="right") / len(ordered))  # strictly above
        distance = np.hypot(1 - rates[0], rates[1])
        found[j] = grid[np.flatnonzero(distance == distance.min())[-1]]
    return found


def bootstrap(
    labels: np.ndarray,
    scores: np.ndarray,
    thresholds: np.ndarray,
    resamples: int,
    seed: int,
    scans: np.ndarray | None = None,
) -> np.ndarray:
    """Return (R, M, C) metrics on scans drawn with replacement; NaN where a class has one label value.

    scans: (N,), equal for the volumes of a scan; without them each volume is one.
    """
    scan = np.arange(len(labels)) if scans is None else np.unique(scans, return_inverse=True)[1]
    rng, n = np.random.default_rng(seed), scan.max() + 1
    found = np.empty((resamples, len(METRICS), labels.shape[1]))
    block = max(1, PER_BLOCK // len(labels))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)[:, scan]
        values = class_metrics(labels, scores, thresholds, counts)
        positives, total = counts @ labels, counts.sum(1, keepdims=True)
        values[np.broadcast_to(((positives == 0) | (positives == total))[:, None], values.shape)] = np.nan
        found[start : start + rows] = values
    return found


def mean_over_classes(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(..., M, C) -> (..., M): mean over the kept classes that are not NaN, NaN where there is none."""
    values = values[..., kept]
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(-1) / defined.sum(-1)


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return false and true positive rates of one class, (N,) each, from 0 to 1, a point a distinct score."""
    true, false = _cumulated(labels, scores.astype(np.float64), np.ones((1, len(labels))))
    return false[0] / false[0, -1], true[0] / true[0, -1]


def _cumulated(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, K + 1) each: true and false positives above none, and from each of the K distinct scores up."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # ties enter together
    weights = counts[:, order]
    true = np.cumsum(weights * labels[order], axis=1)[:, last]
    false = np.cumsum(weights, axis=1)[:, last] - true
    return tuple(np.pad(x, ((0, 0), (1, 0))) for x in (true, false))


def _ranking(labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (R,) each of AUROC and of AP, the sum of (R_i - R_(i-1)) P_i over distinct scores."""
    true, false = _cumulated(labels, scores, counts)
    gained = np.diff(true, axis=1)
    with np.errstate(invalid="ignore"):
        area = (np.diff(false, axis=1) * (true[:, 1:] - gained / 2)).sum(1) / (true[:, -1] * false[:, -1])
        drawn = true[:, 1:] + false[:, 1:]
        precision = np.nan_to_num(true[:, 1:] / drawn)  # 0/0: nothing drawn down to here
        return area, (gained * precision).sum(1) / true[:, -1]


def _at_a_cut(labels: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R, 6, C): the metrics AT_A_CUT of the confusion matrices."""
    tp, fp = counts @ (labels & predicted), counts @ (~labels & predicted)
    positives = counts @ labels
    total = counts.sum(1, keepdims=True)
    negatives = total - positives
    fn, tn = positives - tp, negatives - fp
    with np.errstate(invalid="ignore"):
        recall, specificity = tp / positives, tn / negatives
        precision = np.nan_to_num(tp / (tp + fp))
        f1 = np.nan_to_num(2 * tp / (2 * tp + fp + fn))
        f1_negative = np.nan_to_num(2 * tn / (2 * tn + fp + fn))
    f1_weighted = (positives * f1 + negatives * f1_negative) / total
    found = [(recall + specificity) / 2, (tp + tn) / total, f1_weighted, recall, precision, f1]
    return np.stack(found, axis=1)


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (C,) expected calibration errors and Brier scores.

    The error is the mean, over volumes, of |mean probability - share of positives| of their bin; 15 bins of
    equal width (Guo et al. 2017, here of the probability that the class is present).
    """
    errors = [
        (np.abs(predicted - present) * count).sum() / count.sum()
        for predicted, present, count in map(reliability, labels.T, probabilities.T)
    ]
    return np.array(errors), np.square(probabilities - labels).mean(0)


def reliability(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each occupied bin its mean probability, share of positives and number of volumes.

    labels, probabilities: of any one shape.
    """
    row = np.minimum((probabilities.ravel() * BINS).astype(int), BINS - 1)
    count = np.bincount(row, minlength=BINS)
    some = count > 0
    sums = (np.bincount(row, x.ravel(), BINS)[some] for x in (probabilities, labels))
    predicted, present = (total / count[some] for total in sums)
    return predicted, present, count[some]


def _nested(values: np.ndarray | list[list]) -> dict:
    """(M,), or M intervals -> {"auroc": value, "argmax": {"recall": value, ...}, ...}."""
    made: dict = {}
    for name, value in zip(METRICS, values, strict=True):
        group, _, metric = name.rpartition(".")
        place = made.setdefault(group, {}) if group else made
        place[metric] = value if isinstance(value, list) else or_none(value)
    return made


def _intervals(draws: np.ndarray | None) -> dict:
    """draws (R, M) -> {"interval_95": ...}, over the resamples in which a metric is defined."""
    return {} if draws is None else {"interval_95": _nested(list(map(interval, draws.T)))}


def interval(draws: np.ndarray) -> list[float | None]:
    """Return [low, high], 95 % of the draws (R,) that are defined; None where none is."""
    defined = draws[np.isfinite(draws)]
    return np.percentile(defined, (2.5, 97.5)).tolist() if len(defined) else [None, None]


def or_none(value: np.generic) -> float | int | None:
    """Return the number for JSON, which has no NaN."""
    return None if np.isnan(value) else value.item()
