"""CT-RATE's tree: volumes in folders of patient and scan, tables of reports, labels and metadata."""

import json
import math
import re
from pathlib import Path

from reaf_hsenet.data.sources.datasets import Case, DataSet, Source, label_row
from reaf_hsenet.data.sources.radgenome import read_questions, refusal
from reaf_hsenet.data.sources.tables import given, nifti_stem, read_csv
from reaf_hsenet.data.volume import TableRow
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import named, visible

VOLUME = re.compile(r"[A-Za-z]+_\d+_[A-Za-z]+_\d+(\.nii\.gz)?")
# By split; some tables are named by the one, some by the other.
FOLDERS = {"train": "train", "validation": "valid"}
METADATA = ("VolumeName", "XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept")
Rows = dict[str, dict[str, str]]


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
    tables = {split: base / f"radiology_text_reports/{split}_reports.csv" for split in FOLDERS}
    tables = {split: table for split, table in tables.items() if table.is_file()}
    if not tables:
        raise InputError(
            f"{root}: no CT-RATE data set; expected dataset/radiology_text_reports/train_reports.csv "
            "or validation_reports.csv below it"
        )
    names: dict[tuple[str, ...], Path] = {}
    splits = {split: _cases(base, split, table, impressions, names) for split, table in tables.items()}
    text = "findings and impressions" if impressions else "findings"
    return Source("ct-rate", splits, next(iter(names), ()), blank_orientation="LPS", text=text)


def _cases(
    base: Path, split: str, table: Path, impressions: bool, label_names: dict[tuple[str, ...], Path]
) -> list[Case]:
    """Return the cases of a split. label_names: gains the columns of the first table of labels."""
    folder = FOLDERS[split]
    columns = ("VolumeName", "Findings_EN", "Impressions_EN")
    reports = read_csv(table, columns, "VolumeName", names_volume=VOLUME.fullmatch)
    metadata = _rows(base / f"metadata/{split}_metadata.csv", METADATA)
    labels_csv = base / f"multi_abnormality_labels/{folder}_predicted_labels.csv"
    labels = _rows(labels_csv, ("VolumeName",))
    if labels:
        # Every volume's labels are read by name, in the order of the first table.
        names = tuple(name for name in next(iter(labels.values())) if name != "VolumeName")
        first, file = next(iter(label_names.items()), (names, labels_csv))
        label_names.setdefault(first, file)
        if set(names) != set(first):
            raise InputError(
                f"{labels_csv}: its columns differ from those of {file}; give both tables the same labels"
            )
    # v2 lives in *_fixed; where both are present it is the one with correct headers.
    volumes = base / f"{folder}_fixed" if (base / f"{folder}_fixed").is_dir() else base / folder
    on_disk = {path.name: path for path in visible(volumes, "*/*/*.nii.gz")}
    no_chest = _no_chest(base / f"metadata/no_chest_{folder}.txt")
    names = dict.fromkeys([*reports, *on_disk])
    questions = None
    if (asked := base / "radgenome_files").is_dir():
        questions, refused = read_questions(asked, split, map(nifti_stem, names))
        if refused:
            raise refusal(refused, f"correct the table, or move {asked} elsewhere")
    cases = []
    for name in names:
        if not (VOLUME.fullmatch(name) and name.endswith(".nii.gz")):
            raise InputError(
                f"{table}: VolumeName {name!r} is not of CT-RATE's form, such as train_1_a_1.nii.gz"
            )
        stem = nifti_stem(name)
        patient, scan = stem.rsplit("_", 2)[0], stem.rsplit("_", 1)[0]
        text, problem = _text(reports.get(name), impressions, table)
        case = Case(
            stem,
            scan,
            path=volumes / patient / scan / name,
            text=text,
            labels=label_row(labels, stem, next(iter(label_names), ()), labels_csv),
            table=_table_row(metadata.get(stem)),
            problem=problem if name in on_disk else "is listed in the reports table but absent",
            questions=None if questions is None else tuple(questions.get(stem, ())),
            chest=stem not in no_chest,
        )
        cases.append(case)
    return cases


def _rows(path: Path, columns: tuple[str, ...]) -> Rows:
    """Return the rows of a table that may be absent, by volume: some copies leave out the names' ending."""
    rows: Rows = {}
    table = read_csv(path, columns, "VolumeName", names_volume=VOLUME.fullmatch) if path.is_file() else {}
    for name, row in table.items():
        if rows.setdefault(nifti_stem(name), row) is not row:
            raise InputError(
                f"{path}: VolumeName {name} is listed twice, with and without its ending; keep one"
            )
    return rows


def _text(row: dict[str, str] | None, impressions: bool, table: Path) -> tuple[str, str | None]:
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
    if wrong := [name for name in names if not VOLUME.fullmatch(name)]:
        raise InputError(
            f"{path}: {wrong[0]!r:.60} is not a volume of CT-RATE's form, such as train_1_a_1.nii.gz"
        )
    return set(map(nifti_stem, names))


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


IMPRESSIONS = {"action": "store_true", "help": "add the impressions to the findings"}
CT_RATE = DataSet("ct-rate", read_ct_rate, {"impressions": IMPRESSIONS})
