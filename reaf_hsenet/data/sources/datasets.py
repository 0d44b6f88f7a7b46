"""A published data set, in one file below this folder: its cases, and how preprocess.py offers it.

A reader returns cases per split; it opens tables, never volumes. A case whose tables already rule it out (an
empty report, an absent file) carries the reason as `problem`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from reaf_hsenet.config import RECIPES, Recipe
from reaf_hsenet.data.patients import held_out, patient_name
from reaf_hsenet.data.sources.tables import plain_path
from reaf_hsenet.data.volume import TableRow
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import visible


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
        """Return all cases. Raises InputError for an id that is no path, and an id or file of two."""
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

    def with_development(self, count: int) -> "Source":
        """Return the source with all cases of `count` training patients in a split `development`.

        Raises InputError when no training patient is left.
        """
        train = self.splits.get("train", [])
        patients = {patient_name(vars(case)) for case in train if not case.problem}
        if count >= len(patients):
            raise InputError(
                f"--development {count}: there are {len(patients)} training patients with volumes; hold "
                "fewer out"
            )
        held = held_out(patients, count)
        parts = {"train": [], "development": []}
        for case in train:
            parts["development" if patient_name(vars(case)) in held else "train"].append(case)
        return replace(self, splits={**parts, **{k: v for k, v in self.splits.items() if k not in parts}})


@dataclass(frozen=True)
class DataSet:
    """A data set as preprocess.py --dataset has it.

    read: called with the folder of the raw data and the flags. flags: as argparse wants them, by name.
    recipes, recipe, slice_recipe: what its volumes and slices are prepared by, unless other flags say.
    """

    name: str
    read: Callable[..., Source]
    flags: dict[str, dict] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=lambda: RECIPES)
    recipe: str = "hsenet"
    slice_recipe: str = "hsenet"


def only_csv(root: Path, columns: str) -> Path:
    """The csv file of a folder. Raises InputError unless there is exactly one."""
    found = visible(root, "*.csv")
    if len(found) != 1:
        raise InputError(f"{root}: has {len(found)} csv files; name the one with {columns} with --csv")
    return found[0]


def label_row(
    table: dict[str, dict[str, str]], name: str, names: tuple[str, ...], path: Path
) -> tuple[int, ...] | None:
    """Return the labels of a volume, if it has a row. Raises InputError unless all are 0 or 1."""
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
