"""Scores of generated reports and answers: what evaluate.py writes as json and csv, and prints.

The csv's columns have the published names (HSENet, commit c7198f3): bleu1 to bleu4 are n-gram precisions. Its
meteor needs nltk; without that there is meteor_without_synonyms alone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reaf_hsenet.data.labels import label_tables
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.phantom.findings import LABELS
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.evaluate.command import Command
from reaf_hsenet.evaluate.language_evaluation import Asked
from reaf_hsenet.evaluate.show import cell, show
from reaf_hsenet.metrics.bertscore import Bert, bert_score, load_bert
from reaf_hsenet.metrics.clinical import clinical_report, load_classifier, phantom_labels, size_agreement
from reaf_hsenet.metrics.places import are_phantoms, phantom_places, place_scores, rule_places
from reaf_hsenet.metrics.text import ORDERS, SAMPLE_SCORES, nltk_meteor, sample_scores, text_report
from reaf_hsenet.metrics.vqa import ANATOMIES, anatomy_of, answer_accuracies, vqa_report

Labeler = Callable[[Sequence[str]], np.ndarray]  # texts -> (n, 18) of 0 and 1
# Columns on the screen and their keys in the json. COMPARED: of generated reports and baselines.
COMPARED = {
    **{"micro-F1": "micro_f1", "macro-F1": "macro_f1", "precision": "precision", "recall": "recall"},
    **{"CRG": "crg", "BLEU-4": "ngram_precision_4", "METEOR": "meteor"},
}
TEXT = {f"BLEU-{n}": f"ngram_precision_{n}" for n in ORDERS}
TEXT |= {"ROUGE-1": "rouge1", "ROUGE-L": "rougeL", "METEOR": "meteor"}
FINDINGS = {"F1": "f1", "precision": "precision", "recall": "recall", "support": "support"}
ANSWERS = {"class accuracy": "acc_class", "strict": "acc_class_strict", "exact match": "acc_text"}


@dataclass(frozen=True)
class Readers:
    """The readers that texts are scored by. labeler: and its name; without one no findings are read.

    phantoms: the texts are phantoms' reports, with places and sizes. places: read real ones' by rules.
    """

    labeler: Labeler | None = None
    name: str | None = None
    phantoms: bool = False
    places: bool = False
    bert: Bert | None = None


def load_readers(command: Command, manifest: Manifest, ranks: Ranks) -> Readers:
    """Load what the flags name, on the first rank; the others score nothing."""
    if not ranks.main:
        return Readers()
    phantoms, bert = command.task == "mrg" and are_phantoms(manifest), None
    if command.bertscore:
        bert = load_bert(command.bertscore, command.bertscore_layer, ranks.device)
    labeler, name = (phantom_labels, "phantoms") if phantoms else (None, None)
    if command.classifier:
        labeler, name = load_classifier(command.classifier, ranks.device), str(command.classifier)
    return Readers(labeler, name, phantoms, command.places, bert)


def true_labels(manifest: Manifest, entries: list[dict]) -> np.ndarray | None:
    """(n, 18) in the order of LABELS, where the manifest has these labels of all of the entries."""
    if not set(LABELS) <= set(manifest.labels) or any(entry["labels"] is None for entry in entries):
        return None
    columns = [manifest.labels.index(label) for label in LABELS]
    return np.array([[entry["labels"][j] for j in columns] for entry in entries], dtype=np.int64)


def wanted_labels(command: Command, manifest: Manifest, rows: list[Asked]) -> np.ndarray | None:
    """Return the true labels of the rows, (n, 18): of --labels, else of the manifest, where it has all."""
    if command.labels:
        ids = [row.id for row in rows]
        (table,) = label_tables(command.labels, manifest, command.split)
        return table.values(ids, [[label] for label in LABELS]).astype(np.int64)
    entries = manifest.entries(command.split)
    return true_labels(manifest, [entries[row.entry] for row in rows])


def usual_report(manifest: Manifest) -> str | None:
    """Return the most frequent report of the training split, where there is one."""
    reports = Counter(clean_report(entry["text"]) for entry in manifest.splits.get("train", []))
    return reports.most_common(1)[0][0] if reports else None


def report_scores(
    predictions: list[str],
    rows: list[Asked],
    readers: Readers,
    truth: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    baselines: dict[str, list[str]] | None = None,
    usual: str | None = None,
) -> tuple[dict, list[dict]]:
    """(scores of generated reports, a csv row each).

    truth: (n, 18) labels; without them those that the labeler reads in the references. labels: (n, 18) of the
    predictions. Findings are scored where both are known. baselines: reports of others, scored beside. usual:
    the most frequent training report; without one that of the references is a baseline.
    """
    references, labeler = [row.truth for row in rows], readers.labeler
    scores, table = _text_scores(predictions, rows, readers.bert)
    if labeler and truth is None:
        truth = labeler(references)
    if labels is not None and truth is not None:
        scores["clinical"] = clinical_report(labels, truth)
    guess = usual or Counter(references).most_common(1)[0][0]
    others = {"most_frequent_report": [guess] * len(rows), **(baselines or {})}
    scores["baselines"] = guesses(truth) if "clinical" in scores else {}
    for name, texts in others.items():
        found = labeler(texts) if labeler and truth is not None else None
        scores["baselines"][name] = text_row(text_report(texts, references)) | finding_row(found, truth)
    scores["baselines"]["most_frequent_report"]["report"] = guess
    scores["generated"] = text_row(scores["text"]) | finding_row(labels, truth)
    scores["not_beaten"] = not_beaten(scores["generated"], scores["baselines"])
    if readers.phantoms:
        scores["attributes"] = {"size": size_agreement(predictions, references)}
    if readers.phantoms or readers.places:
        read = phantom_places if readers.phantoms else rule_places
        scores["places"] = place_scores(list(map(read, predictions)), list(map(read, references)))
        scores["places"]["reader"] = "phantoms" if readers.phantoms else "rules"
    return scores | {"labeler": readers.name}, table


def text_row(report: dict) -> dict[str, float]:
    """Return what rows are compared by; METEOR is without synonyms where nltk is not there."""
    meteor = report.get("meteor")
    meteor = meteor if isinstance(meteor, float) else report["meteor_without_synonyms"]
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
        found[name] = [
            shown
            for shown in both
            if generated[COMPARED[shown]] <= row[COMPARED[shown]] and shown not in ("precision", "recall")
        ]
    return {name: lost for name, lost in found.items() if lost}


def answer_scores(
    predictions: list[str], rows: list[Asked], bert: Bert | None = None
) -> tuple[dict, list[dict]]:
    """(scores of generated answers, a csv row each)."""
    answers = [row.truth for row in rows]
    scores, table = _text_scores(predictions, rows, bert)
    report = vqa_report(predictions, answers)
    report["chance"] |= class_chance(answers)
    for i, (text, answer) in enumerate(zip(predictions, answers, strict=True)):
        first = {"id": rows[i].id, "Question": rows[i].question, "Anatomy Type": anatomy_of(answer)}
        table[i] = first | table[i] | answer_accuracies(text, answer)
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
    references = [row.truth for row in rows]
    scores: dict = {"text": text_report(predictions, references)}
    table = []
    for text, row in zip(predictions, rows, strict=True):
        pair = text.strip(), row.truth.strip()
        found, meteor = sample_scores(*pair), nltk_meteor([pair])
        cells = {"id": row.id, "Question": row.question, "Ground Truth": row.truth, "pred": text}
        cells |= {f"bleu{n}": found[f"ngram_precision_{n}"] for n in ORDERS}
        cells |= {name: found[name] for name in ("rouge1", "rougeL")}
        cells |= {"meteor": meteor} if isinstance(meteor, float) else {}
        table.append(cells | {"meteor_without_synonyms": found["meteor_without_synonyms"]})
    if bert:
        found = bert_score(predictions, references, bert)
        means = {name: float(values.mean()) for name, values in found.items()}
        scores["bertscore"] = {"variant": bert.variant, **means}
        for cells, f1 in zip(table, found["f1"].tolist(), strict=True):
            cells["bert_f1"] = f1
    return scores, table


def print_reports(scores: dict) -> None:
    text = scores["text"]
    print(f"{text['reports']} reports, {text['empty_reports']} of them empty")
    _print_text(scores, {"generated": scores["generated"]})
    bleu = ", ".join(f"{text[f'corpus_bleu_{n}']:.3f}" for n in ORDERS)
    print(f"corpus BLEU 1 to 4, with brevity penalty: {bleu}")
    rows = {"generated": scores["generated"], **scores["baselines"]}
    _show(rows, COMPARED, "beside what needs no language model")
    for name, lost in scores["not_beaten"].items():
        print(f"the generated reports do not beat {name.replace('_', ' ')} in {', '.join(lost)}")
    if "clinical" in scores:
        _show(scores["clinical"]["classes"], {**FINDINGS, "named": "predicted"}, "finding")
    else:
        print("findings: left out; name a classifier of reports with --classifier")
    if places := scores.get("places"):
        columns = {name: name for name in ("precision", "recall", "agreement", "compared")}
        levels = {level: places[level] for level in ("presence", "side", "lobe")}
        _show(levels, columns, f"places, read by {places['reader']}")
    if "attributes" in scores:
        size = scores["attributes"]["size"]
        print(f"sizes agree where both name the finding: {cell(size['agreement'])} of {size['compared']}")


def print_answers(scores: dict) -> None:
    majority, found, per_anatomy = scores["majority"], scores["classification"], scores["per_anatomy"]
    micro, macro = scores["micro_average"], scores["macro_average"]
    print(f"{scores['questions']} questions, {scores['empty_answers']} answers empty")
    lines = {
        "generated": micro | {"acc_anatomy": found["accuracy"]},
        "mean over anatomies": macro,
        f"always {majority['answer'][:24]!r}": majority,
        "chance": scores["chance"],
    }
    _show(lines, {**ANSWERS, "anatomy": "acc_anatomy"})
    meteor = {"meteor": scores["text"]["meteor"]}
    _print_text(scores, {"generated": text_row(micro | meteor), "mean over anatomies": text_row(macro)})
    if set(per_anatomy) == {ANATOMIES[-1]}:
        return  # the answers are no places
    rows = {name: found["anatomies"][name] | per_anatomy.get(name, {}) for name in ANATOMIES}
    rows |= {mean: found[mean] for mean in ("macro", "macro_over_true_anatomies", "weighted")}
    _show(rows, {**FINDINGS, "class acc.": "acc_class", "exact": "acc_text"}, "anatomy")


def _print_text(scores: dict, rows: dict[str, dict]) -> None:
    """Print BLEU as published (n-gram precisions), ROUGE and METEOR, with synonyms where nltk is there."""
    _show(rows, TEXT)
    print("BLEU as published: n-gram precisions.")
    if isinstance(meteor := scores["text"]["meteor"], str):
        print(f"METEOR without synonyms; with them: {meteor}")
    if found := scores.get("bertscore"):
        values = ", ".join(f"{name} {found[name]:.3f}" for name in ("f1", "precision", "recall"))
        print(f"BERTScore {values} ({found['variant']})")


def _show(rows: dict[str, dict], columns: dict[str, str], title: str = "") -> None:
    """Print what rows have under the keys of columns, {name on the screen: key}."""
    values = {
        name.replace("_", " "): [row.get(key) for key in columns.values()] for name, row in rows.items()
    }
    print()
    show(values, [(name, max(10, len(name) + 1)) for name in columns], title)
