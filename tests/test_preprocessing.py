"""Preprocessing against the plain way: resample everything in float64, then crop and resize, as published."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.preprocessing import linear_neighbours, preprocess, resampled_grid
from reaf_hsenet.data.volume import Volume
from reaf_hsenet.errors import InputError


def body(shape=(41, 37, 23), seed=0, dtype=np.int16) -> np.ndarray:
    """Noise and bone in a box, air of -1000 and below around it: (x, y, z) HU."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000.0) - rng.integers(0, 30, shape)
    inner = tuple(slice(n // 5, n - n // 6) for n in shape)
    hu[inner] = rng.normal(-300, 400, hu[inner].shape)
    hu[tuple(slice(n // 2, n // 2 + 3) for n in shape)] = 900
    return hu.astype(dtype)


def resize(array: np.ndarray, size) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.float64))[None, None]
    return F.interpolate(tensor, size=tuple(size), mode="trilinear", align_corners=False)[0, 0].numpy()


def plain_hsenet(volume: Volume, size, spacing=(1.5, 0.75, 0.75), window=(-1000, 200)) -> np.ndarray:
    hu = np.clip(volume.hu.astype(np.float64), *window).transpose(2, 0, 1)
    have = (volume.spacing[2], volume.spacing[0], volume.spacing[1])
    grid = resize(hu, [int(n * s / t) for n, s, t in zip(hu.shape, have, spacing, strict=True)]).astype(
        np.float32
    )
    grid = (grid - grid.min()) / (grid.max() - grid.min())
    where = np.argwhere(grid > 0)
    start, end = where.min(0), where.max(0) + 1
    return resize(grid[tuple(map(slice, start, end))], size)


def plain_reaf(volume: Volume, size, fit: str) -> np.ndarray:
    hu = volume.hu.astype(np.float64).transpose(2, 1, 0)
    have = volume.spacing[::-1]
    grid = resize(hu, [int(n * s / t) for n, s, t in zip(hu.shape, have, (3, 1, 1), strict=True)])
    grid = np.clip((grid + 1150) / 1500, 0, 1)
    if fit == "resize":
        grid = resize(grid, size)
    else:
        for axis, want in enumerate(size):
            short = max(want - grid.shape[axis], 0)
            pad = [(0, 0)] * 3
            pad[axis] = (short // 2, short - short // 2)
            grid = np.pad(grid, pad)
            start = (grid.shape[axis] - want) // 2
            grid = np.take(grid, range(start, start + want), axis)
    return (grid - 0.449) / 0.226


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 1.0), (0.9, 0.9, 5.0), (2.9, 2.9, 3.7), (0.4, 0.5, 0.6)])
def test_hsenet_equals_resampling_the_whole_volume(spacing):
    volume = Volume(body(), spacing)
    found = preprocess(volume, replace(RECIPES["hsenet"], size=(8, 20, 24)))
    assert found.shape == (1, 8, 20, 24) and found.dtype == np.float32
    assert np.abs(found[0] - plain_hsenet(volume, (8, 20, 24))).max() < 2e-6


def test_hsenet_without_bone_scales_by_the_volumes_own_maximum():
    hu = np.minimum(body(), 40)
    volume = Volume(hu, (0.7, 0.7, 1.0))
    grid = resampled_grid(volume, RECIPES["hsenet"])
    low, high = grid.range()
    assert low == -1000 and 0 < high <= 40
    found = preprocess(volume, replace(RECIPES["hsenet"], size=(8, 20, 24)))
    assert np.abs(found[0] - plain_hsenet(volume, (8, 20, 24))).max() < 2e-6


def test_hsenet_without_air_crops_nothing_but_the_minimum():
    volume = Volume(np.clip(body(), -900, None) + np.arange(23, dtype=np.int16), (0.7, 0.7, 1.0))
    found = preprocess(volume, replace(RECIPES["hsenet"], size=(8, 20, 24)))
    assert np.abs(found[0] - plain_hsenet(volume, (8, 20, 24))).max() < 2e-6


@pytest.mark.parametrize("fit", ["crop", "resize"])
@pytest.mark.parametrize("spacing", [(0.7, 0.7, 1.0), (2.9, 2.9, 3.7)])
def test_reaf_equals_resampling_the_whole_volume(fit, spacing):
    volume = Volume(body(), spacing)
    found = preprocess(volume, replace(RECIPES["reaf"], size=(12, 40, 33), fit=fit))
    assert np.abs(found[0] - plain_reaf(volume, (12, 40, 33), fit)).max() < 2e-5


def test_reaf_pads_with_the_normalised_zero():
    found = preprocess(Volume(body((6, 6, 6)), (1, 1, 3)), replace(RECIPES["reaf"], size=(10, 9, 8)))
    assert found[0, 0, 0, 0] == pytest.approx(-1.98672569, abs=1e-6)
    # Six planes in ten: two before, two after; six rows in nine: one before, two after.
    inside = found[0, 2:8, 1:7, 1:7]
    assert (np.delete(found[0], range(2, 8), axis=0) == found[0, 0, 0, 0]).all() and inside.std() > 0.1
    assert (found[0, :, 7:] == found[0, 0, 0, 0]).all() and (found[0, :, 0] == found[0, 0, 0, 0]).all()


def test_recipes_order_the_axes_as_published():
    """hsenet: (S, L, P), reaf: (S, P, L). A bright voxel tells."""
    hu = np.full((20, 24, 28), -500, np.int16)
    hu[0, 0, 0], hu[3, 7, 11] = -1000, 1000
    for name, place in (("hsenet", (11, 3, 7)), ("reaf", (11, 7, 3))):
        shape = {"hsenet": (28, 20, 24), "reaf": (28, 24, 20)}[name]
        recipe = replace(RECIPES[name], spacing=None, size=shape, fit="resize")
        image = preprocess(Volume(hu, (1, 1, 1)), recipe)[0]
        assert np.unravel_index(image.argmax(), shape) == place


def test_window_and_fit_are_configurable():
    volume = Volume(body(), (0.7, 0.7, 1.0))
    recipe = replace(RECIPES["hsenet"], size=(8, 20, 24), window=(-1150.0, 350.0))
    assert (
        np.abs(preprocess(volume, recipe)[0] - plain_hsenet(volume, (8, 20, 24), window=(-1150, 350))).max()
        < 2e-6
    )
    cropped = preprocess(volume, replace(recipe, fit="crop"))
    assert cropped.shape == (1, 8, 20, 24) and np.abs(cropped - preprocess(volume, recipe)).max() > 0.1


def test_the_result_does_not_depend_on_the_stored_type():
    recipe = replace(RECIPES["hsenet"], size=(8, 20, 24))
    images = [
        preprocess(Volume(body().astype(t), (0.7, 0.7, 1)), recipe) for t in (np.int16, np.int32, np.float32)
    ]
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])


