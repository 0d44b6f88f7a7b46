"""BIMCV-R: paths of volumes and of sessions, the split by order, and wrong tables."""

import csv
import shutil

import numpy as np
import pytest

from conftest import script
from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.sources.bimcv import read_bimcv
from reaf_hsenet.errors import InputError

SESSION = "/raid/x/BIMCV_CT/covid19_posi/sub-S{0}/ses-E{0}/mod-rx"
FILE_1 = "sub-S1_ses-E1_run-1_bp-chest_ct.nii.gz"
HEADER = ("path", "Report_en")


@pytest.fixture
def root(phantom_root, tmp_path):
    """Ten sessions in two folders; session 3 has two volumes."""
    folder = tmp_path / "bimcv"
    volumes = sorted(phantom_root.rglob("train_*_1.nii.gz"))[:10]
    for i, path in enumerate(volumes):
        target = folder / f"CT{i % 2 + 1}" / "ct"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / f"sub-S{i}_ses-E{i}_run-1_bp-chest_ct.nii.gz")
    shutil.copy(volumes[0], folder / "CT1/ct/sub-S3_ses-E3_run-2_bp-chest_ct.nii.gz")
    write(folder, [[SESSION.format(i), f"Report {i}."] for i in range(10)])
    return folder


def write(folder, rows, header=HEADER, encoding="utf-8", end="\n"):
    with open(folder / "reports.csv", "w", newline="", encoding=encoding) as file:
        csv.writer(file, lineterminator=end).writerows([header, *rows])


def test_a_session_gives_its_report_to_all_its_volumes(root):
    cases = {c.id: c for split in read_bimcv(root, None).splits.values() for c in split}
    assert len(cases) == 11 and not any(c.problem for c in cases.values())
    for run, folder in ((1, "CT2"), (2, "CT1")):
        case = cases[f"{folder}/ct/sub-S3_ses-E3_run-{run}_bp-chest_ct"]
        assert (case.text, case.scan) == ("Report 3.", "sub-S3_ses-E3") and case.path.is_file()


def test_the_first_80_percent_of_the_table_are_for_training(root):
    write(root, [[SESSION.format(i), f"Report {i}."] for i in (7, 3, 9, 1, 0, 2, 8, 4, 6, 5)])
    splits = read_bimcv(root, root / "reports.csv").splits
    assert [c.text[7] for c in splits["train"]] == list("733910284")
    assert [c.text[7] for c in splits["validation"]] == list("65")


def test_an_absent_volume_moves_no_other_to_another_split(root):
    before = [c.id for c in read_bimcv(root, None).splits["validation"]]
    next(root.rglob("sub-S1_*")).unlink()
    source = read_bimcv(root, None)
    assert [c.id for c in source.splits["validation"]] == before
    assert [c.problem for c in source.splits["train"] if c.problem] == ["is listed in the table but absent"]


def test_paths_may_be_those_of_volumes(root):
    names = [p.relative_to(root) for p in sorted(root.rglob("*.nii.gz"))]
    rows = [[f"/elsewhere/{name}", f"Report of {name.name}."] for name in names]
    write(root, rows, encoding="utf-8-sig", end="\r\n")
    source = read_bimcv(root, None)
    cases = [c for split in source.splits.values() for c in split]
    assert len(cases) == 11 and all(c.text == f"Report of {c.path.name}." and not c.problem for c in cases)
    assert len(source.splits["train"]) == 8


def test_a_volume_without_row_and_an_empty_report_are_refused_cases(root):
    write(root, [[SESSION.format(i), "  " if i == 2 else "Report."] for i in range(9)])
    problems = {
        c.scan: c.problem for split in read_bimcv(root, None).splits.values() for c in split if c.problem
    }
    assert problems == {
        "sub-S2_ses-E2": "has an empty report in reports.csv",
        "sub-S9_ses-E9": "has no row in reports.csv",
    }


def test_a_repeated_row_is_one_report_and_two_reports_of_one_session_are_refused(root):
    rows = [[SESSION.format(i), f"Report {i}."] for i in range(10)]
    write(root, [rows[0], *rows])
    assert [c.text[7] for c in read_bimcv(root, None).splits["validation"]] == list("89")
    write(root, [*rows, [SESSION.format(4), "Another."]])
    with pytest.raises(
        InputError, match="reports.csv: line 12: sub-S4_ses-E4 has another Report_en than before"
    ):
        read_bimcv(root, None)


def of_rows(*rows, header=HEADER):
    return lambda root: write(root, rows, header)


def two_files_of_one_name(root):
    shutil.copy(root / "CT2/ct" / FILE_1, root / "CT1/ct" / FILE_1)
    write(root, [[f"x/{FILE_1}", "A."]])


def two_tables(root):
    shutil.copy(root / "reports.csv", root / "more.csv")


def no_volumes(root):
    shutil.rmtree(root / "CT1")
    shutil.rmtree(root / "CT2")


BOTH = [[SESSION.format(1), "A."], [f"x/{FILE_1}", "B."]]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (of_rows(["a", "b"], header=("path", "Report")), "no column Report_en; its columns are path, Report"),
        (of_rows(["scans/7", "A."]), "line 2: path 'scans/7' names no .nii.gz file, nor a session"),
        (of_rows(), "reports.csv: has no rows"),
        (of_rows(*BOTH), "has a row of its own and one of its session"),
        (two_files_of_one_name, f"path {FILE_1} may be .*CT1.* or .*CT2"),
        (two_tables, "has 2 csv files; name the one with path and Report_en with --csv"),
        (no_volumes, r"no BIMCV-R data set; expected CT\*/ct/\*.nii.gz below it"),
    ],
)
def test_a_wrong_folder_or_table_is_one_line(root, spoil, words):
    spoil(root)
    with pytest.raises(InputError, match=words) as caught:
        read_bimcv(root, None)
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def test_volumes_are_prepared_on_their_own_grid_as_published(root, tmp_path):
    next(root.rglob("sub-S5_*")).write_bytes(b"no NIfTI file")
    folders = ("--root", root, "--csv", root / "reports.csv", "--out", tmp_path / "out")
    done = script("preprocess.py", "--dataset", "bimcv-r", *folders, "--size", 16, 32, 32)
    assert done.returncode == 3 and "sub-S5_ses-E5_run-1_bp-chest_ct.nii.gz" in done.stderr, done.stderr
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.dataset, manifest.recipe.spacing, manifest.recipe.window) == (
        "bimcv-r",
        None,
        RECIPES["hsenet"].window,
    )
    entries = manifest.entries("train")
    assert len(entries) == 8 and all("HU already" in e["source"]["rescale"] for e in entries)
    volume = np.load(tmp_path / "out" / entries[0]["volume"])
    assert volume.shape == (16, 32, 32) and 0 <= volume.min() < 0.05 and 0.95 < volume.max() <= 1
    manifest.check(["train", "validation"])


def test_a_chosen_spacing_or_recipe_is_changeable(root, tmp_path):
    for more, spacing in (
        (("--spacing", 3, 2, 2), (3.0, 2.0, 2.0)),
        (("--recipe", "reaf"), RECIPES["reaf"].spacing),
    ):
        out = tmp_path / more[0]
        done = script("preprocess.py", "--dataset", "bimcv-r", "--root", root, "--out", out, "--as-is", *more)
        assert done.returncode == 0, done.stderr
        assert load_manifest(out).recipe.spacing == spacing
