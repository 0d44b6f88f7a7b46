"""BIMCV-R: CT*/ct/*.nii.gz, values in HU already, and a csv with the columns path and Report_en.

A path is a volume's, of which the file name counts, or a session's folder on the publishers' machines
(".../sub-S09754/ses-E22857/mod-rx"), whose report all files named sub-S09754_ses-E22857_... share.
"""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.sources.datasets import Case, DataSet, Source, only_csv
from reaf_hsenet.data.sources.tables import csv_rows, given
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import visible

SESSION = re.compile(r"(sub-[^/_]+)[/_](ses-[^/_.]+)")
ENDING = ".nii.gz"
TRAIN_SHARE = 0.8


def read_bimcv(root: Path, csv: Path | None = None) -> Source:
    """BIMCV-R below `root`. The first 80 % of the table's paths, in its order, are for training, the rest for
    validation.

    The share is of the paths, whichever are there, so that no download changes a volume's split. Volumes of
    one session share their scan. A path without volume, a volume without path, is a case with that problem.
    Raises InputError for a path that is neither a volume's nor a session's, and for two reports of one
    volume.
    """
    root = Path(root)
    files = visible(root, f"CT*/ct/*{ENDING}")
    if not files:
        raise InputError(f"{root}: no BIMCV-R data set; expected CT*/ct/*{ENDING} below it")
    table = csv or only_csv(root, "path and Report_en")
    reports = _reports(table)
    by_key: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        own = {file.name, _session(file.name) or file.name} & reports.keys()
        if len(own) > 1:
            raise InputError(f"{table}: {file.name} has a row of its own and one of its session; keep one")
        by_key[own.pop() if own else ""].append(file)
    for key in reports:
        if key.endswith(ENDING) and len(by_key[key]) > 1:
            raise InputError(
                f"{table}: path {key} may be {by_key[key][0]} or {by_key[key][1]}; keep one of them"
            )
    keys = list(reports)
    cut = int(TRAIN_SHARE * len(keys))
    splits = {"train": keys[:cut], "validation": keys[cut:]}
    cases = {
        split: [case for key in members for case in _cases(root, table, key, reports[key], by_key[key])]
        for split, members in splits.items()
    }
    # Volumes without a report are refused, in whichever split.
    cases["train"] += [_case(root, file, "", f"has no row in {table.name}") for file in by_key[""]]
    return Source("bimcv-r", cases, text="report")


def _reports(table: Path) -> dict[str, str]:
    """Reports by the file name or the session of their path, in the table's order."""
    reports: dict[str, str] = {}
    for line, row in csv_rows(table, ("path", "Report_en"), names_volume=lambda cell: bool(_key(cell))):
        path, text = row["path"].strip(), given(row["Report_en"])
        key = _key(path)
        if key is None:
            raise InputError(
                f"{table}: line {line}: path {path!r} names no {ENDING} file, nor a session such as "
                f"sub-S1/ses-E1"
            )
        if reports.setdefault(key, text) != text:
            raise InputError(f"{table}: line {line}: {key} has another Report_en than before; keep one")
    if not reports:
        raise InputError(f"{table}: has no rows; expected one of path and Report_en for each report")
    return reports


def _cases(root: Path, table: Path, key: str, text: str, files: list[Path]) -> list[Case]:
    if not files:
        name = key if key.endswith(ENDING) else f"{key}_*{ENDING}"
        return [_case(root, root / "CT*" / "ct" / name, text, "is listed in the table but absent")]
    problem = None if text else f"has an empty report in {table.name}"
    return [_case(root, file, text, problem) for file in files]


def _case(root: Path, file: Path, text: str, problem: str | None) -> Case:
    name = str(file.relative_to(root)).removesuffix(ENDING)
    return Case(name, _session(file.name) or name, file, text, problem=problem)


def _key(path: str) -> str | None:
    """Return the file name of a volume's path, or the session of a folder's; None for another text."""
    return Path(path).name if path.endswith(ENDING) else _session(path)


def _session(path: str) -> str | None:
    """sub-S09754_ses-E22857 of a session's folder, or of a file's name."""
    match = SESSION.search(path)
    return match and "_".join(match.groups())


CSV = {"type": Path, "help": "table with the columns path and Report_en"}
OWN_GRID = {**RECIPES, "hsenet": replace(RECIPES["hsenet"], spacing=None)}  # published: not resampled
BIMCV_R = DataSet("bimcv-r", read_bimcv, {"csv": CSV}, OWN_GRID, slice_recipe="bimcv")
