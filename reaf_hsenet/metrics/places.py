"""Where reports say that findings are: presence, then side, then lobe, each scored on what the level before
got right.

A reading is {label of CT-RATE: (sides, lobes)}. `phantom_places` is exact on phantom reports; `rule_places`
reads real ones by words: how often it agrees with a person and with CT-RATE's labels is in
docs/evaluation.md.
"""

import re
from collections.abc import Callable, Sequence
from itertools import compress

from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.phantom.findings import LABELS, LOBES
from reaf_hsenet.data.phantom.labeler import CLAUSE_END, FINDING_WORDS, denied, read_report
from reaf_hsenet.data.text import clean_report

Reading = dict[str, tuple[set[str], set[str]]]

BOTH = r"\bbilateral|\bboth\b|\blungs\b"
SIDE_WORDS = {side: rf"\b{side}\b|{BOTH}" for side in ("right", "left")}
LOBE_WORDS = {name: rf"\b{name}\b[\w, -]*\blobes?\b" for name in ("upper", "middle", "lower")}
LOBE_WORDS["lingula"] = r"\blingul"
SIZE_WORDS = {
    "small": r"\b(?:small(?! airway)|mild|minimal|slight|tiny|trace)\b",
    "moderate": r"\bmoderate\b",
    "large": r"\b(?:large|severe|massive|marked)\b",
}


def phantom_places(text: str) -> Reading:
    """Return what the phantoms' labeler reads. A coronary artery's right and left are its name, no side."""
    reading: Reading = {}
    for finding in read_report(text):
        sides, lobes = reading.setdefault(finding.label, (set(), set()))
        if finding.label != "Coronary artery wall calcification":
            sides |= {finding.place.split(" ")[0]} & {"right", "left"}
        lobes |= {finding.place} & {*LOBES}
    return reading


def rule_places(text: str) -> Reading:
    """Return the findings that some clause names and does not deny, with the clause's sides and lobes."""
    return {label: (sides, lobes) for label, (sides, lobes) in _read(text, SIDE_WORDS, LOBE_WORDS).items()}


def rule_sizes(text: str) -> dict[str, set[str]]:
    """Return the findings that some clause names and does not deny, with the clause's size classes."""
    return {label: sizes for label, (sizes,) in _read(text, SIZE_WORDS).items()}


def _read(text: str, *tables: dict[str, str]) -> dict[str, list[set[str]]]:
    """Return of each finding that is named and not denied which entries of each table its clauses have."""
    found: dict[str, list[set[str]]] = {}
    for clause in CLAUSE_END.split(text.lower().replace("•", ";")):
        told = [{name for name, words in table.items() if re.search(words, clause)} for table in tables]
        for label, words in FINDING_WORDS.items():
            if any(not denied(clause, match) for match in re.finditer(words, clause)):
                known = found.get(label, [set()] * len(tables))
                found[label] = [a | b for a, b in zip(known, told, strict=True)]
    return found


def report_reader(manifest: Manifest) -> Callable[[str], Reading]:
    """Return the reader of a data set's reports: the phantoms' own is exact on theirs alone."""
    return phantom_places if are_phantoms(manifest) else rule_places


def are_phantoms(manifest: Manifest) -> bool:
    """Return True if the phantoms' labeler reads every report's labels exactly as the manifest has them."""
    return set(LABELS) <= set(manifest.labels) and all(
        entry["labels"] is not None and _labels_read(entry["text"]) == _labels_known(manifest, entry)
        for entry in manifest.all_entries()
    )


def _labels_read(text: str) -> set[str]:
    return {finding.label for finding in read_report(clean_report(text))}


def _labels_known(manifest: Manifest, entry: dict) -> set[str]:
    return set(LABELS) & {*compress(manifest.labels, entry["labels"])}


def place_scores(predicted: Sequence[Reading], truth: Sequence[Reading]) -> dict[str, dict]:
    """Return precision and recall of presence, side and lobe, pooled over reports and findings.

    Sides are scored on findings that both texts name, lobes on those of which both tell the same sides.
    agreement: the share of the `compared` with equal sets; compared are those whose reference tells the
    level. None where there is nothing to divide by.
    """
    pairs = list(zip(predicted, truth, strict=True))
    both = [(p[label], t[label]) for p, t in pairs for label in p if label in t]
    levels = {
        "presence": [(set(p), set(t)) for p, t in pairs],
        "side": [(p[0], t[0]) for p, t in both],
        "lobe": [(p[1], t[1]) for p, t in both if p[0] == t[0] != set()],
    }
    return {level: _score(sets) for level, sets in levels.items()}


def _score(pairs: list[tuple[set, set]]) -> dict[str, float | int | None]:
    hits, named, true = (sum(len(sets[i]) for sets in ((p & t, p, t) for p, t in pairs)) for i in range(3))
    told = [p == t for p, t in pairs if t]
    return {
        "precision": hits / named if named else None,
        "recall": hits / true if true else None,
        "agreement": sum(told) / len(told) if told else None,
        "compared": len(told),
    }
