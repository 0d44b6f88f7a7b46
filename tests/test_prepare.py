"""preprocess.py as a user meets it: data sets, restart, interrupts, refusals, locks, full disks."""

import csv
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, error_line, script
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.data.sources.nifti import read_nifti_folder
from reaf_hsenet.errors import InputError

SMALL = ("--size", 16, 32, 32)


@pytest.fixture
def tree(phantom_root, tmp_path) -> Path:
    """A copy of the phantom tree that a test may spoil."""
    return shutil.copytree(phantom_root, tmp_path / "tree")


def ct_rate(root, out, *more, **options):
    return script(
        "preprocess.py", "--dataset", "ct-rate", "--root", root, "--out", out, *SMALL, *more, **options
    )


def edit_csv(path: Path, change) -> None:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(change(rows))


def renamed(column: str, name: str):
    """Another name of a column."""
    return lambda rows: [[name if c == column else c for c in rows[0]], *rows[1:]]


def with_value(column: str, value: str):
    """Another value of the first volume."""

    def change(rows):
        place = rows[0].index(column)
        return [rows[0], [*rows[1][:place], value, *rows[1][place + 1 :]], *rows[2:]]

    return change


def volume_path(root: Path, name: str) -> Path:
    return next(root.rglob(f"{name}.nii.gz"))


def refused(out: Path) -> dict[str, str]:
    with open(out / "refused.csv", newline="") as file:
        return {Path(row["file"]).name.removesuffix(".nii.gz"): row["reason"] for row in csv.DictReader(file)}


def test_manifest_holds_what_the_tables_and_files_say(prepared, phantom_root):
    manifest = load_manifest(prepared)
    source = read_ct_rate(phantom_root)
    assert {s: [e["id"] for e in entries] for s, entries in manifest.splits.items()} == {
        s: [c.id for c in cases] for s, cases in source.splits.items()
    }
    entry, case = manifest.splits["train"][0], source.splits["train"][0]
    assert entry["text"] == case.text and tuple(entry["labels"]) == case.labels and len(case.labels) == 18
    assert entry["scan"] == "train_1_a"
    assert entry["source"]["sha256"] == hashlib.sha256(case.path.read_bytes()).hexdigest()
    assert entry["source"]["orientation"] == "LPS" and entry["source"]["rescale"].startswith(
        "auto: HU already"
    )
    volume = np.load(prepared / entry["volume"])
    assert volume.shape == (16, 32, 32) and volume.dtype == np.float16
    assert 0 <= volume.min() < 0.05 and 0.95 < volume.max() <= 1


def test_reconstructions_share_their_scan(prepared):
    entries = [e for split in load_manifest(prepared).splits.values() for e in split]
    assert len({e["scan"] for e in entries}) == 18 < len(entries)
    assert all(e["id"].rsplit("_", 1)[0] == e["scan"] for e in entries)


@pytest.mark.slow
def test_workers_and_order_do_not_change_the_result(tree, tmp_path, prepared):
    done = ct_rate(tree, tmp_path / "out", "--workers", 2)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "out/volumes").iterdir():
        assert path.read_bytes() == (prepared / "volumes" / path.name).read_bytes()
    assert "rescale" in done.stdout and "HU already" in done.stdout


@pytest.mark.slow
def test_second_run_does_only_what_is_missing(tree, tmp_path):
    out = tmp_path / "out"
    assert ct_rate(tree, out).returncode == 0
    manifest = (out / "manifest.json").read_bytes()
    times = {p.name: p.stat().st_mtime_ns for p in (out / "volumes").iterdir()}
    (out / "volumes/train_3_a_1.npy").unlink()
    (out / "volumes/train_4_a_1.npy").write_bytes(b"short")
    assert ct_rate(tree, out).returncode == 0
    changed = {p.name for p in (out / "volumes").iterdir() if times[p.name] != p.stat().st_mtime_ns}
    assert changed == {"train_3_a_1.npy", "train_4_a_1.npy"}
    assert (out / "manifest.json").read_bytes() == manifest


@pytest.mark.slow
def test_a_changed_source_is_prepared_again(tree, tmp_path):
    out = tmp_path / "out"
    ct_rate(tree, out)
    shutil.copy(volume_path(tree, "train_2_a_1"), volume_path(tree, "train_1_a_1"))
    assert ct_rate(tree, out).returncode == 0
    first, second = (np.load(out / f"volumes/train_{i}_a_1.npy") for i in (1, 2))
    assert np.array_equal(first, second)


@pytest.mark.slow
def test_a_corrected_table_prepares_its_volume_again(tree, tmp_path):
    out = tmp_path / "out"
    ct_rate(tree, out)
    times = {p.name: p.stat().st_mtime_ns for p in (out / "volumes").iterdir()}
    edit_csv(tree / "dataset/metadata/train_metadata.csv", with_value("RescaleSlope", "1.5"))
    assert ct_rate(tree, out).returncode == 0
    changed = {p.name for p in (out / "volumes").iterdir() if times[p.name] != p.stat().st_mtime_ns}
    assert changed == {"train_1_a_1.npy"}


