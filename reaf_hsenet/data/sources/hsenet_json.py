"""HSENet's own data set file: {"train": [entry, ...], "validation": [...], "test": [...]}.

entry: {"image": a prepared volume, .npy, "text": the report or a .txt file that holds it,
"biomedclip_features": the (32, 768) features of its slices, .npy or .pt; optional}. Paths are absolute or
relative to the file. A volume's id is its file's name, without the `_3D_features.npy` of HSENet's own files;
where names repeat, the path without `.npy`.
"""

import os
from collections import Counter
from pathlib import Path

from reaf_hsenet.data.sources.reaf_dataset import CT_RATE_NAME
from reaf_hsenet.data.sources.tables import given
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import is_text, named, read_json

SPLITS = ("train", "validation", "test")
FEATURES = "biomedclip_features"
SUFFIX = "_3D_features"  # what HSENet's preparation appends to a volume's name


def read_hsenet_json(path: Path) -> tuple[dict[str, list[dict]], dict | None]:
    """The splits, as a manifest's entries, and what is known of the slice features (None when no entry has
    any).

    Volumes and features are not opened. Raises InputError for anything that is not of this form.
    """
    values = read_json(path)
    if not isinstance(values, dict) or not values or not set(values) <= set(SPLITS):
        found = ", ".join(map(str, values))[:80] if isinstance(values, dict) else type(values).__name__
        raise InputError(
            f"{path}: has {found or 'nothing'}; expected HSENet's lists {', '.join(SPLITS)}, or a folder "
            f"of preprocess.py"
        )
    splits, seen = {}, set()
    for split, entries in values.items():
        if not isinstance(entries, list):
            raise InputError(f"{path}: {split} is no list; expected entries of image and text")
        splits[split] = [_entry(path, f"{path}: {split} entry {i}", e) for i, e in enumerate(entries)]
        for entry in splits[split]:
            if (image := os.path.normpath(entry["volume"])) in seen:
                raise InputError(f"{path}: image {entry['volume']} is listed twice; keep one")
            seen.add(image)
    names = Counter(_stem(entry["volume"]) for entries in splits.values() for entry in entries)
    for entry in (e for entries in splits.values() for e in entries):
        if names[stem := _stem(entry["volume"])] == 1:
            entry["id"] = stem
        entry["scan"] = stem.rpartition("_")[0] if CT_RATE_NAME.fullmatch(stem) else entry["id"]
    has_features = any("slices" in entry for entries in splits.values() for entry in entries)
    return splits, {"encoder": FEATURES, "slices": 32, "width": 768} if has_features else None


def _stem(image: str) -> str:
    return Path(image).name.removesuffix(".npy").removesuffix(SUFFIX)


def _entry(path: Path, where: str, values) -> dict:
    known = values if isinstance(values, dict) else {}
    image, text, features = (known.get(key) for key in ("image", "text", FEATURES))
    if not (isinstance(image, str) and image.endswith(".npy")):
        raise InputError(f"{where}: image is {image!r}; expected the path of a prepared .npy volume")
    if not (isinstance(text, str) and is_text(text)):
        raise InputError(f"{where} ({image}): has no text; expected a report or the path of a .txt file")
    name = image.removesuffix(".npy")
    text = _report(path.parent / text) if text.endswith(".txt") and "\n" not in text else text
    entry = {"id": name, "scan": name, "volume": image, "text": given(text), "labels": None}
    entry["source"] = {"file": image}
    if features is not None:
        if not (isinstance(features, str) and features.endswith((".npy", ".pt"))):
            raise InputError(
                f"{where} ({image}): {FEATURES} is {features!r}; expected the path of a .npy or .pt file"
            )
        entry["slices"] = features
    return entry


def _report(path: Path) -> str:
    with named(path, "cannot be read as a report"):
        return path.read_text(encoding="utf-8").strip()
