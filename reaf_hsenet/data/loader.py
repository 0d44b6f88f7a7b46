"""Prepared volumes and reports -> batches. What a step sees depends on (seed, epoch, step), not on ranks
or workers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reaf_hsenet.config import Augmentation
from reaf_hsenet.data.augment import augment_with_slices
from reaf_hsenet.data.bad_volumes import BadVolumes, Unreadable
from reaf_hsenet.data.manifest import Manifest, table_row
from reaf_hsenet.data.reading import load_tensor, read_input
from reaf_hsenet.data.text import clean_report, plain_report, shorten_report
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import named
from reaf_hsenet.tokenizer.tokenizer import WordPiece


@dataclass
class Batch:
    """volume: (B, 1, D, H, W) float32. ids, mask: (B, T). index: rows of the split; empty when the one row is
    a stand-in.

    slices: (B, S, C) or None. bad: what could not be read. counts: rows of every rank's batch, where that is
    known.
    """

    volume: Tensor
    ids: Tensor
    mask: Tensor
    index: list[int]
    slices: Tensor | None = None
    bad: list[Unreadable] = field(default_factory=list)
    counts: list[int] | None = None

    def to(self, device: torch.device) -> "Batch":
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by torch's loader, which knows no dataclass. A copy from unpinned memory would wait for
        the GPU.
        """
        return with_tensors(self, Tensor.pin_memory)

    def split(self, rows: int) -> list["Batch"]:
        """Parts of `rows` volumes; the last may have fewer."""
        parts = [t.split(rows) for t in (self.volume, self.ids, self.mask)]
        index = [self.index[i : i + rows] for i in range(0, len(self.volume), rows)]
        slices = [None] * len(index) if self.slices is None else self.slices.split(rows)
        return [Batch(*p) for p in zip(*parts, index, slices, strict=True)]


def with_tensors(batch, change: Callable[[Tensor], Tensor]):
    """Return a copy of a batch, a dataclass, with every tensor changed, those in its lists too."""

    def changed(value):
        if isinstance(value, list):
            return [changed(part) for part in value]
        return change(value) if isinstance(value, Tensor) else value

    return replace(batch, **{f.name: changed(getattr(batch, f.name)) for f in fields(batch)})


