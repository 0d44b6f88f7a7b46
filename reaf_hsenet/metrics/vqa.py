"""Scores of generated answers to questions of where: HSENet's evaluation (commit c7198f3) on
RadGenome-ChestCT.

An answer is a path of places, "lung/right lung/right upper lobe", and belongs to one of 11 anatomies.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from reaf_hsenet.metrics.clinical import label_scores
from reaf_hsenet.metrics.text import means, sample_scores

ANATOMIES = (
    "Lung",
    "Trachea and Bronchie",
    "Mediastinum",
    "Heart",
    "Esophagus",
    "Pleura",
    "Bone",
    "Thyroid",
    "Breast",
    "Abdomen",
    "Others",
)
ACCURACIES = ("acc_class", "acc_class_strict", "acc_text")


def anatomy_of(text: str) -> str:
    """Return the first of ANATOMIES named in the text; as published, "mediastinum/left lung" is Lung."""
    text = text.lower()
    return next((name for name in ANATOMIES[:-1] if name.lower() in text), ANATOMIES[-1])


def answer_accuracies(prediction: str, answer: str) -> dict[str, int]:
    """ACCURACIES of one answer, 0 or 1, upper and lower case alike.

    acc_class: as published, the generated text's part before the first slash is anywhere in the answer; an
    empty text always is. acc_class_strict: the parts before the first slash are the same. acc_text: the texts
    are the same.
    """
    prediction, answer = prediction.lower().strip(), answer.lower().strip()
    first = [text.split("/")[0].strip() for text in (prediction, answer)]
    found = (first[0] in answer, first[0] == first[1], prediction == answer)
    return {name: int(value) for name, value in zip(ACCURACIES, found, strict=True)}


def vqa_report(predictions: Sequence[str], answers: Sequence[str]) -> dict:
    """Scores of generated answers.

    micro_average: ACCURACIES and text.py's SAMPLE_SCORES, means over the questions; macro_average: means of
    the means over the true anatomies that occur; per_anatomy: those means. classification: precision, recall,
    f1 and support of each anatomy; of those, `macro` is the mean over all 11, an absent one as 0, as
    published, and `macro_over_true_anatomies` over those that occur; `weighted` is by support.
    majority: the accuracies of always giving the most frequent answer. chance: the probability that an answer
    (and its anatomy) drawn from the true ones equals another drawn the same way.
    """
    rows = [answer_accuracies(p, a) | sample_scores(p, a) for p, a in zip(predictions, answers, strict=True)]
    true, named = ([anatomy_of(text) for text in texts] for texts in (answers, predictions))
    grouped: dict[str, list[dict]] = {}
    for anatomy, row in zip(true, rows, strict=True):
        grouped.setdefault(anatomy, []).append(row)
    per_anatomy = {name: means(grouped[name]) for name in ANATOMIES if name in grouped}
    texts = [answer.strip().lower() for answer in answers]
    guess = Counter(texts).most_common(1)[0][0]
    guessed = [answer_accuracies(guess, answer) for answer in answers]
    return {
        "questions": len(answers),
        "empty_answers": sum(not p.strip() for p in predictions),
        "micro_average": means(rows),
        "macro_average": means(list(per_anatomy.values())),
        "per_anatomy": per_anatomy,
        "classification": anatomy_classification(named, true),
        "majority": {
            "answer": guess,
            "acc_anatomy": true.count(anatomy_of(guess)) / len(true),
            **means(guessed),
        },
        "chance": {"acc_anatomy": _chance(true), "acc_text": _chance(texts)},
    }


def anatomy_classification(named: Sequence[str], true: Sequence[str]) -> dict:
    """Return vqa_report's classification report of named and true anatomies, one of ANATOMIES each."""
    one_hot = [np.array(side)[:, None] == np.array(ANATOMIES) for side in (named, true)]
    scores = {name: np.nan_to_num(v) for name, v in label_scores(*one_hot).items() if name != "predicted"}
    support = scores["support"]
    metrics = ("precision", "recall", "f1")
    return {
        "anatomies": {a: {m: v[j].item() for m, v in scores.items()} for j, a in enumerate(ANATOMIES)},
        "accuracy": float(np.mean([n == t for n, t in zip(named, true, strict=True)])),
        "macro": {m: float(scores[m].mean()) for m in metrics},
        "macro_over_true_anatomies": {m: float(scores[m][support > 0].mean()) for m in metrics},
        "weighted": {m: float(scores[m] @ support / support.sum()) for m in metrics},
    }


def _chance(values: list[str]) -> float:
    return sum((count / len(values)) ** 2 for count in Counter(values).values())
