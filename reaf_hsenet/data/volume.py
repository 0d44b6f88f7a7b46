"""One CT file -> Hounsfield units on a known grid: header checks, orientation, and the rescale policy.

The result is an array whose axes run to the patient's Left, Posterior and Superior, its spacing in mm, and a record
of what was decided. Facts about CT-RATE's files (v1: raw values under a blank header; v2: HU under a full header with
a table that still lists an intercept) are CT-RATE's own, from its discussions 58 and 59 and CT-CLIP's issue 50.
"""

import argparse
import gzip
import io
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from reaf_hsenet.errors import InputError

RESCALES = ("auto", "header", "metadata", "none")
ORIENTATIONS = ("header", "stored")
MOST_UNPACKED = 100  # bytes of voxels from a byte of gzip: a CT has 2 to 10, one value repeated 1,000


@dataclass
class Volume:
    """hu: (x, y, z) voxels in HU (integers or float32). spacing: mm per axis. record: what the file held."""

    hu: np.ndarray
    spacing: tuple[float, float, float]
    record: dict = field(default_factory=dict)


@dataclass(frozen=True)
class TableRow:
    """What a metadata table says of a volume: (x, y, z) spacing in mm, and the rescale slope and intercept."""

    spacing: tuple[float, float, float] | None = None
    slope: float | None = None
    intercept: float | None = None


def read_volume(
    path: Path,
    table: TableRow = TableRow(),
    rescale: str = "auto",
    orientation: str = "header",
    assume_orientation: str | None = None,
) -> Volume:
    """Read a NIfTI file as HU, axes to Left, Posterior, Superior.

    table: the row of a metadata table, if there is one.
    rescale: `auto` applies the table's slope and intercept to values that are not HU already, `metadata` always,
        `header` never; `none` also skips the check that the values can be HU.
    orientation: `stored` keeps the file's axis order, as the published pipelines do.
    assume_orientation: axis codes such as LPS of a file whose header has none.
    Raises InputError, naming the file, for anything that is not a readable 3D CT.
    """
    image, data = _open(path)
    voxels = _voxels(image, data, path)
    axes, spacing = _geometry(image, path, table, assume_orientation)
    slope, intercept, decision = choose_rescale(voxels, path, table, rescale)
    if (slope, intercept) != (1, 0):
        voxels = voxels.astype(np.float32, copy=False) * np.float32(slope) + np.float32(intercept)
    if orientation == "header":
        turn = ornt_transform(axcodes2ornt(axes), axcodes2ornt("LPS"))
        voxels = apply_orientation(voxels, turn)
        # turn[i] says which LPS axis the file's axis i becomes.
        spacing = tuple(spacing[int(i)] for i in np.argsort(turn[:, 0]))
    record = {
        "shape": list(image.shape),
        "spacing": [float(s) for s in spacing],
        "orientation": "".join(axes),
        "rescale": decision,
        "hu_range": [float(voxels.min()), float(voxels.max())],
    }
    return Volume(voxels, spacing, record)


def _open(path: Path) -> tuple[nib.Nifti1Image, bytes]:
    """The image and the bytes of its file, after every check that needs no voxels. A .gz is read whole, so that its CRC is checked."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        data = unpacked(path) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is truncated or damaged ({_one_line(error)})") from error
    kind = nib.Nifti2Image if data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
    try:
        # nibabel mends some headers, a negative spacing among them; this one is as it stands in the file.
        declared = kind.header_class.from_fileobj(io.BytesIO(data), check=False)["pixdim"][1:4]
        if not all(0 < s < np.inf for s in declared):
            raise InputError(
                f"{path}: the header's spacing is {_mm(declared)}; expected three positive distances"
            )
        image = kind.from_bytes(data)
    except (
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        nib.wrapstruct.WrapStructError,
        OSError,
        ValueError,
        OverflowError,
    ) as error:
        raise InputError(f"{path}: is not a readable NIfTI file ({_one_line(error)})") from error
    shape = image.shape
    if len(shape) != 3 and not (len(shape) > 3 and set(shape[3:]) == {1}) or min(shape[:3]) < 2:
        axes = sum(n > 1 for n in shape)
        raise InputError(f"{path}: is a {axes}D image of shape {tuple(shape)}; expected one 3D volume")
    if image.get_data_dtype().fields or image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: holds {image.get_data_dtype()} values; expected integers or floats")
    return image, data


def unpacked(path: Path) -> bytes:
    """A .gz file's content. Raises EOFError or OSError for a damaged one, and for one that holds far more than it is."""
    size = path.stat().st_size
    most = 1000 * 2**20 + MOST_UNPACKED * size
    with gzip.open(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(f"unpacks to more than {most} bytes from {size}")
    return data


def _voxels(image: nib.Nifti1Image, data: bytes, path: Path) -> np.ndarray:
    """(x, y, z) values with the header's own scaling applied, in the stored type where there is none."""
    proxy = image.dataobj
    needed = proxy.offset + math.prod(image.shape) * proxy.dtype.itemsize
    if needed > len(data):  # before memory is taken for what is not there
        raise InputError(f"{path}: is truncated or damaged (its header tells of {needed} bytes, there are {len(data)})")
    try:
        if (proxy.slope, proxy.inter) == (1, 0):
            # The array is the bytes that were read, not a copy of them.
            voxels = np.ndarray(image.shape, proxy.dtype, data, proxy.offset, order="F")
        else:
            voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise InputError(f"{path}: is truncated or damaged ({_one_line(error)})") from error
    voxels = voxels.reshape(image.shape[:3], order="A")
    if voxels.dtype.kind == "f":
        bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        if bad:
            raise InputError(f"{path}: {bad} voxels are NaN or infinite; expected finite values")
        return voxels.astype(np.float32, copy=False)
    return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)


