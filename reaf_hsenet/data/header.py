"""A NIfTI header: where the voxels begin, which way their axes run, how far apart they lie, and whether all
of it agrees.

A header can say where voxels lie three times: in the sform, in the qform, and (distances only) in pixdim. A
header that says two different things is refused with both values, until `--header` names the one to believe.
Source of the fields: nifti1.h, https://nifti.nimh.nih.gov.
"""

import struct
from dataclasses import dataclass
from typing import Literal, get_args

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation, ornt2axcodes

from reaf_hsenet.errors import InputError

Believed = Literal["check", "sform", "qform", "pixdim", "none"]
HEADERS = get_args(Believed)
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # metre, mm, micron; other codes of xyzt_units say nothing: mm
SPACING_TOLERANCE = 0.01  # relative; less is rounding
MOST_SHEAR = 0.01  # cosine between two axes: a slice 300 mm off stands 3 mm aside
QUATERNION_TOLERANCE = 1e-4  # of the squared length, which float32 rounds by less than 1e-6
MOST_EXTENSION_CODE = 128  # those given out so far end at 44, and are even
SMALLEST, LARGEST = 50.0, 4000.0  # mm of the longest side: no chest is smaller, no scanner's table longer


@dataclass(frozen=True)
class Geometry:
    """axes: codes such as ("L", "P", "S"), the side each stored axis runs to. spacing: mm along each."""

    axes: tuple[str, str, str]
    spacing: tuple[float, float, float]


