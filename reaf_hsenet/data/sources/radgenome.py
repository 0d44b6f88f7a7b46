"""RadGenome-ChestCT's question tables: {train,validation}_vqa_{location,abnormality,presence,size}.csv of
CT-RATE volumes.

Columns, in upper or lower case: Volumename (with or without .nii.gz), Anatomy, Abnormality, of sizes Size;
Question and Answer where present. Tables of presence may call their columns Finding and Presence, as
RadGenome's own loader does.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from reaf_hsenet.config import KINDS
from reaf_hsenet.data.sources.tables import csv_rows, nifti_stem
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import visible

SPLITS = ("train", "validation")
COLUMNS = {
    "location": ("volumename", "anatomy", "abnormality"),
    "abnormality": ("volumename", "anatomy", "abnormality"),
    "presence": ("volumename", "anatomy", "abnormality", "answer"),
    "size": ("volumename", "anatomy", "abnormality", "size"),
}
OTHER_NAMES = {"finding": "abnormality", "presence": "answer"}
Refused = tuple[Path, str, str]  # table, volume, reason


def find_tables(root: Path) -> Path:
    """The folder at or below `root` that holds question tables. Raises InputError when none does."""
    root = Path(root)
    for folder in (root, root / "radgenome_files", root / "dataset" / "radgenome_files"):
        if visible(folder, "*_vqa_*.csv"):
            return folder
    raise InputError(
        f"{root}: has no RadGenome-ChestCT tables; expected train_vqa_location.csv or others of its name "
        "there, or in radgenome_files below it"
    )


def read_questions(
    folder: Path, split: str, volumes: Iterable[str], kinds: Sequence[str] = KINDS
) -> tuple[dict[str, list[dict]], list[Refused]]:
    """The questions of a split's tables by volume, and the rows that cannot be used: (table, volume, reason).

    volumes: ids of the split's volumes. A question is {"kind", "anatomy", "abnormality", "answer"}, and
    "size" and "question" where the table has them; question_text puts one without into words. A repeated row
    is a question of its own, as published.
    """
    ids = {volume.lower(): volume for volume in volumes}
    found: dict[str, list[dict]] = {}
    refused: list[Refused] = []
    for kind in kinds:
        table = folder / f"{split}_vqa_{kind}.csv"
        unknown: Counter[str] = Counter()
        if not table.is_file():
            continue
        rows = csv_rows(table, COLUMNS[kind], _column, lambda cell: nifti_stem(cell).lower() in ids)
        for line, cells in rows:
            name = nifti_stem(cells["volumename"].strip())
            if name.lower() not in ids:
                unknown[name] += 1
                continue
            row = _question(kind, cells)
            told = row["abnormality"] or kind == "abnormality" or "question" in row
            if not (row["answer"] and told):
                lacking = "abnormality" if row["answer"] else "answer"
                refused.append((table, name, f"line {line} has no {lacking}"))
            else:
                found.setdefault(ids[name.lower()], []).append(row)
        for name, count in unknown.items():
            refused.append((table, name, f"not among the {split} volumes, {count} row{'s' * (count > 1)}"))
    return found, refused


def refusal(refused: list[Refused], advice: str) -> InputError:
    """Return the error of the rows that cannot be used: the first table and its first volumes."""
    table, _, reason = refused[0]
    names = list(dict.fromkeys(volume for path, volume, _ in refused if path == table))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return InputError(f"{table}: {', '.join(names[:3])}{more}: {reason}; {advice}")


def _column(name: str) -> str:
    name = name.strip().lower()
    return OTHER_NAMES.get(name, name)


def _question(kind: str, cells: dict[str, str]) -> dict[str, str]:
    names = ("anatomy", "abnormality", "size", "question", "answer")
    row = {name: (cells.get(name) or "").strip() for name in names}
    # Published: where something is, is answered by the name of the anatomy.
    own = {
        "location": row["anatomy"],
        "abnormality": row["answer"] or row["abnormality"],
        "presence": row["answer"],
        "size": row["answer"] or row["size"],
    }[kind]
    row["answer"] = own or row["answer"]
    return {"kind": kind, **{k: v for k, v in row.items() if v or k not in ("size", "question")}}
