"""REAF's published data as they are: folders, reports json, .pt volumes, and manifests of source files."""

import csv
import gzip
import json
import shutil
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from conftest import error_line, script
from reaf_hsenet import pickles
from reaf_hsenet.config import NO_AUGMENTATION, RECIPES
from reaf_hsenet.data.loader import CTReportDataset, read_prepared
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.prepare import Options, list_as_is, prepare
from reaf_hsenet.data.preprocessing import preprocess, resampled_grid
from reaf_hsenet.data.reading import Reading, read_input
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.data.sources.nifti import read_nifti_folder
from reaf_hsenet.data.sources.reaf_dataset import read_reaf
from reaf_hsenet.data.volume import read_volume
from reaf_hsenet.data.workers import batches, make_loader
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece

SMALL = ("--size", 24, 48, 64)
RECIPE = replace(
    RECIPES["reaf"], size=(24, 48, 64)
)  # pads depth and width of a small_ct and crops its height


def small_ct(phantom: Path, path: Path) -> Path:
    """The phantom as if of a small animal, so that its 3 x 1 x 1 mm grid is 20 x 57 x 57."""
    image = nib.load(phantom)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([-1.2, -1.2, 2.5, 1.0])), path)
    return path


def resampled_hu(path: Path) -> torch.Tensor:
    """What the published preparation saves: float32 HU at 3 x 1 x 1 mm."""
    grid = resampled_grid(read_volume(path), RECIPE)
    return torch.from_numpy(grid.at(*map(np.arange, grid.shape)))


def save_gz(tensor, path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        torch.save(tensor, file)


def talk(image: str, *turns: str) -> dict:
    """An entry whose turns alternate between human and gpt."""
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"image": image, "conversations": said}


def write_reports(path: Path, entries: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))


@pytest.fixture(scope="session")
def published(phantom_root, tmp_path_factory) -> Path:
    """Nine phantoms in REAF's layout: per split one .pt, one .pt.gz and one .nii.gz."""
    root = tmp_path_factory.mktemp("reaf") / "ct_rate"
    source = read_ct_rate(phantom_root)
    picked = {
        "train": source.splits["train"][:3],
        "val": source.splits["validation"][:3],
        "test": source.splits["validation"][3:6],
    }
    for split, cases in picked.items():
        volumes = root / split / "volumes"
        (volumes / "inner").mkdir(parents=True)
        small = [small_ct(c.path, root / c.path.name) for c in cases]
        torch.save(resampled_hu(small[0]), volumes / f"{cases[0].id}.pt")
        save_gz(resampled_hu(small[1])[None], volumes / "inner" / f"{cases[1].id}.pt.gz")
        small[2].rename(volumes / small[2].name)
        write_reports(
            root / split / "reports/conversations.json",
            [talk(f"{c.id}.nii.gz", "What is seen?", c.text) for c in cases],
        )
    return root


