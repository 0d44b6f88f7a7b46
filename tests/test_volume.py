"""Reading a CT file: orientation, spacing, Hounsfield units, and what is refused."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from reaf_hsenet.data.volume import TableRow, read_volume
from reaf_hsenet.errors import InputError
from scans import chest, save


def test_any_orientation_becomes_left_posterior_superior(tmp_path):
    """The same body stored in 12 axis orders reads as one array."""
    lps = chest()
    affine = np.diag([-2.8, -2.9, 2.5, 1.0])
    reference = read_volume(save(tmp_path, lps, affine))
    assert np.array_equal(reference.hu, lps) and reference.spacing == pytest.approx((2.8, 2.9, 2.5))
    image = nib.Nifti1Image(lps, affine)
    for codes in ("LPS", "RAS", "LAS", "RPI", "SPL", "PSR", "ASL", "IRP", "LSA", "AIL", "SRA", "PLI"):
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
        )
        turned = image.as_reoriented(turn)
        path = save(tmp_path, np.asarray(turned.dataobj), turned.affine, name=f"{codes}.nii.gz")
        volume = read_volume(path)
        assert volume.record["orientation"] == codes
        assert np.array_equal(volume.hu, lps), codes
        assert volume.spacing == pytest.approx(reference.spacing), codes


def test_stored_orientation_keeps_the_files_axes(tmp_path):
    path = save(tmp_path, chest()[::-1], np.diag([2.8, -2.9, 2.5, 1.0]))
    assert np.array_equal(read_volume(path, orientation="stored").hu, chest()[::-1])
    assert np.array_equal(read_volume(path).hu, chest())


def test_a_blank_header_is_refused_unless_the_orientation_is_said(tmp_path):
    path = save(tmp_path, chest(), codes=(0, 0))
    with pytest.raises(InputError, match="no orientation.*--assume-orientation"):
        read_volume(path)
    assert np.array_equal(read_volume(path, assume_orientation="LPS").hu, chest())
    assert np.array_equal(read_volume(path, assume_orientation="RPS").hu, chest()[::-1])


def test_a_blank_headers_spacing_comes_from_the_table(tmp_path):
    path = save(tmp_path, chest(), codes=(0, 0))
    table = TableRow((2.7, 2.6, 5.5))
    assert read_volume(path, table, assume_orientation="LPS").spacing == (2.7, 2.6, 5.5)
    assert read_volume(path, table, assume_orientation="SPL").spacing == (5.5, 2.6, 2.7)


def test_a_headers_spacing_wins_over_the_table(tmp_path):
    path = save(tmp_path, chest(), np.diag([-2.8, -2.9, 2.5, 1]))
    assert read_volume(path, TableRow((9, 9, 9))).spacing == pytest.approx((2.8, 2.9, 2.5))


@pytest.mark.parametrize("intercept", [-1024, -8192])
def test_auto_applies_the_intercept_to_raw_values_and_never_to_hu(tmp_path, intercept):
    hu = save(tmp_path, chest(), name="v2.nii.gz")
    raw = save(tmp_path, chest().astype(np.float32) - intercept, codes=(0, 0), name="v1.nii.gz")
    table = TableRow((3, 3, 4), 1, intercept)
    as_v2, as_v1 = read_volume(hu, table), read_volume(raw, table, assume_orientation="LPS")
    assert np.array_equal(as_v2.hu, chest()) and np.array_equal(as_v1.hu, chest())
    assert "HU already" in as_v2.record["rescale"] and "raw values" in as_v1.record["rescale"]


def test_metadata_policy_applies_the_intercept_always_and_header_never(tmp_path):
    path = save(tmp_path, chest())
    table = TableRow((3, 3, 4), 1, -24)
    assert np.array_equal(read_volume(path, table, "metadata").hu, chest() - 24)
    assert np.array_equal(read_volume(path, table, "header").hu, chest())
    twice = read_volume(
        path, TableRow((3, 3, 4), 1, -1024), "metadata"
    )  # as published, of CT-RATE's second version
    assert np.array_equal(twice.hu, chest() - 1024)
    with pytest.raises(InputError, match="no table"):
        read_volume(path, rescale="metadata")


def test_header_scaling_is_always_applied(tmp_path):
    path = save(tmp_path, ((chest() + 1024) * 2).astype(np.int16), slope=(0.5, -1024))
    for rescale in ("auto", "header", "none"):
        assert np.allclose(read_volume(path, rescale=rescale).hu, chest()), rescale


def test_values_that_fit_neither_are_refused(tmp_path):
    path = save(tmp_path, (chest() + 3000).astype(np.int16))
    with pytest.raises(InputError, match="fit neither HU nor.*--rescale"):
        read_volume(path, TableRow((3, 3, 4), 1, -1024))
    assert read_volume(path, rescale="none").hu.max() > 3000


def test_record_says_what_the_file_held(tmp_path):
    record = read_volume(save(tmp_path, chest(), np.diag([-2.8, 2.9, 2.5, 1]))).record
    assert record["shape"] == [20, 18, 16] and record["orientation"] == "LAS"
    assert record["hu_range"] == [chest().min(), chest().max()]


def damaged_middle(folder):
    path = save(folder, np.random.default_rng(0).integers(-1000, 500, (32, 32, 32)).astype(np.int16))
    data = bytearray(path.read_bytes())
    data[9000:9100] = bytes(100)
    path.write_bytes(data)
    return path


def text_file(folder):
    path = folder / "notes.nii"
    path.write_text("not an image " * 100)
    return path


def empty_gz(folder):
    path = folder / "empty.nii.gz"
    path.write_bytes(gzip.compress(b""))
    return path


def zero_spacing(folder):
    path = save(folder, chest(), name="zero.nii")
    data = bytearray(path.read_bytes())
    data[80:84] = np.float32(0).tobytes()  # pixdim[1]
    data[280:296] = np.zeros(4, np.float32).tobytes()  # first row of the sform
    path.write_bytes(data)
    return path


def negative_spacing(folder):
    path = save(folder, chest(), name="negative.nii")
    data = bytearray(path.read_bytes())
    data[80:84] = np.float32(-2.8).tobytes()
    path.write_bytes(data)
    return path


def with_nan(folder):
    voxels = chest().astype(np.float32)
    voxels[3, 4, 5], voxels[0, 0, 0] = np.nan, np.inf
    return save(folder, voxels)


WRONG = [
    (damaged_middle, "truncated or damaged"),
    (text_file, "not a readable NIfTI"),
    (empty_gz, "not a readable NIfTI|truncated"),
    (lambda f: save(f, chest()[:, :, 0]), "a 2D image of shape"),
    (lambda f: save(f, chest()[:, :, :1]), "a 2D image of shape"),
    (with_nan, "2 voxels are NaN or infinite"),
    (zero_spacing, "spacing"),
    (negative_spacing, "spacing.*-2.8"),
    (lambda f: save(f, (chest() % 50 - 1020).astype(np.int16)), "only air"),
    (lambda f: save(f, (chest() % 118).astype(np.int16)), "like a mask"),
    (lambda f: save(f, (chest() > 0).astype(np.float32)), "like a mask"),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[words[:28] for _, words in WRONG])
def test_wrong_file_is_refused_in_one_line_with_its_name(tmp_path, make, words):
    path = make(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        read_volume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    assert read_volume(save(tmp_path, chest()[..., None])).hu.shape == (20, 18, 16)
