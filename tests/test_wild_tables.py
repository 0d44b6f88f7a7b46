"""Tables and names as people have them: no row is swallowed, no label or report goes to another volume,
none leaves its folder.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from reaf_hsenet.data.labels import read_label_table
from reaf_hsenet.data.sources.bimcv import read_bimcv
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.data.sources.datasets import Case, Source
from reaf_hsenet.data.sources.hsenet_json import read_hsenet_json
from reaf_hsenet.data.sources.nifti import read_nifti_folder
from reaf_hsenet.data.sources.radgenome import read_questions
from reaf_hsenet.data.sources.reaf_dataset import read_reaf
from reaf_hsenet.data.sources.tables import Volumes, csv_rows, given
from reaf_hsenet.errors import InputError
from scans import table


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def ct_rate(root: Path, split: str, names: list[str], header: str = "", labels: tuple[str, ...] = ()) -> Path:
    """A CT-RATE tree of empty files; labels: rows behind the names."""
    base, long = root / "dataset", "validation" if split == "valid" else split
    for name in names:
        parts = name.split("_")
        touch(base / split / "_".join(parts[:2]) / "_".join(parts[:3]) / f"{name}.nii.gz")
    rows = [f"{name}.nii.gz,Findings of {name}.,None." for name in names]
    table(
        base / "radiology_text_reports" / f"{long}_reports.csv",
        "VolumeName,Findings_EN,Impressions_EN",
        *rows,
    )
    if header:
        lines = [f"{name}.nii.gz,{row}" for name, row in zip(names, labels, strict=True)]
        table(
            base / "multi_abnormality_labels" / f"{split}_predicted_labels.csv",
            f"VolumeName,{header}",
            *lines,
        )
    return base


UNBALANCED = {
    "a closing quote is missing": [
        'a,"Clear lungs.”,train',
        "b,Large effusion.,train",
        'c,"Fracture.",train',
        "d,Normal.,train",
    ],
    "it is missing to the end": [
        'a,"Clear lungs.,train',
        "b,Large effusion.,train",
        "c,Fracture.,train",
        "d,Normal.,train",
    ],
    "an inch mark closes it": [
        'a,"Clear lungs.,train',
        'b,A nodule of 6",train',
        "c,Fracture.,train",
        "d,Normal.,train",
    ],
    "a quote stands inside": [
        'a,"A 6" nodule.",train',
        "b,Large effusion.,train",
        "c,Fracture.,train",
        "d,Normal.,train",
    ],
}


@pytest.mark.parametrize("rows", UNBALANCED.values(), ids=UNBALANCED)
def test_a_table_whose_quotes_do_not_balance_is_refused_with_its_lines(tmp_path, rows):
    touch(*(tmp_path / f"{name}.nii.gz" for name in "abcd"))
    path = table(tmp_path / "r.csv", "id,text,split", *rows)
    with pytest.raises(InputError, match=r"r\.csv: lines? 2.*(quotes do not balance|runs over the row of b)"):
        read_nifti_folder(tmp_path, path)


@pytest.mark.parametrize(
    "text",
    [
        '"Two lines:\nlungs, clear"',
        '"A ""6 mm"" nodule,\nunchanged"',
        '6" nodule',
        "'quoted'",
        '"Findings:\n' + 300 * "x" + ', end."',
    ],
)
def test_texts_of_several_lines_and_with_quotes_are_read_whole(tmp_path, text):
    touch(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    path = table(tmp_path / "r.csv", "id,text,split", f"a,{text},train", "b,Normal.,train")
    cases = read_nifti_folder(tmp_path, path).by_id()
    plain = text[1:-1].replace('""', '"') if text.startswith('"') else text
    assert {i: c.text for i, c in cases.items()} == {"a": plain, "b": "Normal."}


def test_every_reader_of_tables_refuses_an_open_quote(tmp_path):
    base = ct_rate(tmp_path / "ct", "train", ["train_1_a_1", "train_2_a_1"], "Cyst", ("0", "1"))
    reports = base / "radiology_text_reports" / "train_reports.csv"
    good = reports.read_text()
    reports.write_text(good.replace("Findings of train_1_a_1.", '"Findings of train_1_a_1.'))
    with pytest.raises(InputError, match="train_reports.csv: lines 2 to"):
        read_ct_rate(tmp_path / "ct")
    # This one balances: the second row's inch mark closes the first row's text.
    swallowed = good.replace(",Findings of train_1", ',"Findings of train_1').replace(
        "train_2_a_1.,None", 'train_2_a_1, 6",None'
    )
    reports.write_text(swallowed)
    with pytest.raises(
        InputError,
        match="train_reports.csv: lines 2 to 3: a quoted text runs over the row of train_2_a_1.nii.gz",
    ):
        read_ct_rate(tmp_path / "ct")
    reports.write_text(good)
    labels = base / "multi_abnormality_labels" / "train_predicted_labels.csv"
    labels.write_text('VolumeName,Cyst\n"train_1_a_1.nii.gz,0\ntrain_2_a_1.nii.gz,1\n')
    for read in (lambda: read_ct_rate(tmp_path / "ct"), lambda: read_label_table(labels)):
        with pytest.raises(InputError, match="train_predicted_labels.csv: lines 2 to"):
            read()
    touch(tmp_path / "b/CT1/ct/sub-S1_ses-E1_x.nii.gz", tmp_path / "b/CT1/ct/sub-S2_ses-E1_x.nii.gz")
    table(
        tmp_path / "b/r.csv",
        "path,Report_en",
        '/a/sub-S1/ses-E1/mod-rx,"Clear.',
        '/a/sub-S2/ses-E1/mod-rx,A nodule of 6"',
    )
    with pytest.raises(InputError, match="r.csv: lines 2 to 3: a quoted text runs over the row of /a/sub-S2"):
        read_bimcv(tmp_path / "b", None)


def test_ct_rates_labels_are_taken_by_name_in_whichever_order_a_table_has_them(tmp_path):
    ct_rate(tmp_path, "train", ["train_1_a_1"], "Cyst,Nodule,Effusion", ("1,0,0",))
    ct_rate(tmp_path, "valid", ["valid_1_a_1"], "Effusion,Cyst,Nodule", ("0,0,1",))
    source = read_ct_rate(tmp_path)
    named = {i: dict(zip(source.label_names, c.labels, strict=True)) for i, c in source.by_id().items()}
    assert named == {
        "train_1_a_1": {"Cyst": 1, "Nodule": 0, "Effusion": 0},
        "valid_1_a_1": {"Cyst": 0, "Nodule": 1, "Effusion": 0},
    }


def test_ct_rates_tables_of_other_labels_are_refused_with_both_names(tmp_path):
    ct_rate(tmp_path, "train", ["train_1_a_1"], "Cyst,Nodule", ("1,0",))
    ct_rate(tmp_path, "valid", ["valid_1_a_1"], "Cyst,Mass", ("0,0",))
    with pytest.raises(
        InputError,
        match="valid_predicted_labels.csv: its columns differ from those of .*train_predicted_labels.csv",
    ):
        read_ct_rate(tmp_path)


def test_a_path_means_the_volume_that_it_ends_in():
    volumes = Volumes(["s1/ct", "s2/ct", "deep/s3/ct", "flat", "x/twin", "y/twin"])
    for path, volume in {
        "s1/ct": "s1/ct",
        "./s1//ct": "s1/ct",
        "/data/x/s2/ct": "s2/ct",
        "s3/ct": "deep/s3/ct",
        "flat": "flat",
        "/any/where/flat": None,
        "s9/ct": None,
        "s1/other": None,
        "1/ct": None,
        "z/twin": None,
        "": None,
    }.items():
        assert volumes.find(path, "x") == volume, path
    for path in ("ct", "twin"):
        with pytest.raises(InputError, match=f"r.json: image {path} may be"):
            volumes.find(path, f"r.json: image {path}")


def reaf(root: Path, volumes: list[str], reports: dict[str, str]) -> Path:
    touch(*(root / "train/volumes" / name for name in volumes))
    turns = [
        {
            "image": image,
            "conversations": [
                {"from": "human", "value": "<report_generation>"},
                {"from": "gpt", "value": text},
            ],
        }
        for image, text in reports.items()
    ]
    table(root / "train/reports/r.json", json.dumps(turns))
    return root


def test_a_report_never_goes_to_another_patients_file_of_the_same_name(tmp_path):
    root = reaf(tmp_path, ["s0001/ct.nii.gz"], {"s0002/ct.nii.gz": "Of s0002."})
    cases = read_reaf(root).by_id()
    assert {i: (c.text, c.problem and c.problem.split(" in ")[0]) for i, c in cases.items()} == {
        "s0002/ct": ("Of s0002.", "is listed"),
        "s0001/ct": ("", "has no report"),
    }


def test_labels_never_go_to_another_patients_file_of_the_same_name(tmp_path):
    root = reaf(tmp_path, ["s1/ct.nii.gz", "s2/ct.nii.gz"], {"s1/ct.nii.gz": "One.", "s2/ct.nii.gz": "Two."})
    table(
        root / "train/labels.csv", "VolumeName,Cyst", "s3/ct.nii.gz,1", "/data/train/volumes/s2/ct.nii.gz,0"
    )
    assert {i: c.labels for i, c in read_reaf(root).by_id().items()} == {"s1/ct": None, "s2/ct": (0,)}
    table(root / "train/labels.csv", "VolumeName,Cyst", "ct.nii.gz,1")
    with pytest.raises(InputError, match="labels.csv: the row of ct.nii.gz may be s1/ct or s2/ct"):
        read_reaf(root)
    named = read_label_table(table(tmp_path / "l.csv", "VolumeName,Cyst", "s1/ct.nii.gz,1", "s2/ct.nii.gz,0"))
    assert named.values(["s2/ct", "s1/ct"], [["Cyst"]]).tolist() == [[False], [True]]
    bare = read_label_table(table(tmp_path / "l.csv", "VolumeName,Cyst", "ct.nii.gz,1"))
    assert bare.values(["s1/ct"], [["Cyst"]]).tolist() == [[True]]
    with pytest.raises(InputError, match="l.csv: the row of ct may be s1/ct or s2/ct"):
        bare.values(["s1/ct", "s2/ct"], [["Cyst"]])
    other = read_label_table(table(tmp_path / "l.csv", "VolumeName,Cyst", "s3/ct.nii.gz,1"))
    with pytest.raises(InputError, match="l.csv: has no labels of volume s1/ct"):
        other.values(["s1/ct"], [["Cyst"]])


NO_REPORT = ["nan", "NaN", "None", "N/A", "null", "-", " ", "Not given.", "not given"]


def test_a_text_that_only_says_that_there_is_none_is_an_empty_report(tmp_path):
    assert [given(text) for text in NO_REPORT] == [""] * len(NO_REPORT)
    assert [given(text) for text in ("Clear lungs. ", "No nodule.", "None seen.", "Nanosized nodule")] == [
        "Clear lungs.",
        "No nodule.",
        "None seen.",
        "Nanosized nodule",
    ]
    touch(*(tmp_path / f"v{i}.nii.gz" for i in range(len(NO_REPORT))))
    path = table(
        tmp_path / "r.csv", "id,text,split", *(f"v{i},{text},train" for i, text in enumerate(NO_REPORT))
    )
    assert {c.problem for c in read_nifti_folder(tmp_path, path).by_id().values()} == {
        "has an empty text in r.csv"
    }
    root = reaf(tmp_path / "reaf", ["a.nii.gz"], {"a.nii.gz": "nan"})
    assert [c.problem for c in read_reaf(root).by_id().values()] == ["has an empty report in r.json"]


@pytest.mark.parametrize("other", ["./s1/ct", "s1//ct", "s1/./ct.nii.gz", "link"])
def test_one_file_under_two_ids_is_refused(tmp_path, other):
    touch(tmp_path / "s1/ct.nii.gz")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "s1/ct.nii.gz")
    path = table(tmp_path / "r.csv", "id,text,split", "s1/ct,One.,train", f"{other},Two.,validation")
    with pytest.raises(
        InputError, match="are the same volume; keep one|is the file of id s1/ct and of id link"
    ):
        read_nifti_folder(tmp_path, path).by_id()


def test_an_image_of_hsenets_json_is_listed_once_however_it_is_spelled(tmp_path):
    entries = [{"image": "a/x.npy", "text": "One."}, {"image": "./a//x.npy", "text": "Two."}]
    path = table(tmp_path / "d.json", json.dumps({"train": entries[:1], "validation": entries[1:]}))
    with pytest.raises(InputError, match="x.npy is listed twice"):
        read_hsenet_json(path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "new\nline", "bell\a", ""])
def test_an_id_that_leaves_its_folder_or_cannot_be_printed_is_refused(tmp_path, name):
    case = Case(name, "scan", tmp_path / "x.nii.gz", "Text.", problem="absent")
    with pytest.raises(InputError, match="is not a path below its folder") as caught:
        Source("nifti", {"train": [case]}).by_id()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../../x_1_a_1.nii.gz", "/etc/x_1_a_1.nii.gz", "train_1_a.nii.gz", "train_1_a_1.nii"]
)
def test_a_volume_name_that_is_not_ct_rates_is_refused(tmp_path, name):
    base = ct_rate(tmp_path, "train", ["train_1_a_1"])
    reports = base / "radiology_text_reports" / "train_reports.csv"
    with open(reports, "a", newline="") as file:
        csv.writer(file).writerow([name, "x", "y"])
    with pytest.raises(InputError, match="is not of CT-RATE's form"):
        read_ct_rate(tmp_path)


def test_appledouble_files_are_no_data_in_any_data_set(tmp_path):
    base = ct_rate(tmp_path / "ct", "train", ["train_1_a_1"])
    touch(base / "train/train_1/train_1_a/._train_1_a_1.nii.gz")
    assert list(read_ct_rate(tmp_path / "ct").by_id()) == ["train_1_a_1"]
    root = reaf(tmp_path / "reaf", ["a.nii.gz"], {"a.nii.gz": "Clear."})
    touch(root / "train/volumes/._a.nii.gz", root / "train/reports/._r.json", root / "._labels.csv")
    assert list(read_reaf(root).by_id()) == ["a"]
    touch(tmp_path / "n/a.nii.gz", tmp_path / "n/._a.nii.gz", tmp_path / "n/._r.csv")
    table(tmp_path / "n/r.csv", "id,text", "a,Clear.")
    assert list(read_nifti_folder(tmp_path / "n", None).by_id()) == ["a"]
    touch(
        tmp_path / "b/CT1/ct/sub-S1_ses-E1_x.nii.gz",
        tmp_path / "b/CT1/ct/._sub-S1_ses-E1_x.nii.gz",
        tmp_path / "b/._r.csv",
    )
    table(tmp_path / "b/r.csv", "path,Report_en", "/a/sub-S1/ses-E1/mod-rx,Clear.")
    assert list(read_bimcv(tmp_path / "b", None).by_id()) == ["CT1/ct/sub-S1_ses-E1_x"]


def test_volumes_of_ct_rates_no_chest_lists_are_kept_and_marked(tmp_path):
    base = ct_rate(tmp_path, "train", ["train_1_a_1", "train_2_a_1"])
    table(base / "metadata/no_chest_train.txt", "train/train_2/train_2_a/train_2_a_1.nii.gz")
    assert {i: c.chest for i, c in read_ct_rate(tmp_path).by_id().items()} == {
        "train_1_a_1": True,
        "train_2_a_1": False,
    }


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "r.csv")
    with pytest.raises(InputError, match="r.csv: is a pipe or a device, expected a file"):
        list(csv_rows(tmp_path / "r.csv", ("id",)))


def test_a_row_is_missed_wherever_its_name_stands_in_it(tmp_path):
    """An index column, as pandas writes it, or a text before the id."""
    touch(*(tmp_path / f"{name}.nii.gz" for name in "abc"))
    for header, rows in (
        (",id,text", ['0,a,"report one', '1,b,nodule of 5"', "2,c,text c"]),
        ("text,id", ['"report one,a', 'nodule 5",b', "text c,c"]),
    ):
        with pytest.raises(InputError, match="r.csv: lines 2 to 3: a quoted text runs over the row of [ab]"):
            read_nifti_folder(tmp_path, table(tmp_path / "r.csv", header, *rows))


def test_tables_of_labels_numbers_and_questions_miss_a_swallowed_row(tmp_path):
    base = ct_rate(tmp_path / "ct", "train", ["train_1_a_1", "train_2_a_1"], "Note,Cyst", ('"open,0', '5",1'))
    with pytest.raises(
        InputError,
        match="train_predicted_labels.csv: lines 2 to 3: a quoted text runs over the row of train_2",
    ):
        read_ct_rate(tmp_path / "ct")
    (base / "multi_abnormality_labels/train_predicted_labels.csv").unlink()
    table(
        base / "metadata/train_metadata.csv",
        "VolumeName,Note,XYSpacing,ZSpacing,RescaleSlope,RescaleIntercept",
        'train_1_a_1.nii.gz,"open,"',
        'train_2_a_1.nii.gz,5","[1, 1]",1,1,-1024',
    )
    with pytest.raises(InputError, match="train_metadata.csv: lines? 2"):
        read_ct_rate(tmp_path / "ct")
    labels = table(tmp_path / "l.csv", "VolumeName,note,A", 'x,"open,1', 'y,5",0')
    with pytest.raises(InputError, match="l.csv: lines 2 to 3: a quoted text runs over the row of y"):
        read_label_table(labels, known=["x", "y"])
    folder = tmp_path / "q"
    table(
        folder / "train_vqa_location.csv",
        "Volumename,Anatomy,Abnormality,Question",
        'train_1_a_1,lung,nodule,"Where is it',
        'train_2_a_1,heart,cyst,Where?"',
    )
    with pytest.raises(
        InputError,
        match="train_vqa_location.csv: lines 2 to 3: a quoted text runs over the row of train_2_a_1",
    ):
        read_questions(folder, "train", ["train_1_a_1", "train_2_a_1"], ["location"])


def two_splits(root: Path) -> Path:
    reaf(root, ["s1/ct.nii.gz"], {"s1/ct.nii.gz": "One."})
    (root / "val").mkdir()
    shutil.copytree(root / "train/reports", root / "val/reports")
    touch(root / "val/volumes/s2/ct.nii.gz")
    (root / "val/reports/r.json").write_text((root / "train/reports/r.json").read_text().replace("s1", "s2"))
    return root


def test_a_name_that_two_splits_have_labels_neither(tmp_path):
    root = two_splits(tmp_path)
    table(root / "labels.csv", "VolumeName,Cyst", "ct.nii.gz,1")
    with pytest.raises(InputError, match="the row of ct.nii.gz may be s1/ct or s2/ct"):
        read_reaf(root)
    table(root / "labels.csv", "VolumeName,Cyst", "/data/val/volumes/s2/ct.nii.gz,1", "s1/ct,0")
    assert {i: c.labels for i, c in read_reaf(root).by_id().items()} == {"s1/ct": (0,), "s2/ct": (1,)}
    labels = read_label_table(table(tmp_path / "l.csv", "VolumeName,Cyst", "ct,1"), known=["s1/ct", "s2/ct"])
    with pytest.raises(InputError, match="the row of ct may be s1/ct or s2/ct"):
        labels.values(["s1/ct"], [["Cyst"]])


def test_the_path_of_another_splits_volume_labels_none_of_this(tmp_path):
    reaf(tmp_path, ["ct.nii.gz"], {"ct.nii.gz": "One."})
    (tmp_path / "val/volumes").mkdir(parents=True)
    table(tmp_path / "val/reports/r.json", "[]")
    table(tmp_path / "labels.csv", "VolumeName,Cyst", "val/volumes/ct,1")
    assert [c.labels for c in read_reaf(tmp_path).by_id().values()] == [None]


def test_labels_that_contradict_each_other_are_refused(tmp_path):
    root = reaf(tmp_path, ["s1/ct.nii.gz"], {"s1/ct.nii.gz": "One."})
    table(root / "train/labels.csv", "VolumeName,Cyst", "s1/ct,1", "s1/ct.pt,0")
    with pytest.raises(InputError, match="another row than s1/ct.pt says otherwise of s1/ct"):
        read_reaf(root)
    for read in (lambda path: read_label_table(path), lambda path: list(csv_rows(path, ("VolumeName",)))):
        with pytest.raises(InputError, match="has two columns Cyst; keep one"):
            read(table(tmp_path / "l.csv", "VolumeName,Cyst,Cyst", "x,1,0"))


def test_ct_rates_names_are_found_with_and_without_their_ending(tmp_path):
    base = ct_rate(tmp_path, "train", ["train_1_a_1", "train_2_a_1"])
    table(
        base / "multi_abnormality_labels/train_predicted_labels.csv",
        "VolumeName,Cyst",
        "train_1_a_1,1",
        "train_2_a_1.nii.gz,0",
    )
    (base / "metadata").mkdir()
    (base / "metadata/no_chest_train.txt").write_text(
        '\ufeff"train_1_a_1",\ntrain\\train_2\\train_2_a\\train_2_a_1.nii.gz\n\n'
    )
    assert {i: (c.labels, c.chest) for i, c in read_ct_rate(tmp_path).by_id().items()} == {
        "train_1_a_1": ((1,), False),
        "train_2_a_1": ((0,), False),
    }
    (base / "metadata/no_chest_train.txt").write_text("some words\n")
    with pytest.raises(
        InputError, match="no_chest_train.txt: 'some words' is not a volume of CT-RATE's form"
    ):
        read_ct_rate(tmp_path)
