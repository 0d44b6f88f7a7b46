"""The manifest of a prepared data set: manifest.json beside volumes/*.npy.

{"schema": 1, "dataset": ..., "recipe": {...}, "dtype": "float16", "text": ..., "labels": [names],
 "splits": {"train": [entry, ...], "validation": [...]}}
entry: {"id", "scan", "volume" (path below the folder), "text", "labels" (or null), "source": {file, sha256, shape,
spacing, orientation, rescale, hu_range}}
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reaf_hsenet.config import Recipe, from_dict, to_dict
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_json, write_json

SCHEMA = 1


@dataclass
class Manifest:
    folder: Path
    dataset: str
    recipe: Recipe
    dtype: str
    text: str
    labels: list[str]
    splits: dict[str, list[dict]]

    @property
    def file_size(self) -> int:
        """Bytes of a volume's .npy file: numpy's header of 128 bytes, then the voxels."""
        return 128 + int(np.prod(self.recipe.size)) * np.dtype(self.dtype).itemsize

    def save(self) -> None:
        head = {
            "schema": SCHEMA,
            "dataset": self.dataset,
            "recipe": to_dict(self.recipe),
            "dtype": self.dtype,
        }
        write_json(
            self.folder / "manifest.json",
            {**head, "text": self.text, "labels": self.labels, "splits": self.splits},
        )

    def entries(self, split: str) -> list[dict]:
        """The entries of a split. Raises InputError when there are none."""
        entries = self.splits.get(split, [])
        if not entries:
            raise InputError(
                f"{self.folder / 'manifest.json'}: the {split} split is empty; prepare some volumes for it"
            )
        return entries

    def check(self, splits: list[str]) -> None:
        """See that every volume is there and whole. Raises InputError with the first that is not."""
        for split in splits:
            for entry in self.entries(split):
                path = self.folder / entry["volume"]
                try:
                    size = os.stat(path).st_size
                except OSError as error:
                    raise InputError(
                        f"{path}: is in the manifest but absent; run preprocess.py again"
                    ) from error
                if size != self.file_size:
                    raise InputError(
                        f"{path}: has {size} bytes, expected {self.file_size} for "
                        f"{self.recipe.size} {self.dtype}; delete it and run preprocess.py again"
                    )
                if not entry["text"].strip():
                    raise InputError(f"{self.folder / 'manifest.json'}: the report of {entry['id']} is empty")

    def require(self, recipe: Recipe, wanted_by: str) -> None:
        """Raises InputError unless the volumes are of this recipe, which `wanted_by` needs."""
        have, want = vars(self.recipe), vars(recipe)
        other = [key for key in want if have[key] != want[key]]
        if other:
            raise InputError(
                f"{self.folder / 'manifest.json'}: its volumes have {_settings(have, other)}, but {wanted_by} needs "
                f"{_settings(want, other)}; prepare them so with preprocess.py"
            )


def _settings(recipe: dict, keys: list[str]) -> str:
    """`recipe hsenet, size 32x256x256`."""
    shown = {
        k: "x".join(f"{v:g}" for v in recipe[k]) if isinstance(recipe[k], tuple) else recipe[k] for k in keys
    }
    return ", ".join(f"{'recipe' if k == 'name' else k} {v}" for k, v in shown.items())


def load_manifest(folder: Path) -> Manifest:
    """Read a prepared folder's manifest. Raises InputError when it is absent, damaged or of another schema."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with preprocess.py --out {folder}")
    values = read_json(path)
    if values.get("schema") != SCHEMA:
        raise InputError(
            f"{path}: schema {values.get('schema')!r}, expected {SCHEMA}; prepare the data set again"
        )
    try:
        manifest = Manifest(
            folder,
            values["dataset"],
            from_dict(Recipe, values["recipe"]),
            values["dtype"],
            values["text"],
            values["labels"],
            values["splits"],
        )
        ids = [entry["id"] for split in manifest.splits.values() for entry in split]
        for split in manifest.splits.values():
            for entry in split:
                entry["scan"], entry["volume"], entry["text"], entry["labels"]  # KeyError if absent
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: {error} is missing; prepare the data set again") from error
    if len(ids) != len(set(ids)):
        repeated = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"{path}: id {repeated} is listed twice; keep one")
    return manifest
