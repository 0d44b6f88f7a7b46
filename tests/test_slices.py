"""Slices of a CT, their features beside the volumes, and HSENet's own json."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import preprocess
from conftest import ROOT, script
from reaf_hsenet.config import NO_AUGMENTATION, RECIPES
from reaf_hsenet.data.loader import CTReportDataset, read_prepared, read_slices
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.prepare import Options, list_as_is, prepare
from reaf_hsenet.data.slice_features import add_slice_features, normalise
from reaf_hsenet.data.slices import SLICE_RECIPES, axial_slices, fit, slice_images, through_jpeg
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.data.volume import Volume, read_volume
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece
from reaf_hsenet.weights.files import load_strictly
from reaf_hsenet.weights.names import VIT2D, import_state
from reaf_hsenet.weights.slice_encoder import describe, load_slice_encoder, save_slice_encoder

HSENET = SLICE_RECIPES["hsenet"]
RECIPE = replace(RECIPES["hsenet"], size=(16, 32, 32))


def ct(shape, spacing, seed=0) -> Volume:
    return Volume(np.random.default_rng(seed).integers(-1500, 1500, shape).astype(np.int16), spacing)


def published_slices(volume: Volume) -> np.ndarray:
    """The published steps one after the other, on the whole volume, in double precision."""
    voxels = torch.from_numpy(volume.hu.transpose(2, 0, 1).astype(np.float64)).clamp(-1000, 1000) / 1000
    x, y, z = volume.spacing
    size = [int(n * s / t) for n, s, t in zip(voxels.shape, (z, x, y), (1.5, 0.75, 0.75), strict=True)]
    stack = F.interpolate(voxels[None, None], size, mode="trilinear")[0, 0]
    if len(stack) < 32:
        stack = F.interpolate(stack[None, None], (32, *size[1:]), mode="trilinear")[0, 0]
    pictures = []
    for i in torch.linspace(0, len(stack) - 1, 32, dtype=torch.long):
        picture = stack[i].numpy() - stack[i].numpy().min()
        pictures.append(np.rot90((picture / picture.max() * 255).astype(np.uint8), -1))
    return np.stack(pictures)


@pytest.mark.parametrize("depth", [12, 29, 70])
def test_slices_are_the_published_ones(depth):
    volume = ct((20, 17, depth), (1.1, 1.3, 2.9))
    found, expected = axial_slices(volume, HSENET), published_slices(volume)
    assert found.shape == expected.shape and found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3 and np.ptp(found) == 255


def test_slices_run_to_superior_also_where_a_volume_has_more_slices_than_rows():
    volume = Volume(np.full((16, 12, 64), -1000, np.int16), (0.75, 0.75, 1.5))
    for z in range(64):
        volume.hu[z // 4, :, z] = 1000
    found = axial_slices(volume, HSENET)
    assert found.shape == (32, 12, 16)
    columns = found[:, 5].argmax(1)  # from the patient's left, which is on the picture's left
    assert columns[0] == 15 and columns[-1] == 0 and (np.diff(columns) <= 0).all()


def test_a_slice_of_one_value_is_black():
    volume = ct((16, 16, 32), (0.75, 0.75, 1.5))
    volume.hu[:, :, 7] = 300
    found = axial_slices(volume, HSENET)
    assert not found[7].any() and found[8].max() == 255


def test_bimcv_slices_have_the_whole_volumes_range_and_keep_a_thin_volumes_slices():
    volume = ct((9, 7, 20), (1, 1, 5))
    volume.hu[0, 0, 0], volume.hu[0, 0, 1] = -2048, 3000
    found = axial_slices(volume, SLICE_RECIPES["bimcv"])
    grey = ((volume.hu.astype(float) + 2048) / 5048 * 255).astype(np.uint8)
    for k, z in enumerate(torch.linspace(0, 19, 32, dtype=torch.long)):
        assert np.array_equal(found[k], np.rot90(grey[:, :, z]))


SHAPES = [(404, 488, 224), (60, 50, 32), (31, 90, 64), (32, 32, 32)]


@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_pictures_are_resized_to_the_last_digit_as_pillow_does(height, width, size):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pictures = np.random.default_rng(1).integers(0, 256, (2, height, width), dtype=np.uint8)
    short = min(height, width)
    tall, broad = (size if n == short else int(size * n / short) for n in (height, width))
    top, left = round((tall - size) / 2), round((broad - size) / 2)
    for found, picture in zip(fit(pictures, size), pictures, strict=True):
        resized = np.asarray(image.fromarray(picture).resize((broad, tall), image.Resampling.BICUBIC))
        assert np.array_equal(found, resized[top : top + size, left : left + size])


def test_pictures_are_resized_as_torch_does_to_within_a_grey_level():
    pictures = np.random.default_rng(2).integers(0, 256, (2, 90, 60), dtype=np.uint8)
    resized = F.interpolate(torch.from_numpy(pictures)[:, None], (48, 32), mode="bicubic", antialias=True)
    difference = np.abs(fit(pictures, 32).astype(int) - resized[:, 0, 8:40].numpy())
    assert difference.max() <= 1 and difference.mean() < 0.05


def test_pictures_are_normalised_with_clips_statistics():
    found = normalise(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert found.shape == (1, 3, 1, 2)
    assert torch.allclose(found[0, :, 0, 0], torch.tensor([-1.7922626, -1.7520971, -1.4802198]))
    assert torch.allclose(found[0, :, 0, 1], torch.tensor([1.9303361, 2.0748837, 2.1458969]))


def test_jpeg_changes_slices_a_little():
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    smooth = (128 + 100 * np.sin(np.multiply.outer(np.arange(64), np.arange(48)) / 300)).astype(np.uint8)[
        None
    ]
    difference = np.abs(through_jpeg(smooth).astype(int) - smooth)
    assert 0 < difference.max() <= 4
    volume = ct((16, 16, 40), (2, 2, 2))
    assert not np.array_equal(slice_images(volume, HSENET, 32, jpeg=True), slice_images(volume, HSENET, 32))


def test_jpeg_without_pillow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="--jpeg-slices.*pip install pillow"):
        slice_images(ct((16, 16, 40), (2, 2, 2)), HSENET, 32, jpeg=True)


def tiny_encoder(seed=0) -> SliceEncoder:
    torch.manual_seed(seed)
    return SliceEncoder(size=32, patch=16, width=24, depth=1, heads=2, mlp=48).eval()


@pytest.fixture(scope="module")
def encoder() -> SliceEncoder:
    return tiny_encoder()


@pytest.fixture(scope="module")
def provenance(encoder) -> dict:
    return describe(encoder, "tiny", recipe="phantom")


@pytest.fixture(scope="module")
def complete(prepared, encoder, provenance, tmp_path_factory) -> Path:
    """Prepared volumes with slice features."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("slices") / "data")
    assert add_slice_features(folder, encoder, provenance, progress=False) == []
    return folder


