"""Volumes with text -> batches. What a step sees depends on (seed, epoch, step), not on ranks or workers.

`VolumeDataset` reads, augments and collates; a subclass gives the text: here a report for contrastive
training, in language_loader.py a question with its answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
from reaf_hsenet.tokenizer.tokenizer import Tokenizer


@dataclass
class Batch:
    """Samples of a rank, (B, ...). index: their rows of the data set; empty when the one row is a stand-in.

    volume: (B, 1, D, H, W) float32. features: (B, N, C) of every encoder, in place of volumes. slices: (B, S,
    C).
    ids, mask: (B, T). labels: (B, T), -100 where nothing is learned; None in contrastive training.
    findings: (B, 2, K), where a decoder has cues: 0, 1 or NaN, unknown; and uniform draws, or NaN for no cue.
    bad: what could not be read. counts: rows of every rank's batch, where that is known.
    """

    volume: Tensor | None
    ids: Tensor
    mask: Tensor
    index: list[int]
    slices: Tensor | None = None
    labels: Tensor | None = None
    features: list[Tensor] | None = None
    findings: Tensor | None = None
    bad: list[Unreadable] = field(default_factory=list)
    counts: list[int] | None = None

    def to(self, device: torch.device) -> "Batch":
        return with_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return a pinned copy, for torch's loader: one from other memory would wait for the GPU."""
        return with_tensors(self, Tensor.pin_memory)

    def split(self, rows: int) -> list["Batch"]:
        """Return parts of `rows` volumes with their reports; the last may have fewer."""
        parts = [t.split(rows) for t in (self.volume, self.ids, self.mask)]
        index = [self.index[i : i + rows] for i in range(0, len(self.volume), rows)]
        slices = [None] * len(index) if self.slices is None else self.slices.split(rows)
        return [Batch(*p) for p in zip(*parts, index, slices, strict=True)]


def with_tensors(value, change: Callable[[Tensor], Tensor]):
    """Return a copy of a dataclass, list or tuple with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(part, change) for part in value)
    if is_dataclass(value):
        return replace(value, **{name: with_tensors(part, change) for name, part in vars(value).items()})
    return value


class Sample(NamedTuple):
    """Row `row` of a data set: what Batch holds of it, without the batch's axis. text: the subclass's own."""

    row: int
    volume: Tensor | None
    slices: Tensor | None
    features: list[Tensor] | None = None
    text: object = None
    findings: Tensor | None = None


@dataclass(eq=False)
class VolumeDataset(Dataset):
    """A split of a manifest. An item (epoch, row) has its randomness from the seed and both.

    max_text: tokens of a text. slices: items carry slice features. slices_follow: a flip of the volume's
    depth reverses them (published: not). A subclass gives `with_text(sample, epoch, rng)`,
    `collate_text(texts)` and `empty_text()`.
    """

    manifest: Manifest
    split: str
    tokenizer: Tokenizer
    max_text: int
    augmentation: Augmentation | None = None
    seed: int = 0
    slices: bool = False
    slices_follow: bool = True

    def __post_init__(self):
        self.entries = self.manifest.entries(self.split)

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, row: int) -> dict:
        return self.entries[row]

    def name(self, row: int) -> str:
        return self.entry(row)["id"]

    def __getitem__(self, key: tuple[int, int]) -> Sample | Unreadable | InputError:
        """Return a sample, or the error: a worker's exception would carry its traceback."""
        epoch, row = key
        rng = np.random.default_rng((self.seed, epoch, row))
        try:
            sample = Sample(row, *self.read(self.entry(row)))
        except InputError as error:
            return Unreadable(self.name(row), str(error))
        try:
            return self.with_text(sample, epoch, rng)
        except InputError as error:
            return error

    def read(self, entry: dict) -> tuple:
        """Return (volume, slices, features) of an entry, as far as this data set has them."""
        return read_prepared(self.manifest, entry), read_slices(self.manifest, entry) if self.slices else None

    def empty(self) -> tuple:
        """Return what read gives, of zeros: for a rank that has no sample to compute."""
        known = self.manifest.slices
        slices = torch.zeros(known["slices"], known["width"]) if self.slices else None
        return torch.zeros(1, *self.manifest.recipe.size), slices

    def stand_in(self) -> Sample:
        return Sample(-1, *self.empty(), text=self.empty_text())

    def augmented(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if self.augmentation is None or sample.volume is None:
            return sample
        volume, following = augment_with_slices(sample.volume, sample.slices, self.augmentation, rng)
        return sample._replace(volume=volume, slices=following if self.slices_follow else sample.slices)

    def collate(self, items: list) -> Batch | InputError:
        if errors := [item for item in items if isinstance(item, InputError)]:
            return errors[0]
        good, bad = part_unreadable(items)
        samples = good or [self.stand_in()]
        index, volumes, slices, features, texts, findings = zip(*samples, strict=True)
        return Batch(
            volume=None if volumes[0] is None else torch.stack(volumes),
            slices=None if slices[0] is None else torch.stack(slices),
            features=None if features[0] is None else [*map(torch.stack, zip(*features, strict=True))],
            findings=None if findings[0] is None else torch.stack(findings),
            **self.collate_text(texts),
            index=list(index) if good else [],
            bad=bad,
        )


@dataclass(eq=False)
class CTReportDataset(VolumeDataset):
    """Volumes with their reports, which are cleaned and shortened as the method `style` does."""

    style: str = "hsenet"

    def with_text(self, sample: Sample, epoch: int, rng: np.random.Generator) -> Sample:
        sample = self.augmented(sample, rng)
        return sample._replace(text=self.encode(self.entry(sample.row)["text"], rng))

    def encode(self, text: str, rng: np.random.Generator) -> list[int]:
        """Return the token ids of a report."""
        if self.style == "reaf":
            return self.tokenizer.encode(plain_report(text), self.max_text)
        text = clean_report(text)
        text = shorten_report(text, self.max_text, lambda t: len(self.tokenizer.encode(t)), rng)
        return self.tokenizer.encode(text, self.max_text)

    def collate_text(self, texts: tuple[list[int]]) -> dict[str, Tensor]:
        return dict(zip(("ids", "mask"), self.tokenizer.batch(list(texts)), strict=True))

    def empty_text(self) -> list[int]:
        return self.tokenizer.encode("")


def read_sample(manifest: Manifest, entry: dict, slices: bool) -> tuple[Tensor, Tensor | None] | Unreadable:
    """Return (volume, slice features or None) of an entry, or why it cannot be read."""
    try:
        return read_prepared(manifest, entry), read_slices(manifest, entry) if slices else None
    except InputError as error:
        return Unreadable(entry["id"], str(error))


def part_unreadable(items: list) -> tuple[list, list[Unreadable]]:
    """Return the items that could be read, and those that could not."""
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
    if isinstance(batch, InputError):
        raise batch
    bad.agree(batch.bad)
    return batch
