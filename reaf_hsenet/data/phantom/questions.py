"""Questions about a phantom with answers that follow from its findings, in RadGenome-ChestCT's columns."""

from collections.abc import Iterable
from os.path import commonprefix

import numpy as np

from reaf_hsenet.data.phantom.findings import LABELS, LOBES, SIZES, Finding, find

QUESTION_COLUMNS = ("Volumename", "Anatomy", "Abnormality", "Size", "Question", "Answer")
TEMPLATES = {
    "location": ("Where is the {abnormality}?", "Which part shows {abnormality}?"),
    "abnormality": ("What abnormality is seen in the {anatomy}?", "What is abnormal in the {anatomy}?"),
    "presence": (
        "Is there {abnormality}?",
        "Does this scan show {abnormality}?",
        "Is {abnormality} present?",
    ),
    "size": ("How large is the {abnormality}{place}?", "What is the size of the {abnormality}{place}?"),
}
# RadGenome's name of the region of each label; devices are not tied to one region.
REGIONS = dict.fromkeys(LABELS, "lung") | {
    "Medical material": "",
    "Arterial wall calcification": "mediastinum",
    "Cardiomegaly": "heart",
    "Pericardial effusion": "heart",
    "Coronary artery wall calcification": "heart",
    "Hiatal hernia": "esophagus",
    "Lymphadenopathy": "mediastinum",
    "Peribronchial thickening": "trachea and bronchie",
    "Bronchiectasis": "trachea and bronchie",
    "Pleural effusion": "pleura",
}


def anatomy_path(label: str, places: Iterable[str]) -> str:
    """Return RadGenome's path of the smallest part that holds all places, e.g. "lung/right lung"."""
    region, paths = REGIONS[label], []
    for place in places:
        path = [region]
        if region in ("lung", "pleura"):
            path += [f"{place.split()[0]} {region}", *([place] if place in LOBES else [])]
        paths.append(path)
    return "/".join(commonprefix(paths))


def ask_questions(
    volume_name: str, findings: Iterable[Finding], rng: np.random.Generator
) -> dict[str, list[dict[str, str]]]:
    """Return a few questions of each kind: {kind, as in TEMPLATES: rows of QUESTION_COLUMNS}."""
    findings = list(findings)
    present = [label for label in LABELS if find(findings, label)]
    absent = [label for label in LABELS if label not in present]
    rows: dict[str, list[dict[str, str]]] = {kind: [] for kind in TEMPLATES}

    def some(choices: list, most: int) -> list:
        return [choices[i] for i in rng.permutation(len(choices))[:most]]

    def ask(kind: str, answer: str, anatomy: str, abnormality: str, size: str = "", place: str = "") -> None:
        template = TEMPLATES[kind][rng.integers(len(TEMPLATES[kind]))]
        question = template.format(abnormality=abnormality, anatomy=anatomy, place=place)
        cells = (volume_name, anatomy, abnormality, size, question, answer)
        rows[kind].append(dict(zip(QUESTION_COLUMNS, cells, strict=True)))

    for label in some(present, 2) + some(absent, 2):
        ask("presence", "yes" if label in present else "no", REGIONS[label], label.lower())

    for label in some([label for label in present if find(findings, label)[0].place], 2):
        places = dict.fromkeys(finding.place for finding in find(findings, label) if finding.place)
        ask("location", ", ".join(places), anatomy_path(label, places), label.lower())

    for region in some(sorted({*REGIONS.values()} - {""}), 2):
        seen = ", ".join(label.lower() for label in present if REGIONS[label] == region)
        ask("abnormality", seen or "none", region, seen)

    for finding in some([finding for finding in findings if finding.label in SIZES], 2):
        where = f" in the {finding.place}" if finding.place in LOBES else f" on the {finding.place}"
        if finding.label == "Lymphadenopathy":
            where = f" at the {finding.place} station"
        size, region = f"{finding.size:g} mm", REGIONS[finding.label]
        ask(
            "size",
            size,
            region,
            abnormality=finding.label.lower(),
            size=size,
            place=where if finding.place else "",
        )
    return rows
