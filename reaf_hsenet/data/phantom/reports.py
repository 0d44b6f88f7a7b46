"""Writes the report of a phantom: what is present, in varied wording, among normal and negated sentences.

The order is CT-RATE's: airways, vessels and heart, oesophagus, lymph nodes, lungs, pleura, abdomen, bones.
The wording is data: sentences.json.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

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

SENTENCES = json.loads((Path(__file__).parent / "sentences.json").read_text(encoding="utf-8"))
MAX_WORDS = 220
LUNG_LABELS = (
    *("Emphysema", "Mosaic attenuation pattern", "Peribronchial thickening", "Bronchiectasis"),
    *("Interlobular septal thickening", "Lung opacity", "Consolidation", "Atelectasis"),
    *("Pulmonary fibrotic sequela", "Lung nodule"),
)
# Words for whole groups of lobes.
LUNG_PHRASES = (
    (LOBES, ("both lungs", "all lobes of both lungs")),
    (RIGHT_LUNG, ("the right lung", "all lobes of the right lung")),
    (LEFT_LUNG, ("the left lung", "both lobes of the left lung")),
    (UPPER_LOBES, ("the upper lobes of both lungs", "both upper lobes", "bilateral upper lobes")),
    (LOWER_LOBES, ("the lower lobes of both lungs", "both lower lobes", "bilateral lower lobes")),
)
LOBE_PHRASES = ("the {side} {part} lobe", "the {part} lobe of the {side} lung", "the {side} lung {part} lobe")


def write_report(findings: Iterable[Finding], rng: np.random.Generator) -> tuple[str, str]:
    """Return a patient's (Findings_EN, Impressions_EN), at most about 220 words in all but the sickest."""
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
                say(SENTENCES["absent"][label], SENTENCES["absent_share"].get(label, 0.12))

    normal = SENTENCES["normal"]
    say(normal["airways"], 0.5)
    describe("Medical material")
    say(normal["vessels"], 0.3)
    describe("Arterial wall calcification", "Coronary artery wall calcification", "Cardiomegaly")
    describe("Pericardial effusion", "Hiatal hernia", "Lymphadenopathy")
    if rng.random() < 0.4:
        sentences.append((_choose(normal["lungs"], rng), False))
    if not any(find(findings, label) for label in LUNG_LABELS):
        say(normal["clear lungs"])
    describe(*LUNG_LABELS, "Pleural effusion")
    say(normal["abdomen"], 0.4)
    say(normal["bones"], 0.4)
    while sum(len(sentence.split()) for sentence, _ in sentences) > MAX_WORDS:
        spare = [i for i, (_, optional) in enumerate(sentences) if optional]
        if not spare:
            break
        del sentences[_choose(spare, rng)]
    return " ".join(sentence for sentence, _ in sentences), _summarise(findings, rng)


def _choose(choices: Sequence, rng: np.random.Generator):
    return choices[rng.integers(len(choices))]


def _state(label: str, findings: list[Finding], rng: np.random.Generator) -> list[str]:
    """Return sentences that state one label: one sentence for all places that share size and kind."""
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
        amount = "moderate" if size < 50 else "large"
        words = {
            "place": phrase_places(label, places, rng),
            "side": places[0],
            "Side": places[0].capitalize(),
            "size": _length(size, rng),
            "ratio": f"{size:.2f}",
            "kind": kind or _choose(("solid", "noncalcified", "parenchymal"), rng),
            "Kind": kind.capitalize(),
            "amount": "small" if size < 25 else amount,
        }
        templates = SENTENCES["present"][kind if label == "Medical material" else label]
        sentences.append(_choose(templates, rng).format(**words))
    return sentences


def _length(millimetres: float, rng: np.random.Generator) -> str:
    if millimetres >= 20 and rng.random() < 0.25:
        return f"{millimetres / 10:g} cm"
    return f"{millimetres:g} mm"


def phrase_places(label: str, places: list[str], rng: np.random.Generator) -> str:
    """Return words for a set of places, e.g. "both upper lobes" or "the aortic arch and the LAD"."""
    if label == "Coronary artery wall calcification" and len(places) == 3 and rng.random() < 0.5:
        return "all three coronary arteries"
    if places[0] not in LOBES:
        article = "" if label == "Lymphadenopathy" else "the "
        return _join([article + place for place in places])
    for lobes, phrases in LUNG_PHRASES:
        if set(places) == set(lobes):
            return _choose(phrases, rng)
    phrase = _choose(LOBE_PHRASES, rng)
    sides_and_parts = [place.split()[:2] for place in places]
    return _join([phrase.format(side=side, part=part) for side, part in sides_and_parts])


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _summarise(findings: list[Finding], rng: np.random.Generator) -> str:
    if not findings:
        return "Thoracic CT examination within normal limits."
    sentences = []
    for label in LABELS:
        found = find(findings, label)
        places = [finding.place for finding in found]
        if label == "Medical material":
            sentences += [f"{finding.kind.capitalize()}." for finding in found]
        elif found:
            where = f" in {phrase_places(label, places, rng)}" if places[0] in LOBES else ""
            if label == "Pleural effusion":
                where = " on both sides" if len(places) == 2 else f" on the {places[0]}"
            name = SENTENCES["summaries"].get(label, label.lower())
            sentences.append(f"{name.capitalize()}{where}.")
    return " ".join(sentences)
