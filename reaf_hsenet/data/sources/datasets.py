"""Readers of data sets as they are published: which files there are, and what their tables say of them.

A reader returns cases per split; it opens tables, never volumes. A case whose tables already rule it out (an
empty report, an absent file) carries the reason as `problem`.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from reaf_hsenet.data.sources.radgenome import read_questions, refusal
from reaf_hsenet.data.sources.tables import given, plain_path, read_csv
from reaf_hsenet.data.volume import TableRow
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import named, visible

CT_RATE_VOLUME = re.compile(r"[A-Za-z]+_\d+_[A-Za-z]+_\d+(\.nii\.gz)?")


@dataclass(frozen=True)
class Case:
    """One volume and its report. scan: volumes with the same scan are reconstructions of one acquisition.

    questions: rows of radgenome.read_questions; None where the data set has no tables of them. chest: False
    where the data set itself says that the volume is of another part of the body.
    """

    id: str
    scan: str
    path: Path
    text: str
    labels: tuple[int, ...] | None = None
    table: TableRow = TableRow()
    problem: str | None = None
    questions: tuple[dict, ...] | None = None
    chest: bool = True


@dataclass(frozen=True)
class Source:
    """A data set: cases per split, names of the label columns, orientation of files with a blank header.

    text: what of a report the cases' texts are.
    """

    kind: str
    splits: dict[str, list[Case]]
    label_names: tuple[str, ...] = ()
    blank_orientation: str | None = None
    text: str = "findings"

    def by_id(self) -> dict[str, Case]:
        """Return all cases. Raises InputError when two have one id or one file, and for an id that leaves
        its folder.
        """
        cases: dict[str, Case] = {}
        files: dict[tuple[int, int], Case] = {}
        for case in (case for split in self.splits.values() for case in split):
            plain_path(case.id, f"{self.kind}: id")
            if case.id in cases:
                raise InputError(
                    f"{self.kind}: id {case.id} is in two splits ({cases[case.id].path} and {case.path}); "
                    "each volume needs its own"
                )
            cases[case.id] = case
            if case.problem is None:
                try:
                    file = case.path.stat()
                except OSError:
                    continue  # said by name when it is read
                other = files.setdefault((file.st_dev, file.st_ino), case)
                if other is not case:
                    raise InputError(
                        f"{case.path}: is the file of id {other.id} and of id {case.id}; keep one"
                    )
        return cases


def read_ct_rate(root: Path, impressions: bool = False) -> Source:
    """CT-RATE's tree: dataset/{train,valid}[_fixed], metadata, radiology_text_reports,
    multi_abnormality_labels.

    root: the folder that holds `dataset`, or `dataset` itself. The text is Findings_EN, and with
    `impressions` also Impressions_EN. A volume on disk that has no report is a case with that problem, not
    left out. Questions are read from radgenome_files beside the reports, where that is. Volumes of
    metadata/no_chest_*.txt are marked, and kept.
    """
    root = Path(root)
    base = root / "dataset" if (root / "dataset").is_dir() else root
    splits: dict[str, list[Case]] = {}
    label_names: tuple[str, ...] = ()
    names_from: Path | None = None
    for split, table_name, folder in (("train", "train", "train"), ("validation", "validation", "valid")):
        reports_csv = base / "radiology_text_reports" / f"{table_name}_reports.csv"
        if not reports_csv.is_file():
            continue
        columns = ("VolumeName", "Findings_EN", "Impressions_EN")
        reports = read_csv(reports_csv, columns, "VolumeName", names_volume=CT_RATE_VOLUME.fullmatch)
        metadata_csv = base / "metadata" / f"{table_name}_metadata.csv"
        columns = ("VolumeName", "XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept")
        metadata = _by_stem(_optional_csv(metadata_csv, columns), metadata_csv)
        labels_csv = base / "multi_abnormality_labels" / f"{folder}_predicted_labels.csv"
        labels = _by_stem(_optional_csv(labels_csv, ("VolumeName",)), labels_csv)
        if labels:
            # Every volume's labels are read by name, in the order of the first table.
            names = tuple(name for name in next(iter(labels.values())) if name != "VolumeName")
            label_names, names_from = label_names or names, names_from or labels_csv
            if set(names) != set(label_names):
                raise InputError(
                    f"{labels_csv}: its columns differ from those of {names_from}; give both tables the "
                    f"same labels"
                )
        # v2 lives in *_fixed; where both are present it is the one with correct headers.
        volumes = base / f"{folder}_fixed" if (base / f"{folder}_fixed").is_dir() else base / folder
        on_disk = {p.name: p for p in visible(volumes, "*/*/*.nii.gz")}
        no_chest = _no_chest(base / "metadata" / f"no_chest_{folder}.txt")
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
                    label_row(labels, _stem(name), label_names, labels_csv),
                    _table_row(metadata.get(_stem(name))),
                    problem,
                    None if questions is None else tuple(questions.get(name.removesuffix(".nii.gz"), ())),
                    _stem(name) not in no_chest,
                )
            )
        splits[split] = cases
    if not splits:
        raise InputError(
            f"{root}: no CT-RATE data set; expected dataset/radiology_text_reports/train_reports.csv "
            "or validation_reports.csv below it"
        )
    text = "findings and impressions" if impressions else "findings"
    return Source("ct-rate", splits, label_names, blank_orientation="LPS", text=text)


def read_nifti_folder(root: Path, table: Path | None, validation: float = 0.1) -> Source:
    """Any folder of .nii / .nii.gz files and a csv with the columns id and text.

    id: the file's path below `root`, with or without its ending. Optional columns: `scan` (the acquisition
    that several volumes share) and `split` (train, validation or test); without it the share `validation` of
    the scans, chosen by a hash of their names, is for validation. A test volume may have an empty text:
    zero-shot needs none.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    table = table or only_csv(root, "id and text")
    on_disk = cache(lambda: {_stem(str(path.relative_to(root))) for path in visible(root, "**/*.nii*")})
    rows = read_csv(table, ("id", "text"), "id", names_volume=lambda cell: _stem(cell) in on_disk())
    if not rows:
        raise InputError(f"{table}: has no rows; expected an id and a text for each volume")
    cases: dict[str, list[Case]] = {"train": [], "validation": [], "test": []}
    scans = sorted({r.get("scan") or _stem(str(PurePosixPath(i))) for i, r in rows.items()}, key=_hash)
    held_out = set(scans[: math.ceil(validation * len(scans)) if len(scans) > 1 else 0])
    seen: dict[str, str] = {}
    for name, row in rows.items():
        stem = _stem(plain_path(name, f"{table}: id"))
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
        split = row.get("split") or ("validation" if scan in held_out else "train")
        if split not in cases:
            raise InputError(f"{table}: id {name} has split {split!r}; expected {', '.join(cases)}")
        if not text and split != "test":
            problem = f"has an empty text in {table.name}"
        cases[split].append(Case(stem, scan, path or root / f"{stem}.nii.gz", text, problem=problem))
    return Source("nifti", {split: members for split, members in cases.items() if members or split != "test"})