class CTReportDataset(Dataset):
    """A split of a manifest. Items are asked for as (epoch, row): their randomness is a function of seed and
    both.

    slices: items carry slice features. slices_follow: a flip of the volume's depth reverses them (published:
    not).
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        tokenizer: WordPiece,
        max_text: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        style: str = "hsenet",
        slices: bool = False,
        slices_follow: bool = True,
    ):
        self.style, self.slices, self.slices_follow = style, slices, slices_follow
        self.manifest, self.entries = manifest, manifest.entries(split)
        self.tokenizer, self.max_text = tokenizer, max_text
        self.augmentation, self.seed = augmentation, seed

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, row: int) -> str:
        return self.entries[row]["id"]

    def __getitem__(self, key: tuple[int, int]):
        epoch, row = key
        rng = np.random.default_rng((self.seed, epoch, row))
        sample = read_sample(self.manifest, self.entries[row], self.slices)
        if isinstance(sample, Unreadable):
            return sample
        volume, slices = sample
        if self.augmentation is not None:
            volume, following = augment_with_slices(volume, slices, self.augmentation, rng)
            slices = following if self.slices_follow else slices
        item = volume, self.encode(self.entries[row]["text"], rng), row
        return (*item, slices) if self.slices else item

    def encode(self, text: str, rng: np.random.Generator) -> list[int]:
        """The token ids of a report, cleaned and shortened as the method `style` does."""
        if self.style == "reaf":
            return self.tokenizer.encode(plain_report(text), self.max_text)
        text = clean_report(text)
        text = shorten_report(text, self.max_text, lambda t: len(self.tokenizer.encode(t)), rng)
        return self.tokenizer.encode(text, self.max_text)

    def collate(self, items: list) -> Batch:
        good, bad = part_unreadable(items)
        volumes, rows, index, *slices = zip(*(good or [self.stand_in()]), strict=True)
        features = torch.stack(slices[0]) if slices else None
        batch = self.tokenizer.batch(list(rows))
        return Batch(torch.stack(volumes), *batch, list(index) if good else [], features, bad)

    def stand_in(self) -> tuple:
        volume, slices = empty_sample(self.manifest, self.slices)
        item = volume, self.tokenizer.encode(""), -1
        return (*item, slices) if self.slices else item


def read_sample(manifest: Manifest, entry: dict, slices: bool) -> tuple[Tensor, Tensor | None] | Unreadable:
    """(volume, slice features or None) of an entry. What cannot be read is returned, not raised: an
    exception of a loader process would carry its traceback.
    """
    try:
        return read_prepared(manifest, entry), read_slices(manifest, entry) if slices else None
    except InputError as error:
        return Unreadable(entry["id"], str(error))


def empty_sample(manifest: Manifest, slices: bool) -> tuple[Tensor, Tensor | None]:
    """What read_sample gives, of zeros: for a rank that has no sample to compute."""
    features = torch.zeros(manifest.slices["slices"], manifest.slices["width"]) if slices else None
    return torch.zeros(1, *manifest.recipe.size), features


def part_unreadable(items: list) -> tuple[list, list[Unreadable]]:
    """(items that could be read, those that could not)."""
    bad = [item for item in items if isinstance(item, Unreadable)]
    return [item for item in items if not isinstance(item, Unreadable)], bad


def read_prepared(manifest: Manifest, entry: dict) -> Tensor:
    """(1, D, H, W) float32: a prepared .npy, or a source file processed on the fly.

    Raises InputError, naming the file, when it is absent, damaged or of another size.
    """
    path = manifest.folder / entry["volume"]
    if path.suffix != ".npy":
        return torch.from_numpy(read_input(path, manifest.recipe, manifest.reading, table_row(entry))[0])
    voxels = _load(path, "write it again" if manifest.published else "run preprocess.py again")
    if manifest.published and voxels.ndim == 4 and len(voxels) == 1:
        voxels = voxels[0]
    if voxels.shape != tuple(manifest.recipe.size):
        raise InputError(f"{path}: has shape {voxels.shape}, the manifest says {manifest.recipe.size}")
    if manifest.published:
        if voxels.dtype.kind != "f" or voxels.min() < -1e-3 or voxels.max() > 1.001:
            raise InputError(
                f"{path}: holds {voxels.dtype} from {voxels.min()} to {voxels.max()}; expected a prepared "
                "volume of floats in [0, 1]"
            )
    elif voxels.dtype != manifest.dtype:
        raise InputError(f"{path}: holds {voxels.dtype}, the manifest says {manifest.dtype}")
    # numpy allocates large arrays and tests for NaN several times as fast as torch, torch converts so.
    volume = np.empty(voxels.shape, np.float32)
    torch.from_numpy(volume).copy_(torch.from_numpy(voxels))
    if not np.isfinite(volume).all():
        raise InputError(f"{path}: holds NaN or infinite values; delete it and run preprocess.py again")
    return torch.from_numpy(volume)[None]


def read_slices(manifest: Manifest, entry: dict) -> Tensor:
    """(S, C) float32 slice features of a volume, from inferior to superior.

    Raises InputError, naming the file, when they are absent, damaged or of another length or width.
    """
    path = manifest.slices_path(entry)
    again = "make it again" if manifest.published else "run preprocess.py --slices again"
    features = load_tensor(path) if path.suffix == ".pt" else torch.from_numpy(_load(path, again))
    expected = manifest.slices["slices"], manifest.slices["width"]
    if tuple(features.shape) != expected or not features.is_floating_point():
        raise InputError(
            f"{path}: holds {features.dtype} {tuple(features.shape)}; expected slice features {expected}"
        )
    features = features.float()
    if not torch.isfinite(features).all():
        raise InputError(f"{path}: holds NaN or infinite values; delete it and {again}")
    return features


def _load(path: Path, again: str) -> np.ndarray:
    """An array of real numbers that torch can take. again: how the file is made again."""
    with named(path, "cannot be read", f"delete it and {again}"):
        array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        held = array.dtype if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(f"{path}: holds {held}; expected one array of numbers, delete it and {again}")
    # Neither another byte order nor more than 64 bits are known to torch.
    return array if array.dtype.isnative and array.dtype.itemsize <= 8 else array.astype(np.float32)


def plain_batch(dataset: CTReportDataset, rows: int, bad: BadVolumes) -> Batch:
    """The first `rows` of a data set as one batch, without those that cannot be read."""
    batch = dataset.collate([dataset[0, row] for row in range(min(rows, len(dataset)))])
    bad.agree(batch.bad)
    return batch