@pytest.fixture
def done(complete, tmp_path) -> Path:
    return shutil.copytree(complete, tmp_path / "done")


def entries(folder: Path) -> list[dict]:
    return [e for split in load_manifest(folder).splits.values() for e in split]


def change_manifest(folder: Path, change) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def refused(folder: Path) -> dict[str, str]:
    with open(folder / "refused.csv", newline="") as file:
        return {Path(row["file"]).name: row["reason"] for row in csv.DictReader(file)}


def test_features_are_the_encoders_of_the_source_files_slices(complete, encoder, provenance):
    manifest = load_manifest(complete)
    assert manifest.slices == provenance and provenance["width"] == 24 and provenance["slices"] == 32
    manifest.check(["train", "validation"], slices=True)
    for entry in manifest.entries("train")[:3]:
        stored = np.load(complete / f"slices/{entry['id']}.npy")
        assert (
            entry["slices"] == f"slices/{entry['id']}.npy"
            and stored.shape == (32, 24)
            and stored.dtype == np.float16
        )
        images = slice_images(read_volume(Path(entry["source"]["file"])), SLICE_RECIPES["phantom"], 32)
        with torch.no_grad():
            expected = encoder(normalise(torch.from_numpy(images)))
        assert torch.allclose(read_slices(manifest, entry), expected, atol=2e-3)
    one, two = (read_slices(manifest, e) for e in manifest.entries("train")[:2])
    assert not torch.allclose(one, two, atol=1e-2) and not torch.allclose(one, one.flip(0), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "workers"), [(7, 1), (100, 2)])
