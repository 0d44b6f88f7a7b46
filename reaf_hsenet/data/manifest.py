"""The manifest of a data set: manifest.json, beside volumes/*.npy or of source files as they are.

The file is an object with "schema": 1 and the fields of Manifest from `dataset` to `slices`. An entry of a
split is
an object: "id", "scan", "volume" (path, absolute or below the folder), "text", "labels" (0 or 1 each, or
null), "source": {file, sha256, shape, spacing, orientation, rescale, hu_range} and, where there are some,
"table": {spacing, slope, intercept} of a metadata table, "slices" (path), "qa": [{"kind", "anatomy",
"abnormality", "size"?, "question"?, "answer"}, ...] (see questions.py), "chest": false (by the data set's own
list it is another part of the body). Volumes that end in .npy are prepared, others are source files; both may
stand side by side.
"""

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from reaf_hsenet.config import RECIPES, Recipe
from reaf_hsenet.data.reading import Reading
from reaf_hsenet.data.sources.datasets import Case, Source
from reaf_hsenet.data.sources.hsenet_json import FEATURES, read_hsenet_json
from reaf_hsenet.data.sources.reaf_dataset import is_reaf_layout, read_reaf
from reaf_hsenet.data.sources.tables import given, plain_path
from reaf_hsenet.data.volume import TableRow
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import is_text, read_object, write_json
from reaf_hsenet.settings import from_dict, to_dict

SCHEMA = 1
AGAIN = "prepare the data set again"


# An entry has the kinds of the first table, and may have those of the second.
ENTRY = {"id": str, "scan": str, "volume": str, "text": str, "labels": list | None}
OPTIONAL = {"source": dict, "table": dict, "slices": str, "qa": list, "chest": bool}
QA = {"kind", "anatomy", "abnormality", "answer"}


