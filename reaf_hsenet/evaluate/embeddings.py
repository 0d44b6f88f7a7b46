"""A split's embeddings, computed once: stored with the results of a run, and used while nothing has changed.

A safetensors file: `image` and, where the split has reports, `text`, unit vectors (N, C) in the manifest's
order. Its metadata says what they were made of: `ids`, `model` (sha256 of the weights), `data`.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from reaf_hsenet import distributed
from reaf_hsenet.config import LANGUAGE
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.manifest import Manifest, origin
from reaf_hsenet.data.sources.tables import given
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, named
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.runs.answering import image_features
from reaf_hsenet.runs.embedding import embed
from reaf_hsenet.runs.trained import Trained

Vectors = dict[str, dict[str, Tensor]]  # of each split `image` and `text`, unit vectors (N, C)


def write_tensors(path: Path, tensors: dict[str, Tensor], known: dict[str, str]) -> None:
    """Write a safetensors file with metadata."""
    with atomic_write(path, "wb") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, known))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's tensors and metadata. Raises what safetensors does: read inside `named`."""
    with safe_open(path, "pt") as file:
        # Copies in memory that is aligned as computed ones are: products round alike.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118, it is no dict
        return tensors, file.metadata() or {}


class MeanTokens:
    """Gives the unit mean token of each of a language model's encoders, side by side, as a scan's vector."""

    def __init__(self, model: Mllm):
        self.model = model

    def encode_image(self, volume: Tensor, slices: Tensor | None) -> Tensor:
        """Return (B, C) of volumes (B, 1, D, H, W) and, where encoders are guided, slices (B, S, C)."""
        tokens = image_features(self.model, volume, slices)
        return torch.cat([F.normalize(x.float().mean(1), dim=1) for x in tokens], 1)


def made_of(run: Trained, manifest: Manifest, entries: list[dict]) -> str:
    """Hash what embeddings depend on beside weights: volumes, slice features, reports, the vocabulary.

    A file is known by its size and time of change, which cost no reading.
    """
    parts = [manifest.slices, run.origin.get("text_model"), getattr(run.tokenizer, "vocab", None)]
    for entry in entries:
        files = [os.stat(manifest.folder / entry[name]) for name in ("volume", "slices") if name in entry]
        stamps = [(file.st_size, file.st_mtime_ns) for file in files]
        parts.append([entry["id"], entry["text"], origin(entry), stamps])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def split_embeddings(
    run: Trained,
    manifest: Manifest,
    split: str,
    ranks: Ranks,
    *,
    folder: Path,
    batch: int,
    workers: int = 0,
    anew: bool = False,
) -> dict[str, Tensor]:
    """Return `image` and, of a dual encoder where all volumes have reports, `text` of a split.

    They are computed on all ranks, unless the file in `folder` was made of the same; then only the first rank
    gets them. anew: the file is not read.
    """
    entries, language = manifest.entries(split), run.stage in LANGUAGE
    path = folder / f"{'scan_vectors' if language else 'embeddings'}_{split}.safetensors"
    source = {"ids": "\n".join(manifest.ids(split)), "data": made_of(run, manifest, entries)}
    source |= {"model": run.sha256(), **({"base": json.dumps(run.base_sha256())} if language else {})}
    found = None
    if ranks.main and not anew:
        with suppress(InputError), named(path):  # absent, or cut off: computed again
            tensors, made = read_tensors(path)
            found = tensors if made == source and "image" in tensors else None
    if distributed.gather_objects(found is not None)[0]:
        if ranks.main:
            print(f"embeddings of {path}")
        return found or {}

    reports = not language and all(given(entry["text"]) for entry in entries)
    style = {} if language else {"style": run.config.model}
    tokens = run.tokenizer, run.config.max_text
    dataset = CTReportDataset(manifest, split, *tokens, slices=run.guided, **style)
    model, how = MeanTokens(run.model) if language else run.model, {"workers": workers, "progress": True}
    image, text = embed(model, dataset, ranks, batch, reports=reports, **how)
    found = {"image": image, "text": text} if reports else {"image": image}
    if ranks.main:
        write_tensors(path, found, source)
    return found