@pytest.fixture
def tree(published, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(published, tmp_path / "ct_rate")


def reaf(root, out, *more):
    return script("preprocess.py", "--dataset", "reaf", "--root", root, "--out", out, *SMALL, *more)


def listed(root: Path, out: Path) -> Manifest:
    """What preprocess.py --as-is writes, read back."""
    list_as_is(read_reaf(root), out, Options(RECIPE))
    return load_manifest(out)


def train_cases(root: Path) -> dict:
    return {c.id: c for c in read_reaf(root).splits["train"]}


def test_the_published_layout_is_read_with_splits_texts_and_scans(published, phantom_root):
    texts = {c.id: c.text for cases in read_ct_rate(phantom_root).splits.values() for c in cases}
    source = read_reaf(published)
    assert list(source.splits) == ["train", "validation", "test"]
    for cases in source.splits.values():
        assert len(cases) == 3 and all(c.problem is None and c.labels is None for c in cases)
        assert {c.path.suffixes[-1] for c in cases} == {".pt", ".gz"} and all(c.path.is_file() for c in cases)
        for case in cases:
            base = case.id.removeprefix("inner/")
            assert case.text == texts[base] and case.scan == case.id.rsplit("_", 1)[0]
        assert sum(c.id.startswith("inner/") for c in cases) == 1


def test_the_validation_folder_may_be_called_valid(tree):
    (tree / "val").rename(tree / "valid")
    assert len(read_reaf(tree).splits["validation"]) == 3
    (tree / "val/volumes").mkdir(parents=True)
    with pytest.raises(InputError, match="has both val and valid"):
        read_reaf(tree)


def test_of_several_conversations_the_marked_one_is_the_report(tree):
    ids = [c.id for c in read_reaf(tree).splits["train"]]
    write_reports(
        tree / "train/reports/conversations.json",
        [
            talk(ids[0], "Is there a nodule?", "No.", "Describe. <report_generation>", "The first report."),
            talk(f"{ids[0]}.nii.gz", "Where?", "Left lobe."),
            {**talk(ids[1], "Write it.", "The second report."), "type": "report_generation"},
            talk(ids[1], "Size?", "8 mm"),
            talk(ids[2], "<report_generation>", "The third report."),
            talk(ids[2], "Again <report_generation>", "The third report."),
        ],
    )
    assert [c.text for c in read_reaf(tree).splits["train"]] == [
        "The first report.",
        "The second report.",
        "The third report.",
    ]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([talk("{id}", "a", "one"), talk("{id}", "b", "two")], "image {id} has 2 answers, none .*marked"),
        (
            [talk("{id}", "<report_generation>", "one"), talk("{id}", "<report_generation>", "two")],
            "image {id} has 2 answers; expected one report",
        ),
        ([talk("{id}", "a")], "image {id} has no answers"),
        ([{"conversations": []}], "entry 0: has no image"),
        (
            [{"image": "{id}", "conversations": [{"from": "doctor", "value": "x"}]}],
            "entry 0 .{id}.: its conversations",
        ),
        ([{"image": "{id}"}], "its conversations are no list"),
        ({"image": "{id}"}, "holds no list"),
    ],
)
def test_an_unclear_reports_json_is_refused_with_image_and_file(tree, entries, words):
    name = read_reaf(tree).splits["train"][0].id
    path = tree / "train/reports/conversations.json"
    path.write_text(json.dumps(entries).replace("{id}", name))
    with pytest.raises(InputError, match=words.replace("{id}", name)) as caught:
        read_reaf(tree)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_reports_file_that_is_absent_or_no_json_is_named(tree):
    path = tree / "train/reports/conversations.json"
    path.write_text("[{")
    with pytest.raises(InputError, match="conversations.json: is not valid JSON"):
        read_reaf(tree)
    path.unlink()
    with pytest.raises(InputError, match="train/reports: has no .json file"):
        read_reaf(tree)
    with pytest.raises(InputError, match="no REAF data set; expected train/volumes"):
        read_reaf(tree / "val")


def test_an_image_is_found_by_path_or_unique_name_and_a_doubtful_one_is_refused(tree):
    volumes = tree / "train/volumes"
    (volumes / "a").mkdir()
    (volumes / "b").mkdir()
    one = next(volumes.glob("*.pt"))
    for folder in "ab":
        shutil.copy(one, volumes / folder / "case.pt")
    path = tree / "train/reports/conversations.json"
    entries = json.loads(path.read_text())
    write_reports(path, [*entries, talk("a/case", "x", "Report a."), talk("b/case.nii.gz", "x", "Report b.")])
    cases = train_cases(tree)
    assert cases["a/case"].text == "Report a." and cases["b/case"].text == "Report b."
    assert cases["a/case"].scan == "a/case"
    write_reports(path, [*entries, talk("case.pt", "x", "y")])
    with pytest.raises(InputError, match="image case.pt may be a/case or b/case"):
        read_reaf(tree)


def test_one_volume_in_several_formats_is_one_case_read_from_the_fastest(tree):
    path = next((tree / "train/volumes").glob("*.pt"))
    tensor = torch.load(path, weights_only=True)
    save_gz(tensor, path.with_name(f"{path.name}.gz"))
    path.with_suffix(".nii.gz").write_bytes(b"")
    cases = train_cases(tree)
    assert len(cases) == 3 and cases[path.stem].path == path
    path.unlink()
    assert train_cases(tree)[path.stem].path.name == f"{path.name}.gz"


def test_links_to_folders_are_followed(tree, tmp_path):
    (tree / "train/volumes/inner").rename(tmp_path / "elsewhere")
    (tree / "train/volumes/inner").symlink_to(tmp_path / "elsewhere")
    assert all(c.problem is None for c in train_cases(tree).values())


