"""What a NIfTI header says of its geometry: contradictions are refused with both values, all else is read
alike.
"""

import itertools
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from reaf_hsenet.data.volume import TableRow, read_volume
from reaf_hsenet.errors import InputError
from scans import LPS, chest, image, save


def written(folder: Path, made: nib.Nifti1Image, *fields: tuple[str, int, tuple]) -> Path:
    """A .nii whose header's bytes are changed by (struct format, offset, values) after it was made."""
    data = bytearray(made.to_bytes())
    for form, offset, values in fields:
        struct.pack_into(form, data, offset, *values)
    path = folder / "scan.nii"
    path.write_bytes(data)
    return path


def turned(degrees: float, axes: tuple[int, int]) -> np.ndarray:
    """LPS, turned about the third axis of the patient."""
    turn, (i, j), angle = np.eye(4), axes, np.radians(degrees)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn @ LPS


def flipped(axis: int) -> np.ndarray:
    return LPS @ np.diag([-1.0 if i == axis else 1.0 for i in range(4)])


def same_as_stored(volume) -> bool:
    return np.array_equal(volume.hu, chest()) and volume.spacing == pytest.approx((8, 8, 10), rel=1e-3)


@pytest.mark.parametrize("unit", ["mm", "meter", "micron", "unknown"])
def test_a_header_in_metres_or_microns_is_read_as_the_same_scan(tmp_path, unit):
    factor = {"meter": 1e-3, "micron": 1e3}.get(unit, 1.0)
    affine = LPS * [[factor], [factor], [factor], [1]]
    assert same_as_stored(read_volume(written(tmp_path, image(affine, affine, unit=unit))))


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1), (4, 1)])
def test_headers_with_one_or_two_coded_transforms_are_read_alike(tmp_path, codes):
    assert same_as_stored(read_volume(written(tmp_path, image(codes=codes))))


def test_all_48_storage_orders_are_read_as_one_scan(tmp_path):
    made = image()
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            other = made.as_reoriented(np.array([*zip(order, signs, strict=True)]))
            other.set_qform(other.affine, 1)
            volume = read_volume(written(tmp_path, other))
            assert same_as_stored(volume)
            # The record is of the file: shape, orientation and spacing belong to the same axes.
            assert volume.record["spacing"] == pytest.approx(
                [
                    (8, 8, 10)["LPS".index({"R": "L", "A": "P", "I": "S"}.get(c, c))]
                    for c in volume.record["orientation"]
                ]
            )


@pytest.mark.parametrize("degrees", [3, 12, 40])
def test_oblique_scans_and_slight_turns_between_the_transforms_are_accepted(tmp_path, degrees):
    oblique = turned(degrees, (1, 2))
    assert same_as_stored(read_volume(written(tmp_path, image(oblique, oblique))))
    assert same_as_stored(read_volume(written(tmp_path, image(LPS, oblique, (2, 1)))))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_transforms_that_disagree_on_a_side_are_refused_until_one_is_named(tmp_path, axis):
    path = written(tmp_path, image(flipped(axis), LPS))
    other = "".join(nib.aff2axcodes(flipped(axis)))
    with pytest.raises(
        InputError,
        match=f"scan.nii: the header's sform says axes to {other}, its qform to LPS; .*--header sform, qform",
    ):
        read_volume(path)
    assert np.array_equal(read_volume(path, header="qform").hu, chest())
    assert np.array_equal(read_volume(path, header="sform").hu, np.flip(chest(), axis))


def test_transforms_whose_axes_are_swapped_are_refused(tmp_path):
    swapped = LPS[:, [1, 0, 2, 3]]
    with pytest.raises(InputError, match="sform says axes to PLS, its qform to LPS"):
        read_volume(written(tmp_path, image(swapped, LPS)))


@pytest.mark.parametrize("codes", [(2, 0), (1, 1)])
def test_a_pixdim_that_differs_from_the_sform_is_refused_until_one_is_named(tmp_path, codes):
    path = written(tmp_path, image(codes=codes), ("<fff", 80, (4.0, 4.0, 5.0)))
    with pytest.raises(InputError, match="pixdim says 4 x 4 x 5 mm, its sform 8 x 8 x 10 mm; .*--header"):
        read_volume(path)
    assert read_volume(path, header="sform").spacing == pytest.approx((8, 8, 10))
    assert read_volume(path, header="pixdim").spacing == pytest.approx((4, 4, 5))
    rounded = written(tmp_path, image(codes=codes), ("<fff", 80, (8.02, 8.0, 10.0)))
    assert read_volume(rounded).spacing == pytest.approx((8, 8, 10))


@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0])], ids=["nibabel", "itk"])
def test_an_identity_affine_is_refused_whatever_the_size_of_the_scan(tmp_path, affine):
    for repeat in (1, 6):
        made = nib.Nifti1Image(np.tile(chest(), (repeat, repeat, repeat)), affine)
        nib.save(made, tmp_path / "eye.nii.gz")
        with pytest.raises(InputError, match="sform is the identity, .*--header none --assume-orientation"):
            read_volume(tmp_path / "eye.nii.gz")
    assert read_volume(tmp_path / "eye.nii.gz", header="sform").spacing == (1, 1, 1)
    assert (
        read_volume(tmp_path / "eye.nii.gz", header="none", assume_orientation="LPS").record["orientation"]
        == "LPS"
    )