@dataclass
class Manifest:
    """A data set's head and entries. dtype: of the .npy files. reading: how source files are read.

    slices: what made the slice features, {encoder, sha256 of its weights, slices, width, ...}.
    published: HSENet's own json, if the data set is one. Its arrays have any float type, checked when read.
    """

    folder: Path | None
    dataset: str
    recipe: Recipe
    dtype: Literal["float16", "float32"]
    text: str
    labels: tuple[str, ...]
    splits: dict
    reading: Reading = Reading()
    slices: dict | None = None
    published: Path | None = None

    @property
    def location(self) -> Path:
        """The path that `--data` names, and load_manifest reads again."""
        return self.published or self.folder

    @property
    def name(self) -> Path:
        """The path that messages name: the file, or the folder of a published layout without one."""
        path = self.folder / "manifest.json"
        return self.published or (path if path.is_file() else self.folder)

    @property
    def file_size(self) -> int:
        """Bytes of a prepared volume's .npy file: numpy's header of 128 bytes, then the voxels."""
        return 128 + int(np.prod(self.recipe.size)) * np.dtype(self.dtype).itemsize

    @property
    def slices_size(self) -> int:
        """Bytes of a volume's float16 slice features, likewise."""
        return 128 + 2 * self.slices["slices"] * self.slices["width"]

    def save(self) -> None:
        head = {"schema": SCHEMA, **{name: getattr(self, name) for name in SAVED}}
        head |= {"recipe": to_dict(self.recipe), "reading": to_dict(self.reading)}
        if not self.slices:
            del head["slices"]
        write_json(self.folder / "manifest.json", head)

    def all_entries(self) -> list[dict]:
        return [entry for entries in self.splits.values() for entry in entries]

    def entries(self, split: str) -> list[dict]:
        """The entries of a split. Raises InputError when there are none."""
        entries = self.splits.get(split, [])
        if not entries:
            raise InputError(f"{self.name}: the {split} split is empty; prepare some volumes for it")
        return entries

    def ids(self, split: str) -> list[str]:
        return [entry["id"] for entry in self.entries(split)]

    @property
    def chosen_on(self) -> str:
        """Name the split that training validates on, and so chooses its checkpoints."""
        return "development" if self.splits.get("development") else "validation"

    def scans(self, split: str) -> np.ndarray:
        """Return the scan of each volume of a split, (N,)."""
        return np.array([entry["scan"] for entry in self.entries(split)])

    def training_sha256(self) -> str:
        """Hash the names of the training volumes."""
        names = "\n".join(sorted(entry["id"] for entry in self.splits.get("train", [])))
        return hashlib.sha256(names.encode()).hexdigest()

    def check(self, splits: list[str], slices: bool = False, reports: bool = True) -> None:
        """Raise InputError for the first volume, slice features (with `slices`) or report that is missing."""
        for split in splits:
            if reports:
                self.check_reports(split)
            for entry in self.entries(split):
                self.check_files(entry, slices)

    def check_reports(self, split: str) -> None:
        for entry in self.entries(split):
            if not given(entry["text"]):
                raise InputError(f"{self.name}: the report of {entry['id']} is empty")

    def check_files(self, entry: dict, slices: bool) -> None:
        """See that the files of an entry are there and whole, without reading them."""
        path = self.folder / entry["volume"]
        size = self._bytes(path, "correct its path" if self.published else "run preprocess.py again")
        if path.suffix == ".npy" and not self.published and size != self.file_size:
            raise InputError(
                f"{path}: has {size} bytes, expected {self.file_size} for {self.recipe.size} {self.dtype}; "
                "delete it and run preprocess.py again"
            )
        if slices:
            path = self.slices_path(entry)
            size = self._bytes(path, self._make_slices)
            if not self.published and size != self.slices_size:
                shape = self.slices["slices"], self.slices["width"]
                raise InputError(
                    f"{path}: has {size} bytes, expected {self.slices_size} for {shape} float16; "
                    f"{self._make_slices}"
                )

    def _bytes(self, path: Path, advice: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError as error:
            where = self.published.name if self.published else "the manifest"
            raise InputError(f"{path}: is in {where} but absent; {advice}") from error

    @property
    def _make_slices(self) -> str:
        if self.published:
            return f"give its entries {FEATURES}, the path of a .npy or .pt file"
        return f"make them with preprocess.py --slices ENCODER --out {self.folder}"

    def slices_path(self, entry: dict) -> Path:
        """The slice features of a volume. Raises InputError when it has none."""
        if self.slices is None or "slices" not in entry:
            raise InputError(f"{self.name}: {entry['id']} has no slice features; {self._make_slices}")
        return self.folder / entry["slices"]

    def require_slices(self, provenance: dict, wanted_by: str) -> None:
        """Raise InputError unless the slice features are of this provenance, wherever its weights lay.

        HSENet's json does not say what made its features: only their shape is compared.
        """
        if self.slices is None:
            raise InputError(f"{self.name}: has no slice features; {self._make_slices}")
        if other := different_slices(self.slices, provenance):
            replace = "" if self.published else " --replace-slices"
            raise InputError(
                f"{self.name}: its slice features have another {other} than {wanted_by}; "
                f"{self._make_slices}{replace}"
            )

    def require(self, recipe: Recipe, wanted_by: str) -> None:
        """Raise InputError unless the volumes are of this recipe, which `wanted_by` needs."""
        have, want = vars(self.recipe), vars(recipe)
        other = [key for key in want if have[key] != want[key]]
        if other:
            raise InputError(
                f"{self.name}: its volumes have {_settings(have, other)}, but {wanted_by} needs "
                f"{_settings(want, other)}; prepare them so with preprocess.py"
            )


SAVED = ("dataset", "recipe", "dtype", "text", "labels", "reading", "slices", "splits")


def _settings(recipe: dict, keys: list[str]) -> str:
    """`recipe hsenet, size 32x256x256`."""
    shown = {"recipe" if key == "name" else key: recipe[key] for key in keys}
    plain = {k: "x".join(f"{n:g}" for n in v) if isinstance(v, tuple) else v for k, v in shown.items()}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def different_slices(have: dict, want: dict) -> str:
    """Return the settings, but for the encoder's name, in which slice features differ, as text."""
    return ", ".join(k for k in want if k != "encoder" and k in have and have[k] != want[k])


def origin(entry: dict) -> dict:
    """Return facts that are equal for two volumes that were made of one file in one way."""
    source = entry.get("source", {})
    if "sha256" in source:  # then it does not matter where the file is
        source = {k: v for k, v in source.items() if k != "file"}
    return {"source": source, "table": entry.get("table")}


def make_entry(case: Case, folder: Path, volume: Path, source: dict) -> dict:
    """The entry of `volume`: its path is relative where it lies below the manifest's folder."""
    table = {}
    if case.table != TableRow():
        table["table"] = {
            "spacing": case.table.spacing and [_json_number(s) for s in case.table.spacing],
            "slope": _json_number(case.table.slope),
            "intercept": _json_number(case.table.intercept),
        }
    return {
        "id": case.id,
        "scan": case.scan,
        "volume": str(volume.relative_to(folder) if volume.is_relative_to(folder) else volume.absolute()),
        "text": case.text,
        "labels": None if case.labels is None else list(case.labels),
        "source": source,
        **table,
        **({} if case.questions is None else {"qa": list(case.questions)}),
        **({} if case.chest else {"chest": False}),
    }


def new_manifest(source: Source, folder: Path, recipe: Recipe, reading: Reading, dtype: str) -> Manifest:
    """Return a manifest without splits."""
    return Manifest(
        folder=folder,
        dataset=source.kind,
        recipe=recipe,
        dtype=dtype,
        text=source.text,
        labels=source.label_names,
        splits={},
        reading=reading,
    )


def as_is_manifest(
    source: Source, folder: Path, recipe: Recipe, reading: Reading, dtype: str = "float16"
) -> tuple[Manifest, list[tuple[str, str]]]:
    """Return a manifest whose volumes are the source files, which are not opened, and what is refused."""
    manifest = new_manifest(source, folder, recipe, reading, dtype)
    refused = [(str(case.path), case.problem) for case in source.by_id().values() if case.problem]
    for split, cases in source.splits.items():
        manifest.splits[split] = [
            make_entry(case, folder, case.path, {"file": str(case.path.absolute())})
            for case in cases
            if not case.problem
        ]
    return manifest, refused


def _json_number(value: float | None) -> float | str | None:
    """JSON has no NaN, which a table row without a usable spacing holds."""
    return value if value is None or math.isfinite(value) else str(value)


def table_row(entry: dict) -> TableRow | None:
    """Return the metadata table's row of an entry's source file; None where it is not of numbers."""
    if "table" not in entry:
        return TableRow()
    try:
        spacing, slope, intercept = (entry["table"][key] for key in ("spacing", "slope", "intercept"))
        if spacing is not None:
            x, y, z = map(float, spacing)
            spacing = (x, y, z)
        return TableRow(spacing, *(None if v is None else float(v) for v in (slope, intercept)))
    except (KeyError, TypeError, ValueError):
        return None


def load_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest, a folder in REAF's published layout, or HSENet's json file.

    Raises InputError when there is none, and for a manifest that is damaged or of another schema.
    """
    folder = Path(folder)
    if folder.is_file():
        return _published_hsenet(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        if is_reaf_layout(folder):
            return _published_reaf(folder)
        raise InputError(f"{path}: no such file; make it with preprocess.py --out {folder}")
    values = read_object(path)
    if values.get("schema") != SCHEMA:
        raise InputError(f"{path}: schema {values.get('schema')!r}, expected {SCHEMA}; {AGAIN}")
    known = {field.name for field in fields(Manifest)} - {"folder", "published"}
    try:
        head = {name: value for name, value in values.items() if name in known}
        manifest = from_dict(Manifest, {**head, "folder": None}, str(path))
    except InputError as error:
        raise InputError(f"{error}; {AGAIN}") from error
    for split, entries in manifest.splits.items():
        if not isinstance(entries, list):
            raise InputError(f"{path}: {split} is {entries!r:.60}; {AGAIN}")
        for number, entry in enumerate(entries):
            _check_entry(entry, len(manifest.labels), f"{path}: {split} entry {number}")
    manifest.folder = folder
    if manifest.slices is not None:
        _check_slices(path, manifest.slices)
    listed = manifest.all_entries()
    for what, names in (
        ("id", [entry["id"] for entry in listed]),
        ("volume", [os.path.normpath(entry["volume"]) for entry in listed]),
    ):
        name, times = next(iter(Counter(names).most_common(1)), ("", 0))
        if times > 1:
            raise InputError(f"{path}: {what} {name} is listed twice; keep one")
    return manifest


def _check_entry(entry: dict, labels: int, where: str) -> None:
    """Raise InputError, naming the field, unless an entry is as preprocess.py writes it."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: it is {entry!r:.60}; {AGAIN}")
    kinds = ENTRY | {name: kind for name, kind in OPTIONAL.items() if name in entry}
    fits = {name: isinstance(entry.get(name, ...), kind) for name, kind in kinds.items()}
    if all(fits.values()):
        marks, source, asked = entry["labels"], entry.get("source", {}), entry.get("qa", ())
        fits = {
            "volume": "\0" not in entry["volume"],
            "text": is_text(entry["text"]),
            "labels": marks is None or len(marks) == labels and all(mark in (0, 1) for mark in marks),
            "source": all(isinstance(source.get(n, ""), str) for n in ("file", "rescale", "orientation"))
            and isinstance(source.get("spacing", []), list),
            "table": table_row(entry) is not None,
            "qa": all(isinstance(row, dict) and QA <= row.keys() for row in asked)
            and all(isinstance(text, str) for row in asked for text in row.values()),
        }
    for name, fit in fits.items():
        if not fit:
            raise InputError(f"{where}: {name} is {entry.get(name, 'missing')!r:.60}; {AGAIN}")
    plain_path(entry["id"], f"{where}: id")


def _check_slices(path: Path, slices: dict) -> None:
    """Raise InputError unless what is said of the slice features tells their shape and their encoder."""
    for key, kind in (("sha256", str), ("slices", int), ("width", int)):
        if type(value := slices.get(key)) is not kind or value in ("", 0):
            raise InputError(
                f"{path}: {key} of its slice features is {value!r}; remove its slices and run preprocess.py "
                f"--slices ENCODER --out {path.parent}"
            )


def _published_hsenet(path: Path) -> Manifest:
    splits, features = read_hsenet_json(path)
    head = "hsenet", RECIPES["hsenet"], "float32", "report", ()
    return Manifest(path.parent, *head, splits, slices=features, published=path)


def _published_reaf(folder: Path) -> Manifest:
    manifest, refused = as_is_manifest(read_reaf(folder), folder, RECIPES["reaf"], Reading())
    if refused:
        path, reason = refused[0]
        raise InputError(
            f"{path}: {reason}; {len(refused)} volumes of {folder} cannot be used: make a manifest of the "
            f"others with preprocess.py --dataset reaf --root {folder} --as-is --out FOLDER"
        )
    return manifest