def test_a_volume_without_report_and_a_report_without_volume_are_refused_cases(tree):
    path = tree / "train/reports/conversations.json"
    first, second, third = json.loads(path.read_text())
    second["conversations"][1]["value"] = " "
    write_reports(path, [second, third, talk("train_99_a_1.nii.gz", "x", "A report.")])
    problems = {name: c.problem for name, c in train_cases(tree).items()}
    assert "has no report in" in problems[first["image"].removesuffix(".nii.gz")]
    assert "absent" in problems["train_99_a_1"] and problems[third["image"].removesuffix(".nii.gz")] is None
    assert (
        "empty report in conversations.json" in problems["inner/" + second["image"].removesuffix(".nii.gz")]
    )


@pytest.mark.parametrize("place", ["train/labels.csv", "train_predicted_labels.csv"])
def test_labels_beside_the_data_are_read(tree, place):
    names = [c.id.removeprefix("inner/") for c in read_reaf(tree).splits["train"]]
    with open(tree / place, "w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("VolumeName", "Effusion", "Nodule"),
                (f"{names[0]}.nii.gz", 1, 0),
                (f"{names[1]}.nii.gz", "0.0", "1.0"),
            ]
        )
    source = read_reaf(tree)
    assert source.label_names == ("Effusion", "Nodule")
    assert [c.labels for c in source.splits["train"]] == [(1, 0), (0, 1), None]
    other = tree / "val/labels.csv"
    other.write_text("VolumeName,Nodule\nx.nii.gz,1\n")
    with pytest.raises(InputError, match="val/labels.csv: its columns differ from those of"):
        read_reaf(tree)


@pytest.fixture(scope="session")
def nifti(phantom_root, tmp_path_factory) -> Path:
    return small_ct(
        next(phantom_root.rglob("train_1_a_1.nii.gz")), tmp_path_factory.mktemp("ct") / "a.nii.gz"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_pt_file_of_resampled_hu_gives_the_input_of_its_nifti_file(nifti, tmp_path, dtype):
    for size in ((24, 48, 64), (16, 60, 20)):
        recipe = replace(RECIPE, size=size)
        torch.save(resampled_hu(nifti).to(dtype), tmp_path / "x.pt")
        save_gz(resampled_hu(nifti).to(dtype)[None, None], tmp_path / "x.pt.gz")
        expected = preprocess(read_volume(nifti), recipe)
        for name in ("x.pt", "x.pt.gz"):
            found, record = read_input(tmp_path / name, recipe)
            assert found.dtype == np.float32 and found.shape == expected.shape == (1, *size)
            assert np.abs(found - expected).max() < (2e-3 if dtype == torch.float16 else 1e-5)
            assert record["rescale"].startswith("auto: HU already") and record["orientation"] == "SPL"


def test_a_pt_file_may_be_prepared_with_another_recipe(nifti, tmp_path):
    hu = resampled_hu(nifti)
    torch.save(hu, tmp_path / "x.pt")
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(hu.numpy().transpose(2, 1, 0), affine), tmp_path / "y.nii")
    recipe = replace(RECIPES["hsenet"], size=(16, 32, 32))
    assert np.array_equal(*(read_input(tmp_path / n, recipe)[0] for n in ("x.pt", "y.nii")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_finished_input_is_taken_as_it_is(nifti, tmp_path, dtype):
    tensor = torch.from_numpy(preprocess(read_volume(nifti), RECIPE)).to(dtype)
    torch.save(tensor, tmp_path / "x.pt")
    found, record = read_input(tmp_path / "x.pt", RECIPE)
    assert np.array_equal(found, tensor.float().numpy()) and found.min() < -1.98
    assert record["rescale"] == "none: the network's finished input"


def test_reading_a_tensor_leaves_it_unchanged(nifti, tmp_path, monkeypatch):
    hu = resampled_hu(nifti)
    before = hu.clone()
    monkeypatch.setattr(pickles, "load_pickle", lambda *a, **k: hu)
    for size in (RECIPE.size, (24, 60, 64)):  # the second holds all of it, without a crop
        read_input(tmp_path / "x.pt", replace(RECIPE, size=size))
        assert torch.equal(hu, before)


class Payload:
    def __reduce__(self):
        return print, ("unpickled",)


def with_nan(hu):
    hu[3, 3, 3] = float("nan")
    return hu


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda hu: {"image": hu}, "holds a dict; expected one tensor"),
        (lambda hu: OrderedDict(a=hu), "holds a OrderedDict; expected one tensor"),
        (lambda hu: [hu, hu], "holds a list; expected one tensor"),
        (lambda hu: hu.numpy(), "holds more than tensors .*, which is not loaded"),
        (lambda hu: Payload(), "holds more than tensors .print., which is not loaded"),
        (lambda hu: hu[0], "holds a tensor of shape"),
        (
            lambda hu: hu[None].repeat(2, 1, 1, 1),
            "holds a tensor of shape .*2, 20, 57, 57.*expected one volume",
        ),
        (lambda hu: hu[:0], "holds a tensor of shape"),
        (lambda hu: hu > 0, "holds a torch.bool tensor; expected real numbers"),
        (lambda hu: hu.to_sparse(), "it is a sparse, quantised, nested or empty tensor"),
        (with_nan, "voxels are NaN or infinite"),
        (lambda hu: hu.clamp(0, 0), "every voxel is 0; .*values run from 0 to 0"),
        (
            lambda hu: (hu + 1150) / 1500,
            "not HU.*its values run from .*a finished input is 24x48x64 from -1.987 to",
        ),
        (lambda hu: (hu > 0).to(torch.int16), "like a mask"),
        (lambda hu: hu + 1024, "not HU"),
    ],
)
def test_a_wrong_pt_file_is_refused_in_one_line_with_its_name(nifti, tmp_path, make, words, capsys):
    torch.save(make(resampled_hu(nifti)), tmp_path / "x.pt")
    with pytest.raises(InputError, match=words) as caught:
        read_input(tmp_path / "x.pt", RECIPE)
    assert str(caught.value).startswith(f"{tmp_path / 'x.pt'}: ") and "\n" not in str(caught.value)
    assert "unpickled" not in capsys.readouterr().out


