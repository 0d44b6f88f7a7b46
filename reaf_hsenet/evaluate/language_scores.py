"""Scores of generated reports and answers: what evaluate.py writes as json and csv, and prints.

The csv's columns have the published names (HSENet, commit c7198f3): bleu1 to bleu4 are n-gram precisions. Its
meteor needs nltk; without that there is meteor_without_synonyms alone.
"""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.phantom.findings import LABELS
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.evaluate.language_evaluation import Asked
from reaf_hsenet.evaluate.show import cell, show
from reaf_hsenet.files import atomic_write
from reaf_hsenet.metrics.bertscore import Bert, bert_score
from reaf_hsenet.metrics.clinical import clinical_report, phantom_labels, size_agreement
from reaf_hsenet.metrics.places import phantom_places, place_scores, rule_places
from reaf_hsenet.metrics.text import ORDERS, SAMPLE_SCORES, nltk_meteor, sample_scores, text_report
from reaf_hsenet.metrics.vqa import ACCURACIES, ANATOMIES, anatomy_of, answer_accuracies, vqa_report
from reaf_hsenet.runs.checkpoint import Choice

Labeler = Callable[[Sequence[str]], np.ndarray]  # texts -> (n, 18) of 0 and 1
# What rows of generated reports and baselines are compared by: names on the screen, and in the json.
COMPARED = {
    **{"micro-F1": "micro_f1", "macro-F1": "macro_f1", "precision": "precision", "recall": "recall"},
    **{"CRG": "crg", "BLEU-4": "ngram_precision_4", "METEOR": "meteor"},
}
SHOWN_TEXT = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-1", "ROUGE-L", "METEOR")
COLUMNS = (
    *("id", "Question", "Anatomy Type", "Ground Truth", "pred"),
    *("bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rougeL", "meteor", "meteor_without_synonyms"),
    *("bert_f1", "acc_class", "acc_class_strict", "acc_text"),
)


def true_labels(manifest: Manifest, entries: list[dict]) -> np.ndarray | None:
    """(n, 18) in the order of LABELS, where the manifest has these labels of all of the entries."""
    if not set(LABELS) <= set(manifest.labels) or any(entry["labels"] is None for entry in entries):
        return None
    columns = [manifest.labels.index(label) for label in LABELS]
    return np.array([[entry["labels"][j] for j in columns] for entry in entries], dtype=np.int64)


def are_phantoms(manifest: Manifest) -> bool:
    """Return True if the phantoms' labeler reads every report's labels exactly as the manifest has them."""
    entries = [entry for split in manifest.splits.values() for entry in split]
    labels = true_labels(manifest, entries)
    return labels is not None and all(
        (phantom_labels([clean_report(entry["text"])])[0] == row).all()
        for entry, row in zip(entries, labels, strict=True)
    )


def report_scores(
    predictions: list[str],
    rows: list[Asked],
    truth: np.ndarray | None = None,
    labeler: Labeler | None = None,
    *,
    labels: np.ndarray | None = None,
    phantoms: bool = False,
    places: bool = False,
    bert: Bert | None = None,
    baselines: dict[str, list[str]] | None = None,
) -> tuple[dict, list[dict]]:
    """(scores of generated reports, a csv row each).

    truth: (n, 18) labels; without them those that the labeler reads in the references. labels: (n, 18) of the
    predictions, where others than the labeler's are scored. Findings are scored where both are known.
    phantoms: places and sizes, too; places: places by rules. baselines: reports of others, scored beside.
    """
    references = [row.truth for row in rows]
    scores, table = _text_scores(predictions, rows, bert)
    if labeler and truth is None:
        truth = labeler(references)
    if labeler and labels is None:
        labels = labeler(predictions)
    if labels is not None and truth is not None:
        scores["clinical"] = clinical_report(labels, truth)
    guess = Counter(references).most_common(1)[0][0]
    others = {"most_frequent_report": [guess] * len(rows), **(baselines or {})}
    scores["baselines"] = guesses(truth) if "clinical" in scores else {}
    for name, texts in others.items():
        found = labeler(texts) if labeler and truth is not None else None
        scores["baselines"][name] = text_row(text_report(texts, references)) | finding_row(found, truth)
    scores["baselines"]["most_frequent_report"]["report"] = guess
    scores["generated"] = text_row(scores["text"]) | finding_row(labels, truth)
    scores["not_beaten"] = not_beaten(scores["generated"], scores["baselines"])
    if phantoms:
        scores["attributes"] = {"size": size_agreement(predictions, references)}
    if phantoms or places:
        read = phantom_places if phantoms else rule_places
        scores["places"] = place_scores(list(map(read, predictions)), list(map(read, references)))
        scores["places"]["reader"] = "phantoms" if phantoms else "rules"
    return scores, table


