"""A prepared data set's slices -> slices/<id>.npy, float16 (S, C): HSENet's stage 2 encodes them once, with a
frozen ViT.

Restartable: what is done is in slices.jsonl and on disk. The manifest says which encoder made the features.
"""

import json
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.manifest import Manifest, different_slices, load_manifest, origin
from reaf_hsenet.data.pool import worker_pool
from reaf_hsenet.data.prepare import Journal, entry_slices, read_refused, remove_half_written, write_refused
from reaf_hsenet.data.reading import SlicesWanted, ending
from reaf_hsenet.data.slices import MEAN, SLICE_RECIPES, SLICES, STD
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, folder_lock
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.progress import progress_bar

REFUSED = "slices: "  # begins the reasons of refused.csv that are of this step


def normalise(images: Tensor) -> Tensor:
    """(S, H, W) uint8 -> (S, 3, H, W) float32, grey as colour, with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((images.float() / 255)[:, None] - mean) / std


def add_slice_features(
    folder: Path,
    encoder: SliceEncoder,
    provenance: dict,
    workers: int = 1,
    device: torch.device | str = "cpu",
    progress: bool = True,
    batch: int = 64,
    replace: bool = False,
) -> list[tuple[str, str]]:
    """Encode what is missing of a prepared folder's volumes, then list it in manifest.json.

    provenance: of load_slice_encoder or describe. batch: slices per forward pass.
    replace: remove features that the folder has of another encoder, or that were made in another way.
    Returns the refused (file, reason) pairs, which refused.csv has too: these volumes get no features. Raises
    InputError when the folder has such features and `replace` is not given.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise InputError(
            f"{folder / 'manifest.json'}: no such file; prepare volumes first, with preprocess.py --dataset"
        )
    with folder_lock(folder):
        remove_half_written(folder)
        manifest = load_manifest(folder)
        entries = [e for split in manifest.splits.values() for e in split]
        others = [line for line in read_refused(folder) if not line[1].startswith(REFUSED)]
        _refuse_tensors(entries)
        if other := different_slices(_held(manifest, entries), provenance):
            if not replace:
                raise InputError(
                    f"{folder}: holds slice features with another {other}; choose another --out, or replace "
                    "them with --replace-slices"
                )
            _remove(manifest, entries)
        if not _held(manifest, entries):
            (folder / "slices.jsonl").unlink(missing_ok=True)  # of an encoder that made nothing
        manifest.slices = provenance
        origins = {e["id"]: _origin(e) for e in entries}
        journal = Journal(folder / "slices.jsonl", provenance, "slice features", ignored=("encoder",))

        def whole(record: dict) -> bool:
            path = folder / slices_name(record["id"])
            same = origins.get(record["id"]) == record.get("origin")
            return same and path.is_file() and path.stat().st_size == manifest.slices_size

        done = journal.read(whole)
        todo = [e for e in entries if e["id"] not in done]
        refused: list[tuple[str, str]] = []
        encoder = encoder.to(device).eval()
        waiting: list[tuple[dict, np.ndarray]] = []

        def encode_waiting() -> None:
            features = _encode(encoder, np.concatenate([images for _, images in waiting]), device, batch)
            for (entry, _), rows in zip(waiting, np.split(features, len(waiting)), strict=True):
                if not np.isfinite(rows).all():
                    raise InputError(
                        f"{provenance['encoder']}: gives {entry['id']} NaN, or values beyond float16's"
                    )
                with atomic_write(folder / slices_name(entry["id"]), "wb") as file:
                    np.save(file, rows)
                done[entry["id"]] = {"id": entry["id"], "origin": origins[entry["id"]]}
                journal.add(done[entry["id"]])
            waiting.clear()

        with (
            progress_bar(len(todo), "slices", "volume", shown=progress and bool(todo)) as bar,
            closing(_pictures(todo, manifest, encoder.size, workers)) as pictures,
        ):
            for entry, images, reason in pictures:
                if images is None:
                    refused.append((entry["source"]["file"], REFUSED + reason))
                else:
                    waiting.append((entry, images))
                if len(waiting) * SLICES >= batch:
                    encode_waiting()
                bar.update()
            if waiting:
                encode_waiting()
        for entry in entries:
            entry.pop("slices", None)
            if entry["id"] in done:
                entry["slices"] = slices_name(entry["id"])
        write_refused(folder, [*others, *refused])
        manifest.save()
    return refused


def slices_name(volume_id: str) -> str:
    return f"slices/{volume_id}.npy"


def _held(manifest: Manifest, entries: list[dict]) -> dict:
    """The provenance of the features that a folder has, whether listed or half made; empty where it has
    none.
    """
    journal = manifest.folder / "slices.jsonl"
    if manifest.slices is not None:
        return manifest.slices
    if not journal.is_file() or not any((manifest.folder / slices_name(e["id"])).is_file() for e in entries):
        return {}
    return next(iter(Journal(journal, {}, "slice features").lines()), {})


def _remove(manifest: Manifest, entries: list[dict]) -> None:
    """Features leave the manifest first, so that an interrupt does not leave two encoders' listed as
    one's.
    """
    manifest.slices = None
    for entry in entries:
        entry.pop("slices", None)
    manifest.save()
    for entry in entries:
        (manifest.folder / slices_name(entry["id"])).unlink(missing_ok=True)


def _refuse_tensors(entries: list[dict]) -> None:
    tensors = [e for e in entries if ending(e["source"]["file"]) in (".pt", ".pt.gz")]
    if tensors:
        raise InputError(
            f"{tensors[0]['source']['file']}: --slices needs the CT itself, in HU at its own resolution; "
            f"{len(tensors)} volumes come from .pt files, prepare them from .nii or .nii.gz"
        )


def _origin(entry: dict) -> dict:
    """What features are made from, as JSON gives it back; a source file as it is, by its size and time."""
    facts = origin(entry)
    if "sha256" not in entry["source"]:
        path = Path(entry["source"]["file"])
        facts["file"] = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    return json.loads(json.dumps(facts))


def slices_wanted(provenance: dict, size: int) -> SlicesWanted:
    """Return how the slices of features of this provenance were taken; size: the side of the encoder's
    pictures.
    """
    return SlicesWanted(SLICE_RECIPES[provenance["recipe"]], size, provenance["jpeg"])


def _pictures(
    todo: list[dict], manifest: Manifest, size: int, workers: int
) -> Iterator[tuple[dict, np.ndarray | None, str | None]]:
    """entry_slices of each entry, in order, made in `workers` processes that are at most two volumes each
    ahead.
    """
    take = partial(entry_slices, reading=manifest.reading, wanted=slices_wanted(manifest.slices, size))
    if workers == 1 or len(todo) < 2:
        yield from map(take, todo)
        return
    with worker_pool(workers) as pool:
        ahead = deque()
        for entry in todo:
            ahead.append(pool.submit(take, entry))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@torch.inference_mode()
def _encode(encoder: SliceEncoder, images: np.ndarray, device, batch: int) -> np.ndarray:
    """(S, H, W) uint8 -> (S, C) float16."""
    try:
        parts = [encoder(normalise(part.to(device))) for part in torch.from_numpy(images).split(batch)]
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            f"--slice-batch {batch}: does not fit the GPU's memory; choose a smaller one"
        ) from error
    return torch.cat(parts).half().cpu().numpy()
