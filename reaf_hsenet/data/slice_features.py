"""A prepared data set's slices -> slices/<id>.npy, float16 (S, C): HSENet's stage 2 encodes them once, with a
frozen ViT.

Restartable: what is done is in slices.jsonl and on disk. The manifest says which encoder made the features.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.each_volume import Journal, Refused, each_volume, write_refused
from reaf_hsenet.data.manifest import Manifest, different_slices, load_manifest, origin
from reaf_hsenet.data.prepare import entry_slices
from reaf_hsenet.data.reading import SlicesWanted, ending
from reaf_hsenet.data.slices import MEAN, SLICE_RECIPES, SLICES, STD
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, folder_lock
from reaf_hsenet.models.slice_encoder import SliceEncoder

JOURNAL = "slices.jsonl"
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
) -> Refused:
    """Encode what is missing of a prepared folder's volumes, then list it in manifest.json.

    provenance: of load_slice_encoder or describe. batch: slices per forward pass.
    replace: remove features that the folder has of another encoder, or that were made in another way.
    Returns what was refused, which refused.csv has too: these volumes get no features. Raises InputError when
    the folder has such features and `replace` is not given.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise InputError(
            f"{folder / 'manifest.json'}: no such file; prepare volumes first, with preprocess.py --dataset"
        )
    with folder_lock(folder):
        manifest = load_manifest(folder)
        _make_way(manifest, provenance, replace)
        entries = {entry["id"]: entry for entry in manifest.all_entries()}
        origins = {i: _origin(entry) for i, entry in entries.items()}
        encoder = encoder.to(device).eval()

        def whole(record: dict) -> bool:
            path = folder / slices_name(record["id"])
            same = origins.get(record["id"]) == record.get("origin")
            return same and path.is_file() and path.stat().st_size == manifest.slices_size

        def encode(taken: list[tuple[dict, np.ndarray]]) -> Iterator[dict]:
            """Write the features of some volumes and give their records."""
            features = _encode(encoder, np.concatenate([images for _, images in taken]), device, batch)
            for (entry, _), rows in zip(taken, np.split(features, len(taken)), strict=True):
                if not np.isfinite(rows).all():
                    raise InputError(
                        f"{provenance['encoder']}: gives {entry['id']} NaN, or values beyond float16's"
                    )
                with atomic_write(folder / slices_name(entry["id"]), "wb") as file:
                    np.save(file, rows)
                yield {"id": entry["id"], "origin": origins[entry["id"]]}

        wanted = slices_wanted(provenance, encoder.size)
        done, reasons = each_volume(
            entries,
            partial(entry_slices, reading=manifest.reading, wanted=wanted),
            Journal(folder / JOURNAL, provenance, "slice features", ignored=("encoder",)),
            whole,
            what="slices",
            workers=workers,
            progress=progress,
            finish=encode,
            together=-(-batch // SLICES),
        )
        for i, entry in entries.items():
            entry.pop("slices", None)
            if i in done:
                entry["slices"] = slices_name(i)
        files = {i: entry["source"]["file"] for i, entry in entries.items()}
        refused = [(files[i], REFUSED + why.removeprefix(f"{files[i]}: ")) for i, why in reasons.items()]
        write_refused(folder, refused, REFUSED)
        manifest.save()
    return refused


def slices_name(volume_id: str) -> str:
    return f"slices/{volume_id}.npy"


def _make_way(manifest: Manifest, provenance: dict, replace: bool) -> None:
    """See that the folder can have features of this provenance, and only of it.

    Raises InputError for volumes without a CT of their own, and for features that are not to be replaced.
    """
    entries, journal = manifest.all_entries(), manifest.folder / JOURNAL
    _refuse_tensors(entries)
    made = [path for e in entries if (path := manifest.folder / slices_name(e["id"])).is_file()]
    held = manifest.slices
    if held is None and made and journal.is_file():  # features that are half made
        held = next(iter(Journal(journal, {}, "slice features").lines()), None)
    if other := different_slices(held or {}, provenance):
        if not replace:
            raise InputError(
                f"{manifest.folder}: holds slice features with another {other}; choose another --out, or "
                "replace them with --replace-slices"
            )
        # They leave the manifest first, so that an interrupt does not leave two encoders' listed as one's.
        manifest.slices = held = None
        for entry in entries:
            entry.pop("slices", None)
        manifest.save()
        for path in made:
            path.unlink()
    if not held:
        journal.unlink(missing_ok=True)  # of an encoder that made nothing
    manifest.slices = provenance


def _refuse_tensors(entries: list[dict]) -> None:
    tensors = [e for e in entries if ending(e["source"]["file"]) in (".pt", ".pt.gz")]
    if tensors:
        raise InputError(
            f"{tensors[0]['source']['file']}: --slices needs the CT itself, in HU at its own resolution; "
            f"{len(tensors)} volumes come from .pt files, prepare them from .nii or .nii.gz"
        )


def _origin(entry: dict) -> dict:
    """Return what features are made from, as JSON gives it back. A file as it is has its size and time."""
    facts = origin(entry)
    if "sha256" not in entry["source"]:
        path = Path(entry["source"]["file"])
        facts["file"] = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
    return json.loads(json.dumps(facts))


def slices_wanted(provenance: dict, size: int) -> SlicesWanted:
    """Return how slices of this provenance are taken. size: the side of the encoder's pictures."""
    return SlicesWanted(SLICE_RECIPES[provenance["recipe"]], size, provenance["jpeg"])


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
