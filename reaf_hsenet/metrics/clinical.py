"""Clinical scores of generated reports: which of CT-RATE's 18 findings they name, and how large.

Labels (n, 18) of 0 and 1, in the order of LABELS, come from the phantoms' exact labeler (`phantom_labels`) or
from a BERT or RoBERTa classifier (`load_classifier`), such as CT-RATE's RadBertClassifier. Both label the
generated text and, where there is no table of true labels, the reference.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reaf_hsenet.config import TextConfig
from reaf_hsenet.data.phantom.findings import LABELS, find, labels_of
from reaf_hsenet.data.phantom.labeler import read_report
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_object
from reaf_hsenet.metrics.bertscore import load_text_reader
from reaf_hsenet.metrics.classification import or_none
from reaf_hsenet.models.text_encoder import Pooler, TextEncoder
from reaf_hsenet.weights.files import load_strictly, read_weights
from reaf_hsenet.weights.names import classifier_table, import_state

CT_RATE_FILE = "RadBertClassifier.pth"
SIZE_TOLERANCE = (2.0, 0.1)  # mm, or of the reference's size: whichever is more


def label_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return (C,) each of precision, recall, f1, support (positives) and predicted (their number).

    predicted, truth: (n, C) of 0 and 1. Recall is NaN without positives, F1 without positives and
    predictions. Precision without predictions is 0.
    """
    predicted, truth = predicted.astype(bool), truth.astype(bool)
    hits, named, positives = (m.sum(0) for m in (predicted & truth, predicted, truth))
    with np.errstate(invalid="ignore"):
        return {
            "precision": np.nan_to_num(hits / named),
            "recall": hits / positives,
            "f1": 2 * hits / (named + positives),
            "support": positives,
            "predicted": named,
        }


def clinical_report(predicted: np.ndarray, truth: np.ndarray, names: Sequence[str] = LABELS) -> dict:
    """Precision, recall and F1 of each finding; micro, over all pairs of report and finding; macro, over
    findings; CRG.

    predicted, truth: (n, C) of 0 and 1. A finding without positives has no recall (None); `macro` leaves it
    out and `left_out_of_macro` names it.
    """
    metrics = ("precision", "recall", "f1")
    scores, micro = label_scores(predicted, truth), label_scores(predicted.ravel(), truth.ravel())
    kept = scores["support"] > 0
    classes = {name: {m: or_none(values[j]) for m, values in scores.items()} for j, name in enumerate(names)}
    return {
        "reports": len(truth),
        "classes": classes,
        "micro": {m: or_none(micro[m]) for m in metrics},
        "macro": {m: or_none(scores[m][kept].mean()) if kept.any() else None for m in metrics},
        "crg": crg(predicted, truth),
        "classes_in_macro": int(kept.sum()),
        "left_out_of_macro": [name for name, has in zip(names, kept, strict=True) if not has],
    }


def crg(predicted: np.ndarray, truth: np.ndarray) -> float | None:
    """Return the CRG score (Hamamci et al. 2025, arXiv 2505.17167), by which the VLM3D challenge ranks.

    predicted, truth: (n, C) of 0 and 1. A finding that is named or missed weighs r, a false one 1, where r is
    half the ratio of negatives to positives: all right is 1, naming everything or nothing 1/3. None without
    positives, and where all are positive: there the challenge's code stops, or gives 0.
    """
    predicted, truth = predicted.astype(bool), truth.astype(bool)
    positives, negatives = truth.sum(), (~truth).sum()
    if not positives or not negatives:
        return None
    weight = negatives / (2 * positives)
    hits, misses, false = (m.sum() for m in (predicted & truth, ~predicted & truth, predicted & ~truth))
    score, best = weight * (hits - misses) - false, weight * positives
    return float(best / (2 * best - score))


def phantom_labels(texts: Sequence[str]) -> np.ndarray:
    """(n, 18) int64: what the phantoms' labeler reads. Exact on phantom reports; rules only on others."""
    return np.array([labels_of(read_report(text)) for text in texts]).reshape(-1, len(LABELS))


