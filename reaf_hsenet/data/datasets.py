"""Readers of data sets as they are published: which files there are, and what their tables say of them.

A reader returns cases per split; it opens tables, never volumes. A case whose tables already rule it out (an empty
report, an absent file) carries the reason as `problem`.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from reaf_hsenet.data.radgenome import read_questions, refusal
from reaf_hsenet.data.tables import read_csv
from reaf_hsenet.data.volume import TableRow
from reaf_hsenet.errors import InputError


@dataclass(frozen=True)
class Case:
    """One volume and its report. scan: volumes with the same scan are reconstructions of one acquisition.

    questions: rows of radgenome.read_questions; None where the data set has no tables of them.
    """

    id: str
    scan: str
    path: Path
    text: str
    labels: tuple[int, ...] | None = None
    table: TableRow = TableRow()
    problem: str | None = None
    questions: tuple[dict, ...] | None = None


@dataclass(frozen=True)
class Source:
    """A data set: cases per split, names of the label columns, orientation of files with a blank header."""

    kind: str
    splits: dict[str, list[Case]]
    label_names: tuple[str, ...] = ()
    blank_orientation: str | None = None

    def by_id(self) -> dict[str, Case]:
        """All cases. Raises InputError when two have one id."""
        cases: dict[str, Case] = {}
        for case in (case for split in self.splits.values() for case in split):
            if case.id in cases:
                raise InputError(
                    f"{self.kind}: id {case.id} is in two splits ({cases[case.id].path} and {case.path}); "
                    "each volume needs its own"
                )
            cases[case.id] = case
        return cases


def read_ct_rate(root: Path, impressions: bool = False) -> Source:
    """CT-RATE's tree: dataset/{train,valid}[_fixed], metadata, radiology_text_reports, multi_abnormality_labels.

    root: the folder that holds `dataset`, or `dataset` itself. The text is Findings_EN, and with `impressions` also
    Impressions_EN. A volume on disk that has no report is a case with that problem, not left out. Questions are read
    from radgenome_files beside the reports, where that is.
    """
    root = Path(root)
    base = root / "dataset" if (root / "dataset").is_dir() else root
    splits: dict[str, list[Case]] = {}
    label_names: tuple[str, ...] = ()
    for split, table_name, folder in (("train", "train", "train"), ("validation", "validation", "valid")):
        reports_csv = base / "radiology_text_reports" / f"{table_name}_reports.csv"
        if not reports_csv.is_file():
            continue
        reports = read_csv(reports_csv, ("VolumeName", "Findings_EN", "Impressions_EN"), "VolumeName")
        metadata = _optional_csv(
            base / "metadata" / f"{table_name}_metadata.csv",
            ("VolumeName", "XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept"),
        )
        labels_csv = base / "multi_abnormality_labels" / f"{folder}_predicted_labels.csv"
        labels = _optional_csv(labels_csv, ("VolumeName",))
        if labels:
            label_names = tuple(name for name in next(iter(labels.values())) if name != "VolumeName")
        # v2 lives in *_fixed; where both are present it is the one with correct headers.
        volumes = base / f"{folder}_fixed" if (base / f"{folder}_fixed").is_dir() else base / folder
        on_disk = {p.name: p for p in sorted(volumes.glob("*/*/*.nii.gz"))}
        names = [*reports, *(n for n in on_disk if n not in reports)]
        questions = None
        if (tables := base / "radgenome_files").is_dir():
            questions, refused = read_questions(tables, split, (n.removesuffix(".nii.gz") for n in names))
            if refused:
                raise refusal(refused, f"correct the table, or move {tables} elsewhere")
        cases = []
        for name in names:
            patient, scan = _ct_rate_folders(name, reports_csv)
            text, problem = _ct_rate_text(reports.get(name), impressions, reports_csv)
            path = volumes / patient / scan / name
            if path.name not in on_disk:
                problem = "is listed in the reports table but absent"
            cases.append(
                Case(
                    name.removesuffix(".nii.gz"),
                    scan,
                    path,
                    text,
                    label_row(labels, name, label_names, labels_csv),
                    _table_row(metadata.get(name)),
                    problem,
                    None if questions is None else tuple(questions.get(name.removesuffix(".nii.gz"), ())),
                )
            )
        splits[split] = cases
    if not splits:
        raise InputError(
            f"{root}: no CT-RATE data set; expected dataset/radiology_text_reports/train_reports.csv "
            "or validation_reports.csv below it"
        )
    return Source("ct-rate", splits, label_names, blank_orientation="LPS")


def read_nifti_folder(root: Path, table: Path | None, validation: float = 0.1) -> Source:
    """Any folder of .nii / .nii.gz files and a csv with the columns id and text.

    id: the file's path below `root`, with or without its ending. Optional columns: `scan` (the acquisition that
    several volumes share) and `split` (train, validation or test); without it the share `validation` of the scans,
    chosen by a hash of their names, is for validation. A test volume may have an empty text: zero-shot needs none.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    table = table or only_csv(root, "id and text")
    rows = read_csv(table, ("id", "text"), "id")
    if not rows:
        raise InputError(f"{table}: has no rows; expected an id and a text for each volume")
    cases: dict[str, list[Case]] = {"train": [], "validation": [], "test": []}
    scans = sorted({r.get("scan") or _stem(i) for i, r in rows.items()}, key=_hash)
    held_out = set(scans[: math.ceil(validation * len(scans)) if len(scans) > 1 else 0])
    seen: dict[str, str] = {}
    for name, row in rows.items():
        stem = _stem(name)
        if stem in seen:
            raise InputError(f"{table}: id {name} and id {seen[stem]} are the same volume; keep one")
        if ".." in Path(name).parts or Path(name).is_absolute() or not stem:
            raise InputError(f"{table}: id {name!r} is not a path below {root}")
        seen[stem] = name
        try:
            path = next((p for p in (root / f"{stem}.nii.gz", root / f"{stem}.nii") if p.is_file()), None)
        except OSError as error:
            raise InputError(f"{table}: id {name[:60]}... is no file's name ({error.strerror})") from error
        text = row["text"].strip()
        problem = None if path else "is listed in the table but absent"
        scan = row.get("scan") or stem
        split = row.get("split") or ("validation" if scan in held_out else "train")
        if split not in cases:
            raise InputError(f"{table}: id {name} has split {split!r}; expected {', '.join(cases)}")
        if not text and split != "test":
            problem = f"has an empty text in {table.name}"
        cases[split].append(Case(stem, scan, path or root / f"{stem}.nii.gz", text, problem=problem))
    return Source("nifti", {split: members for split, members in cases.items() if members or split != "test"})


