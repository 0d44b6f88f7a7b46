"""Reads findings back from the text of a chest CT report: labels, places, sizes and kinds, by rules alone.

The text is cut into clauses. A label is found in a clause that has its words, unless they are negated, and
takes the clause's places and sizes. The rules invert every phantom report exactly, and read plain sentences
written by hand, so that they can score generated reports.
"""

import re

from reaf_hsenet.data.phantom.findings import (
    AORTA_PARTS,
    CORONARIES,
    DEVICES,
    LOBES,
    NODE_STATIONS,
    SIDED_DEVICES,
    SIDES,
    SIZES,
    Finding,
)

CALCIFIED = "(?:calcifi|atheroma)"
CALCIFIED_OR_SCLEROTIC = "(?:calcifi|atherosclero|atheroma)"
CORONARY = r"(?:coronar|\blad\b|circumflex|descending artery)"
FINDING_WORDS = {
    "Medical material": r"pacemaker|\bport\b|catheter|sternotomy|sternal (?:wire|suture)|screw"
    r"|spinal fixation|prosthe|\bstents?\b|metallic|\bdevices?\b",
    "Arterial wall calcification": rf"{CALCIFIED_OR_SCLEROTIC}.*(?:aort|arterial)"
    rf"|(?:aort|arterial).*{CALCIFIED_OR_SCLEROTIC}",
    "Cardiomegaly": r"cardiomegaly|enlarged heart|enlargement of the heart"
    r"|(?:heart|cardiothoracic)(?: size| ratio| index)?(?: is| was)? (?:increased|enlarged)"
    r"|increase in (?:the )?(?:heart size|cardiothoracic)"
    r"|(?:cardiothoracic (?:ratio|index)|\bctr\b).*\b0\.[5-9]",
    "Pericardial effusion": r"pericardial (?:\w+ )?(?:effusion|fluid)|(?:effusion|fluid)\b.*\bpericardial",
    "Coronary artery wall calcification": rf"{CALCIFIED}.*{CORONARY}|{CORONARY}.*{CALCIFIED}",
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
}
# "No X" and "without X" deny what follows; "X was not observed" denies what comes before.
DENIES_WHAT_FOLLOWS = re.compile(r"\b(?:no|not|without|neither|nor|free of|absence of|negative for)\b")
DENIES_WHAT_PRECEDES = re.compile(
    r"\b(?:not|never) (?:been )?(?:observed|detected|seen|identified|found|present|noted|evident|reach\w*)"
    r"|\babsent\b"
)
CLAUSE_END = re.compile(r"[.!?](?=\s|$)|[;:\n]|\b(?:but|however|whereas|although|while)\b")
LENGTH = re.compile(r"(\d+(?:\.\d+)?)(?:\s*x\s*(\d+(?:\.\d+)?))?\s*-?(mm|cm)\b")
SIDED_LENGTH = re.compile(LENGTH.pattern + r"(?: \w+){0,3}? (?:on|in) the (right|left)")

# Widest first: a match is removed from the clause, so that its words are not read again as something else.
LUNG_WORDS = (
    r"(?:both|bilateral) (upper|lower) lobes|(upper|lower) lobes (?:of both lungs|bilaterally)",
    r"(upper|middle|lower) lobe of (?:the )?(right|left) lung",
    r"(right|left) (?:lung )?(upper|middle|lower)(?: and (upper|middle|lower))? lobes?",
    r"both lungs|bilateral|lungs bilaterally",
    r"(right|left) lung",
)
DEVICE_WORDS = ("pacemaker", r"\bport\b", "sternotomy|sternal", "screw|spinal fixation")
CORONARY_WORDS = (
    r"left anterior descending|\blad\b|three coronary",
    r"circumflex|\bcx\b|three coronary",
    r"right coronary|\brca\b|three coronary",
)
# The words of the places of the labels that are not in a lobe.
PLACE_WORDS = {
    "Arterial wall calcification": {
        part: rf"{part.split()[0]}\b(?! (?:coronary )?arter)" for part in AORTA_PARTS
    },
    "Coronary artery wall calcification": dict(zip(CORONARIES, CORONARY_WORDS, strict=True)),
    "Lymphadenopathy": {station: station for station in NODE_STATIONS},
    "Pericardial effusion": {},
    "Hiatal hernia": {},
    "Cardiomegaly": {},
}
KIND_WORDS = {
    "Emphysema": r"\b(?:mild|moderate|severe)\b",
    "Lung opacity": r"\b(?:patchy|diffuse)\b",
}