def test_batches_and_workers_do_not_change_features(data, complete, encoder, provenance, batch, workers):
    assert add_slice_features(data, encoder, provenance, workers, progress=False, batch=batch) == []
    for entry in entries(complete):
        one, two = (np.load(folder / entry["slices"]).astype(float) for folder in (data, complete))
        assert np.allclose(one, two, atol=4e-3)


def test_an_interrupted_step_continues_and_repeats_nothing(data, encoder, provenance, monkeypatch):
    forward, calls = SliceEncoder.forward, []

    def counted(self, images):
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(SliceEncoder, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        add_slice_features(data, encoder, provenance, progress=False, batch=32)
    left = {p: p.stat().st_mtime_ns for p in data.glob("slices/*.npy")}
    assert len(left) == 3 and load_manifest(data).slices is None
    next(iter(left)).write_bytes(b"short")
    add_slice_features(data, encoder, provenance, progress=False, batch=32)
    kept = [p for p, time in left.items() if p.stat().st_mtime_ns == time]
    assert len(kept) == 2 and len(calls) == 4 + len(entries(data)) - 2 and set(calls) == {32}
    load_manifest(data).check(["train", "validation"], slices=True)
    calls.clear()
    manifest = (data / "manifest.json").read_bytes()
    add_slice_features(data, encoder, provenance, progress=False)
    assert not calls and (data / "manifest.json").read_bytes() == manifest


def test_another_encoder_into_the_same_folder_is_refused(done, encoder, provenance):
    manifest = (done / "manifest.json").read_bytes()
    other = tiny_encoder(1)
    (done / "slices.jsonl").unlink()  # the manifest knows too
    for record, words in (
        (describe(other, "other", recipe="phantom"), "another sha256; choose another --out"),
        ({**provenance, "jpeg": True}, "another jpeg"),
        ({**provenance, "recipe": "hsenet"}, "another recipe"),
    ):
        with pytest.raises(InputError, match=words):
            add_slice_features(done, other, record, progress=False)
    assert (done / "manifest.json").read_bytes() == manifest
    add_slice_features(done, encoder, {**provenance, "encoder": "the same weights elsewhere"}, progress=False)
    assert load_manifest(done).slices["encoder"] == "the same weights elsewhere"


def interrupt(monkeypatch, folder: Path, encoder, provenance, after: int, **flags) -> None:
    """Ctrl-C while features are made, when `after` volumes have theirs."""
    forward, calls = SliceEncoder.forward, []

    def interrupted(self, images):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return forward(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SliceEncoder, "forward", interrupted)
        add_slice_features(folder, encoder, provenance, progress=False, batch=32, **flags)


def test_another_encoder_is_refused_while_features_are_half_made(data, encoder, provenance, monkeypatch):
    interrupt(monkeypatch, data, encoder, provenance, after=1)
    with pytest.raises(
        InputError, match="holds slice features with another sha256; choose another --out, or .*--replace"
    ):
        add_slice_features(
            data, tiny_encoder(1), describe(tiny_encoder(1), "x", recipe="phantom"), progress=False
        )


@pytest.mark.parametrize("failure", ["interrupt", "NaN"])
def test_an_encoder_that_made_no_features_does_not_bind_the_folder(
    data, encoder, provenance, monkeypatch, failure
):
    other = tiny_encoder(1)
    if failure == "interrupt":
        interrupt(monkeypatch, data, other, describe(other, "x", recipe="phantom"), after=0)
    else:
        torch.nn.init.constant_(other.norm.bias, float("nan"))
        with pytest.raises(InputError, match="NaN"):
            add_slice_features(data, other, describe(other, "x", recipe="phantom"), progress=False)
    assert add_slice_features(data, encoder, provenance, progress=False) == []
    assert load_manifest(data).slices == provenance


def test_features_are_replaced_when_that_is_asked_for(done, encoder, provenance, monkeypatch):
    other = tiny_encoder(1)
    record, old = describe(other, "x", recipe="phantom"), np.load(done / entries(done)[0]["slices"])
    replace = lambda: add_slice_features(done, other, record, progress=False, replace=True)
    interrupt(monkeypatch, done, other, record, after=1, replace=True)
    manifest = load_manifest(done)  # no mixture of two encoders is ever listed as one's
    assert manifest.slices is None and not any("slices" in e for e in entries(done))
    assert len(list(done.glob("slices/*.npy"))) == 1
    first = next(done.glob("slices/*.npy")).stat().st_mtime_ns
    assert replace() == [] and load_manifest(done).slices == record
    load_manifest(done).check(["train", "validation"], slices=True)
    assert first in [p.stat().st_mtime_ns for p in done.glob("slices/*.npy")]  # the same command continues
    new = np.load(done / entries(done)[0]["slices"])
    assert not np.allclose(new.astype(float), old.astype(float), atol=1e-2)
    made = {p: p.stat().st_mtime_ns for p in done.glob("slices/*.npy")}
    assert replace() == [] and {p: p.stat().st_mtime_ns for p in made} == made


def test_features_of_any_byte_order_are_read_and_what_is_no_array_is_named(done):
    manifest = load_manifest(done)
    entry = manifest.entries("train")[0]
    path = done / entry["slices"]
    plain, stored = read_slices(manifest, entry), np.load(path)
    for dtype in (">f2", ">f8", np.longdouble):
        np.save(path, stored.astype(dtype))
        assert torch.equal(read_slices(manifest, entry), plain)
    np.save(path, np.full((32, 24), "a"))
    with pytest.raises(InputError, match=f"{path}: holds <U1; expected one array of numbers.*--slices again"):
        read_slices(manifest, entry)
    with open(path, "wb") as file:
        np.savez(file, stored)
    with pytest.raises(InputError, match=f"{path}: holds several arrays"):
        read_slices(manifest, entry)
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(InputError, match=f"{path}: cannot be read"):
        read_slices(manifest, entry)
    path.unlink()
    with pytest.raises(InputError, match=f"{path}: no such file; run preprocess.py --slices again"):
        read_slices(manifest, entry)


def test_training_on_features_of_another_encoder_is_refused(complete, provenance):
    manifest = load_manifest(complete)
    manifest.require_slices({**provenance, "encoder": "elsewhere"}, "the run")
    with pytest.raises(InputError, match="another sha256, jpeg than the run; .* --replace-slices"):
        manifest.require_slices({**provenance, "sha256": "0", "jpeg": True}, "the run")


@pytest.mark.slow
def test_a_source_that_is_gone_or_damaged_is_refused_by_name(phantom_root, tmp_path, encoder, provenance):
    tree, out = shutil.copytree(phantom_root, tmp_path / "tree"), tmp_path / "out"
    gone, damaged, no_volume = (next(tree.rglob(f"train_{i}_a_1.nii.gz")) for i in (1, 2, 3))
    no_volume.write_bytes(b"")
    prepare(read_ct_rate(tree), out, Options(RECIPE), progress=False)
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:4000])
    found = add_slice_features(out, encoder, provenance, progress=False)
    assert (
        {Path(p).name for p, _ in found} == {gone.name, damaged.name} == set(refused(out)) - {no_volume.name}
    )
    assert "no such file" in refused(out)[gone.name] and "truncated" in refused(out)[damaged.name]
    listed = {e["id"]: "slices" in e for e in entries(out)}
    assert [i for i, has in listed.items() if not has] == ["train_1_a_1", "train_2_a_1"]
    with pytest.raises(InputError, match="train_1_a_1 has no slice features"):
        load_manifest(out).check(["train"], slices=True)
    add_slice_features(out, encoder, provenance, progress=False)
    assert len(refused(out)) == 3


