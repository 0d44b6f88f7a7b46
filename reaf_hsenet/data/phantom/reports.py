"""Writes the report of a phantom: what is present, in varied wording, among normal and negated sentences.

The order is CT-RATE's: airways, vessels and heart, oesophagus, lymph nodes, lungs, pleura, abdomen, bones.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from reaf_hsenet.data.phantom.findings import (
    LABELS,
    LEFT_LUNG,
    LOBES,
    LOWER_LOBES,
    RIGHT_LUNG,
    UPPER_LOBES,
    Finding,
    find,
)
from reaf_hsenet.data.phantom.sentences import ABSENT, ABSENT_SHARE, NORMAL, PRESENT, SUMMARIES

MAX_WORDS = 220
LUNG_LABELS = (
    "Emphysema",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Bronchiectasis",
    "Interlobular septal thickening",
    "Lung opacity",
    "Consolidation",
    "Atelectasis",
    "Pulmonary fibrotic sequela",
    "Lung nodule",
)


def write_report(findings: Iterable[Finding], rng: np.random.Generator) -> tuple[str, str]:
    """(Findings_EN, Impressions_EN) of a patient, at most about 220 words in all but the sickest."""
    findings = list(findings)
    sentences: list[tuple[str, bool]] = []  # (sentence, whether it may be left out)

    def say(templates: Sequence[str], chance: float = 1.0) -> None:
        if rng.random() < chance:
            sentences.append((_choose(templates, rng), True))

    def describe(*labels: str) -> None:
        for label in labels:
            stated = _state(label, find(findings, label), rng)
            sentences.extend((sentence, False) for sentence in stated)
            if not stated:
                say(ABSENT[label], ABSENT_SHARE.get(label, 0.12))

    say(NORMAL["airways"], 0.5)
    describe("Medical material")
    say(NORMAL["vessels"], 0.3)
    describe("Arterial wall calcification", "Coronary artery wall calcification", "Cardiomegaly")
    describe("Pericardial effusion", "Hiatal hernia", "Lymphadenopathy")
    if rng.random() < 0.4:
        sentences.append((_choose(NORMAL["lungs"], rng), False))
    if not any(find(findings, label) for label in LUNG_LABELS):
        say(NORMAL["clear lungs"])
    describe(*LUNG_LABELS, "Pleural effusion")
    say(NORMAL["abdomen"], 0.4)
    say(NORMAL["bones"], 0.4)
    while sum(len(sentence.split()) for sentence, _ in sentences) > MAX_WORDS:
        spare = [i for i, (_, optional) in enumerate(sentences) if optional]
        if not spare:
            break
        del sentences[_choose(spare, rng)]
    return " ".join(sentence for sentence, _ in sentences), _summarise(findings, rng)


def _choose(choices: Sequence, rng: np.random.Generator):
    return choices[rng.integers(len(choices))]


def _state(label: str, findings: list[Finding], rng: np.random.Generator) -> list[str]:
    """Sentences that state one label: one for all places that share size and kind."""
    if label == "Pleural effusion" and len(findings) == 2 and rng.random() < 0.5:
        sizes = {finding.place: _length(finding.size, rng) for finding in findings}
        where = f"{sizes['right']} on the right and {sizes['left']} on the left"
        return [f"Bilateral pleural effusion is observed, measuring {where}."]
    groups: dict[tuple, list[str]] = {}
    for finding in findings:
        # A side is stated in a sentence of its own; lobes and vessels that share a description are listed.
        apart = finding.place if label in ("Pleural effusion", "Medical material") else ""
        groups.setdefault((finding.size, finding.kind, apart), []).append(finding.place)
    sentences = []
    for (size, kind, _), places in groups.items():
        key = kind if label == "Medical material" else label
        words = {
            "place": phrase_places(label, places, rng),
            "side": places[0],
            "Side": places[0].capitalize(),
            "size": _length(size, rng),
            "ratio": f"{size:.2f}",
            "kind": kind or _choose(("solid", "noncalcified", "parenchymal"), rng),
            "Kind": kind.capitalize(),
            "amount": "small" if size < 25 else "moderate" if size < 50 else "large",
        }
        sentences.append(_choose(PRESENT[key], rng).format(**words))
    return sentences


def _length(millimetres: float, rng: np.random.Generator) -> str:
    if millimetres >= 20 and rng.random() < 0.25:
        return f"{millimetres / 10:g} cm"
    return f"{millimetres:g} mm"


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def phrase_places(label: str, places: list[str], rng: np.random.Generator) -> str:
    """Words for a set of places, e.g. "both upper lobes" or "the aortic arch and the descending aorta"."""
    if label == "Coronary artery wall calcification" and len(places) == 3 and rng.random() < 0.5:
        return "all three coronary arteries"
    if places[0] not in LOBES:
        article = "" if label == "Lymphadenopathy" else "the "
        return _join([article + place for place in places])
    for lobes, phrases in (
        (LOBES, ("both lungs", "all lobes of both lungs")),
        (RIGHT_LUNG, ("the right lung", "all lobes of the right lung")),
        (LEFT_LUNG, ("the left lung", "both lobes of the left lung")),
        (UPPER_LOBES, ("the upper lobes of both lungs", "both upper lobes", "bilateral upper lobes")),
        (LOWER_LOBES, ("the lower lobes of both lungs", "both lower lobes", "bilateral lower lobes")),
    ):
        if set(places) == set(lobes):
            return _choose(phrases, rng)
    style = _choose(
        ("the {side} {part} lobe", "the {part} lobe of the {side} lung", "the {side} lung {part} lobe"), rng
    )
    return _join([style.format(side=place.split()[0], part=place.split()[1]) for place in places])


def _summarise(findings: list[Finding], rng: np.random.Generator) -> str:
    if not findings:
        return "Thoracic CT examination within normal limits."
    sentences = []
    for label in LABELS:
        places = list(dict.fromkeys(finding.place for finding in find(findings, label)))
        if label == "Medical material":
            sentences += [f"{finding.kind.capitalize()}." for finding in find(findings, label)]
        elif places:
            name = SUMMARIES.get(label, label.lower())
            where = f" in {phrase_places(label, places, rng)}" if places[0] in LOBES else ""
            if label == "Pleural effusion":
                where = " on both sides" if len(places) == 2 else f" on the {places[0]}"
            sentences.append(f"{name.capitalize()}{where}.")
    return " ".join(sentences)
