"""Reads findings back from the text of a chest CT report: labels, places, sizes and kinds, by rules alone.

Text is cut into clauses; in a clause each label has its finding words, which count unless negated, and the
places and sizes of the same clause belong to it. It inverts every phantom report exactly and reads plain
hand-written sentences, so that it can score generated reports.
"""

import re

from reaf_hsenet.data.phantom.findings import AORTA_PARTS, CORONARIES, LOBES, NODE_STATIONS, Finding

FINDING_WORDS = {
    label: re.compile(pattern)
    for label, pattern in {
        "Medical material": r"pacemaker|\bport\b|catheter|sternotomy|sternal (?:wire|suture)|screw"
        r"|spinal fixation|prosthe|\bstents?\b|metallic|\bdevices?\b",
        "Arterial wall calcification": r"(?:calcifi|atherosclero|atheroma).*(?:aort|arterial)"
        r"|(?:aort|arterial).*(?:calcifi|atherosclero|atheroma)",
        "Cardiomegaly": r"cardiomegaly"
        r"|(?:heart|cardiothoracic)(?: size| ratio| index)?(?: is| was)? (?:increased|enlarged)"
        r"|enlarged heart|enlargement of the heart|increase in (?:the )?(?:heart size|cardiothoracic)"
        r"|(?:cardiothoracic (?:ratio|index)|\bctr\b).*\b0\.[5-9]",
        "Pericardial effusion": r"pericardial (?:\w+ )?(?:effusion|fluid)"
        r"|(?:effusion|fluid)\b.*\bpericardial",
        "Coronary artery wall calcification": r"(?:calcifi|atheroma).*"
        r"(?:coronar|\blad\b|circumflex|descending artery)"
        r"|(?:coronar|\blad\b|circumflex|descending artery).*(?:calcifi|atheroma)",
        "Hiatal hernia": r"hiatal hernia|hiatus hernia",
        "Lymphadenopathy": r"lymph nodes?|lymphadenopath|\blaps?\b",
        "Emphysema": r"emphysema",
        "Atelectasis": r"\batelecta",
        "Lung nodule": r"\bnodules?\b",
        "Lung opacity": r"ground[ -]glass|\bopacit(?:y|ies)",
        "Pulmonary fibrotic sequela": r"sequela|fibrotic|fibroatelecta",
        "Pleural effusion": r"pleural (?:or pericardial |and pericardial )?(?:effusion|fluid)|hydrothorax"
        r"|bilateral (?:\w+ )?effusion|effusions?\b[^,]* hemithora",
        "Mosaic attenuation pattern": r"mosaic",
        "Peribronchial thickening": r"peribronchial [\w ]*thick|bronchial walls? (?:is |are )?thicken"
        r"|thickening of the (?:peribronchial|bronchial wall)",
        "Consolidation": r"consolidat",
        "Bronchiectasis": r"bronchiecta",
        "Interlobular septal thickening": r"septal (?:[\w ]+ )?thick"
        r"|thickenings? (?:of|in) (?:the )?(?:interlobular )?sept",
    }.items()
}
# "No X", "without X" deny what follows; "X was not observed" denies what came before.
DENIES_WHAT_FOLLOWS = re.compile(r"\b(?:no|not|without|neither|nor|free of|absence of|negative for)\b")
DENIES_WHAT_PRECEDES = re.compile(
    r"\b(?:not|never) (?:been )?(?:observed|detected|seen|identified|found|present|noted|evident|reach\w*)"
    r"|\babsent\b"
)
CLAUSE_END = re.compile(r"[.!?](?=\s|$)|[;:\n]|\b(?:but|however|whereas|although|while)\b")
LENGTH = re.compile(r"(\d+(?:\.\d+)?)(?:\s*x\s*(\d+(?:\.\d+)?))?\s*-?(mm|cm)\b")
SIDED_LENGTH = re.compile(LENGTH.pattern + r"(?: \w+){0,3}? (?:on|in) the (right|left)")
RATIO = re.compile(r"\b0\.\d+\b")

# Widest first: a match is removed from the clause, so that its words are not read again as something else.
LUNG_PLACES = (
    (
        re.compile(
            r"(?:both|bilateral) (upper|lower) lobes|(upper|lower) lobes (?:of both lungs|bilaterally)"
        ),
        lambda part, other: [f"right {part or other} lobe", f"left {part or other} lobe"],
    ),
    (
        re.compile(r"(upper|middle|lower) lobe of (?:the )?(right|left) lung"),
        lambda part, side: [f"{side} {part} lobe"],
    ),
    (
        re.compile(r"(right|left) (?:lung )?(upper|middle|lower)(?: and (upper|middle|lower))? lobes?"),
        lambda side, part, other: [f"{side} {part} lobe"] + [f"{side} {other} lobe"] * bool(other),
    ),
    (re.compile(r"both lungs|bilateral|lungs bilaterally"), lambda: list(LOBES)),
    (re.compile(r"(right|left) lung"), lambda side: [lobe for lobe in LOBES if lobe.startswith(side)]),
)
DEVICE_WORDS = (
    (re.compile(r"pacemaker"), "pacemaker"),
    (re.compile(r"\bport\b"), "port catheter"),
    (re.compile(r"sternotomy|sternal"), "sternal wires"),
    (re.compile(r"screw|spinal fixation"), "spinal screws"),
)
CORONARY_WORDS = (
    re.compile(r"left anterior descending|\blad\b|three coronary"),
    re.compile(r"circumflex|\bcx\b|three coronary"),
    re.compile(r"right coronary|\brca\b|three coronary"),
)


