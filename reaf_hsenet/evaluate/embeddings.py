"""A split's embeddings, computed once: stored with the results of a run, and used while nothing has changed.

A safetensors file: `image` and, where the split has reports, `text`, unit vectors (N, C) in the manifest's
order. Its metadata says what they were made of: `ids`, `model` (sha256 of the weights), `data`.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from reaf_hsenet import distributed
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.manifest import Manifest, origin
from reaf_hsenet.data.sources.tables import given
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.files import atomic_write
from reaf_hsenet.runs.embedding import embed
from reaf_hsenet.runs.trained import Trained


def embeddings_file(folder: Path, split: str) -> Path:
    return folder / f"embeddings_{split}.safetensors"


def made_of(run: Trained, manifest: Manifest, split: str) -> dict[str, str]:
    """Return what a split's embeddings depend on: its volumes and reports, slice features, the weights."""
    entries = manifest.entries(split)
    data = json.dumps([[entry["id"], entry["text"], origin(entry)] for entry in entries] + [manifest.slices])
    ids = "\n".join(entry["id"] for entry in entries)
    return {"ids": ids, "model": run.sha256(), "data": hashlib.sha256(data.encode()).hexdigest()}


def stored(
    path: Path,
    source: dict[str, str],
    ranks: Ranks,
    compute: Callable[[], dict[str, Tensor]],
    anew: bool = False,
) -> dict[str, Tensor]:
    """Return the tensors of a file if it was made of the same `source`; else compute and store them.

    compute: runs on all ranks. The first rank gets the tensors of the file; the others, then, get none.
    """
    found = None
    if ranks.main and not anew:
        try:
            with safe_open(path, "pt") as file:
                found = load_file(path) if file.metadata() == source else None
        except (SafetensorError, OSError):
            found = None  # absent, or cut off: computed again
    if distributed.gather_objects(found is not None)[0]:
        if ranks.main:
            print(f"embeddings of {path}")
        return found or {}
    found = compute()
    if ranks.main:
        with atomic_write(path, "wb") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in found.items()}, source))
    return found


def split_embeddings(
    run: Trained,
    manifest: Manifest,
    split: str,
    ranks: Ranks,
    folder: Path,
    batch_size: int,
    workers: int = 0,
    anew: bool = False,
) -> dict[str, Tensor]:
    """Return `image` and, where all volumes have reports, `text` of a split: stored ones, else computed."""
    reports = all(given(entry["text"]) for entry in manifest.entries(split))

    def compute() -> dict[str, Tensor]:
        dataset = CTReportDataset(
            manifest,
            split,
            run.tokenizer,
            run.config.max_text,
            style=run.config.model,
            slices=run.guided,
        )
        image, text = embed(
            run.model, dataset, ranks, batch_size, workers=workers, progress=True, reports=reports
        )
        return {"image": image, "text": text} if reports else {"image": image}

    path = embeddings_file(folder, split)
    return stored(path, made_of(run, manifest, split), ranks, compute, anew)