def only_csv(root: Path, columns: str) -> Path:
    """The csv file of a folder. Raises InputError unless there is exactly one."""
    found = sorted(root.glob("*.csv"))
    if len(found) != 1:
        raise InputError(f"{root}: has {len(found)} csv files; name the one with {columns} with --csv")
    return found[0]


def _optional_csv(path: Path, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    return read_csv(path, columns, "VolumeName") if path.is_file() else {}


def _ct_rate_folders(name: str, table: Path) -> tuple[str, str]:
    """train_1_a_2.nii.gz -> (train_1, train_1_a)."""
    parts = name.removesuffix(".nii.gz").split("_")
    if len(parts) != 4 or not name.endswith(".nii.gz"):
        raise InputError(f"{table}: VolumeName {name!r} is not of CT-RATE's form, such as train_1_a_1.nii.gz")
    return "_".join(parts[:2]), "_".join(parts[:3])


def _ct_rate_text(row: dict[str, str] | None, impressions: bool, table: Path) -> tuple[str, str | None]:
    if row is None:
        return "", f"has no row in {table.name}"
    parts = [row["Findings_EN"], row["Impressions_EN"]] if impressions else [row["Findings_EN"]]
    given = [p.strip() for p in parts if p.strip() and p.strip().lower() != "not given."]
    return " ".join(given), None if given else f"has an empty report in {table.name}"


def label_row(
    table: dict[str, dict[str, str]], name: str, names: tuple[str, ...], path: Path
) -> tuple[int, ...] | None:
    """The labels of a volume; None when the table has no row of it. Raises InputError unless all are 0 or 1."""
    row = table.get(name)
    if row is None:
        return None
    try:
        values = tuple(float(row[n]) for n in names)
    except (TypeError, ValueError):
        values = (math.nan,)
    if not all(v in (0, 1) for v in values):
        raise InputError(f"{path}: the row of {name} is not all 0 and 1")
    return tuple(int(v) for v in values)


def _table_row(row: dict[str, str] | None) -> TableRow:
    if row is None:
        return TableRow(spacing=(math.nan,) * 3)
    try:
        in_plane = json.loads(row["XYSpacing"])
        spacing = (float(in_plane[0]), float(in_plane[1]), float(row["ZSpacing"]))
    except (ValueError, TypeError, IndexError, KeyError):
        # CT-RATE has rows without a usable ZSpacing; the volume is refused only if its header lacks spacing too.
        spacing = (math.nan,) * 3
    return TableRow(spacing, _number(row, "RescaleSlope"), _number(row, "RescaleIntercept"))


def _number(row: dict[str, str], column: str) -> float | None:
    try:
        return float(row[column]) if row[column].strip() else None
    except ValueError as error:
        problem = f"{column} of {row['VolumeName']} is {row[column]!r}; expected a number"
        raise InputError(f"the metadata table: {problem}") from error


def _stem(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".nii")


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
