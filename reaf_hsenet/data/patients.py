"""Whose volumes they are, and which patients are held out: by a hash of their names, whatever their order."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

# CT-RATE's volumes and scans, train_1_a_1 and train_1_a; BIMCV's and BIDS's, sub-S1_ses-E1 and sub-S1/ses-E1.
PATIENT = (
    re.compile(r"(?:.*/)?((?:train|valid)_\d+)_[a-z]+(?:_\d+)?"),
    re.compile(r"(?:.*[/_])?(sub-[^/_]+)(?:[/_].*)?"),
)


def patient_name(entry: dict) -> str:
    """Return the patient of a manifest's entry, read off its id or its scan; else the scan itself."""
    names = (pattern.fullmatch(entry[key]) for key in ("id", "scan") for pattern in PATIENT)
    return next((match[1] for match in names if match), entry["scan"])


def held_rows(entries: Sequence[dict], share: float = 0.2) -> np.ndarray:
    """Return (N,) bool, which of a manifest's entries are of a held-out share of their patients."""
    patients = [patient_name(entry) for entry in entries]
    held = held_out(patients, round(share * len(set(patients))))
    return np.array([patient in held for patient in patients], dtype=bool)


def held_out(patients: Iterable[str], count: int) -> set[str]:
    """Return the `count` patients whose names have the smallest sha256."""
    return set(sorted(set(patients), key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