def read_header(data: bytes) -> nib.Nifti1Header:
    """Return the header of a single-file NIfTI, with vox_offset at the first voxel.

    Raises InputError, ValueError or what nibabel raises for a header that no reader accepts.
    """
    second = data[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")
    kind = nib.Nifti2Header if second else nib.Nifti1Header
    header = kind(data[: kind.sizeof_hdr], check=False)
    # nibabel mends some headers, a negative spacing among them; this one is as it stands in the file.
    declared = header["pixdim"][1:4]
    if not all(0 < s < np.inf for s in declared):
        raise InputError(f"the header's spacing is {_mm(declared)}; expected three positive distances")
    _place_voxels(header, data)
    _round_quaternion(header)
    header.check_fix()
    header.get_slope_inter()
    return header


def _place_voxels(header: nib.Nifti1Header, data: bytes) -> None:
    """Set a vox_offset of 0 to the end of the header. Raises ValueError for one inside the header."""
    start, first, at = int(header["vox_offset"]), header.single_vox_offset, header.sizeof_hdr
    integers, end = header.endianness + "ii", first
    # Behind the header, where its flag says so, extensions follow one another: size, code, content.
    while data[at] and end <= max(first, start - 1) and end + 8 <= len(data):
        size, code = struct.unpack_from(integers, data, end)
        if size < 16 or size % 16 or not 0 <= code <= MOST_EXTENSION_CODE or code % 2:
            break
        end += size
    if start == 0 and end == first:
        header["vox_offset"] = first
    elif start < end:
        raise ValueError(f"its voxels begin at byte {start}, inside the header of {end} bytes")


def _round_quaternion(header: nib.Nifti1Header) -> None:
    """Shorten a quaternion that rounding made longer than 1, which nibabel refuses."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    squared = sum(float(header[name]) ** 2 for name in names)
    if 1 < squared < 1 + QUATERNION_TOLERANCE:
        for name in names:
            header[name] = float(header[name]) / (squared**0.5 * (1 + 1e-7))


def geometry(
    header: nib.Nifti1Header,
    table_spacing: tuple[float, float, float] | None = None,
    assume_orientation: str | None = None,
    believe: str = "check",
) -> Geometry:
    """Return the axes and spacing of the stored array.

    table_spacing: (x, y, z) in mm of a metadata table, for a header without orientation.
    assume_orientation: axis codes for a header without orientation.
    believe: `check` refuses a header that contradicts itself; `sform`, `qform` and `pixdim` take the one
        named, and pixdim the axes of the sform or else the qform; `none` takes the header for one without
        orientation.
    Raises InputError, with both values, for a contradiction; for sheared or parallel axes; for what is no
    body's size.
    """
    unit = int(header["xyzt_units"]) % 8
    scale, pixdim = MM_PER_UNIT.get(unit, 1.0), np.array(header.get_zooms()[:3], dtype=float)
    affines = {} if believe == "none" else _affines(header)
    if believe in ("sform", "qform") and believe not in affines:
        raise InputError(f"--header {believe}, but the header has none (its code is 0)")
    if not affines:
        if assume_orientation is None:
            raise InputError(
                "the header has no orientation (sform and qform codes are 0); say which with "
                "--assume-orientation, for example LPS"
            )
        axes, spacing = tuple(assume_orientation), table_spacing or pixdim * scale
    else:
        name = believe if believe in affines else next(iter(affines))
        affine = affines[name]
        axes, spacing = _axes(affine, name), _spacing(affine) * scale
        if believe == "pixdim":
            spacing = pixdim * scale
        if believe == "check":
            _agree(affines, pixdim, scale)
    if not all(0 < s < np.inf for s in spacing):
        raise InputError(f"the spacing is {_mm(spacing)}; expected three positive distances in mm")
    sides = np.array(spacing) * header.get_data_shape()[:3]
    if believe == "check" and not SMALLEST <= max(sides) <= LARGEST:
        unit_name = {1: "metre", 2: "mm", 3: "micron"}.get(unit, "not given, so mm")
        # Another unit than mm holds whatever is believed of the rest.
        otherwise = ", or take it as it is with --header sform, qform or pixdim" if scale == 1 else "'s unit"
        raise InputError(
            f"by its header the scan is {_mm(sides)} (the unit is {unit_name}), which no chest is; "
            f"mend the header{otherwise}"
        )
    return Geometry(axes, tuple(float(s) for s in spacing))


def _affines(header: nib.Nifti1Header) -> dict[str, np.ndarray]:
    """Return the coded ones of sform and qform, (4, 4) each, the one that NIfTI readers prefer first."""
    found = {}
    if header["sform_code"] > 0:
        found["sform"] = header.get_sform()
    if header["qform_code"] > 0:
        found["qform"] = header.get_qform()
    return found


def _spacing(affine: np.ndarray) -> np.ndarray:
    columns = affine[:3, :3]
    return np.sqrt((columns**2).sum(axis=0)) if np.isfinite(columns).all() else np.full(3, np.nan)


def _axes(affine: np.ndarray, name: str) -> tuple[str, str, str]:
    """Return the axis codes. Raises InputError for axes that are no right-angled frame."""
    spacing = _spacing(affine)
    if not min(spacing) > 0:
        raise InputError(
            f"the {name}'s spacing is {_mm(spacing)}; expected three positive distances in mm, or "
            "say what else holds with --header qform or pixdim"
        )
    unit = affine[:3, :3] / spacing
    if abs(np.linalg.det(unit)) < 1e-3:
        raise InputError("the header's affine is degenerate, two axes run the same way; mend the header")
    cosines = np.abs(unit.T @ unit - np.eye(3))
    if cosines.max() > MOST_SHEAR:
        tilt = np.degrees(np.arcsin(min(1.0, cosines.max())))
        raise InputError(
            f"two axes of the {name} are {tilt:.1f} degrees off a right angle (gantry tilt, or a "
            "shear); resample the scan onto a right-angled grid first, such as the _Tilt file that dcm2niix "
            "writes"
        )
    return ornt2axcodes(io_orientation(affine))


def _agree(affines: dict[str, np.ndarray], pixdim: np.ndarray, scale: float) -> None:
    """Raise InputError, with both values, where the header contradicts itself or says nothing."""
    name, affine = next(iter(affines.items()))
    spacing, columns = _spacing(affine), affine[:3, :3]
    believe = f"say which one holds with --header {', '.join(affines)} or pixdim, or mend the header"
    if np.abs(pixdim / spacing - 1).max() > SPACING_TOLERANCE:
        raise InputError(f"the header's pixdim says {_mm(pixdim)}, its {name} {_mm(spacing)}; {believe}")
    if len(affines) == 2:
        other = affines["qform"]
        codes = ["".join(_axes(a, n)) for n, a in affines.items()]
        # The turn from one to the other; up to 45 degrees it leaves every axis on its side.
        turn = np.linalg.inv(other[:3, :3] / _spacing(other)) @ (columns / spacing)
        if not np.array_equal(io_orientation(np.pad(turn, (0, 1))), io_orientation(np.eye(4))):
            raise InputError(
                f"the header's sform says axes to {codes[0]}, its qform to {codes[1]}; {believe}"
            )
    # Ones in any order and with any signs, but for rounding.
    ones = np.allclose(np.sort(np.abs(columns * scale), axis=0), [[0] * 3, [0] * 3, [1] * 3], atol=1e-4)
    if ones and np.abs(affine[:3, 3] * scale).max() < 1e-3:
        raise InputError(
            f"the header's {name} is the identity, 1 mm voxels from the origin, as is written for an "
            "array without geometry; give the file its own, say it with --header none --assume-orientation, "
            f"or take it with --header {name}"
        )


def _mm(distances) -> str:
    return " x ".join(f"{float(d):.4g}" for d in distances) + " mm"
