"""Which volumes of a split retrieval is scored among: RadFinder's filter modes of CT-RATE, `<dedup>_<part>`.

dup: all volumes. first: of a report (our entries' scan) the first volume by the name of its file.
smallestdeduptext: of a report the volume of smallest in-plane spacing; then of equal texts the first, in the
order of reports' names (COLIPRI's evaluation set). all: all studies. nohead: without the studies of which
a volume is listed in metadata/no_chest_*.txt. docs/evaluation.md says which numbers were published on which.
"""

import math
from itertools import product

from reaf_hsenet.data.manifest import Manifest, table_row
from reaf_hsenet.errors import InputError

PROTOCOLS = tuple(map("_".join, product(("dup", "first", "smallestdeduptext"), ("all", "nohead"))))


def protocol_rows(name: str, manifest: Manifest, split: str) -> list[int]:
    """Return the rows of the split that a protocol keeps. Raises InputError where the data do not tell."""
    dedup, part = name.split("_")
    entries, where = manifest.entries(split), manifest.name
    heads = {entry["scan"] for entry in entries if not entry.get("chest", True)}
    if part == "nohead" and not heads:
        raise InputError(
            f"{where}: has no {split} volume that is marked as no chest; put the data set's "
            "metadata/no_chest_*.txt beside its tables and prepare again"
        )
    kept = [i for i, entry in enumerate(entries) if part == "all" or entry["scan"] not in heads]
    file_name = [f"{entry['id']}.nii.gz" for entry in entries]  # before _10 comes _1, and _2 after it
    if dedup == "first":
        kept = _first_of_each(sorted(kept, key=file_name.__getitem__), "scan", entries)
    elif dedup == "smallestdeduptext":
        if manifest.text == "findings and impressions":
            raise InputError(f"{where}: its texts have impressions; prepare the findings alone")
        spacing = {i: in_plane_spacing(entries[i]) for i in kept}
        if unknown := [entries[i]["id"] for i in kept if math.isnan(spacing[i])]:
            raise InputError(f"{where}: does not know the in-plane spacing of {unknown[0]}; prepare again")
        kept.sort(key=lambda i: (entries[i]["scan"], spacing[i], file_name[i]))
        kept = _first_of_each(_first_of_each(kept, "scan", entries), "text", entries)
    if not kept:
        raise InputError(f"{where}: leaves none of the {split} volumes; choose another")
    return sorted(kept)


def choose_protocols(
    names: tuple[str, ...], manifest: Manifest, split: str
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the rows of each protocol, without names of all that the data tell, and why others are not."""
    rows, left_out = {}, {}
    for name in names or PROTOCOLS:
        try:
            rows[name] = protocol_rows(name, manifest, split)
        except InputError as error:
            if names:
                raise InputError(f"--protocol {name}: {error}") from error
            left_out[name] = str(error)
    return rows, left_out


def in_plane_spacing(entry: dict) -> float:
    """Return mm along the left-right axis: the metadata table's, else the file's; NaN for neither."""
    listed, source = table_row(entry).spacing, entry.get("source", {})
    if listed and math.isfinite(listed[0]):
        return listed[0]
    axes = zip(source.get("orientation", ""), source.get("spacing", ()), strict=False)
    return next((mm for axis, mm in axes if axis in "LR" and isinstance(mm, int | float)), math.nan)


def _first_of_each(rows: list[int], key: str, entries: list[dict]) -> list[int]:
    first: dict[str, int] = {}
    for i in rows:
        first.setdefault(entries[i][key], i)
    return list(first.values())
