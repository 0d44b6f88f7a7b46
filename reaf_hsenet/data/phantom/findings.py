"""The findings a phantom chest CT can have: CT-RATE's 18 labels, each with a place, a size and a kind.

A `Finding` holds one label at one place. The same values are drawn into the volume (drawing.py),
stated in the report (reports.py) and read back from it (labeler.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
RIGHT_LUNG, LEFT_LUNG = LOBES[:3], LOBES[3:]
UPPER_LOBES = ("right upper lobe", "left upper lobe")
LOWER_LOBES = ("right lower lobe", "left lower lobe")
LUNG_PATTERNS = (LOBES, RIGHT_LUNG, LEFT_LUNG, UPPER_LOBES, LOWER_LOBES)
AORTA_PARTS = ("ascending aorta", "aortic arch", "descending aorta")
CORONARIES = ("left anterior descending artery", "circumflex artery", "right coronary artery")
NODE_STATIONS = (
    "right paratracheal",
    "prevascular",
    "subcarinal",
    "right hilar",
    "left hilar",
    "right axillary",
    "left axillary",
)
DEVICES = ("pacemaker", "port catheter", "sternal wires", "spinal screws")

# A phantom has between four and five labels. What shows at coarse resolution is the most common.
FREQUENCIES = dict(
    zip(
        LABELS,
        (
            0.28,
            0.32,
            0.30,
            0.22,
            0.18,
            0.26,
            0.18,
            0.28,
            0.34,
            0.20,
            0.38,
            0.26,
            0.40,
            0.18,
            0.16,
            0.38,
            0.15,
            0.21,
        ),
        strict=True,
    )
)
NORMAL_SHARE = 0.05


@dataclass(frozen=True, order=True)
class Finding:
    """One label at one place.

    place: a lobe, side, vessel or lymph node station; empty where the label itself says the place. size: mm
    (nodule and hernia diameter, lymph node short axis, thickness of an effusion); the cardiothoracic ratio
    for cardiomegaly; 0 when the label has none. kind: device, severity, extent or calcification, else empty.
    """

    label: str
    place: str = ""
    size: float = 0.0
    kind: str = ""


def labels_of(findings: Iterable[Finding]) -> list[int]:
    """The 18 values (1 present, 0 absent) in the order of LABELS."""
    present = {finding.label for finding in findings}
    return [int(label in present) for label in LABELS]


def find(findings: Iterable[Finding], label: str) -> list[Finding]:
    """The findings that carry a label."""
    return [finding for finding in findings if finding.label == label]


def sample_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw a patient's findings, sorted. Independent places, sizes and kinds tell patients apart."""

    def some(choices: tuple[str, ...], most: int) -> list[str]:
        count = min(int(rng.integers(1, most + 1)), len(choices))
        return [choices[i] for i in sorted(rng.choice(len(choices), count, replace=False))]

    def one(choices: tuple) -> str | tuple[str, ...]:
        return choices[rng.integers(len(choices))]

    def millimetres(low: int, high: int) -> float:
        return float(rng.integers(low, high + 1))

    if rng.random() < NORMAL_SHARE:
        return ()
    present = {label for label, share in FREQUENCIES.items() if rng.random() < share}
    findings: list[Finding] = []

    def add(label: str, places: Iterable[str] = ("",), size: float = 0.0, kind: str = "") -> None:
        findings.extend(Finding(label, place, size, kind) for place in places)

    if "Medical material" in present:
        for device in some(DEVICES, 2):
            sided = device in ("pacemaker", "port catheter")
            add("Medical material", [one(("right", "left")) if sided else ""], kind=device)
    if "Arterial wall calcification" in present:
        add("Arterial wall calcification", some(AORTA_PARTS, 3))
    if "Cardiomegaly" in present:
        add("Cardiomegaly", size=round(float(rng.uniform(0.55, 0.72)), 2))
    if "Pericardial effusion" in present:
        add("Pericardial effusion", size=millimetres(6, 24))
    if "Coronary artery wall calcification" in present:
        add("Coronary artery wall calcification", some(CORONARIES, 3))
    if "Hiatal hernia" in present:
        add("Hiatal hernia", size=millimetres(40, 90))
    if "Lymphadenopathy" in present:
        for station in some(NODE_STATIONS, 3):
            add("Lymphadenopathy", [station], size=millimetres(12, 36))
    if "Emphysema" in present:
        add(
            "Emphysema",
            one((LOBES, UPPER_LOBES, RIGHT_LUNG, LEFT_LUNG)),
            kind=one(("mild", "moderate", "severe")),
        )
    for label in ("Mosaic attenuation pattern", "Peribronchial thickening", "Interlobular septal thickening"):
        if label in present:
            add(label, one(LUNG_PATTERNS))
    if "Bronchiectasis" in present:
        add("Bronchiectasis", some(LOBES, 2))
    if "Pulmonary fibrotic sequela" in present:
        add("Pulmonary fibrotic sequela", some(LOBES, 2))
    if "Lung opacity" in present:
        extent = one(("patchy", "diffuse"))
        add("Lung opacity", one(LUNG_PATTERNS) if rng.random() < 0.4 else some(LOBES, 2), kind=extent)
    # Airless lobes are kept apart: a nodule or a collapse inside a consolidated lobe could not be seen.
    aerated = LOBES
    for label in ("Consolidation", "Atelectasis"):
        if label in present:
            affected = some(aerated, 2)
            add(label, affected)
            aerated = tuple(lobe for lobe in aerated if lobe not in affected)
    if "Lung nodule" in present:
        for lobe in some(aerated, 2):
            add(
                "Lung nodule", [lobe], size=millimetres(8, 30), kind="calcified" if rng.random() < 0.3 else ""
            )
    if "Pleural effusion" in present:
        for side in some(("right", "left"), 2):
            add("Pleural effusion", [side], size=millimetres(10, 75))
    return tuple(sorted(findings))
