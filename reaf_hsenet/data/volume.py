"""One CT file -> Hounsfield units on a known grid: header checks, orientation, and the rescale policy.

The result is an array whose axes run to the patient's Left, Posterior and Superior, its spacing in mm, and a
record of what was decided. Facts about CT-RATE's files (v1: raw values under a blank header; v2: HU under a
full header with a table that still lists an intercept) are CT-RATE's own, from its discussions 58 and 59 and
CT-CLIP's issue 50.
"""

import argparse
import gzip
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

from reaf_hsenet.config import MOST_VOXELS
from reaf_hsenet.data.header import geometry, read_header
from reaf_hsenet.errors import InputError, about
from reaf_hsenet.files import named

Rescale = Literal["auto", "header", "metadata", "none"]
Orientation = Literal["header", "stored"]
RESCALES, ORIENTATIONS = get_args(Rescale), get_args(Orientation)
NOT_READABLE = "is not a readable NIfTI file"
HEADER_BYTES = 2**20  # a header and its extensions
BODY = (-200.0, 250.0)  # HU of a body's middle value
LEAST_BODY = 0.04  # its share of the voxels, in a small child's scan
MOST_UNPACKED = 100  # bytes of voxels from a byte of gzip: a CT has 2 to 10, one value repeated 1,000


@dataclass
class Volume:
    """hu: (x, y, z) voxels in HU (integers or float32). spacing: mm per axis. record: what the file held."""

    hu: np.ndarray
    spacing: tuple[float, float, float]
    record: dict = field(default_factory=dict)


@dataclass(frozen=True)
class TableRow:
    """A metadata table's (x, y, z) spacing in mm, and its rescale slope and intercept."""

    spacing: tuple[float, float, float] | None = None
    slope: float | None = None
    intercept: float | None = None


def read_volume(
    path: Path,
    table: TableRow = TableRow(),
    rescale: Rescale = "auto",
    orientation: Orientation = "header",
    assume_orientation: str | None = None,
    header: str = "check",
) -> Volume:
    """Read a NIfTI file as HU, axes to Left, Posterior, Superior.

    table: the row of a metadata table, if there is one.
    rescale: `auto` applies the table's slope and intercept to values that are not HU already, `metadata`
        always, `header` never; `none` and `metadata` skip the check that the values can be HU.
    orientation: `stored` keeps the file's axis order, as the published pipelines do.
    assume_orientation: axis codes such as LPS of a file whose header has none.
    header: one of header.HEADERS: what of a header that contradicts itself is believed.
    Raises InputError, naming the file, for anything that is not a readable 3D CT.
    """
    with about(path):
        head, data = _open(Path(path))
        voxels = _voxels(head, data, path)
        with named(path, NOT_READABLE):
            stored = geometry(head, table.spacing, assume_orientation, header)
        slope, intercept, decision = choose_rescale(voxels, table, rescale)
        if (slope, intercept) != (1, 0):
            voxels = voxels.astype(np.float32, copy=False) * np.float32(slope) + np.float32(intercept)
        spacing = stored.spacing
        if orientation == "header":
            turn = ornt_transform(axcodes2ornt(stored.axes), axcodes2ornt("LPS"))
            voxels = apply_orientation(voxels, turn)
            # turn[i] says which LPS axis the file's axis i becomes.
            spacing = tuple(spacing[int(i)] for i in np.argsort(turn[:, 0]))
        record = {
            "shape": list(head.get_data_shape()),
            "spacing": list(stored.spacing),
            "orientation": "".join(stored.axes),
            "rescale": decision,
            "hu_range": [float(voxels.min()), float(voxels.max())],
        }
        return Volume(voxels, spacing, record)


def _open(path: Path) -> tuple[nib.Nifti1Header, bytes]:
    """Return the header and the bytes of a file, after every check that needs no voxels.

    A .gz is read whole, so that its CRC is checked; of a .nii no more than its header tells of.
    """
    with named(path):
        data = unpacked(path) if path.suffix == ".gz" else _first_bytes(path, HEADER_BYTES)
    with named(path, NOT_READABLE):
        header = read_header(data)
    shape, kind = header.get_data_shape(), header.get_data_dtype()
    if len(shape) != 3 and not (len(shape) > 3 and set(shape[3:]) == {1}) or min(shape[:3]) < 2:
        axes = sum(n > 1 for n in shape)
        raise InputError(f"is a {axes}D image of shape {tuple(shape)}; expected one 3D volume")
    if kind.fields or kind.kind not in "iuf":
        raise InputError(f"holds {kind} values; expected integers or floats")
    needed = header.get_data_offset() + math.prod(shape) * kind.itemsize
    held = len(data) if path.suffix == ".gz" else path.stat().st_size
    if needed > held:  # before memory is taken for what is not there
        raise InputError(f"is truncated or damaged (its header tells of {needed} bytes, there are {held})")
    if math.prod(shape) > MOST_VOXELS:
        raise InputError(
            f"has {math.prod(shape)} voxels; expected at most {MOST_VOXELS}, as many as 1024 x 1024 x 1024"
        )
    return header, data if path.suffix == ".gz" else _first_bytes(path, needed)