def only_csv(root: Path, columns: str) -> Path:
    """The csv file of a folder. Raises InputError unless there is exactly one."""
    found = visible(root, "*.csv")
    if len(found) != 1:
        raise InputError(f"{root}: has {len(found)} csv files; name the one with {columns} with --csv")
    return found[0]


def _optional_csv(path: Path, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    return (
        read_csv(path, columns, "VolumeName", names_volume=CT_RATE_VOLUME.fullmatch) if path.is_file() else {}
    )


def _by_stem(table: dict[str, dict[str, str]], path: Path) -> dict[str, dict[str, str]]:
    """Return the rows by their volume without its ending, which some copies of these tables leave out."""
    rows: dict[str, dict[str, str]] = {}
    for name, row in table.items():
        if rows.setdefault(_stem(name), row) is not row:
            raise InputError(
                f"{path}: VolumeName {name} is listed twice, with and without its ending; keep one"
            )
    return rows


def _ct_rate_folders(name: str, table: Path) -> tuple[str, str]:
    """train_1_a_2.nii.gz -> (train_1, train_1_a)."""
    parts = name.removesuffix(".nii.gz").split("_")
    if not (CT_RATE_VOLUME.fullmatch(name) and name.endswith(".nii.gz")):
        raise InputError(f"{table}: VolumeName {name!r} is not of CT-RATE's form, such as train_1_a_1.nii.gz")
    return "_".join(parts[:2]), "_".join(parts[:3])


def _ct_rate_text(row: dict[str, str] | None, impressions: bool, table: Path) -> tuple[str, str | None]:
    if row is None:
        return "", f"has no row in {table.name}"
    parts = [row["Findings_EN"], row["Impressions_EN"]] if impressions else [row["Findings_EN"]]
    text = " ".join(filter(None, map(given, parts)))
    return text, None if text else f"has an empty report in {table.name}"


def _no_chest(path: Path) -> set[str]:
    """Return the volumes of a list of paths, one a line, without ending; none where there is no list."""
    if not path.is_file():
        return set()
    with named(path, "cannot be read as a list of volumes"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    names = [line.strip(' ",\t').replace("\\", "/").rpartition("/")[2] for line in lines if line.strip()]
    if wrong := [name for name in names if not CT_RATE_VOLUME.fullmatch(name)]:
        raise InputError(
            f"{path}: {wrong[0]!r:.60} is not a volume of CT-RATE's form, such as train_1_a_1.nii.gz"
        )
    return set(map(_stem, names))


def label_row(
    table: dict[str, dict[str, str]], name: str, names: tuple[str, ...], path: Path
) -> tuple[int, ...] | None:
    """The labels of a volume; None when the table has no row of it. Raises InputError unless all are 0 or
    1.
    """
    row = table.get(name)
    if row is None:
        return None
    try:
        values = tuple(float(row[n]) for n in names)
    except (TypeError, ValueError):
        values = (math.nan,)
    if not all(v in (0, 1) for v in values):
        raise InputError(f"{path}: the row of {row.get('VolumeName', name)} is not all 0 and 1")
    return tuple(int(v) for v in values)


def _table_row(row: dict[str, str] | None) -> TableRow:
    if row is None:
        return TableRow(spacing=(math.nan,) * 3)
    try:
        in_plane = json.loads(row["XYSpacing"])
        spacing = (float(in_plane[0]), float(in_plane[1]), float(row["ZSpacing"]))
    except (ValueError, TypeError, IndexError, KeyError):
        # CT-RATE has rows without a usable ZSpacing; the volume is refused only if its header lacks spacing
        # too.
        spacing = (math.nan,) * 3
    return TableRow(spacing, _number(row, "RescaleSlope"), _number(row, "RescaleIntercept"))


def _number(row: dict[str, str], column: str) -> float | None:
    try:
        return float(row[column]) if row[column].strip() else None
    except ValueError as error:
        problem = f"{column} of {row['VolumeName']} is {row[column]!r}; expected a number"
        raise InputError(f"the metadata table: {problem}") from error


def _nifti_file(root: Path, stem: str) -> Path | None:
    return next((p for p in (root / f"{stem}.nii.gz", root / f"{stem}.nii") if p.is_file()), None)


def _stem(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".nii")


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
