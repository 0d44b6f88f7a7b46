"""Zero-shot metrics: plain recomputation, hand-made cases, undefined classes and the bootstrap."""

import math

import numpy as np
import pytest

from reaf_hsenet.metrics.classification import (
    METRICS,
    bootstrap,
    class_metrics,
    classification_report,
    find_thresholds,
    mean_over_classes,
    roc_curve,
)


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    """60 volumes of 4 classes; the scores are rounded, so that many are equal."""
    rng = np.random.default_rng(5)
    labels = rng.random((60, 4)) < (0.5, 0.3, 0.2, 0.7)
    scores = np.round(np.clip(0.4 + 0.15 * labels + 0.2 * rng.standard_normal((60, 4)), 0, 1), 1)
    return labels, scores.astype(np.float32)


def metric(labels, scores, name: str, thresholds=None) -> np.ndarray:
    """(C,): one metric on the data itself."""
    labels, scores = (np.asarray(x).reshape(len(x), -1) for x in (labels, scores))
    thresholds = find_thresholds(labels, scores) if thresholds is None else np.array(thresholds)
    return class_metrics(labels, scores, thresholds, np.ones((1, len(labels))))[0, METRICS.index(name)]


def test_auroc_is_the_share_of_pairs_in_order_and_a_tie_is_half(case):
    labels, scores = case
    for j, found in enumerate(metric(*case, "auroc")):
        up, down = scores[labels[:, j], j], scores[~labels[:, j], j]
        assert found == pytest.approx(
            (np.greater.outer(up, down) + 0.5 * np.equal.outer(up, down)).mean(), abs=1e-12
        )


def test_average_precision_sums_precision_times_recall_steps_over_distinct_scores(case):
    labels, scores = case
    for j, found in enumerate(metric(*case, "average_precision")):
        expected, before = 0.0, 0.0
        for cut in sorted(set(scores[:, j].tolist()), reverse=True):
            above = scores[:, j] >= cut
            recall = (above & labels[:, j]).sum() / labels[:, j].sum()
            expected += (recall - before) * (above & labels[:, j]).sum() / above.sum()
            before = recall
        assert found == pytest.approx(expected, abs=1e-12)


def test_scans_are_drawn_with_all_their_volumes(case):
    """Two copies of every volume as one scan have the intervals of the volumes themselves."""
    labels, scores = case
    once = bootstrap(labels, scores, np.full(4, 0.5), 20, seed=3)
    twice = bootstrap(
        *(np.repeat(x, 2, axis=0) for x in case), np.full(4, 0.5), 20, 3, np.repeat(range(60), 2)
    )
    assert np.allclose(once, twice, atol=1e-12, equal_nan=True)


def test_one_score_for_all_is_chance():
    labels = np.array([True, False, False, True, False])
    assert metric(labels, np.full(5, 0.7), "auroc") == 0.5
    assert metric(labels, np.full(5, 0.7), "average_precision") == pytest.approx(0.4)


def test_order_of_the_rows_does_not_matter(case):
    labels, scores = case
    turned = class_metrics(
        labels[::-1], scores[::-1], find_thresholds(labels[::-1], scores[::-1]), np.ones((1, 60))
    )
    assert np.allclose(
        turned, class_metrics(labels, scores, find_thresholds(*case), np.ones((1, 60))), atol=1e-12
    )


def test_metrics_at_argmax_of_a_case_made_by_hand():
    """3 true, 1 false positive, 1 false, 3 true negative; a score of exactly 0.5 is negative."""
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
    scores = np.array([0.9, 0.8, 0.6, 0.5, 0.7, 0.5, 0.4, 0.1])
    for name, value in (
        ("accuracy", 0.75),
        ("balanced_accuracy", 0.75),
        ("recall", 0.75),
        ("precision", 0.75),
    ):
        assert metric(labels, scores, f"argmax.{name}") == value
    assert metric([1, 1, 1, 0], [0.9, 0.9, 0.1, 0.9], "argmax.f1_weighted") == pytest.approx(0.75 * 2 / 3)


def test_precision_without_a_predicted_positive_is_0():
    assert metric(np.array([True, False]), np.array([0.2, 0.1]), "argmax.precision") == 0


def test_of_equally_near_thresholds_the_largest_is_taken_and_scores_must_exceed_it():
    labels, scores = np.array([[0], [1]], dtype=bool), np.array([[0.2], [0.8]])
    threshold = find_thresholds(labels, scores)[0]
    assert threshold == np.linspace(0, 1, 100)[79] and threshold < 0.8
    on_the_grid = np.array([[0.0], [np.linspace(0, 1, 100)[50]]])
    assert find_thresholds(labels, on_the_grid)[0] == np.linspace(0, 1, 100)[49]


def test_accuracy_at_the_threshold_is_plain_accuracy(case):
    labels, scores = case
    thresholds = find_thresholds(labels, scores)
    plain = ((scores > thresholds) == labels).mean(0)
    assert np.allclose(metric(*case, "thresholded.accuracy"), plain)
    assert not np.allclose(metric(*case, "thresholded.balanced_accuracy"), plain)