def _geometry(image: nib.Nifti1Image, path: Path, table: TableRow, assume_orientation: str | None):
    """Axis codes and spacing of the stored array: from the affine where the header has one, else from the table."""
    header = image.header
    if not (header["sform_code"] > 0 or header["qform_code"] > 0):
        if assume_orientation is None:
            raise InputError(
                f"{path}: the header has no orientation (sform and qform codes are 0); "
                "say which with --assume-orientation, for example LPS"
            )
        axes, spacing = assume_orientation, table.spacing or header.get_zooms()[:3]
    else:
        affine = image.affine
        spacing = nib.affines.voxel_sizes(affine) if np.isfinite(affine).all() else (np.nan,) * 3
        turn = io_orientation(affine) if min(spacing) > 0 else np.zeros((3, 2))
        axes = affine[:3, :3] / (np.array(spacing) if min(spacing) > 0 else np.nan)
        if np.isnan(turn).any() or abs(np.linalg.det(axes)) < 1e-3:  # of unit vectors
            raise InputError(
                f"{path}: the header's affine is degenerate, two axes run the same way; mend the header"
            )
        axes = nib.orientations.ornt2axcodes(turn) if min(spacing) > 0 else ()
    if not all(0 < s < np.inf for s in spacing):
        raise InputError(f"{path}: the spacing is {_mm(spacing)}; expected three positive distances in mm")
    return tuple(axes), tuple(float(s) for s in spacing)


def choose_rescale(voxels: np.ndarray, path: Path, table: TableRow, rescale: str) -> tuple[float, float, str]:
    """(slope, intercept, decision) to apply to `voxels`, which already carry the header's scaling.

    A chest CT in HU has air or lung below -200 (1st percentile) and at most a tenth of its voxels above 600; raw
    CT-RATE values, HU + 1024 or HU + 8192, have a tenth above 900. A minimum would be no test: padding varies.
    Raises InputError for a constant volume, a mask, only air, and values that fit neither.
    """
    # Every n-th voxel is enough for percentiles, and keeps a 512x512x600 volume fast.
    sample = voxels.reshape(-1, order="A")[:: max(1, voxels.size // 1_000_000)]
    low, high = float(voxels.min()), float(voxels.max())
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}; expected a CT")
    if rescale == "none":
        return 1, 0, "none: taken as they are"
    if low >= 0 and high <= 255 and (sample == np.round(sample)).all():
        raise InputError(
            f"{path}: holds only whole numbers from {low:g} to {high:g}, like a mask; expected a CT in HU"
        )
    p1, p90 = (float(p) for p in np.percentile(sample, (1, 90)))
    slope = 1.0 if table.slope is None else table.slope
    intercept = 0.0 if table.intercept is None else table.intercept
    rescaled = sorted((slope * p1 + intercept, slope * p90 + intercept))
    is_hu = p1 < -200 and p90 < 600
    is_raw = (p1 > -200 or p90 > 900) and rescaled[0] < -200 and rescaled[1] < 600
    facts = f"1st and 90th percentile {p1:.0f} and {p90:.0f}"
    if rescale == "metadata":
        if table.intercept is None and table.slope is None:
            raise InputError(f"{path}: --rescale metadata, but no table gives its slope and intercept")
        values, decision = rescaled, "metadata: slope and intercept of the table applied"
    elif is_hu or rescale == "header":
        slope, intercept, values = 1.0, 0.0, [p1, p90]
        decision = f"{rescale}: HU already ({facts})"
    elif is_raw:
        values, decision = (
            rescaled,
            f"auto: raw values ({facts}); table's {slope:g} * v {intercept:+g} applied",
        )
    else:
        raise InputError(
            f"{path}: the values fit neither HU nor the table's slope {slope:g} and intercept "
            f"{intercept:g} ({facts}); say what they are with --rescale"
        )
    if slope * high + intercept < -300 and slope > 0:
        raise InputError(f"{path}: no voxel above -300 HU, only air; expected a CT of a body")
    if values[0] >= -200:
        raise InputError(
            f"{path}: no air or lung below -200 HU ({facts}); expected a chest CT in HU, see --rescale"
        )
    return slope, intercept, decision


def axis_codes(text: str) -> str:
    """The value of a flag such as --assume-orientation, in capitals."""
    if sorted(text.upper().translate(str.maketrans("LPI", "RAS"))) != ["A", "R", "S"]:
        raise argparse.ArgumentTypeError(f"{text!r} is not an orientation such as LPS or RAS")
    return text.upper()


def _mm(spacing) -> str:
    return " x ".join(f"{float(s):g}" for s in spacing) + " mm"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