@pytest.mark.slow
def test_slices_read_a_file_as_its_volume_was_read(phantom_root, tmp_path, encoder, provenance):
    tree, out = shutil.copytree(phantom_root, tmp_path / "tree"), tmp_path / "out"
    blank = next(tree.rglob("train_1_a_1.nii.gz"))
    nib.save(
        nib.Nifti1Image(np.asarray(nib.load(blank).dataobj), None), blank
    )  # its spacing is the table's alone
    prepare(read_ct_rate(tree), out, Options(RECIPE), progress=False)
    assert add_slice_features(out, encoder, provenance, progress=False) == []
    shutil.rmtree(out / "slices")
    change_manifest(out, lambda v: v["splits"]["train"][0]["table"].update(spacing=[9, 9, 9]))
    ((path, reason),) = add_slice_features(out, encoder, provenance, progress=False)
    assert path == str(blank) and "its spacing differs from the prepared volume's" in reason


def test_volumes_from_pt_files_have_no_slices(data, encoder, provenance):
    change_manifest(data, lambda v: v["splits"]["train"][2]["source"].update(file="/x/scan.pt.gz"))
    with pytest.raises(
        InputError, match="/x/scan.pt.gz: --slices needs the CT itself.*1 volumes come from .pt"
    ):
        add_slice_features(data, encoder, provenance, progress=False)
    assert not (data / "slices").exists()


