"""Small CT files, and tables beside them."""

from pathlib import Path

import nibabel as nib
import numpy as np

LPS = np.diag([-8.0, -8.0, 10.0, 1.0])
LPS[:3, 3] = 70, 60, -80


def chest(shape=(20, 18, 16)) -> np.ndarray:
    """Air, lung, soft tissue, bone: plausible HU, asymmetric in every axis."""
    x, y, z = np.indices(shape)
    hu = np.where((x > 2) & (x < 17) & (y > 2) & (y < 15), 40, -1000)
    hu = np.where((x > 4) & (x < 9) & (y > 5) & (y < 12), -850, hu)
    hu[10:12, 12:14] = 700
    return (hu + x + 2 * y + 3 * z).astype(np.int16)


def save(folder: Path, voxels, affine=None, codes=(1, 1), name="scan.nii.gz", slope=None) -> Path:
    image = nib.Nifti1Image(voxels, np.diag([-3.0, -3.0, 4.0, 1.0]) if affine is None else affine)
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine, codes[1])
    if slope:
        image.header.set_slope_inter(*slope)
    path = folder / name
    nib.save(image, path)
    return path


def image(sform=LPS, qform=LPS, codes=(1, 1), unit="mm") -> nib.Nifti1Image:
    made = nib.Nifti1Image(chest(), LPS)
    made.set_sform(sform, codes[0])
    made.set_qform(qform, codes[1])
    made.header.set_xyzt_units(unit, "sec")
    return made


def table(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
