"""Questions about a phantom, and the answers that follow from its findings, as RadGenome-ChestCT's tables."""

from collections.abc import Iterable
from os.path import commonprefix

import numpy as np

from reaf_hsenet.data.phantom.findings import LABELS, LOBES, Finding, find

QUESTION_COLUMNS = ("Volumename", "Anatomy", "Abnormality", "Size", "Question", "Answer")
QUESTION_TYPES = ("location", "abnormality", "presence", "size")
# RadGenome's region names; devices are not tied to one region.
REGIONS = {
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
OTHER_REGION = "lung"
SIZED = ("Lung nodule", "Lymphadenopathy", "Hiatal hernia", "Pericardial effusion", "Pleural effusion")


def anatomy_path(label: str, places: Iterable[str]) -> str:
    """RadGenome's path of what holds all places: "lung/right lung" of two lobes of the right lung, "lung"
    of both lungs.
    """
    region = REGIONS.get(label, OTHER_REGION)
    paths = []
    for place in places:
        side = place.split()[0]
        lobe = [place] if place in LOBES else []
        paths.append(
            [region, f"{side} {region}", *lobe] if region == "lung" or region == "pleura" else [region]
        )
    return "/".join(commonprefix(paths))


def ask_questions(
    volume_name: str, findings: Iterable[Finding], rng: np.random.Generator
) -> dict[str, list[dict[str, str]]]:
    """A few questions of each type: {one of QUESTION_TYPES: rows of QUESTION_COLUMNS}."""
    findings = list(findings)
    present = [label for label in LABELS if find(findings, label)]
    absent = [label for label in LABELS if label not in present]
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in QUESTION_TYPES}

    def some(choices: list, most: int) -> list:
        return [choices[i] for i in rng.permutation(len(choices))[:most]]

    def ask(
        kind: str,
        templates: tuple[str, ...],
        answer: str,
        anatomy: str,
        abnormality: str = "",
        size: str = "",
        place: str = "",
    ) -> None:
        template = templates[rng.integers(len(templates))]
        question = template.format(abnormality=abnormality, anatomy=anatomy, place=place)
        cells = (volume_name, anatomy, abnormality, size, question, answer)
        rows[kind].append(dict(zip(QUESTION_COLUMNS, cells, strict=True)))

    presence = ("Is there {abnormality}?", "Does this scan show {abnormality}?", "Is {abnormality} present?")
    for label in some(present, 2) + some(absent, 2):
        answer = "yes" if label in present else "no"
        ask("presence", presence, answer, REGIONS.get(label, OTHER_REGION), label.lower())

    location = ("Where is the {abnormality}?", "Which part shows {abnormality}?")
    for label in some([label for label in present if find(findings, label)[0].place], 2):
        places = dict.fromkeys(finding.place for finding in find(findings, label) if finding.place)
        ask("location", location, ", ".join(places), anatomy_path(label, places), label.lower())

    abnormality = ("What abnormality is seen in the {anatomy}?", "What is abnormal in the {anatomy}?")
    regions = sorted({region for region in REGIONS.values() if region} | {OTHER_REGION})
    for region in some(regions, 2):
        seen = [label.lower() for label in present if REGIONS.get(label, OTHER_REGION) == region]
        ask("abnormality", abnormality, ", ".join(seen) or "none", region, ", ".join(seen))

    for finding in some([finding for finding in findings if finding.label in SIZED], 2):
        size = f"{finding.size:g} mm"
        side_or_lobe = f"in the {finding.place}" if finding.place in LOBES else f"on the {finding.place}"
        if finding.label == "Lymphadenopathy":
            side_or_lobe = f"at the {finding.place} station"
        templates = (
            "How large is the {abnormality}{place}?",
            "What is the size of the {abnormality}{place}?",
        )
        region = REGIONS.get(finding.label, OTHER_REGION)
        where = f" {side_or_lobe}" if finding.place else ""
        ask("size", templates, size, region, finding.label.lower(), size, where)
    return rows
