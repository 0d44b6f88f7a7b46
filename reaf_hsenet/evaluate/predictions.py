"""Files of generated reports as the VLM3D challenge has them (github.com/forithmus/VLM3D-Dockers,
ct_challenges/).

{"generated_reports": [{"input_image_name", "report"}, ...]}, which its platforms wrap as [{"outputs":
[{"value": {...}}]}]. A case may have `labels`, 0 or 1, or `probabilities`, by CT-RATE's 18 names.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reaf_hsenet.data.phantom.findings import LABELS
from reaf_hsenet.data.sources.tables import Volumes
from reaf_hsenet.errors import InputError, first_six
from reaf_hsenet.files import is_text, read_json, write_json

ENDING = re.compile(r"\.(nii(\.gz)?|mha)$")


def read_predictions(path: Path, ids: Sequence[str]) -> tuple[list[str], np.ndarray | None]:
    """Return the reports in the order of the volumes' ids, and their labels (n, 18), where the file has them.

    A probability of 0.5 or more is a label. Raises InputError for an unknown, repeated or missing volume, a
    report that is no text, and labels of some cases only.
    """
    volumes, found = Volumes(ids), {}
    for case in _cases(path):
        name = case.get("input_image_name")
        if not isinstance(name, str):
            raise InputError(f"{path}: input_image_name is {name!r:.60}; expected the name of a volume")
        where = f"{path}: {name!r:.100}"
        volume = volumes.find(ENDING.sub("", name), where)
        if volume is None:
            raise InputError(f"{where} is no volume of the evaluated split; leave it out or correct its name")
        if volume in found:
            raise InputError(f"{where}: volume {volume} has two reports; keep one")
        text = case.get("report")
        if not isinstance(text, str) or not is_text(text):
            raise InputError(f"{where}: its report is {text!r:.60}; expected a text")
        found[volume] = text.strip(), _labels(case, where)
    if missing := [volume for volume in ids if volume not in found]:
        raise InputError(f"{path}: has no report of {first_six(missing)}; add one for every volume")
    texts, labels = zip(*(found[volume] for volume in ids), strict=True)
    if unlabelled := [volume for volume in ids if found[volume][1] is None]:
        if len(unlabelled) < len(ids):
            raise InputError(f"{path}: has no labels of {first_six(unlabelled)}; give those of all or none")
        return list(texts), None
    return list(texts), np.array(labels, dtype=np.int64)


def _cases(path: Path) -> list[dict]:
    match read_json(path):
        case [{"outputs": [{"value": {"generated_reports": [*cases]}}, *_]}, *_]:
            pass
        case {"generated_reports": [*cases]}:
            pass
        case _:
            cases = [None]
    if not all(isinstance(case, dict) for case in cases):
        raise InputError(f"{path}: expected generated_reports, a list of input_image_name and report")
    return cases


def _labels(case: dict, where: str) -> list[bool] | None:
    """Return the 18 labels of a case, in the order of LABELS, where it has some."""
    values = case.get("labels", case.get("probabilities"))
    if values is None:
        return None
    found = [values.get(label) for label in LABELS] if isinstance(values, dict) else [None]
    if any(type(v) not in (int, float, bool) or not 0 <= v <= 1 for v in found):
        raise InputError(f"{where}: expected labels from 0 to 1 by CT-RATE's {len(LABELS)} names")
    return [value >= 0.5 for value in found]


def write_vlm3d(path: Path, ids: Sequence[str], texts: Sequence[str], labels: np.ndarray | None) -> None:
    """Write reports as the challenge's evaluation reads them, with labels (n, 18) where there are some."""
    cases: list[dict] = [{"input_image_name": i, "report": t} for i, t in zip(ids, texts, strict=True)]
    for case, row in zip(cases, [] if labels is None else labels.tolist(), strict=labels is not None):
        case["labels"] = dict(zip(LABELS, row, strict=True))
    head = {"name": "Generated reports", "type": "Report generation", "version": {"major": 1, "minor": 0}}
    write_json(path, [{"outputs": [{"value": {**head, "generated_reports": cases}}]}])
