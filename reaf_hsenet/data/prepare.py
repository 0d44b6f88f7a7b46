"""A data set's CTs -> volumes/*.npy and a manifest, restartable: progress.jsonl says what is done.

Or only a manifest of the CTs as they are, which training reads and processes itself.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from reaf_hsenet.config import Recipe
from reaf_hsenet.data.each_volume import Journal, Refused, each_volume, write_refused
from reaf_hsenet.data.manifest import (
    Manifest,
    as_is_manifest,
    load_manifest,
    make_entry,
    new_manifest,
    origin,
    table_row,
)
from reaf_hsenet.data.reading import Reading, SlicesWanted, read_input, read_slice_images
from reaf_hsenet.data.sources.datasets import Case, Source
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, file_sha256, folder_lock
from reaf_hsenet.settings import to_dict


@dataclass(frozen=True)
class Options:
    """All that a prepared volume depends on, beside its source file."""

    recipe: Recipe
    reading: Reading = Reading()
    dtype: str = "float16"

    def for_source(self, source: Source) -> "Options":
        """Take the source's own orientation of blank headers, unless one was chosen."""
        blank = self.reading.assume_orientation or source.blank_orientation
        return replace(self, reading=replace(self.reading, assume_orientation=blank))

    def to_json(self) -> dict:
        reading = to_dict(self.reading)
        header = reading.pop("header")
        held = {"recipe": json.loads(json.dumps(to_dict(self.recipe))), **reading, "dtype": self.dtype}
        # Journals from before there was a choice have no header.
        return held if header == "check" else {**held, "header": header}


def prepare(
    source: Source, out: Path, options: Options, workers: int = 1, progress: bool = True
) -> tuple[Manifest, Refused]:
    """Prepare what is missing below `out`, then write manifest.json and refused.csv.

    Returns the manifest and what was refused. Only whole files ever appear under their names; after an
    interrupt the same call continues.
    """
    out, options = Path(out), options.for_source(source)
    cases = source.by_id()
    manifest = new_manifest(source, out, options.recipe, options.reading, options.dtype)

    def whole(record: dict) -> bool:
        """Return whether the volume is on disk, and its source is as it was."""
        case, volume = cases.get(record["id"]), out / volume_name(record["id"])
        unchanged = case and not case.problem and _is_source(record.get("source"))
        unchanged = unchanged and _stamp(case) == record.get("stamp")
        return bool(unchanged) and volume.is_file() and volume.stat().st_size == manifest.file_size

    with folder_lock(out):
        done, reasons = each_volume(
            {i: case for i, case in cases.items() if not case.problem},
            partial(prepare_case, out=out, options=options),
            Journal(out / "progress.jsonl", options.to_json(), "volumes prepared"),
            whole,
            what="volumes",
            workers=workers,
            progress=progress,
        )
        for split, members in source.splits.items():
            # The file is where it is now, which may be another place than when the volume was made.
            manifest.splits[split] = [
                make_entry(
                    c, out, out / volume_name(c.id), {**done[c.id]["source"], "file": str(c.path.absolute())}
                )
                for c in members
                if c.id in done
            ]
        reasons |= {i: case.problem for i, case in cases.items() if case.problem}
        refused = [_refused(cases[i].path, reason) for i, reason in sorted(reasons.items())]
        _save(manifest, refused)
    return manifest, refused


def list_as_is(source: Source, out: Path, options: Options) -> tuple[Manifest, Refused]:
    """Write manifest.json of the source files themselves, and refused.csv. No volume is opened."""
    out, options = Path(out), options.for_source(source)
    with folder_lock(out):
        if (out / "progress.jsonl").exists():
            raise InputError(f"{out}: holds prepared volumes, which --as-is would hide; choose another --out")
        manifest, refused = as_is_manifest(source, out, options.recipe, options.reading, options.dtype)
        _save(manifest, refused)
    return manifest, refused


def _refused(path: Path | str, reason: str) -> tuple[str, str]:
    return str(path), reason.removeprefix(f"{path}: ")


def _save(manifest: Manifest, refused: Refused) -> None:
    _keep_added(manifest)
    write_refused(manifest.folder, refused)
    manifest.save()


def _keep_added(manifest: Manifest) -> None:
    """Take over what was added to the folder's manifest: questions, and slice features.

    Questions are kept where the data set itself has none, features of the volumes that are still made of the
    same source.
    """
    if not (manifest.folder / "manifest.json").is_file():
        return
    try:
        before = load_manifest(manifest.folder)
    except InputError:
        return  # it is replaced; `--slices` finds the features again
    manifest.slices = before.slices
    listed = {entry["id"]: entry for entry in before.all_entries()}
    for entry in manifest.all_entries():
        old = listed.get(entry["id"], {})
        if "qa" in old and "qa" not in entry:
            entry["qa"] = old["qa"]
        if "slices" in old and origin(old) == origin(json.loads(json.dumps(entry))):
            entry["slices"] = old["slices"]


def _is_source(value) -> bool:
    """Return whether this is what read_input records of a source file."""
    kinds = {"sha256": str, "rescale": str, "shape": list}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def volume_name(case_id: str) -> str:
    return f"volumes/{case_id}.npy"


def prepare_case(case: Case, out: Path, options: Options) -> dict:
    """Write one volume and return its record. Raises InputError when the source cannot be used."""
    image, record = read_input(case.path, options.recipe, options.reading, case.table)
    with atomic_write(out / volume_name(case.id), "wb") as file:
        np.save(file, image[0].astype(options.dtype))
    source = {"file": str(case.path), "sha256": file_sha256(case.path), **record}
    return {"id": case.id, "stamp": _stamp(case), "source": source}


def entry_slices(entry: dict, reading: Reading, wanted: SlicesWanted) -> np.ndarray:
    """Return (32, size, size) uint8 pictures of an entry's source file.

    Raises InputError when the file cannot be read, or holds something else than the prepared volume. Stands
    here, not with the slice features, since workers start faster without torch.
    """
    path = Path(entry["source"]["file"])
    images, record = read_slice_images(path, wanted, reading, table_row(entry))
    if other := differs(entry["source"], record):
        raise InputError(
            f"{path}: its {', '.join(other)} differs from the prepared volume's; run preprocess.py --dataset "
            "again"
        )
    return images


def differs(source: dict, record: dict) -> list[str]:
    """Return the names in which a manifest's record of a source file is not a new reading's."""
    other = [k for k, v in record.items() if source.get(k, v) != v]
    # Earlier versions recorded the spacing in another order of axes.
    return [k for k in other if k != "spacing" or sorted(source[k]) != sorted(record[k])]


def _stamp(case: Case) -> str | None:
    """Return what the volume depends on: another file or row of the table is prepared again."""
    try:
        stat = case.path.stat()
    except OSError:
        return None
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns, {case.table}"
