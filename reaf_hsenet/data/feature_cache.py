"""Patch tokens of frozen encoders, stored once: FOLDER/<key>/<id>.safetensors, one tensor (N, C) an encoder.

The key is of the encoders, the recipe and the type, so that several runs share a folder, and no run reads
another's features. A file also says what its volume was made of, so that features of a volume that was
prepared anew are not used.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reaf_hsenet.data.bad_volumes import BadVolumes, Unreadable
from reaf_hsenet.data.loader import read_sample
from reaf_hsenet.data.manifest import Manifest, origin
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.files import atomic_write, named
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.progress import progress_bar
from reaf_hsenet.settings import to_dict


class FeatureCache:
    """dtype: of the stored tokens, the one that the run computes in. shapes: (N, C) of every encoder."""

    def __init__(
        self,
        folder: Path,
        encoders: list[dict],
        manifest: Manifest,
        dtype: torch.dtype,
        shapes: list[tuple[int, int]],
    ):
        hashes = [encoder["sha256"] for encoder in encoders]
        slices = manifest.slices and {k: v for k, v in manifest.slices.items() if k != "encoder"}
        facts = _digest([hashes, to_dict(manifest.recipe), manifest.dtype, slices, str(dtype)])
        self.folder, self.manifest, self.dtype = Path(folder) / facts[:16], manifest, dtype
        self.shapes = shapes

    def path(self, entry: dict) -> Path:
        return self.folder / f"{entry['id']}.safetensors"

    def has(self, entry: dict) -> bool:
        try:
            with safe_open(self.path(entry), "pt") as file:
                return (file.metadata() or {}).get("volume") == _digest(origin(entry))
        except (OSError, SafetensorError):
            return False

    def read(self, entry: dict) -> list[Tensor]:
        """Return (N, C) of every encoder. Raises InputError when the file is gone or damaged."""
        path = self.path(entry)
        with named(path, "cannot be read", "start again with --resume, which makes it again"):
            with safe_open(path, "pt") as file:
                return [file.get_tensor(name) for name in sorted(file.keys(), key=int)]

    def empty(self) -> list[Tensor]:
        """Return what read gives, of zeros."""
        return [torch.zeros(shape, dtype=self.dtype) for shape in self.shapes]

    def write(self, entry: dict, features: list[Tensor]) -> None:
        tensors = {str(i): x.to(self.dtype).cpu().contiguous() for i, x in enumerate(features)}
        with atomic_write(self.path(entry), "wb") as file:
            file.write(save(tensors, {"volume": _digest(origin(entry))}))


def _digest(facts) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@torch.inference_mode()
def fill_cache(
    cache: FeatureCache, model: Mllm, splits: tuple[str, ...], ranks: Ranks, slices: bool, bad: BadVolumes
) -> None:
    """Compute what is missing, each volume alone: in a batch its last digits would depend on the others."""
    manifest = cache.manifest
    entries = [entry for split in splits for entry in manifest.entries(split)][ranks.rank :: ranks.world]
    missing = [entry for entry in entries if not cache.has(entry)]
    model.encoders.to(ranks.device).eval()
    enabled, unreadable = cache.dtype != torch.float32, []
    with progress_bar(len(missing), "features", "volume", shown=ranks.main and bool(missing)) as bar:
        for entry in missing:
            bar.update()
            sample = read_sample(manifest, entry, slices)
            if isinstance(sample, Unreadable):
                unreadable.append(sample)
                continue
            volume, given = (x if x is None else x[None].to(ranks.device) for x in sample)
            with torch.autocast(
                ranks.device.type, cache.dtype if enabled else torch.bfloat16, enabled=enabled
            ):
                features = model.features(volume, given)
            cache.write(entry, [x[0] for x in features])
    bad.agree(unreadable)  # and wait for the others' files