def test_the_finished_range_counts_only_at_the_recipes_size(nifti, tmp_path):
    torch.save(torch.from_numpy(preprocess(read_volume(nifti), RECIPE))[:, :-1], tmp_path / "x.pt")
    with pytest.raises(InputError, match="not HU"):
        read_input(tmp_path / "x.pt", RECIPE)


def test_a_damaged_file_is_refused_in_one_line_with_its_name(nifti, tmp_path):
    whole, zipped = tmp_path / "a.pt", tmp_path / "a.pt.gz"
    torch.save(resampled_hu(nifti), whole)
    save_gz(resampled_hu(nifti), zipped)
    flipped = bytearray(zipped.read_bytes())
    flipped[-6] ^= 1  # within the CRC: only reading to the end finds it
    for name, content in (
        ("t.pt", whole.read_bytes()[:3000]),
        ("t.pt.gz", zipped.read_bytes()[:3000]),
        ("e.pt", b""),
        ("e.pt.gz", b""),
        ("c.pt.gz", bytes(flipped)),
        ("n.pt.gz", whole.read_bytes()),
        ("g.pt", b"not a tensor"),
        ("absent.pt", None),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match="truncated or damaged|not unpickled|no such file") as caught:
            read_input(path, RECIPE)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
    with pytest.raises(
        InputError, match="x.mha: expected a file that ends in .npy, .pt, .pt.gz, .nii.gz, .nii"
    ):
        read_input(tmp_path / "x.mha", RECIPE)


def entries(manifest) -> list[dict]:
    return [e for split in manifest.splits.values() for e in split]


@pytest.mark.slow
def test_preprocess_writes_reafs_volumes_once(published, tmp_path):
    out = tmp_path / "out"
    done = reaf(published, out)
    assert done.returncode == 0, done.stderr
    assert "3 train, 3 validation, 3 test volumes of (24, 48, 64), reaf" in done.stdout
    manifest = load_manifest(out)
    assert manifest.recipe == RECIPE and manifest.dataset == "reaf" and manifest.text == "report"
    manifest.check(["train", "validation", "test"])
    for entry in entries(manifest):
        expected = read_input(Path(entry["source"]["file"]), RECIPE)[0]
        assert np.load(out / entry["volume"]).dtype == np.float16 and entry["source"]["rescale"].startswith(
            "auto: HU"
        )
        assert np.abs(read_prepared(manifest, entry).numpy() - expected).max() < 2e-3
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*.npy")}
    assert len(times) == 9
    text = (out / "manifest.json").read_bytes()
    assert reaf(published, out).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.npy")} == times
    assert (out / "manifest.json").read_bytes() == text


