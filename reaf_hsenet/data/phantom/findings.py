"""The findings that a phantom chest CT can have: CT-RATE's 18 labels, each with a place, a size and a kind.

A `Finding` holds one label at one place. The same values are drawn into the volume (drawing.py), stated in
the report (reports.py) and read back from it (labeler.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# The share of patients with each label, in CT-RATE's order of labels. Labels that show at a coarse resolution
# are the most frequent. A patient has between four and five labels on average.
FREQUENCIES = {
    "Medical material": 0.28,
    "Arterial wall calcification": 0.32,
    "Cardiomegaly": 0.30,
    "Pericardial effusion": 0.22,
    "Coronary artery wall calcification": 0.18,
    "Hiatal hernia": 0.26,
    "Lymphadenopathy": 0.18,
    "Emphysema": 0.28,
    "Atelectasis": 0.34,
    "Lung nodule": 0.20,
    "Lung opacity": 0.38,
    "Pulmonary fibrotic sequela": 0.26,
    "Pleural effusion": 0.40,
    "Mosaic attenuation pattern": 0.18,
    "Peribronchial thickening": 0.16,
    "Consolidation": 0.38,
    "Bronchiectasis": 0.15,
    "Interlobular septal thickening": 0.21,
}
NORMAL_SHARE = 0.05
LABELS = tuple(FREQUENCIES)

SIDES = ("right", "left")
LOBES = ("right upper lobe", "right middle lobe", "right lower lobe", "left upper lobe", "left lower lobe")
RIGHT_LUNG, LEFT_LUNG = LOBES[:3], LOBES[3:]
UPPER_LOBES = ("right upper lobe", "left upper lobe")
LOWER_LOBES = ("right lower lobe", "left lower lobe")
LUNG_PATTERNS = (LOBES, RIGHT_LUNG, LEFT_LUNG, UPPER_LOBES, LOWER_LOBES)
AORTA_PARTS = ("ascending aorta", "aortic arch", "descending aorta")
CORONARIES = ("left anterior descending artery", "circumflex artery", "right coronary artery")
NODE_STATIONS = (
    *("right paratracheal", "prevascular", "subcarinal"),
    *("right hilar", "left hilar", "right axillary", "left axillary"),
)
SIDED_DEVICES = ("pacemaker", "port catheter")
DEVICES = (*SIDED_DEVICES, "sternal wires", "spinal screws")

# Where a label can be, and in how many places at most.
PLACES = {
    "Medical material": (DEVICES, 2),
    "Arterial wall calcification": (AORTA_PARTS, 3),
    "Coronary artery wall calcification": (CORONARIES, 3),
    "Lymphadenopathy": (NODE_STATIONS, 3),
    "Bronchiectasis": (LOBES, 2),
    "Pulmonary fibrotic sequela": (LOBES, 2),
    "Pleural effusion": (SIDES, 2),
}
WIDESPREAD = ("Mosaic attenuation pattern", "Peribronchial thickening", "Interlobular septal thickening")
AIRLESS = ("Consolidation", "Atelectasis")
# The smallest and the largest size in mm of the labels that have one.
SIZES = {
    "Pericardial effusion": (12, 36),
    "Hiatal hernia": (40, 90),
    "Lymphadenopathy": (20, 44),
    "Lung nodule": (32, 60),
    "Pleural effusion": (10, 75),
}
# The order in which labels draw their random numbers: another one would change every phantom.
DRAWN = (
    *LABELS[: LABELS.index("Emphysema")],
    *("Emphysema", *WIDESPREAD, "Bronchiectasis", "Pulmonary fibrotic sequela", "Lung opacity"),
    *(*AIRLESS, "Lung nodule", "Pleural effusion"),
)


@dataclass(frozen=True, order=True)
class Finding:
    """One label at one place.

    place: a lobe, side, vessel or lymph node station; empty where the label itself names the place.
    size: in mm, of a nodule or hernia its diameter, of a lymph node its short axis, of an effusion its
        thickness; the cardiothoracic ratio for cardiomegaly; 0 for other labels.
    kind: device, severity, extent or calcification, else empty.
    """

    label: str
    place: str = ""
    size: float = 0.0
    kind: str = ""

    @property
    def side(self) -> str:
        """The right or left side of a place that has one."""
        return self.place.split()[0]


def labels_of(findings: Iterable[Finding]) -> list[int]:
    """Return the 18 values (1 present, 0 absent) in the order of LABELS."""
    present = {finding.label for finding in findings}
    return [int(label in present) for label in LABELS]


def find(findings: Iterable[Finding], label: str) -> list[Finding]:
    """Return the findings that carry a label."""
    return [finding for finding in findings if finding.label == label]


def sample_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draw a patient's findings, sorted. Independent places, sizes and kinds tell patients apart."""

    def some(choices: Sequence[str], most: int) -> list[str]:
        count = min(int(rng.integers(1, most + 1)), len(choices))
        return [choices[i] for i in sorted(rng.choice(len(choices), count, replace=False))]

    def one(choices: Sequence):
        return choices[rng.integers(len(choices))]

    def describe(label: str, place: str, kind: str) -> Finding:
        """Draw what each place has of its own: a device's side, a size, whether a nodule is calcified."""
        if label == "Medical material":
            return Finding(label, one(SIDES) if place in SIDED_DEVICES else "", kind=place)
        size = 0.0
        if label in SIZES:
            low, high = SIZES[label]
            size = float(rng.integers(low, high + 1))
        elif label == "Cardiomegaly":
            size = round(float(rng.uniform(0.55, 0.72)), 2)
        if label == "Lung nodule" and rng.random() < 0.3:
            kind = "calcified"
        return Finding(label, place, size, kind)

    if rng.random() < NORMAL_SHARE:
        return ()
    present = {label for label, share in FREQUENCIES.items() if rng.random() < share}
    findings, aerated = [], LOBES
    for label in [label for label in DRAWN if label in present]:
        places, kind = [""], ""
        if label in PLACES:
            places = some(*PLACES[label])
        elif label in WIDESPREAD:
            places = one(LUNG_PATTERNS)
        elif label == "Emphysema":
            places = one((LOBES, UPPER_LOBES, RIGHT_LUNG, LEFT_LUNG))
            kind = one(("mild", "moderate", "severe"))
        elif label == "Lung opacity":
            kind = one(("patchy", "diffuse"))
            places = one(LUNG_PATTERNS) if rng.random() < 0.4 else some(LOBES, 2)
        elif label in (*AIRLESS, "Lung nodule"):
            places = some(aerated, 2)
            # A nodule or a collapse inside a consolidated lobe could not be seen.
            aerated = [lobe for lobe in aerated if lobe not in places]
        findings += [describe(label, place, kind) for place in places]
    return tuple(sorted(findings))