def unpacked(path: Path) -> bytes:
    """Return the content of a .gz file. Raises OSError for one that holds far more than it is."""
    size = path.stat().st_size
    most = 1000 * 2**20 + MOST_UNPACKED * size
    with gzip.open(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"unpacks to more than {most} bytes from {size}")
    return data


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _voxels(header: nib.Nifti1Header, data: bytes, path: Path) -> np.ndarray:
    """(x, y, z) values with the header's own scaling applied, in the stored type where there is none."""
    with named(path):
        if header.get_slope_inter() in ((1, 0), (None, None)):
            # The array is the bytes that were read, not a copy of them.
            shape, offset = header.get_data_shape(), header.get_data_offset()
            voxels = np.ndarray(shape, header.get_data_dtype(), data, offset, order="F")
        else:
            voxels = np.asanyarray(nib.arrayproxy.ArrayProxy(io.BytesIO(data), header), dtype=np.float32)
    voxels = voxels.reshape(voxels.shape[:3], order="A")
    if voxels.dtype.kind != "f":
        return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)
    return finite(voxels)


def finite(voxels: np.ndarray) -> np.ndarray:
    """Return the voxels as float32. Raises InputError for NaN, infinity, and numbers beyond float32."""
    with np.errstate(over="ignore"):
        voxels = voxels.astype(np.float32, copy=False)
    if bad := voxels.size - int(np.count_nonzero(np.isfinite(voxels))):
        raise InputError(f"{bad} voxels are NaN or infinite, or beyond float32; expected finite values")
    return voxels


def choose_rescale(voxels: np.ndarray, table: TableRow, rescale: str) -> tuple[float, float, str]:
    """(slope, intercept, decision) to apply to `voxels`, which already carry the header's scaling.

    Raises InputError for a constant volume, a mask, only air, and values that are HU neither as they are nor
    rescaled.
    """
    # Every n-th voxel is enough for percentiles, and keeps a 512x512x600 volume fast.
    sample = voxels.reshape(-1, order="A")[:: max(1, voxels.size // 1_000_000)].astype(np.float64)
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise InputError(f"every voxel is {low:g}; expected a CT")
    if rescale == "none":
        return 1, 0, "none: taken as they are"
    if low >= 0 and high <= 255 and (sample == np.round(sample)).all():
        raise InputError(
            f"holds only whole numbers from {low:g} to {high:g}, like a mask; expected a CT in HU"
        )
    slope = 1.0 if table.slope is None else table.slope
    intercept = 0.0 if table.intercept is None else table.intercept
    facts = "1st and 90th percentile {:.0f} and {:.0f}".format(*np.percentile(sample, (1, 90)))
    if rescale == "metadata":
        if table.intercept is None and table.slope is None:
            raise InputError("--rescale metadata, but no table gives its slope and intercept")
        # As asked, whatever comes of it: the published code applies CT-RATE's offset to values that have it
        # already.
        decision, fault = "metadata: slope and intercept of the table applied", None
    elif rescale == "header" or why_not_hu(sample) is None:
        slope, intercept = 1.0, 0.0
        decision, fault = f"{rescale}: HU already ({facts})", why_not_hu(sample)
    else:
        decision = f"auto: raw values ({facts}); table's {slope:g} * v {intercept:+g} applied"
        fault = why_not_hu(sample)
        if why_not_hu(sample * slope + intercept) is None:
            fault = None
        elif (slope, intercept) != (1, 0):
            raise InputError(
                f"the values fit neither HU nor the table's slope {slope:g} and intercept "
                f"{intercept:g} ({facts}): {fault}; say what they are with --rescale"
            )
    if fault:
        raise InputError(f"the values are not HU: {fault}; say what they are with --rescale")
    return slope, intercept, decision


def why_not_hu(sample: np.ndarray) -> str | None:
    """Say why values cannot be those of a chest in HU; None when they can.

    Air or lung lies below -200. The middle of all that is denser than lung, above -500, is fat and muscle:
    -25 to 77 in four real CTs. It moves with any offset that was applied twice or not at all; a minimum would
    be no test, since padding varies, and neither is a maximum, since metal and bone pass it.
    """
    inside = sample[sample > sample.min()]  # the smallest value may be padding, which says nothing of air
    if (air := float(np.percentile(inside, 1))) >= -200:
        return f"there is no air or lung below -200 (1st percentile {air:.0f})"
    body = sample[sample > -500]
    if len(body) < LEAST_BODY * len(sample):
        return (
            f"only {len(body) / len(sample):.1%} of the voxels are denser than lung, above -500: only "
            f"air, or an offset applied twice?"
        )
    middle = float(np.median(body))
    if not BODY[0] < middle < BODY[1]:
        return (
            f"the body's middle value is {middle:.0f}, fat and muscle have {BODY[0]:.0f} to "
            f"{BODY[1]:.0f}: was an offset applied twice?"
        )
    return None


def is_orientation(text: str) -> bool:
    """Return whether a text has one letter for each axis of the patient, such as LPS."""
    return sorted(text.translate(str.maketrans("LPI", "RAS"))) == ["A", "R", "S"]


def axis_codes(text: str) -> str:
    """The value of a flag such as --assume-orientation, in capitals."""
    if not is_orientation(text.upper()):
        raise argparse.ArgumentTypeError(f"{text!r} is not an orientation such as LPS or RAS")
    return text.upper()