@pytest.mark.slow
def test_a_bad_pt_file_is_refused_by_preprocessing_and_named_in_training(tree, tmp_path):
    bad = next((tree / "train/volumes").glob("*.pt"))
    torch.save({"hu": 1}, bad)
    done = reaf(tree, tmp_path / "out")
    assert done.returncode == 3 and f"{bad}: holds a dict" in done.stderr
    assert len(load_manifest(tmp_path / "out").splits["train"]) == 2
    manifest = listed(tree, tmp_path / "as-is")
    manifest.check(["train"])
    dataset = dataset_of(manifest)
    for workers in (0, 2):
        with pytest.raises(InputError, match=f"{bad.name}: holds a dict"):
            list(batches(make_loader(dataset, GlobalBatches(3, 3, 0, 1, 0), workers), torch.device("cpu")))


def dataset_of(manifest, split="train") -> CTReportDataset:
    tokenizer = train_wordpiece([e["text"] for e in manifest.entries(split)], 200)
    return CTReportDataset(manifest, split, tokenizer, 32, NO_AUGMENTATION)


@pytest.mark.slow
def test_as_is_writes_a_manifest_and_nothing_else(published, tmp_path):
    out = tmp_path / "out"
    done = reaf(published, out, "--as-is")
    assert done.returncode == 0, done.stderr
    assert "9 volumes: decided when read" in done.stdout
    assert {p.name for p in out.iterdir()} == {"manifest.json", "refused.csv", ".lock"}
    manifest = load_manifest(out)
    manifest.check(["train", "validation", "test"])
    for entry in entries(manifest):
        expected = read_input(Path(entry["source"]["file"]), RECIPE)[0]
        assert np.array_equal(read_prepared(manifest, entry).numpy(), expected)
    text = (out / "manifest.json").read_bytes()
    assert reaf(published, out, "--as-is").returncode == 0 and (out / "manifest.json").read_bytes() == text


def test_an_as_is_manifest_is_not_written_over_prepared_volumes(published, tmp_path):
    prepare(read_reaf(published), tmp_path / "out", Options(RECIPE), progress=False)
    assert "choose another --out" in error_line(reaf(published, tmp_path / "out", "--as-is"))
    assert load_manifest(tmp_path / "out").splits["train"][0]["volume"].endswith(".npy")


def raw_copy(phantom_root: Path, folder: Path) -> Path:
    """The tree with one volume as CT-RATE's first version stores it: raw values, blank header, spacing in
    the table.
    """
    tree = shutil.copytree(phantom_root, folder)
    path = next(tree.rglob("train_1_a_1.nii.gz"))
    image = nib.load(path)
    raw = nib.Nifti1Image(np.asarray(image.dataobj, dtype=np.float32) + 1024, None)
    raw.set_sform(None, 0)
    raw.set_qform(None, 0)
    nib.save(raw, path)
    return tree


def test_ct_rate_as_is_keeps_the_table_and_the_orientation_of_blank_headers(phantom_root, tmp_path):
    """Both ways of using the same files give the same numbers, up to float16."""
    tree = raw_copy(phantom_root, tmp_path / "tree")
    metadata = tree / "dataset/metadata/train_metadata.csv"
    rows = list(csv.DictReader(open(metadata)))
    rows[0].update(RescaleSlope="1", RescaleIntercept="-1024")
    rows[1]["ZSpacing"] = ""  # becomes NaN, which JSON has not; this volume's header has its spacing
    with open(metadata, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    made = {}
    for name, make in (("prepared", partial(prepare, progress=False)), ("as-is", list_as_is)):
        make(read_ct_rate(tree), tmp_path / name, Options(RECIPE))
        made[name] = load_manifest(tmp_path / name)
    assert made["as-is"].reading == Reading(assume_orientation="LPS")
    for one, two in zip(*(m.splits["train"][:3] for m in made.values()), strict=True):
        assert (one["id"], one["scan"], one["text"], one["labels"]) == (
            two["id"],
            two["scan"],
            two["text"],
            two["labels"],
        )
        difference = read_prepared(made["prepared"], one) - read_prepared(made["as-is"], two)
        assert difference.abs().max() < 2e-3
    assert made["prepared"].splits["train"][0]["source"]["rescale"].startswith("auto: raw values")


def test_a_nifti_folder_as_is_keeps_its_reading_options(nifti, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(nifti, folder / "a.nii.gz")
    (folder / "reports.csv").write_text("id,text\na,A report.\n")
    made = {}
    for name in ("header", "stored"):
        list_as_is(read_nifti_folder(folder, None), tmp_path / name, Options(RECIPE, Reading("header", name)))
        made[name] = load_manifest(tmp_path / name)
        assert made[name].reading == Reading("header", name)
    turned = nib.load(nifti)
    nib.save(turned.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]])), folder / "a.nii.gz")
    one, two = (read_prepared(m, entries(m)[0]).numpy() for m in made.values())
    assert np.array_equal(one, preprocess(read_volume(nifti), RECIPE)) and not np.array_equal(one, two)