def size_agreement(predictions: Sequence[str], references: Sequence[str]) -> dict:
    """Count how often the generated text agrees on the size of findings that both texts name.

    Read by the phantoms' labeler. Only findings whose reference tells a size are `compared`; a generated text
    that leaves it open does not agree. The largest must agree within SIZE_TOLERANCE; mean_abs_error_mm is
    over the `both_stated`. None where there is nothing to compare.
    """
    agrees: list[bool] = []
    errors = []
    for texts in zip(predictions, references, strict=True):
        reports = [read_report(text) for text in texts]
        for label in LABELS:
            if label == "Cardiomegaly":  # whose size is a ratio
                continue
            found, size = (max((f.size for f in find(report, label)), default=None) for report in reports)
            if found is not None and size:
                error = abs(found - size)
                agrees.append(bool(found) and error <= max(SIZE_TOLERANCE[0], SIZE_TOLERANCE[1] * size))
                errors += [error] * bool(found)
    return {
        "agreement": float(np.mean(agrees)) if agrees else None,
        "compared": len(agrees),
        "both_stated": len(errors),
        "mean_abs_error_mm": float(np.mean(errors)) if errors else None,
    }


class ReportClassifier(nn.Module):
    """ids (B, T) -> logits (B, 18): tanh of a Linear of the class token, and a Linear."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.encoder = TextEncoder(**vars(config))
        self.pooler = Pooler(config.width)
        self.head = nn.Linear(config.width, len(LABELS))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.pooler(self.encoder(ids, mask)))


def load_classifier(
    folder: Path, device: torch.device | str = "cpu", batch_size: int = 32
) -> Callable[[Sequence[str]], np.ndarray]:
    """Return a function from texts to labels (n, 18) int64: 1 where the sigmoid is 0.5 or more.

    folder: config.json, tokenizer, and weights under the names of transformers' BertForSequenceClassification
    or RobertaForSequenceClassification, or CT-RATE's RadBertClassifier.pth. Where config.json names the
    classes, they are put in the order of LABELS. An empty text has no label. Raises InputError, by name, for
    weights that do not fit, and for other classes.
    """
    folder, reader = Path(folder), load_text_reader(folder)
    order = _label_order(folder / "config.json")
    # A RadBERT folder that CT-RATE's file was put into has weights of its own, without a classifier.
    file = folder / CT_RATE_FILE
    source = file if file.is_file() else folder
    published = read_weights(source)
    model = ReportClassifier(reader.config)
    load_strictly(model, import_state(classifier_table(published), published), str(source))
    model.eval().to(device)

    @torch.no_grad()
    def labels(texts: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(texts), len(LABELS)), dtype=np.int64)
        ids = {i: reader.ids(text) for i, text in enumerate(texts) if text.strip()}
        by_length = sorted(ids, key=lambda i: len(ids[i]))
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            logits = model(*reader.batch([ids[i] for i in rows], device))
            found[rows] = (logits.sigmoid() >= 0.5).cpu().numpy()[:, order]
        return found

    return labels


def _label_order(path: Path) -> list[int]:
    """Return the columns of the classifier's output in the order of LABELS, by the names of id2label."""
    named = {str(name).lower(): int(i) for i, name in read_object(path).get("id2label", {}).items()}
    # What transformers writes where nobody named the classes.
    if all(re.fullmatch(r"label_\d+", name) for name in named):
        return list(range(len(LABELS)))
    wanted = {label.lower() for label in LABELS}
    if set(named) != wanted or sorted(named.values()) != list(range(len(LABELS))):
        other = ", ".join(sorted(set(named) ^ wanted)[:3]) or "ids other than 0 to 17"
        raise InputError(
            f"{path}: id2label differs from CT-RATE's {len(LABELS)} labels in {other}; expected those"
        )
    return [named[label.lower()] for label in LABELS]
