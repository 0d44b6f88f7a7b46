"""One CT through preprocessing: this project against the plain way, time per volume and peak memory.

    python benchmarks/preprocess.py [--shape 512 512 600] [--pairs 3]

The plain way is what the published scripts do: float64 voxels by get_fdata, resample all of them, crop,
resize. Both read the same .nii.gz in a process of its own with one thread, as a preprocessing worker does.
"""

import argparse
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from measure import compare
from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.preprocessing import preprocess
from reaf_hsenet.data.volume import read_volume


def make_ct(path: Path, shape: tuple[int, int, int]) -> None:
    """An int16 CT of a body in air, with noise, 0.8 x 0.8 x 0.6 mm."""
    rng = np.random.default_rng(0)
    x, y, z = (
        np.linspace(-1, 1, n, dtype=np.float32).reshape([-1 if i == a else 1 for i in range(3)])
        for a, n in enumerate(shape)
    )
    body = x**2 / 0.7 + y**2 / 0.45 < 1
    lungs = ((abs(x) - 0.4) ** 2 / 0.08 + y**2 / 0.18 + z**2 / 0.8 < 1) & body
    bone = (x**2 / 0.006 + (y - 0.5) ** 2 / 0.012 < 1) & body
    hu = np.where(lungs, -850, np.where(bone, 600, np.where(body, 40, -1000))).astype(np.int16)
    for plane in range(shape[2]):
        hu[:, :, plane] += rng.normal(0, 20, shape[:2]).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, np.diag([-0.8, -0.8, 0.6, 1.0])), path)


def ours(path: str, recipe: str):
    return lambda: preprocess(read_volume(Path(path)), RECIPES[recipe])


def plain(path: str, recipe: str):
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    order, target, size = {
        "hsenet": ((2, 0, 1), (1.5, 0.75, 0.75), (32, 256, 256)),
        "reaf": ((2, 1, 0), (3.0, 1.0, 1.0), (112, 336, 336)),
    }[recipe]

    def resize(volume, shape):
        return F.interpolate(volume[None, None], size=shape, mode="trilinear", align_corners=False)[0, 0]

    def work():
        image = nib.load(path)
        hu = torch.from_numpy(image.get_fdata()).permute(order)
        spacing = [float(image.header.get_zooms()[a]) for a in order]
        shape = [int(n * s / t) for n, s, t in zip(hu.shape, spacing, target, strict=True)]
        if recipe == "hsenet":
            grid = resize(hu.clamp(-1000, 200), shape).float()
            grid = (grid - grid.min()) / (grid.max() - grid.min())
            where = (grid > 0).nonzero()
            box = [
                slice(int(low), int(high) + 1) for low, high in zip(where.amin(0), where.amax(0), strict=True)
            ]
            return resize(grid[tuple(box)], size)
        grid = ((resize(hu.float(), shape) + 1150) / 1500).clamp(0, 1)
        for axis, want in enumerate(size):
            short = max(want - grid.shape[axis], 0)
            pad = [0] * 6
            pad[2 * (2 - axis)], pad[2 * (2 - axis) + 1] = short // 2, short - short // 2
            grid = F.pad(grid, pad)
            grid = grid.narrow(axis, (grid.shape[axis] - want) // 2, want)
        return (grid - 0.449) / 0.226

    return work


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 600), metavar=("X", "Y", "Z"))
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "ct.nii.gz")
        make_ct(Path(path), args.shape)
        for recipe in RECIPES:
            difference = np.abs(ours(path, recipe)()[0] - plain(path, recipe)().numpy()).max()
            print(
                f"{recipe}: {'x'.join(map(str, args.shape))} int16 .nii.gz, largest difference "
                f"{difference:.1e}"
            )
            compare(("reaf_hsenet", "plain way"), (ours, plain), (path, recipe), args.pairs)


if __name__ == "__main__":
    main()
