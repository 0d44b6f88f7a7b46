"""A data set's CTs -> volumes/*.npy and a manifest, restartable: what is done is in progress.jsonl and on
disk.

Or only a manifest of the CTs as they are, which training reads and processes itself.
"""

import csv
import json
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reaf_hsenet.config import Recipe
from reaf_hsenet.data.manifest import (
    Manifest,
    as_is_manifest,
    load_manifest,
    make_entry,
    origin,
    table_row,
)
from reaf_hsenet.data.pool import worker_pool
from reaf_hsenet.data.reading import Reading, SlicesWanted, read_input, read_slice_images
from reaf_hsenet.data.sources.datasets import Case, Source
from reaf_hsenet.data.sources.tables import csv_rows
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.files import atomic_write, file_sha256, folder_lock, named
from reaf_hsenet.progress import progress_bar
from reaf_hsenet.settings import to_dict


@dataclass(frozen=True)
class Options:
    """What a prepared volume depends on, beside its source file."""

    recipe: Recipe
    rescale: str = "auto"
    orientation: str = "header"
    assume_orientation: str | None = None
    dtype: str = "float16"
    header: str = "check"

    @property
    def reading(self) -> Reading:
        return Reading(self.rescale, self.orientation, self.assume_orientation, self.header)

    def for_source(self, source: Source) -> "Options":
        """With the source's own orientation of blank headers, unless one was chosen."""
        return replace(self, assume_orientation=self.assume_orientation or source.blank_orientation)

    def to_json(self) -> dict:
        values = json.loads(json.dumps(to_dict(self)))
        if self.header == "check":  # as in journals from before there was a choice
            del values["header"]
        return values


def prepare(
    source: Source,
    out: Path,
    options: Options,
    text: str = "findings",
    workers: int = 1,
    progress: bool = True,
) -> tuple[Manifest, list[tuple[str, str]]]:
    """Prepare what is missing below `out`, then write manifest.json and refused.csv.

    Returns the manifest and the refused (file, reason) pairs. Only whole files ever appear under their names;
    after an interrupt the same call continues.
    """
    out = Path(out)
    options = options.for_source(source)
    cases = source.by_id()
    with folder_lock(out):
        remove_half_written(out)
        manifest = Manifest(
            out,
            source.kind,
            options.recipe,
            options.dtype,
            text,
            list(source.label_names),
            {},
            options.reading,
        )
        journal = Journal(out / "progress.jsonl", options.to_json(), "volumes prepared")

        def whole(record: dict) -> bool:
            """Is the volume whole, and has its source not changed since?"""
            case, volume = cases.get(record["id"]), out / volume_name(record["id"])
            unchanged = case and not case.problem and _is_source(record.get("source"))
            unchanged = unchanged and _stamp(case) == record.get("stamp")
            return bool(unchanged) and volume.is_file() and volume.stat().st_size == manifest.file_size

        done = journal.read(whole)
        refused = {i: c.problem for i, c in cases.items() if c.problem}
        todo = [c for i, c in cases.items() if i not in done and i not in refused]
        with progress_bar(len(todo), "volumes", "volume", shown=progress and bool(todo)) as bar:

            def keep(case: Case, record: dict | None, reason: str | None) -> None:
                if record is None:
                    refused[case.id] = reason
                else:
                    journal.add(record)
                    done[case.id] = record
                bar.update()

            _run(todo, out, options, workers, keep)
        for split, members in source.splits.items():
            manifest.splits[split] = [
                # The file is where it is now, which may be another place than when the volume was made.
                make_entry(
                    c, out, out / volume_name(c.id), {**done[c.id]["source"], "file": str(c.path.absolute())}
                )
                for c in members
                if c.id in done
            ]
        lines = [(str(cases[i].path), reason) for i, reason in sorted(refused.items())]
        _save(manifest, lines)
    return manifest, lines


def list_as_is(
    source: Source, out: Path, options: Options, text: str = "findings"
) -> tuple[Manifest, list[tuple[str, str]]]:
    """Write a manifest.json of the source files themselves, and refused.csv; returns both. No volume is
    opened.
    """
    out = Path(out)
    with folder_lock(out):
        if (out / "progress.jsonl").exists():
            raise InputError(f"{out}: holds prepared volumes, which --as-is would hide; choose another --out")
        reading = options.for_source(source).reading
        manifest, lines = as_is_manifest(source, out, options.recipe, reading, text, options.dtype)
        _save(manifest, lines)
    return manifest, lines


def _save(manifest: Manifest, refused: list[tuple[str, str]]) -> None:
    _keep_added(manifest)
    write_refused(manifest.folder, refused)
    manifest.save()


def write_refused(folder: Path, refused: list[tuple[str, str]]) -> None:
    with atomic_write(folder / "refused.csv") as file:
        csv.writer(file).writerows([("file", "reason"), *refused])


def read_refused(folder: Path) -> list[tuple[str, str]]:
    """The (file, reason) pairs of refused.csv, none where there is no such file."""
    path = folder / "refused.csv"
    return (
        [(row["file"], row["reason"]) for _, row in csv_rows(path, ("file", "reason"))]
        if path.is_file()
        else []
    )


def _keep_added(manifest: Manifest) -> None:
    """What was added to the folder's manifest: questions where the data set itself has none, and slice
    features.

    Features are kept of the volumes that are still made of the same source.
    """
    if not (manifest.folder / "manifest.json").is_file():
        return
    try:
        before = load_manifest(manifest.folder)
    except InputError:
        return  # it is replaced; `--slices` finds the features again
    manifest.slices = before.slices
    listed = {e["id"]: e for entries in before.splits.values() for e in entries}
    for entry in (e for entries in manifest.splits.values() for e in entries):
        old = listed.get(entry["id"], {})
        if "qa" in old and "qa" not in entry:
            entry["qa"] = old["qa"]
        if "slices" in old and origin(old) == origin(json.loads(json.dumps(entry))):
            entry["slices"] = old["slices"]


