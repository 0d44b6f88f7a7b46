"""Any folder of .nii and .nii.gz files with a csv of their texts."""

import math
from functools import cache
from pathlib import Path, PurePosixPath

from reaf_hsenet.data.patients import held_out
from reaf_hsenet.data.sources.datasets import Case, DataSet, Source, only_csv
from reaf_hsenet.data.sources.tables import given, nifti_stem, plain_path, read_csv
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import visible


def read_nifti_folder(root: Path, csv: Path | None = None, validation: float = 0.1) -> Source:
    """Any folder of .nii / .nii.gz files and a csv with the columns id and text.

    id: the file's path below `root`, with or without its ending. Optional columns: `scan` (the acquisition
    that several volumes share) and `split` (train, validation or test); without it the share `validation` of
    the scans, chosen by a hash of their names, is for validation. A test volume may have an empty text:
    zero-shot needs none.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    table = csv or only_csv(root, "id and text")
    on_disk = cache(lambda: {nifti_stem(str(path.relative_to(root))) for path in visible(root, "**/*.nii*")})
    rows = read_csv(table, ("id", "text"), "id", names_volume=lambda cell: nifti_stem(cell) in on_disk())
    if not rows:
        raise InputError(f"{table}: has no rows; expected an id and a text for each volume")
    cases: dict[str, list[Case]] = {"train": [], "validation": [], "test": []}
    scans = {r.get("scan") or nifti_stem(str(PurePosixPath(i))) for i, r in rows.items()}
    validated = held_out(scans, math.ceil(validation * len(scans)) if len(scans) > 1 else 0)
    seen: dict[str, str] = {}
    for name, row in rows.items():
        stem = nifti_stem(plain_path(name, f"{table}: id"))
        if stem in seen:
            raise InputError(f"{table}: id {name} and id {seen[stem]} are the same volume; keep one")
        seen[stem] = name
        try:
            path = _nifti_file(root, stem)
        except OSError as error:
            raise InputError(f"{table}: id {name[:60]}... is no file's name ({error.strerror})") from error
        text = given(row["text"])
        problem = None if path else "is listed in the table but absent"
        scan = row.get("scan") or stem
        split = row.get("split") or ("validation" if scan in validated else "train")
        if split not in cases:
            raise InputError(f"{table}: id {name} has split {split!r}; expected {', '.join(cases)}")
        if not text and split != "test":
            problem = f"has an empty text in {table.name}"
        cases[split].append(Case(stem, scan, path or root / f"{stem}.nii.gz", text, problem=problem))
    return Source("nifti", {split: members for split, members in cases.items() if members or split != "test"})


def _nifti_file(root: Path, stem: str) -> Path | None:
    return next((p for p in (root / f"{stem}.nii.gz", root / f"{stem}.nii") if p.is_file()), None)


CSV = {"type": Path, "help": "table with the columns id and text (optional: scan, split)"}
NIFTI = DataSet("nifti", read_nifti_folder, {"csv": CSV})
