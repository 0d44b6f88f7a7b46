"""One source file -> the network input of a recipe: .nii and .nii.gz, and REAF's .pt and .pt.gz volumes.

A .pt file holds one tensor (D, H, W), leading axes of 1 allowed: HU on REAF's published grid (3 x 1 x 1 mm,
axes to superior, posterior, left), or the finished input. Which of the two is decided per volume. Nothing is
unpickled but a tensor.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reaf_hsenet.config import RECIPES, Recipe
from reaf_hsenet.data.header import Believed
from reaf_hsenet.data.preprocessing import preprocess
from reaf_hsenet.data.slices import SliceRecipe, slice_images
from reaf_hsenet.data.volume import (
    Orientation,
    Rescale,
    TableRow,
    Volume,
    choose_rescale,
    finite,
    is_orientation,
    read_volume,
    unpacked,
)
from reaf_hsenet.errors import InputError, about
from reaf_hsenet.files import named

PT_GRID = RECIPES["reaf"]
# Where one volume is there in several formats, the first of these is read: the fastest.
ENDINGS = (".pt", ".pt.gz", ".nii.gz", ".nii")
NO_TABLE = TableRow()


@dataclass(frozen=True)
class Reading:
    """The choices of read_volume, for .nii files; `rescale` also for .pt files."""

    rescale: Rescale = "auto"
    orientation: Orientation = "header"
    assume_orientation: str | None = None
    header: Believed = "check"

    def __post_init__(self):
        if self.assume_orientation is not None and not is_orientation(self.assume_orientation):
            raise InputError(
                f"assume_orientation {self.assume_orientation!r}: expected axis codes such as LPS or RAS"
            )


def ending(name: str) -> str | None:
    """The one of ENDINGS that a file's name has."""
    return next((e for e in ENDINGS if name.endswith(e)), None)


def stem(name: str) -> str:
    """A file's name without its ending."""
    return name.removesuffix(ending(name) or "")


@dataclass(frozen=True)
class SlicesWanted:
    """A choice of 2D slices of a CT: the recipe, the side of a picture, and whether through JPEG."""

    recipe: SliceRecipe
    size: int
    jpeg: bool = False


def read_input(
    path: Path, recipe: Recipe, reading: Reading = Reading(), table: TableRow = NO_TABLE
) -> tuple[np.ndarray, dict]:
    """Return (1, D, H, W) float32 of recipe.size, and a record of what the file held."""
    volume, _, record = read_source(path, recipe, None, reading, table)
    return volume, record


def read_slice_images(
    path: Path, wanted: SlicesWanted, reading: Reading, table: TableRow = NO_TABLE
) -> tuple[np.ndarray, dict]:
    """Return (32, size, size) uint8 pictures, and a record of what the file held."""
    _, images, record = read_source(path, None, wanted, reading, table)
    return images, record


def read_source(
    path: Path,
    recipe: Recipe | None,
    slices: SlicesWanted | None,
    reading: Reading = Reading(),
    table: TableRow = NO_TABLE,
) -> tuple[np.ndarray | None, np.ndarray | None, dict]:
    """Return the network input of a recipe and the 2D slices, whichever are wanted, of one reading of a
    source file.

    The input is (1, D, H, W) float32 of recipe.size, the slices (32, size, size) uint8; then a record of what
    the file held. Raises InputError, naming the file.
    """
    with about(path):
        kind = ending(path.name)
        if slices is not None and kind not in (".nii", ".nii.gz"):
            raise InputError(
                "slices are taken from the CT itself, in HU at its own resolution; expected .nii or .nii.gz"
            )
        if kind is None:
            raise InputError(f"expected a file that ends in .npy, {', '.join(ENDINGS)}")
        if kind in (".pt", ".pt.gz"):
            voxels = _read_tensor(path)
            if (finished := _finished(voxels, recipe)) is not None:
                return finished[0], None, finished[1]
            volume = _hu_volume(voxels, recipe, reading.rescale)
        else:
            volume = read_volume(path, table, **vars(reading))
        images = slice_images(volume, slices.recipe, slices.size, slices.jpeg) if slices else None
        return preprocess(volume, recipe) if recipe else None, images, volume.record


def load_tensor(path: Path):
    """Return the one tensor of a .pt or .pt.gz file. A .gz is read whole, so that its CRC is checked."""
    import torch  # here, not above: the workers that prepare NIfTI files start faster without it

    from reaf_hsenet.pickles import load_pickle, plain

    data = None
    if path.suffix == ".gz":
        with named(path):
            data = unpacked(path)
    tensor = load_pickle(path, data)
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{path}: holds a {type(tensor).__name__}; expected one tensor")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{path}: holds a {tensor.dtype} tensor; expected real numbers")
    return plain(tensor, f"{path}: it")


def _read_tensor(path: Path) -> np.ndarray:
    """(D, H, W) finite numbers, as they are in the file."""
    tensor = load_tensor(path)
    shape = tuple(tensor.shape)
    while tensor.ndim > 3 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 3 or min(tensor.shape) < 2:
        raise InputError(f"holds a tensor of shape {shape}; expected one volume (D, H, W)")
    return finite(tensor.float().numpy()) if tensor.is_floating_point() else tensor.numpy()


def _input_range(recipe: Recipe) -> tuple[float, float]:
    return -recipe.mean / recipe.std, (1 - recipe.mean) / recipe.std


def _finished(voxels: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, dict] | None:
    """The input and its record when the voxels are a finished one: the recipe's size, values within its
    range.

    HU never pass: air is below the range. float16 rounds the range's ends by less than 2e-3.
    """
    if voxels.shape != tuple(recipe.size):
        return None
    low, high = _input_range(recipe)
    least, most = float(voxels.min()), float(voxels.max())
    if not low - 2e-3 <= least < most <= high + 2e-3:
        return None
    decision = "none: the network's finished input"
    record = {"shape": list(voxels.shape), "rescale": decision, "range": [least, most]}
    return voxels.astype(np.float32, copy=False)[None], record


def _hu_volume(voxels: np.ndarray, recipe: Recipe, rescale: str) -> Volume:
    """HU on REAF's published grid as a Volume, whose axes run to left, posterior, superior."""
    try:
        decision = choose_rescale(voxels, NO_TABLE, rescale)[2]
    except InputError as error:
        low, high = _input_range(recipe)
        raise InputError(
            f"{error}; its values run from {voxels.min():g} to {voxels.max():g}, a finished input is "
            f"{'x'.join(map(str, recipe.size))} from {low:.3f} to {high:.3f}"
        ) from error
    order = [PT_GRID.axes.index(letter) for letter in "LPS"]
    record = {
        "shape": list(voxels.shape),
        "spacing": list(PT_GRID.spacing),
        "orientation": PT_GRID.axes,
        "rescale": decision,
        "hu_range": [float(voxels.min()), float(voxels.max())],
    }
    return Volume(voxels.transpose(order), tuple(PT_GRID.spacing[i] for i in order), record)