def test_a_class_without_positives_is_left_out_of_the_mean(case):
    labels, scores = case
    labels = labels.copy()
    labels[:, 1] = False
    report = classification_report(labels, scores, list("abcd"), {"mean": [], "mean_2": ["d"]}, resamples=20)
    empty, mean = report["classes"]["b"], report["means"]["mean"]
    assert (
        empty["positives"] == 0 and empty["auroc"] is empty["average_precision"] is empty["threshold"] is None
    )
    assert empty["argmax"]["recall"] is empty["thresholded"]["accuracy"] is None
    assert empty["argmax"]["accuracy"] is not None and empty["interval_95"]["auroc"] == [None, None]
    for kept, found in (("acd", mean), ("ac", report["means"]["mean_2"])):
        assert found["classes"] == len(kept)
        for name in ("auroc", "average_precision"):
            assert found[name] == pytest.approx(np.mean([report["classes"][c][name] for c in kept]))
        assert found["argmax"]["accuracy"] == pytest.approx(
            np.mean([report["classes"][c]["argmax"]["accuracy"] for c in kept])
        )


def test_a_class_without_negatives_has_no_auroc_either():
    report = classification_report(np.ones((4, 1), bool), np.full((4, 1), 0.7), ["a"], {"mean": []})
    assert report["classes"]["a"]["auroc"] is None and report["classes"]["a"]["argmax"]["recall"] == 1
    assert report["means"]["mean"] == {**report["means"]["mean"], "classes": 0, "auroc": None}


def test_a_resample_has_the_metrics_of_the_volumes_it_repeats(case):
    """The weighted computation against the same volumes written out."""
    labels, scores = case
    rng = np.random.default_rng(1)
    thresholds = find_thresholds(labels, scores)
    for _ in range(5):
        drawn = rng.integers(60, size=60)
        counts = np.bincount(drawn, minlength=60)[None]
        weighted = class_metrics(labels, scores, thresholds, counts)
        written_out = class_metrics(labels[drawn], scores[drawn], thresholds, np.ones((1, 60)))
        assert np.allclose(weighted, written_out, atol=1e-12)


def test_the_bootstrap_is_seeded_and_does_not_depend_on_the_block_size(case, monkeypatch):
    thresholds = find_thresholds(*case)
    one = bootstrap(*case, thresholds, 30, seed=0)
    assert np.array_equal(one, bootstrap(*case, thresholds, 30, seed=0))
    assert not np.array_equal(one, bootstrap(*case, thresholds, 30, seed=1))
    monkeypatch.setattr("reaf_hsenet.metrics.classification.PER_BLOCK", 60 * 7)
    assert np.array_equal(one, bootstrap(*case, thresholds, 30, seed=0))


def test_a_resample_with_one_label_value_leaves_that_class_out():
    """One positive of 6: about a third of the draws miss it, and their mean is the other class's."""
    labels = np.array([[1, 1], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0]], dtype=bool)
    scores = np.random.default_rng(0).random((6, 2))
    draws = bootstrap(labels, scores, find_thresholds(labels, scores), 300, seed=0)
    missed = np.isnan(draws[:, :, 0])
    assert 0.2 < missed[:, 0].mean() < 0.5 and np.array_equal(missed.all(1), missed.any(1))
    mean = mean_over_classes(draws, np.array([True, True]))
    both = missed[:, 0] & ~np.isnan(draws[:, 0, 1])
    assert np.array_equal(mean[both], draws[both][:, :, 1])


def test_intervals_hold_the_value_and_cover_what_theory_says():
    """The accuracy of n volumes has the standard error sqrt(p (1 - p) / n); 95 percent is 1.96 of them
    each side.
    """
    rng = np.random.default_rng(2)
    labels = rng.random((2000, 1)) < 0.5
    scores = np.where(rng.random((2000, 1)) < 0.8, labels, ~labels) * 0.5 + 0.25
    found = classification_report(labels, scores, ["a"], {"mean": []}, resamples=1000)
    accuracy, (low, high) = (
        d["argmax"]["accuracy"] for d in (found["classes"]["a"], found["classes"]["a"]["interval_95"])
    )
    assert low < accuracy < high
    assert (high - low) == pytest.approx(2 * 1.96 * math.sqrt(accuracy * (1 - accuracy) / 2000), rel=0.1)
    assert found["means"]["mean"]["interval_95"] == found["classes"]["a"]["interval_95"]


def test_without_resamples_there_are_no_intervals(case):
    report = classification_report(*case, list("abcd"), {"mean": []})
    assert all("interval_95" not in row for row in [*report["classes"].values(), *report["means"].values()])


def test_the_area_under_the_drawn_roc_curve_is_the_auroc(case):
    labels, scores = case
    false, true = roc_curve(labels[:, 0], scores[:, 0])
    area = (np.diff(false) * (true[1:] + true[:-1]) / 2).sum()
    assert area == pytest.approx(metric(*case, "auroc")[0], abs=1e-12)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