def text_row(report: dict) -> dict[str, float]:
    """Return what rows are compared by; METEOR is without synonyms where nltk is not there."""
    meteor = report["meteor"] if isinstance(report["meteor"], float) else report["meteor_without_synonyms"]
    return {**{name: report[name] for name in SAMPLE_SCORES}, "meteor": meteor}


def finding_row(labels: np.ndarray | None, truth: np.ndarray | None) -> dict[str, float | None]:
    """Return the scores of findings that rows are compared by; none where labels (n, 18) are not known."""
    if labels is None or truth is None:
        return {}
    report = clinical_report(labels, truth)
    micro = report["micro"]
    means = {"micro_f1": micro["f1"], "macro_f1": report["macro"]["f1"], "crg": report["crg"]}
    return {**means, "precision": micro["precision"], "recall": micro["recall"]}


def guesses(truth: np.ndarray) -> dict[str, dict]:
    """Scores of findings that are guessed without looking at the scan.

    chance: each finding is drawn at its true rate; micro F1 is then the ratio of expectations.
    all_findings: all of them for everyone.
    """
    rates = truth.mean(0)
    positive = rates.sum() > 0
    chance = {
        "micro_f1": float((rates**2).sum() / rates.sum()) if positive else None,
        "macro_f1": float(rates[rates > 0].mean()) if positive else None,
    }
    return {"chance": chance, "all_findings": finding_row(np.ones_like(truth), truth)}


def not_beaten(generated: dict, baselines: dict[str, dict]) -> dict[str, list[str]]:
    """Return, by baseline, in what generated reports score no higher. Precision and recall count in F1."""
    found = {}
    for name, row in baselines.items():
        both = [shown for shown, key in COMPARED.items() if None not in (row.get(key), generated.get(key))]
        lost = [shown for shown in both if generated[COMPARED[shown]] <= row[COMPARED[shown]]]
        found[name] = [shown for shown in lost if shown not in ("precision", "recall")]
    return {name: lost for name, lost in found.items() if lost}


def answer_scores(
    predictions: list[str], rows: list[Asked], bert: Bert | None = None
) -> tuple[dict, list[dict]]:
    """(scores of generated answers, a csv row each)."""
    answers = [row.truth for row in rows]
    scores, table = _text_scores(predictions, rows, bert)
    report = vqa_report(predictions, answers)
    report["chance"] |= class_chance(answers)
    for cells, text, answer in zip(table, predictions, answers, strict=True):
        cells |= {"Anatomy Type": anatomy_of(answer), **answer_accuracies(text, answer)}
    return scores | report, table


def class_chance(answers: list[str]) -> dict[str, float]:
    """Expected acc_class and acc_class_strict of one true answer, drawn at random, for another one."""
    texts = Counter(answer.strip().lower() for answer in answers)
    classes: Counter[str] = Counter()
    for text, count in texts.items():
        classes[text.split("/")[0].strip()] += count
    inside = sum(n * m for name, n in classes.items() for text, m in texts.items() if name in text)
    return {
        "acc_class": inside / len(answers) ** 2,
        "acc_class_strict": sum(n * n for n in classes.values()) / len(answers) ** 2,
    }


def _text_scores(predictions: list[str], rows: list[Asked], bert: Bert | None) -> tuple[dict, list[dict]]:
    scores: dict = {"text": text_report(predictions, [row.truth for row in rows])}
    table = []
    for text, row in zip(predictions, rows, strict=True):
        found = sample_scores(text.strip(), row.truth.strip())
        cells = {"id": row.id, "Question": row.question, "Ground Truth": row.truth, "pred": text}
        cells |= {f"bleu{n}": found[f"ngram_precision_{n}"] for n in ORDERS}
        cells |= {name: found[name] for name in ("rouge1", "rougeL", "meteor_without_synonyms")}
        meteor = nltk_meteor([(text.strip(), row.truth.strip())])
        table.append(cells | ({"meteor": meteor} if isinstance(meteor, float) else {}))
    if bert:
        found = bert_score(predictions, [row.truth for row in rows], bert)
        scores["bertscore"] = {
            "variant": bert.variant,
            **{name: float(values.mean()) for name, values in found.items()},
        }
        for cells, f1 in zip(table, found["f1"].tolist(), strict=True):
            cells["bert_f1"] = f1
    return scores, table