def test_an_encoder_that_gives_nan_is_named(data, provenance):
    broken = tiny_encoder()
    torch.nn.init.constant_(broken.norm.bias, float("nan"))
    with pytest.raises(InputError, match="tiny: gives train_1_a_1 NaN"):
        add_slice_features(data, broken, provenance, progress=False)
    assert not list(data.glob("slices/*.npy"))


@pytest.mark.slow
def test_volumes_prepared_again_keep_their_features(phantom_root, tmp_path, encoder, provenance):
    tree, out = shutil.copytree(phantom_root, tmp_path / "tree"), tmp_path / "out"
    again = lambda: prepare(read_ct_rate(tree), out, Options(RECIPE), progress=False)
    again()
    add_slice_features(out, encoder, provenance, progress=False)
    before = (out / "manifest.json").read_bytes()
    again()
    assert (out / "manifest.json").read_bytes() == before
    first, second = (next(tree.rglob(f"train_{i}_a_1.nii.gz")) for i in (1, 2))
    old = np.load(out / "slices/train_1_a_1.npy")
    shutil.copy(second, first)
    again()
    assert [e["id"] for e in entries(out) if "slices" not in e] == ["train_1_a_1"]
    add_slice_features(out, encoder, provenance, progress=False)
    new, other = (np.load(out / f"slices/train_{i}_a_1.npy").astype(float) for i in (1, 2))
    assert np.allclose(new, other, atol=4e-3) and not np.allclose(new, old.astype(float), atol=4e-3)


def test_files_as_they_are_get_features_of_what_they_hold_now(phantom_root, tmp_path, encoder, provenance):
    tree, out = shutil.copytree(phantom_root, tmp_path / "tree"), tmp_path / "out"
    list_as_is(read_ct_rate(tree), out, Options(RECIPE))
    add_slice_features(out, encoder, provenance, progress=False)
    load_manifest(out).check(["train", "validation"], slices=True)
    old = np.load(out / "slices/train_1_a_1.npy").astype(float)
    shutil.copy(*(next(tree.rglob(f"train_{i}_a_1.nii.gz")) for i in (2, 1)))
    add_slice_features(out, encoder, provenance, progress=False)
    new, other = (np.load(out / f"slices/train_{i}_a_1.npy").astype(float) for i in (1, 2))
    assert np.allclose(new, other, atol=4e-3) and not np.allclose(new, old, atol=4e-3)


def test_an_encoder_folder_reads_back_the_same(tmp_path, encoder):
    save_slice_encoder(tmp_path, encoder)
    again, record = load_slice_encoder(str(tmp_path))
    assert record == describe(encoder, str(tmp_path)) and not again.training
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), encoder(images))
    assert describe(tiny_encoder(1), str(tmp_path))["sha256"] != record["sha256"]