class Journal:
    """One line per finished volume. The first line says how all were made: another way needs another folder.

    ignored: settings of that line that may differ.
    """

    def __init__(self, path: Path, head: dict, holds: str, ignored: tuple[str, ...] = ()):
        self.path, self.head, self.holds, self.ignored = path, head, holds, ignored

    def read(self, whole: Callable[[dict], bool]) -> dict[str, dict]:
        """Records by id of the volumes that `whole` still finds as they were left."""
        head, *records = self.lines() or [None]
        if head is not None:
            known = {k: v for k, v in head.items() if k not in self.ignored}
            wanted = {k: v for k, v in self.head.items() if k not in self.ignored}
            if changed := [k for k in {**wanted, **known} if known.get(k) != wanted.get(k)]:
                raise InputError(
                    f"{self.path.parent}: holds {self.holds} with another {', '.join(changed)}; choose "
                    f"another --out"
                )
        done = {
            record["id"]: record for record in records if isinstance(record.get("id"), str) and whole(record)
        }
        with atomic_write(self.path) as file:
            for line in (self.head, *done.values()):
                file.write(json.dumps(line) + "\n")
        return done

    def lines(self) -> list[dict]:
        """Return the first line and the records, without those that are damaged. Raises InputError for a
        first line that is.
        """
        if not self.path.exists():
            return []
        with named(self.path):
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [_object(line) for line in lines]
        if found and found[0] is None:
            raise InputError(
                f"{self.path}: its first line is damaged, which says how {self.holds} were made; choose "
                f"another --out"
            )
        return [
            record for record in found if record is not None
        ]  # the last line may be half, of a run that was killed

    def add(self, record: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror}): free space and run again"
            ) from error


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")


def _object(line: str) -> dict | None:
    try:
        value = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_source(value) -> bool:
    """Return whether this is what read_input records of a source file."""
    kinds = {"sha256": str, "rescale": str, "shape": list}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


def volume_name(case_id: str) -> str:
    return f"volumes/{case_id}.npy"


def prepare_case(case: Case, out: Path, options: Options) -> tuple[Case, dict | None, str | None]:
    """Write one volume. Returns (case, record, None) or (case, None, reason it was refused)."""
    try:
        image, record = read_input(case.path, options.recipe, options.reading, case.table)
    except InputError as error:
        return case, None, str(error).removeprefix(f"{case.path}: ")
    except MemoryError:
        return case, None, "needs more memory than there is; use fewer --workers"
    with atomic_write(out / volume_name(case.id), "wb") as file:
        np.save(file, image[0].astype(options.dtype))
    source = {"file": str(case.path), "sha256": file_sha256(case.path), **record}
    return case, {"id": case.id, "stamp": _stamp(case), "source": source}, None


def entry_slices(
    entry: dict, reading: Reading, wanted: SlicesWanted
) -> tuple[dict, np.ndarray | None, str | None]:
    """(entry, (32, size, size) uint8 pictures of its source file, None) or (entry, None, reason it was
    refused).
    """
    path = Path(entry["source"]["file"])
    try:
        images, record = read_slice_images(path, wanted, reading, table_row(entry))
    except InputError as error:
        return entry, None, str(error).removeprefix(f"{path}: ")
    except MemoryError:
        return entry, None, "needs more memory than there is; use fewer --workers"
    if other := differs(entry["source"], record):
        reason = (
            f"its {', '.join(other)} differs from the prepared volume's; run preprocess.py --dataset again"
        )
        return entry, None, reason
    return entry, images, None


def differs(source: dict, record: dict) -> list[str]:
    """Return what a manifest's record of a source file says otherwise than a new reading of it."""
    other = [k for k, v in record.items() if source.get(k, v) != v]
    # Earlier versions recorded the spacing in another order of axes.
    return [k for k in other if k != "spacing" or sorted(source[k]) != sorted(record[k])]


def _run(todo: list[Case], out: Path, options: Options, workers: int, keep: Callable[..., None]) -> None:
    """prepare_case for each case, in `workers` processes; keep(*result) as each is done."""
    if workers == 1 or len(todo) < 2:
        for case in todo:
            keep(*prepare_case(case, out, options))
        return
    failures: list[Exception] = []

    def finished(future: Future) -> None:
        # Runs in the pool's own thread, which Ctrl-C does not reach: a volume that was written is kept.
        if not future.cancelled() and future.exception() is None:
            try:
                keep(*future.result())
            except OutputError as error:
                failures.append(error)

    with worker_pool(workers) as pool:
        futures = [pool.submit(prepare_case, case, out, options) for case in todo]
        for future in futures:
            future.add_done_callback(finished)
        for future in as_completed(futures):
            future.result()
            if failures:
                raise failures[0]


def _stamp(case: Case) -> str | None:
    """What a prepared volume came from: another file, or another row of the table, asks for it to be
    prepared again.
    """
    try:
        stat = case.path.stat()
    except OSError:
        return None
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns, {case.table}"


def remove_half_written(out: Path) -> None:
    for path in [*out.glob(".*.tmp"), *out.glob("volumes/**/.*.tmp"), *out.glob("slices/**/.*.tmp")]:
        path.unlink(missing_ok=True)