class Counted(np.ndarray):
    """An array that counts the voxels that indexing reads."""

    read = 0

    def __getitem__(self, key):
        part = np.asarray(self)[key]
        Counted.read += part.size
        return part


def test_only_needed_planes_are_read():
    """The published pipelines resample every plane; 8 of them need at most 32 of the 400 stored ones."""
    hu = body((40, 36, 400))
    Counted.read = 0
    grid = resampled_grid(Volume(hu.view(Counted), (0.8, 0.8, 1.0)), RECIPES["reaf"])
    grid.voxels = grid.voxels.view(Counted)
    grid.at(np.arange(0, 130, 9), np.arange(20), np.arange(20))
    assert 0 < Counted.read <= 30 * 40 * 36 < hu.size / 10


def test_a_volume_that_is_constant_after_clamping_is_refused():
    with pytest.raises(InputError, match="every voxel is -1000 HU after clamping"):
        preprocess(Volume(np.full((9, 9, 9), -1000) - np.arange(9), (1, 1, 1)), RECIPES["hsenet"])


def test_neighbours_are_torchs_trilinear():
    for source, target in ((5, 12), (12, 5), (7, 7), (1, 4), (3, 1)):
        low, high, weight = linear_neighbours(source, target)
        ramp = np.random.default_rng(1).random(source)
        mine = ramp[low] + weight * (ramp[high] - ramp[low])
        torchs = F.interpolate(
            torch.from_numpy(ramp)[None, None], size=target, mode="linear", align_corners=False
        )
        assert np.abs(mine - torchs[0, 0].numpy()).max() < 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": (200.0, -1000.0)}, "--window"),
        ({"size": (0, 4, 4)}, "--size"),
        ({"spacing": (1.5, 0.0, 0.75)}, "--spacing"),
        ({"spacing": (1.5, -0.75, 0.75)}, "--spacing"),
        ({"fit": "stretch"}, "--fit"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_flag(changes, words):
    with pytest.raises(InputError, match=words):
        replace(RECIPES["hsenet"], **changes)