@pytest.mark.parametrize("prefix", ["visual.trunk.", ""])
def test_a_published_vit_is_recognised_by_its_shapes(tmp_path, prefix):
    torch.manual_seed(3)
    model = SliceEncoder(size=64, patch=16, width=128, depth=2, heads=2, mlp=96).eval()
    state = {n.replace("patch_embed.", "patch_embed.proj."): t for n, t in model.state_dict().items()}
    state = {prefix + n: t for n, t in state.items()} | {
        "visual.head.proj.weight" if prefix else "head.weight": torch.ones(2)
    }
    save_file(state, tmp_path / "model.safetensors")
    found, record = load_slice_encoder(str(tmp_path / "model.safetensors"))
    assert [record[k] for k in ("size", "patch", "width", "depth", "heads", "mlp")] == [64, 16, 128, 2, 2, 96]
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(images), model(images))


@pytest.mark.parametrize(
    "known", ["head.bias", "fc_norm.weight", "decoder_blocks.0.norm1.weight", "mask_token"]
)
def test_heads_of_a_vit_are_left_out_and_other_tensors_refused(tmp_path, encoder, known):
    state = {n.replace("patch_embed.", "patch_embed.proj."): t for n, t in encoder.state_dict().items()}
    assert import_state(VIT2D, state | {known: torch.ones(24)}).keys() == encoder.state_dict().keys()
    for unknown in ("norm_pre.weight", "reg_token", "blocks.0.ls1.gamma"):  # computed with, in other ViTs
        with pytest.raises(InputError, match=f"{unknown} is not known"):
            load_strictly(encoder, import_state(VIT2D, state | {unknown: torch.ones(24)}), "vit")


