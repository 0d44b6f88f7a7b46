"""Scores of generated answers; the published numbers: test_parity.py."""

import pytest

from reaf_hsenet.metrics.vqa import (
    ANATOMIES,
    anatomy_classification,
    anatomy_of,
    answer_accuracies,
    vqa_report,
)

ANSWERS = ["lung/left lung", "lung/right lung", "lung/left lung", "heart"]


def test_an_anatomy_is_the_first_of_the_list_that_is_named_anywhere():
    assert anatomy_of("Mediastinum/left lung hilum") == "Lung"
    assert anatomy_of("pericardium/HEART") == "Heart"
    assert anatomy_of("trachea and bronchi") == anatomy_of("") == anatomy_of("计算") == "Others"


def test_the_published_class_accuracy_counts_an_empty_answer_and_the_strict_one_does_not():
    assert answer_accuracies("", "lung") == {"acc_class": 1, "acc_class_strict": 0, "acc_text": 0}
    assert (
        answer_accuracies("l", "lung")["acc_class"] == 1
        and answer_accuracies("l", "lung")["acc_class_strict"] == 0
    )
    assert answer_accuracies("Lung/x", "lung/left lung") == {
        "acc_class": 1,
        "acc_class_strict": 1,
        "acc_text": 0,
    }
    assert set(answer_accuracies(" Heart", "heart ").values()) == {1}


def test_micro_is_over_questions_and_macro_over_the_anatomies_that_occur():
    report = vqa_report(["lung/left lung", "lung", "", "heart"], ANSWERS)
    assert report["micro_average"]["acc_text"] == 2 / 4
    assert report["per_anatomy"]["Lung"]["acc_text"] == 1 / 3
    assert report["macro_average"]["acc_text"] == (1 / 3 + 1) / 2
    assert list(report["per_anatomy"]) == ["Lung", "Heart"] and report["empty_answers"] == 1


def test_absent_anatomies_count_as_zero_in_the_published_macro_only():
    found = anatomy_classification(["Lung", "Others", "Heart"], ["Lung", "Lung", "Heart"])
    assert found["anatomies"]["Lung"] == {
        "precision": 1,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "support": 2,
    }
    assert found["anatomies"]["Others"]["precision"] == 0 == found["anatomies"]["Bone"]["recall"]
    assert found["macro"]["recall"] == pytest.approx(1.5 / len(ANATOMIES))
    assert found["macro_over_true_anatomies"]["recall"] == 0.75 and found["accuracy"] == pytest.approx(2 / 3)


def test_majority_and_chance_are_those_of_the_answers():
    report = vqa_report([""] * 4, ANSWERS)
    assert report["majority"] == {
        "answer": "lung/left lung",
        "acc_anatomy": 3 / 4,
        "acc_class": 3 / 4,
        "acc_class_strict": 3 / 4,
        "acc_text": 2 / 4,
    }
    assert report["chance"] == {"acc_anatomy": 9 / 16 + 1 / 16, "acc_text": 4 / 16 + 1 / 16 + 1 / 16}
