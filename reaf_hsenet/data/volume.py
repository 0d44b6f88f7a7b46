"""One CT file -> Hounsfield units on a known grid: header checks, orientation, and the rescale policy.

The result is an array whose axes run to the patient's Left, Posterior and Superior, its spacing in mm, and a record
of what was decided. Facts about CT-RATE's files (v1: raw values under a blank header; v2: HU under a full header with
a table that still lists an intercept) are CT-RATE's own, from its discussions 58 and 59 and CT-CLIP's issue 50.
"""

import zlib
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from reaf_hsenet.errors import InputError

RESCALES = ("auto", "header", "metadata", "none")
ORIENTATIONS = ("header", "stored")


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
    image = _open(path)
    voxels = _voxels(image, path)
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


def _open(path: Path) -> nib.Nifti1Image:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        image = nib.load(path)
    except (
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        OSError,
        EOFError,
        ValueError,
        zlib.error,
    ) as error:
        raise InputError(f"{path}: is not a readable NIfTI file ({_one_line(error)})") from error
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        image = image.slicer[:, :, :, 0]
    elif len(shape) != 3 or min(shape) < 2:
        raise InputError(f"{path}: is {_dimensions(shape)} of shape {tuple(shape)}; expected one 3D volume")
    if image.get_data_dtype().fields or image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: holds {image.get_data_dtype()} values; expected integers or floats")
    return image


def _dimensions(shape: tuple[int, ...]) -> str:
    flat = sum(n > 1 for n in shape)
    return f"a {flat}D image" if flat != 3 or len(shape) == 3 else f"a {len(shape)}D image"


def _voxels(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    """The values with the header's own scaling applied, in the stored type where there is none."""
    try:
        if (image.dataobj.slope, image.dataobj.inter) == (1, 0):
            voxels = np.asanyarray(image.dataobj)
        else:
            voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: is truncated or damaged ({_one_line(error)})") from error
    if voxels.dtype.kind == "f":
        bad = voxels.size - int(np.count_nonzero(np.isfinite(voxels)))
        if bad:
            raise InputError(f"{path}: {bad} voxels are NaN or infinite; expected finite values")
        return voxels.astype(np.float32, copy=False)
    return voxels.astype(voxels.dtype.newbyteorder("="), copy=False)


def _geometry(image: nib.Nifti1Image, path: Path, table: TableRow, assume_orientation: str | None):
    """Axis codes and spacing of the stored array: from the affine where the header has one, else from the table."""
    header = image.header
    blank = not (header.get("sform_code", 1) > 0 or header.get("qform_code", 0) > 0)
    if blank:
        if assume_orientation is None:
            raise InputError(
                f"{path}: the header has no orientation (sform and qform codes are 0); "
                "say which with --assume-orientation, for example LPS"
            )
        axes = assume_orientation
        spacing = table.spacing or header.get_zooms()[:3]
    else:
        affine = image.affine
        spacing = nib.affines.voxel_sizes(affine) if np.isfinite(affine).all() else (0.0,)
        turn = io_orientation(affine) if min(spacing) > 0 else np.full((3, 2), np.nan)
        if np.isnan(turn).any():
            raise InputError(
                f"{path}: the header's spacing is {_mm(header['pixdim'][1:4])} and its affine has no "
                "volume; expected three positive distances in mm"
            )
        axes = nib.orientations.ornt2axcodes(turn)
    declared = header.get("pixdim", np.ones(4))[1:4]
    if not blank and not (np.isfinite(declared).all() and (declared > 0).all()):
        spacing = declared
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


def _mm(spacing) -> str:
    return " x ".join(f"{float(s):g}" for s in spacing) + " mm"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