def write_rows(path: Path, table: list[dict], checkpoint: Choice | Path) -> None:
    """Write the csv: the rows' COLUMNS as far as there are such, and the checkpoint or the file."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, [*(name for name in COLUMNS if name in table[0]), "checkpoint"])
        writer.writeheader()
        writer.writerows({**row, "checkpoint": checkpoint} for row in table)


def print_reports(scores: dict) -> None:
    text = scores["text"]
    print(f"{text['reports']} reports, {text['empty_reports']} of them empty")
    _print_text({"generated": text})
    bleu = ", ".join(f"{text[f'corpus_bleu_{n}']:.3f}" for n in ORDERS)
    print(f"corpus BLEU 1 to 4, with brevity penalty: {bleu}")
    _print_bertscore(scores)
    rows = {"generated": scores["generated"], **scores["baselines"]}
    print()
    show(
        {name.replace("_", " "): [row.get(key) for key in COMPARED.values()] for name, row in rows.items()},
        [(name, 10) for name in COMPARED],
        "beside what needs no language model",
        40,
    )
    for name, lost in scores["not_beaten"].items():
        print(f"the generated reports do not beat {name.replace('_', ' ')} in {', '.join(lost)}")
    if "clinical" not in scores:
        print("findings: left out; name a classifier of reports with --classifier")
    else:
        metrics = ("f1", "precision", "recall", "support", "predicted")
        classes = scores["clinical"]["classes"]
        columns = [(name, 10) for name in ("F1", "precision", "recall", "support", "named")]
        print()
        show({name: [row[m] for m in metrics] for name, row in classes.items()}, columns, width=40)
    if "places" in scores:
        metrics = ("precision", "recall", "agreement", "compared")
        rows = {
            level: [scores["places"][level][m] for m in metrics] for level in ("presence", "side", "lobe")
        }
        title = f"places, read by {scores['places']['reader']}"
        print()
        show(rows, [(name, 10) for name in metrics], title, 40)
    if "attributes" in scores:
        size = scores["attributes"]["size"]
        print(f"sizes agree where both name the finding: {cell(size['agreement'])} of {size['compared']}")


def print_answers(scores: dict) -> None:
    majority, found, per_anatomy = scores["majority"], scores["classification"], scores["per_anatomy"]
    print(f"{scores['questions']} questions, {scores['empty_answers']} answers empty")
    lines = {
        "generated": scores["micro_average"] | {"acc_anatomy": found["accuracy"]},
        "mean over anatomies": scores["macro_average"],
        f"always {majority['answer'][:24]!r}": majority,
        "chance": scores["chance"],
    }
    metrics = (*ACCURACIES, "acc_anatomy")
    columns = ("class accuracy", "strict", "exact match", "anatomy")
    show(
        {line: [row.get(metric) for metric in metrics] for line, row in lines.items()},
        [(name, 15) for name in columns],
    )
    generated = scores["micro_average"] | {"meteor": scores["text"]["meteor"]}
    _print_text({"generated": generated, "mean over anatomies": scores["macro_average"]})
    _print_bertscore(scores)
    if set(per_anatomy) == {ANATOMIES[-1]}:
        return  # the answers are no places
    rows = {}
    for name in ANATOMIES:
        row, means = found["anatomies"][name], per_anatomy.get(name, {})
        rows[name] = [row[metric] for metric in ("precision", "recall", "f1", "support")]
        rows[name] += [means.get("acc_class"), means.get("acc_text")]
    for mean in ("macro", "macro_over_true_anatomies", "weighted"):
        rows[mean.replace("_", " ")] = [found[mean][metric] for metric in ("precision", "recall", "f1")]
    print()
    columns = [(name, 10) for name in ("precision", "recall", "F1", "support")]
    show(rows, [*columns, ("class acc.", 12), ("exact", 10)], "anatomy")


def _print_text(lines: dict[str, dict]) -> None:
    """Print BLEU as published (n-gram precisions), ROUGE and METEOR, with synonyms where nltk is there."""
    rows, meteor = {}, lines["generated"]["meteor"]
    for line, row in lines.items():
        rows[line] = [*(row[f"ngram_precision_{n}"] for n in ORDERS), row["rouge1"], row["rougeL"]]
        with_synonyms = isinstance(row.get("meteor"), float)
        rows[line].append(row["meteor" if with_synonyms else "meteor_without_synonyms"])
    show(rows, [(name, 9) for name in SHOWN_TEXT])
    print("BLEU as published: n-gram precisions.")
    if isinstance(meteor, str):
        print(f"METEOR without synonyms; with them: {meteor}")


def _print_bertscore(scores: dict) -> None:
    if found := scores.get("bertscore"):
        values = ", ".join(f"{name} {found[name]:.3f}" for name in ("f1", "precision", "recall"))
        print(f"BERTScore {values} ({found['variant']})")