def test_what_is_no_slice_encoder_is_refused(tmp_path, encoder):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is not a 2D ViT such as BiomedCLIP's"):
        load_slice_encoder(str(tmp_path))
    save_slice_encoder(tmp_path, encoder)
    for change, words in (
        ({"heads": 5}, "whole heads"),
        ({"depth": 0}, "above 0"),
        ({"depth": 2}, "blocks.1.*is missing"),
    ):
        settings = {"size": 32, "patch": 16, "width": 24, "depth": 1, "heads": 2, "mlp": 48} | change
        (tmp_path / "slice_encoder.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match=words):
            load_slice_encoder(str(tmp_path))


@pytest.mark.slow
def test_the_command_adds_features_to_prepared_volumes(data, tmp_path, encoder):
    save_slice_encoder(tmp_path / "encoder", encoder)
    flags = ("--slices", tmp_path / "encoder", "--slice-recipe", "phantom", "--device", "cpu", "--out")
    done = script("preprocess.py", *flags, data)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(data)
    assert (
        f"(32, 24) slice features of {tmp_path / 'encoder'}, sha256 {manifest.slices['sha256'][:12]}"
        in done.stdout
    )
    manifest.check(["train", "validation"], slices=True)
    name = entries(data)[0]["slices"]
    (data / name).unlink()
    change_manifest(
        data, lambda v: v["splits"]["train"][0]["source"].update(file=str(tmp_path / "gone.nii.gz"))
    )
    done = script("preprocess.py", *flags, data)
    assert (
        done.returncode == 3 and f"refused: {tmp_path / 'gone.nii.gz'}: slices: no such file" in done.stderr
    )
    assert script("preprocess.py", *flags, data, "--allow-refused").returncode == 0


@pytest.mark.slow
def test_an_interrupt_between_processes_is_clean_and_the_same_command_continues(data, tmp_path, encoder):
    save_slice_encoder(tmp_path / "encoder", encoder)
    flags = ["--slices", tmp_path / "encoder", "--out", data]
    flags += "--device cpu --workers 2 --slice-batch 32".split()
    command = [sys.executable, ROOT / "preprocess.py", *flags]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(data.glob("slices/*.npy"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command continues" in errors and "Traceback" not in errors
    made = {p: p.stat().st_mtime_ns for p in data.glob("slices/*.npy")}
    assert 2 <= len(made) < len(entries(data)) and not list(data.rglob("*.tmp"))
    done = script("preprocess.py", *flags)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in made} == made
    load_manifest(data).check(["train", "validation"], slices=True)


@pytest.mark.slow
def test_one_command_makes_phantoms_volumes_and_features(tmp_path, encoder):
    save_slice_encoder(tmp_path / "encoder", encoder)
    flags = "--dataset phantom --train-size 2 --valid-size 1 --shape 24 48 48 --size 16 32 32 --device cpu"
    folders = ("--out", tmp_path / "out", "--slices", tmp_path / "encoder")
    done = script("preprocess.py", *flags.split(), *folders)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out")
    manifest.check(["train", "validation"], slices=True)
    assert manifest.slices["recipe"] == "phantom"


def test_the_command_replaces_features_with_a_flag(done, tmp_path):
    save_slice_encoder(tmp_path / "encoder", tiny_encoder(1))
    command = ["--slices", str(tmp_path / "encoder"), "--out", str(done)]
    command += "--slice-recipe phantom --device cpu".split()
    with pytest.raises(InputError, match="another sha256.*--replace-slices"):
        preprocess.main(command)
    assert preprocess.main([*command, "--replace-slices"]) == 0
    assert load_manifest(done).slices["encoder"] == str(tmp_path / "encoder")


@pytest.fixture
def published(tmp_path) -> dict:
    """HSENet's json as a dictionary, and its files: two volumes for training, one for validation."""
    rng = np.random.default_rng(0)
    values: dict[str, list[dict]] = {"train": [], "validation": []}
    for i, split in enumerate(("train", "train", "validation")):
        name = f"{split}_{i}_a_1"
        volume = rng.random((1, 32, 256, 256), dtype=np.float32)
        np.save(tmp_path / f"{name}.npy", volume if i else volume[0].astype(np.float16))
        features = torch.from_numpy(rng.standard_normal((32, 768), dtype=np.float32))
        if i:
            torch.save(features, tmp_path / f"{name}.pt")
        else:
            np.save(tmp_path / f"{name}_2d.npy", features.numpy())
        text = f"Report {i}."
        (tmp_path / f"{name}.txt").write_text(text + "\n")
        entry = {"image": f"{name}.npy", "text": text if i else f"{name}.txt"}
        values[split].append(
            {**entry, "biomedclip_features": f"{name}.pt" if i else str(tmp_path / f"{name}_2d.npy")}
        )
    return values


def write_json(folder: Path, values) -> Path:
    (folder / "data.json").write_text(json.dumps(values))
    return folder / "data.json"


def test_hsenets_json_is_read_as_it_is(published, tmp_path):
    path = write_json(tmp_path, published)
    manifest = load_manifest(path)
    manifest.check(["train", "validation"], slices=True)
    assert (
        manifest.location == path
        and manifest.recipe.size == (32, 256, 256)
        and manifest.slices["width"] == 768
    )
    assert [e["text"] for e in manifest.entries("train")] == ["Report 0.", "Report 1."]
    assert [e["scan"] for e in manifest.entries("train")] == ["train_0_a", "train_1_a"]
    assert load_manifest(manifest.location).splits == manifest.splits
    first = np.load(tmp_path / "train_0_a_1.npy").astype(np.float32)
    assert torch.equal(read_prepared(manifest, manifest.entries("train")[0])[0], torch.from_numpy(first))
    tokenizer = train_wordpiece(["report"], 40)
    dataset = CTReportDataset(manifest, "train", tokenizer, 16, NO_AUGMENTATION, slices=True)
    batch = dataset.collate([dataset[0, 0], dataset[0, 1]])
    assert batch.volume.shape == (2, 1, 32, 256, 256)
    assert torch.equal(batch.slices[1], torch.load(tmp_path / "train_1_a_1.pt", weights_only=True))
    assert np.array_equal(batch.slices[0].numpy(), np.load(tmp_path / "train_0_a_1_2d.npy"))
    manifest.require_slices({"encoder": "x", "sha256": "1", "slices": 32, "width": 768}, "the run")
    with pytest.raises(InputError, match="another width"):
        manifest.require_slices({"slices": 32, "width": 24}, "the run")


def test_hsenets_json_needs_no_features_for_stage_1(published, tmp_path):
    for entry in (e for entries in published.values() for e in entries):
        del entry["biomedclip_features"]
    manifest = load_manifest(write_json(tmp_path, published))
    manifest.check(["train", "validation"])
    assert manifest.slices is None
    with pytest.raises(
        InputError, match="train_0_a_1 has no slice features; give its entries biomedclip_features"
    ):
        manifest.check(["train"], slices=True)


def test_files_of_hsenets_json_are_checked_when_read(published, tmp_path):
    manifest = load_manifest(write_json(tmp_path, published))
    entry = manifest.entries("train")[1]
    torch.save(torch.zeros(16, 768), tmp_path / "train_1_a_1.pt")
    with pytest.raises(
        InputError, match=r"train_1_a_1.pt: holds torch.float32 \(16, 768\); expected .* \(32, 768\)"
    ):
        read_slices(manifest, entry)
    torch.save({"features": torch.zeros(32, 768)}, tmp_path / "train_1_a_1.pt")
    with pytest.raises(InputError, match="train_1_a_1.pt: holds a dict; expected one tensor"):
        read_slices(manifest, entry)
    for voxels, words in (
        (np.zeros((32, 256, 128), np.float32), "has shape"),
        (np.full((32, 256, 256), -1000, np.float32), r"from -1000.0 to -1000.0; expected a prepared volume"),
        (np.zeros((32, 256, 256), np.int16), "holds int16"),
        (np.full((32, 256, 256), np.nan, np.float32), "NaN"),
    ):
        np.save(tmp_path / "train_1_a_1.npy", voxels)
        with pytest.raises(InputError, match=f"train_1_a_1.npy: .*{words}"):
            read_prepared(manifest, entry)
    np.save(tmp_path / "train_1_a_1.npy", np.ones((32, 256, 256), ">f4"))
    assert read_prepared(manifest, entry).eq(1).all()
    (tmp_path / "train_1_a_1.npy").unlink()
    with pytest.raises(InputError, match="train_1_a_1.npy: no such file; write it again"):
        read_prepared(manifest, entry)
    with pytest.raises(InputError, match="train_1_a_1.npy: is in data.json but absent; correct its path"):
        manifest.check(["train"])


def published_names(folder: Path, names: list[str]) -> list[dict]:
    path = write_json(folder, {"train": [{"image": name, "text": "A report."} for name in names]})
    return load_manifest(path).entries("train")


def test_hsenets_file_names_give_the_volumes_names_and_scans(tmp_path):
    names = [f"/data/train_{i}/train_{i}_a_{k}_3D_features.npy" for i in (1, 2) for k in (1, 2)]
    found = published_names(tmp_path, names)
    assert [e["id"] for e in found] == ["train_1_a_1", "train_1_a_2", "train_2_a_1", "train_2_a_2"]
    assert [e["scan"] for e in found] == ["train_1_a", "train_1_a", "train_2_a", "train_2_a"]
    assert [e["volume"] for e in found] == names


def test_reconstructions_in_folders_of_their_own_are_of_one_scan(tmp_path):
    found = published_names(tmp_path, [f"train_1_a_{k}/train_1_a_{k}.npy" for k in (1, 2)])
    assert [e["scan"] for e in found] == ["train_1_a"] * 2 and [e["id"] for e in found] == [
        "train_1_a_1",
        "train_1_a_2",
    ]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    found = published_names(tmp_path, ["a/image.npy", "b/image.npy", "c/other.npy"])
    assert [e["id"] for e in found] == [e["scan"] for e in found] == ["a/image", "b/image", "other"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(val=v.pop("validation")), "has train, val; expected HSENet's lists"),
        (lambda v: v["train"][0].pop("image"), "train entry 0: image is None"),
        (
            lambda v: v["train"][0].update(image="a.nii.gz"),
            "train entry 0: image is 'a.nii.gz'; expected .*.npy",
        ),
        (lambda v: v["train"][1].pop("text"), "train entry 1 .train_1_a_1.npy.: has no text"),
        (lambda v: v["train"][0].update(text="none.txt"), "none.txt: no such file"),
        (lambda v: v["train"][0].update(biomedclip_features=3), "biomedclip_features is 3"),
        (lambda v: v["validation"].append(v["train"][0]), "image train_0_a_1.npy is listed twice"),
        (lambda v: v.update(train={}), "train is no list"),
    ],
)
def test_a_wrong_json_is_one_line_that_names_it(published, tmp_path, change, words):
    change(published)
    with pytest.raises(InputError, match=words) as caught:
        load_manifest(write_json(tmp_path, published))
    assert "\n" not in str(caught.value)