def read_report(findings_text: str) -> list[Finding]:
    """The findings that a report states, sorted, without repetition.

    A label without a readable place, size or kind gets an empty one. Lengths are in mm.
    """
    findings = set()
    for clause in CLAUSE_END.split(findings_text.lower()):
        for label, words in FINDING_WORDS.items():
            if any(not _denied(clause, match) for match in words.finditer(clause)):
                findings.update(_describe(label, clause))
    return sorted(_without_repetition(findings))


def _denied(clause: str, match: re.Match) -> bool:
    return bool(
        DENIES_WHAT_FOLLOWS.search(clause[: match.end()])
        or DENIES_WHAT_PRECEDES.search(clause, match.start())
    )


def _describe(label: str, clause: str) -> list[Finding]:
    if label == "Medical material":
        kinds = [kind for pattern, kind in DEVICE_WORDS if pattern.search(clause)] or [""]
        return [
            Finding(label, _side(clause) if kind in ("pacemaker", "port catheter") else "", kind=kind)
            for kind in kinds
        ]
    if label == "Pleural effusion":
        return _effusions(label, clause)
    if label == "Cardiomegaly":
        ratio = RATIO.search(clause)
        return [Finding(label, size=float(ratio.group()) if ratio else 0.0)]
    if label in ("Pericardial effusion", "Hiatal hernia"):
        return [Finding(label, size=_length(clause))]
    if label == "Arterial wall calcification":
        places = [
            part for part in AORTA_PARTS if re.search(rf"{part.split()[0]}\b(?! (?:coronary )?arter)", clause)
        ]
        return [Finding(label, place) for place in places or [""]]
    if label == "Coronary artery wall calcification":
        places = [
            place for place, words in zip(CORONARIES, CORONARY_WORDS, strict=True) if words.search(clause)
        ]
        return [Finding(label, place) for place in places or [""]]
    if label == "Lymphadenopathy":
        places = [station for station in NODE_STATIONS if station in clause]
        return [Finding(label, place, _length(clause, shortest=True)) for place in places or [""]]
    size = _length(clause) if label == "Lung nodule" else 0.0
    return [Finding(label, place, size, _kind(label, clause)) for place in _lobes(clause) or [""]]


def _side(clause: str) -> str:
    side = re.search(r"\b(right|left)\b", clause)
    return side.group() if side else ""


def _lobes(clause: str) -> list[str]:
    lobes: set[str] = set()
    for pattern, expand in LUNG_PLACES:
        for match in pattern.finditer(clause):
            lobes.update(expand(*match.groups()))
        clause = pattern.sub("|", clause)
    return [lobe for lobe in LOBES if lobe in lobes]


def _to_mm(number: str, unit: str) -> float:
    return round(float(number) * (10 if unit == "cm" else 1), 2)


def _length(clause: str, shortest: bool = False) -> float:
    """The first length in mm; of "12 x 9 mm" the larger number, or the smaller one for a short axis."""
    match = LENGTH.search(clause)
    if not match:
        return 0.0
    sides = [_to_mm(number, match.group(3)) for number in match.groups()[:2] if number]
    return min(sides) if shortest else max(sides)


def _effusions(label: str, clause: str) -> list[Finding]:
    by_side = {
        match.group(4): _to_mm(match.group(1), match.group(3)) for match in SIDED_LENGTH.finditer(clause)
    }
    sides = [side for side in ("right", "left") if re.search(rf"\b{side}\b", clause)]
    if re.search(r"bilateral|both", clause):
        sides = ["right", "left"]
    return [Finding(label, side, by_side.get(side, _length(clause))) for side in sides or [""]]


def _kind(label: str, clause: str) -> str:
    if label == "Emphysema":
        degree = re.search(r"\b(mild|moderate|severe)\b", clause)
        return degree.group() if degree else ""
    if label == "Lung opacity":
        extent = re.search(r"\b(patchy|diffuse)\b", clause)
        return extent.group() if extent else ""
    if label == "Lung nodule":
        calcified = re.search(r"\bcalcifi(?:ed|c\b|cation)", clause)
        return "calcified" if calcified and not _denied(clause, calcified) else ""
    return ""


def _without_repetition(findings: set[Finding]) -> list[Finding]:
    """Drop a bare mention of a label that is also described ("There is cardiomegaly; the ratio is 0.6")."""
    return [
        finding
        for finding in findings
        if finding.place
        or finding.size
        or finding.kind
        or not any(other.label == finding.label and other != finding for other in findings)
    ]