@pytest.mark.parametrize("factor", [1e-3, 0.1, 100])
def test_a_scan_of_no_bodys_size_is_refused_with_its_size_and_unit(tmp_path, factor):
    affine = LPS * [[factor], [factor], [factor], [1]]
    with pytest.raises(
        InputError, match=r"by its header the scan is .* mm \(the unit is mm\), which no chest is"
    ):
        read_volume(written(tmp_path, image(affine, affine)))


def test_gantry_tilt_is_refused_with_its_angle(tmp_path):
    tilted = LPS.copy()
    tilted[1, 2] = 10 * np.tan(np.radians(20))
    for header in ("check", "sform"):
        with pytest.raises(InputError, match="axes of the sform are 20.0 degrees off a right angle .*_Tilt"):
            read_volume(written(tmp_path, image(tilted, LPS, (1, 0))), header=header)


def test_a_header_without_the_named_transform_is_refused(tmp_path):
    with pytest.raises(InputError, match="--header qform, but the header has none"):
        read_volume(written(tmp_path, image(codes=(1, 0))), header="qform")


def test_voxels_start_behind_the_header(tmp_path):
    whole = read_volume(written(tmp_path, image())).hu
    assert np.array_equal(read_volume(written(tmp_path, image(), ("<f", 108, (0.0,)))).hu, whole)
    for offset in (16, 348):
        with pytest.raises(
            InputError, match=f"voxels begin at byte {offset}, inside the header of 352 bytes"
        ):
            read_volume(written(tmp_path, image(), ("<f", 108, (float(offset),))))


def test_voxels_start_behind_the_headers_extension(tmp_path):
    made = image()
    made.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 1000))
    assert same_as_stored(read_volume(written(tmp_path, made)))
    for offset in (0.0, 352.0):
        with pytest.raises(InputError, match="inside the header of 1360 bytes"):
            read_volume(written(tmp_path, made, ("<f", 108, (offset,))))


def test_a_quaternion_that_rounding_made_too_long_is_read_and_a_longer_one_refused(tmp_path):
    made = image(codes=(0, 1))
    assert same_as_stored(read_volume(written(tmp_path, made, ("<fff", 256, (0.0, 0.0, 1.0000003)))))
    with pytest.raises(InputError, match="not a readable NIfTI file"):
        read_volume(written(tmp_path, made, ("<fff", 256, (0.0, 0.0, 1.001))))


@pytest.mark.parametrize("offset", [-1024, -500, -8192, 400, 1024])
def test_an_offset_that_was_applied_twice_or_never_is_not_hu(tmp_path, offset):
    """Bone and metal keep a second -1024 above any cut on the maximum."""
    hu = chest().astype(np.int32)
    hu[10:12, 12:14], hu[11, 12, :3] = 1100, 2600
    assert np.array_equal(read_volume(save(tmp_path, hu)).hu, hu)
    with pytest.raises(InputError, match="the values are not HU: .*--rescale"):
        read_volume(save(tmp_path, hu + offset))


@pytest.mark.parametrize("value", [1e300, -1e300, np.inf, np.nan])
def test_a_voxel_beyond_float32_is_refused(tmp_path, value):
    voxels = chest().astype(np.float64)
    voxels[3, 4, 5] = value
    with pytest.raises(InputError, match="1 voxels are NaN or infinite, or beyond float32"):
        read_volume(save(tmp_path, voxels))


def test_of_a_sparse_file_no_more_is_read_than_its_header_tells_of(tmp_path):
    path = written(tmp_path, image())
    with open(path, "r+b") as file:
        file.truncate(20 * 2**30)
    assert same_as_stored(read_volume(path))


@pytest.mark.parametrize("padding", [-2000, -1000, -300])
def test_raw_values_with_padding_are_rescaled_and_not_taken_for_hu(tmp_path, padding):
    """Padding lies below -200 whatever the scale is, and is no air."""
    raw = np.pad(chest().astype(np.int32), ((12, 12), (12, 12), (0, 0)), constant_values=-1000) + 1024
    raw[:6] = padding
    volume = read_volume(save(tmp_path, raw), TableRow(None, 1, -1024))
    assert "raw values" in volume.record["rescale"] and np.array_equal(volume.hu, raw - 1024)


@pytest.mark.parametrize("sizes", [(32,), (32, 32), (48, 1008, 16)])
@pytest.mark.parametrize("second", [False, True])
def test_voxels_start_behind_all_extensions(tmp_path, sizes, second):
    made = image() if not second else nib.Nifti2Image.from_image(image())
    for size in sizes:
        made.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * (size - 8)))
    assert same_as_stored(read_volume(written(tmp_path, made)))
    place, form = (168, "<q") if second else (108, "<f")
    first = 544 if second else 352
    for offset in (0, first, first + sizes[0] - 16, first + sum(sizes) - sizes[-1] // 2):
        with pytest.raises(InputError, match=f"begin at byte {offset}, inside the header of"):
            read_volume(written(tmp_path, made, (form, place, (offset,))))


def test_a_flag_of_extensions_without_one_is_no_reason(tmp_path):
    assert same_as_stored(read_volume(written(tmp_path, image(), ("<b", 348, (1,)))))


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4) + 1e-6 * np.ones((4, 4)),
        np.eye(4)[[1, 0, 2, 3]],
        np.diag([1.0, -1.0, -1.0, 1.0]),
        np.diag([1e-3, 1e-3, 1e-3, 1.0]),
    ],
)
def test_an_identity_that_is_rounded_permuted_or_in_metres_is_refused(tmp_path, affine):
    made = image(affine, affine, unit="meter" if abs(affine[0, 0]) == 1e-3 else "mm")
    with pytest.raises(InputError, match="sform is the identity"):
        read_volume(written(tmp_path, made))