def read_report(findings_text: str) -> list[Finding]:
    """Return the findings that a report states, sorted, without repetition.

    A label without a readable place, size or kind gets an empty one. Lengths are in mm.
    """
    findings = set()
    for clause in CLAUSE_END.split(findings_text.lower()):
        for label, words in FINDING_WORDS.items():
            if any(not denied(clause, match) for match in re.finditer(words, clause)):
                findings.update(_describe(label, clause))
    # Drop a bare mention of a label that is also described ("There is cardiomegaly; the ratio is 0.6").
    described = {f.label for f in findings if f != Finding(f.label)}
    return sorted(f for f in findings if f.label not in described or f != Finding(f.label))


def denied(clause: str, match: re.Match) -> bool:
    """Return whether a clause says that what was matched in it is not there."""
    before = DENIES_WHAT_FOLLOWS.search(clause[: match.end()])
    return bool(before or DENIES_WHAT_PRECEDES.search(clause, match.start()))


def _describe(label: str, clause: str) -> list[Finding]:
    """Return a finding for each place of the label in a clause, with its size and its kind."""
    if label == "Medical material":
        kinds = [kind for kind, words in zip(DEVICES, DEVICE_WORDS, strict=True) if re.search(words, clause)]
        side = _first(r"\b(?:right|left)\b", clause)
        return [Finding(label, side if kind in SIDED_DEVICES else "", kind=kind) for kind in kinds or [""]]
    if label == "Pleural effusion":
        sizes = {match[4]: _to_mm(match[1], match[3]) for match in SIDED_LENGTH.finditer(clause)}
        both = re.search("bilateral|both", clause)
        sides = [side for side in SIDES if both or re.search(rf"\b{side}\b", clause)]
        return [Finding(label, side, sizes.get(side, _length(clause))) for side in sides or [""]]
    if label in PLACE_WORDS:
        places = [place for place, words in PLACE_WORDS[label].items() if re.search(words, clause)]
    else:
        places = _lobes(clause)
    size, kind = 0.0, _first(KIND_WORDS[label], clause) if label in KIND_WORDS else ""
    if label == "Cardiomegaly":
        size = float(_first(r"\b0\.\d+\b", clause) or 0)
    elif label in SIZES:
        size = _length(clause, shortest=label == "Lymphadenopathy")
    if label == "Lung nodule":
        calcified = re.search(r"\bcalcifi(?:ed|c\b|cation)", clause)
        kind = "calcified" if calcified and not denied(clause, calcified) else ""
    return [Finding(label, place, size, kind) for place in places or [""]]


def _first(words: str, clause: str) -> str:
    found = re.search(words, clause)
    return found.group() if found else ""


def _lobes(clause: str) -> list[str]:
    lobes = set()
    for words in LUNG_WORDS:
        for match in re.finditer(words, clause):
            named = set(match.groups())
            # A match without a side means both sides; without an upper, middle or lower, the whole lung.
            sides = named & {*SIDES} or {*SIDES}
            parts = named - {*SIDES, None} or {"upper", "middle", "lower"}
            lobes |= {f"{side} {part} lobe" for side in sides for part in parts}
        clause = re.sub(words, "|", clause)
    return [lobe for lobe in LOBES if lobe in lobes]


def _length(clause: str, shortest: bool = False) -> float:
    """Return the first length in mm: the larger number of "12 x 9 mm", or the smaller for a short axis."""
    match = LENGTH.search(clause)
    if not match:
        return 0.0
    sides = [_to_mm(number, match[3]) for number in match.groups()[:2] if number]
    return min(sides) if shortest else max(sides)


def _to_mm(number: str, unit: str) -> float:
    return round(float(number) * (10 if unit == "cm" else 1), 2)