def mixed_manifest(published: Path, folder: Path) -> Path:
    """A prepared folder's manifest whose train split has .npy, .pt, .pt.gz and .nii.gz entries."""
    prepare(read_reaf(published), folder, Options(RECIPE), progress=False)
    listed(published, folder.with_name("as-is"))
    values, other = (
        json.loads((f / "manifest.json").read_text()) for f in (folder, folder.with_name("as-is"))
    )
    values["splits"]["train"][1:] = [*other["splits"]["train"][1:], *other["splits"]["test"][:1]]
    values["splits"].pop("test")
    (folder / "manifest.json").write_text(json.dumps(values))
    return folder


def test_formats_may_stand_side_by_side_in_one_manifest(published, tmp_path):
    manifest = load_manifest(mixed_manifest(published, tmp_path / "mixed"))
    kinds = [Path(e["volume"]).name.partition(".")[2] for e in manifest.entries("train")]
    assert sorted(kinds) == ["nii.gz", "npy", "pt", "pt.gz"]
    manifest.check(["train", "validation"])
    dataset = dataset_of(manifest)
    for workers in (0, 2):
        (batch,) = batches(make_loader(dataset, GlobalBatches(4, 4, 0, 1, 0), workers), torch.device("cpu"))
        assert batch.volume.shape == (4, 1, 24, 48, 64) and batch.volume.dtype == torch.float32
        for row, volume in zip(batch.index, batch.volume, strict=True):
            expected = read_input(Path(manifest.entries("train")[row]["source"]["file"]), RECIPE)[0]
            assert np.abs(volume.numpy() - expected).max() < 2e-3


def test_the_check_names_an_absent_source_file(tree, tmp_path):
    manifest = listed(tree, tmp_path / "out")
    gone = next((tree / "train/volumes").glob("*.pt"))
    gone.unlink()
    with pytest.raises(InputError, match=f"{gone.name}: is in the manifest but absent"):
        manifest.check(["train"])


def test_the_published_layout_is_a_manifest_without_any_preparation(published):
    manifest = load_manifest(published)
    assert manifest.recipe == RECIPES["reaf"] and set(manifest.splits) == {"train", "validation", "test"}
    manifest.check(["train", "validation", "test"])
    assert len(manifest.entries("test")) == 3 and not (published / "manifest.json").exists()
    assert not Path(manifest.entries("train")[0]["volume"]).is_absolute()
    small = replace(manifest, recipe=RECIPE)
    entry = small.entries("train")[1]
    expected = read_input(published / entry["volume"], RECIPE)[0]
    assert np.array_equal(read_prepared(small, entry).numpy(), expected)
    with pytest.raises(InputError, match=f"^{published}: its volumes have size 112x336x336, but"):
        manifest.require(RECIPE, "a test")


def test_a_published_layout_with_gaps_names_the_first_and_the_remedy(tree, tmp_path):
    next((tree / "train/volumes").glob("*.pt")).unlink()
    with pytest.raises(InputError, match="absent; 1 volumes of .* --dataset reaf .*--as-is") as caught:
        load_manifest(tree)
    assert "\n" not in str(caught.value)
    assert reaf(tree, tmp_path / "out", "--as-is").returncode == 3
    assert len(load_manifest(tmp_path / "out").entries("train")) == 2


def test_one_id_in_two_splits_is_refused(tree):
    path = next((tree / "train/volumes").glob("*.pt"))
    shutil.copy(path, tree / "test/volumes")
    with pytest.raises(InputError, match=f"id {path.stem} is in two splits"):
        load_manifest(tree)