@pytest.mark.slow
def test_an_interrupt_leaves_whole_files_only_and_the_next_run_continues(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    flags = "--dataset phantom --train-size 60 --valid-size 4 --size 48 160 160 --workers 2".split()
    command = list(map(str, [sys.executable, ROOT / "preprocess.py", *flags, "--root", raw, "--out", out]))
    for wanted, number in ((130, signal.SIGINT), (143, signal.SIGTERM)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        before = len(list(out.glob("volumes/*.npy")))
        deadline = time.monotonic() + 90
        while len(list(out.glob("volumes/*.npy"))) < before + 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == wanted, errors
        assert "Traceback" not in errors
        volumes = list(out.glob("volumes/*.npy"))
        assert before < len(volumes) < 64
        assert {p.stat().st_size for p in volumes} == {128 + 2 * 48 * 160 * 160}
        assert not (out / "manifest.json").exists()
    times = {p: p.stat().st_mtime_ns for p in volumes}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in volumes} == times
    assert len(load_manifest(out).splits["train"]) == 60 and not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_refused_files_are_listed_named_and_exit_3(tree, tmp_path):
    out = tmp_path / "out"
    volume_path(tree, "train_1_a_1").write_bytes(volume_path(tree, "train_1_a_1").read_bytes()[:5000])
    volume_path(tree, "train_2_a_1").unlink()
    edit_csv(
        tree / "dataset/radiology_text_reports/train_reports.csv",
        lambda rows: [
            r[:3] + ["Not given."] + r[4:] if r[0] == "train_3_a_1.nii.gz" else r
            for r in rows
            if r[0] != "train_4_a_1.nii.gz"
        ],
    )
    done = ct_rate(tree, out)
    assert done.returncode == 3
    reasons = refused(out)
    assert set(reasons) == {"train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1"}
    assert "truncated" in reasons["train_1_a_1"] and "absent" in reasons["train_2_a_1"]
    assert "empty report" in reasons["train_3_a_1"] and "no row in" in reasons["train_4_a_1"]
    assert "train_1_a_1.nii.gz: is truncated" in done.stderr and "Traceback" not in done.stderr
    ids = {e["id"] for e in load_manifest(out).splits["train"]}
    assert ids.isdisjoint(reasons) and len(ids) > 5
    assert ct_rate(tree, out, "--allow-refused").returncode == 0


@pytest.mark.slow
def test_a_missing_spacing_is_refused_only_where_the_header_has_none(tree, tmp_path):
    import nibabel as nib

    blank = volume_path(tree, "train_1_a_1")
    image = nib.load(blank)
    image = nib.Nifti1Image(np.asarray(image.dataobj), None)
    nib.save(image, blank)
    column = {}

    def no_spacing(rows):
        column["z"] = rows[0].index("ZSpacing")
        return [
            [
                *r[: column["z"]],
                "" if r[0].startswith(("train_1_", "train_2_")) else r[column["z"]],
                *r[column["z"] + 1 :],
            ]
            for r in rows
        ]

    edit_csv(tree / "dataset/metadata/train_metadata.csv", no_spacing)
    assert ct_rate(tree, tmp_path / "out").returncode == 3
    assert (
        set(refused(tmp_path / "out")) == {"train_1_a_1"}
        and "spacing" in refused(tmp_path / "out")["train_1_a_1"]
    )


def test_impressions_are_added_when_asked_for(phantom_root):
    plain, both = read_ct_rate(phantom_root), read_ct_rate(phantom_root, impressions=True)
    for one, two in zip(plain.splits["train"], both.splits["train"], strict=True):
        assert two.text.startswith(one.text) and len(two.text) > len(one.text)


def test_fixed_folders_of_version_2_are_read(tree):
    for name in ("train", "valid"):
        (tree / "dataset" / name).rename(tree / "dataset" / f"{name}_fixed")
    cases = read_ct_rate(tree).splits["train"]
    assert all(c.problem is None for c in cases) and "train_fixed" in str(cases[0].path)


REPORTS = "radiology_text_reports/train_reports.csv"
LABELS = "multi_abnormality_labels/train_predicted_labels.csv"
METADATA = "metadata/train_metadata.csv"
WRONG_TABLES = [
    (REPORTS, lambda rows: [r[:3] + r[4:] for r in rows], "train_reports.csv.*no column Findings_EN"),
    (REPORTS, lambda rows: [*rows, rows[1]], "train_1_a_1.nii.gz is listed twice"),
    (REPORTS, lambda rows: [*rows, ["scan7.nii.gz", *rows[1][1:]]], "scan7.nii.gz.*not of CT-RATE's form"),
    (REPORTS, lambda rows: [rows[0], [*rows[1], "and more"]], "line 2 has more fields than the header"),
    (METADATA, renamed("XYSpacing", "Spacing"), "train_metadata.csv.*no column XYSpacing"),
    (METADATA, with_value("RescaleSlope", "abc"), "RescaleSlope of train_1_a_1.nii.gz is 'abc'"),
    (LABELS, lambda rows: [rows[0], [rows[1][0], "yes", *rows[1][2:]]], "train_1_a_1.* is not all 0 and 1"),
]


@pytest.mark.parametrize(("name", "change", "words"), WRONG_TABLES)
def test_a_wrong_table_is_one_line_that_names_it(tree, name, change, words):
    edit_csv(tree / "dataset" / name, change)
    with pytest.raises(InputError, match=words) as caught:
        read_ct_rate(tree)
    assert "\n" not in str(caught.value) and (str(tree) in str(caught.value) or "table" in str(caught.value))


def test_a_folder_without_reports_is_no_ct_rate(tree):
    shutil.rmtree(tree / "dataset/radiology_text_reports")
    with pytest.raises(InputError, match=f"{tree}.*no CT-RATE data set|no CT-RATE data set.*{tree}"):
        read_ct_rate(tree)


@pytest.mark.slow
def test_another_recipe_needs_another_folder(tree, tmp_path):
    assert ct_rate(tree, tmp_path / "out").returncode == 0
    before = (tmp_path / "out/manifest.json").read_bytes()
    done = ct_rate(tree, tmp_path / "out", "--window", -1150, 350)
    assert "another recipe" in error_line(done) and "--out" in error_line(done)
    assert (tmp_path / "out/manifest.json").read_bytes() == before


@pytest.mark.slow
def test_two_runs_into_one_folder_are_refused(tree, tmp_path):
    from reaf_hsenet.files import folder_lock

    with folder_lock(tmp_path / "out"):
        done = ct_rate(tree, tmp_path / "out")
    assert f"process {os.getpid()}" in error_line(done) and "is writing into it" in error_line(done)
    assert ct_rate(tree, tmp_path / "out").returncode == 0


def limit_files_to_20_kb():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_in_one_line_and_loses_nothing(tree, tmp_path, workers):
    flags = ["--dataset", "ct-rate", "--root", tree, "--out", tmp_path / "out", "--workers", workers]
    command = list(map(str, [sys.executable, ROOT / "preprocess.py", *flags, *SMALL]))
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_files_to_20_kb)
    assert "cannot be written" in error_line(done) and "free space" in error_line(done)
    assert not list((tmp_path / "out").rglob("*.npy")) and not list((tmp_path / "out").rglob("*.tmp"))
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def nifti_folder(phantom_root, tmp_path) -> Path:
    folder = tmp_path / "scans"
    (folder / "inner").mkdir(parents=True)
    for i, path in enumerate(sorted(phantom_root.rglob("train_*_1.nii.gz"))[:5]):
        shutil.copy(path, folder / ("inner" if i > 2 else ".") / f"case{i}.nii.gz")
    names = ["case0", "case1.nii.gz", "case2", "inner/case3", "inner/case4.nii.gz"]
    with open(folder / "reports.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((n, f"Report of {n}.") for n in names)])
    return folder


def test_any_nifti_folder_with_a_csv_is_read(nifti_folder, tmp_path):
    done = script(
        "preprocess.py", "--dataset", "nifti", "--root", nifti_folder, "--out", tmp_path / "out", *SMALL
    )
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "out")
    assert len(manifest.splits["train"]) == 4 and len(manifest.splits["validation"]) == 1
    ids = {e["id"] for split in manifest.splits.values() for e in split}
    assert ids == {"case0", "case1", "case2", "inner/case3", "inner/case4"}
    assert (tmp_path / "out/volumes/inner/case4.npy").is_file()


def test_nifti_csv_may_choose_splits_and_scans(nifti_folder):
    edit_csv(
        nifti_folder / "reports.csv",
        lambda rows: [
            ["id", "text", "split", "scan"],
            *([*r, "validation" if i < 2 else "train", f"s{i // 2}"] for i, r in enumerate(rows[1:])),
        ],
    )
    source = read_nifti_folder(nifti_folder, None)
    assert [c.id for c in source.splits["validation"]] == ["case0", "case1"]
    assert {c.scan for c in source.splits["validation"]} == {"s0"}


def test_a_nifti_row_without_text_or_file_is_a_refused_case(nifti_folder):
    edit_csv(nifti_folder / "reports.csv", lambda rows: [*rows[:-1], [rows[-1][0], " "], ["case9", "text"]])
    problems = {
        c.id: c.problem for s in read_nifti_folder(nifti_folder, None).splits.values() for c in s if c.problem
    }
    assert "empty text" in problems["inner/case4"] and "absent" in problems["case9"]
