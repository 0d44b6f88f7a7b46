"""One volume of real size read as training reads it, in every format: time per volume, and how much faster
.npy is.

    python benchmarks/loading.py [--repeats 7]

A chest CT of 512 x 512 x 300 voxels becomes REAF's input of 112 x 336 x 336: from .nii.gz on the fly, from
.pt and .pt.gz files of its HU at 3 x 1 x 1 mm, and from the float16 .npy that preprocess.py writes. The files
are read in turn, with one thread and from the page cache, as by a worker of a loader whose disk is fast.
"""

import argparse
import gzip
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from preprocess import make_ct
from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.loader import read_prepared
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.preprocessing import preprocess, resampled_grid
from reaf_hsenet.data.volume import read_volume


def write_files(folder: Path) -> None:
    """ct.nii.gz, and from it ct.pt, ct.pt.gz (resampled HU, float32, as the published script saves) and
    ct.npy.
    """
    recipe = RECIPES["reaf"]
    make_ct(folder / "ct.nii.gz", (512, 512, 300))
    voxels = np.asarray(nib.load(folder / "ct.nii.gz").dataobj)
    nib.save(nib.Nifti1Image(voxels, np.diag([-0.75, -0.75, 1.3, 1.0])), folder / "ct.nii.gz")
    volume = read_volume(folder / "ct.nii.gz")
    grid = resampled_grid(volume, recipe)
    hu = torch.from_numpy(grid.at(*map(np.arange, grid.shape)))
    torch.save(hu, folder / "ct.pt")
    (folder / "ct.pt.gz").write_bytes(gzip.compress((folder / "ct.pt").read_bytes(), 6))
    np.save(folder / "ct.npy", preprocess(volume, recipe)[0].astype(np.float16))
    print(f"HU at 3 x 1 x 1 mm: {' x '.join(map(str, hu.shape))}, input: {' x '.join(map(str, recipe.size))}")


def plain_pt_gz(path: Path) -> torch.Tensor:
    """The plain way: unzip while torch reads, which seeks back and so unzips more than once; window,
    crop, normalise.
    """
    with gzip.open(path) as file:
        hu = torch.load(file, weights_only=True)
    image = torch.clip((hu + 1150) / 1500, 0, 1)
    for axis, want in enumerate(RECIPES["reaf"].size):
        image = image.narrow(axis, (image.shape[axis] - want) // 2, want)
    return ((image - 0.449) / 0.226)[None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        manifest = Manifest(
            folder, "benchmark", recipe=RECIPES["reaf"], dtype="float16", text="", labels=[], splits={}
        )
        names = ("ct.npy", "ct.pt", "ct.pt.gz", "ct.nii.gz")
        ways = {n: partial(read_prepared, manifest, {"volume": n}) for n in names}
        ways["ct.pt.gz, plain way"] = partial(plain_pt_gz, folder / "ct.pt.gz")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        volumes = {}
        for repeat in range(args.repeats + 1):
            for way, read in ways.items():
                started = time.perf_counter()
                volumes[way] = read()
                if repeat:  # the first round fills the page cache
                    seconds[way].append(time.perf_counter() - started)
        print(f"{'':<22}{'file':>8}{'median':>11}{'range':>18}{'against .npy':>22}{'largest difference':>22}")
        for way, times in seconds.items():
            ratios = [t / own for t, own in zip(times, seconds["ct.npy"], strict=True)]
            print(
                f"{way:<22}{(folder / way.split(',')[0]).stat().st_size / 1e6:>5.0f} "
                f"MB{statistics.median(times) * 1e3:>8.0f} ms{min(times) * 1e3:>9.0f} to "
                f"{max(times) * 1e3:.0f} ms{statistics.median(ratios):>10.1f}x ({min(ratios):.0f} to "
                f"{max(ratios):.0f}){(volumes[way] - volumes['ct.npy']).abs().max():>16.1e}"
            )


if __name__ == "__main__":
    main()
