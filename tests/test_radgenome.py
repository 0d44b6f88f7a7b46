"""RadGenome-ChestCT's tables joined to prepared volumes, and every way in which a table can be wrong."""

import csv
import shutil

import pytest

from conftest import error_line, script
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.questions import add_questions
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.data.sources.radgenome import read_questions
from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics.vqa import ANATOMIES, anatomy_of

LOCATION = [
    ["Volumename", "Anatomy", "Abnormality"],
    ["train_1_a_1.nii.gz", "lung/right lung", "nodule"],
    ["train_1_a_1.nii.gz", "pleura", "effusion"],
    ["train_2_a_1.nii.gz", "heart", "calcification"],
]

RADGENOME = ("preprocess.py", "--dataset", "radgenome")


@pytest.fixture
def volumes(prepared, tmp_path):
    """Prepared phantoms, without their questions."""
    folder = shutil.copytree(prepared, tmp_path / "data")
    manifest = load_manifest(folder)
    for entry in (e for entries in manifest.splits.values() for e in entries):
        del entry["qa"]
    manifest.save()
    return folder


def write(folder, name: str, rows: list[list[str]], encoding: str = "utf-8", end: str = "\n"):
    folder.mkdir(exist_ok=True)
    with open(folder / name, "w", newline="", encoding=encoding) as file:
        csv.writer(file, lineterminator=end).writerows(rows)
    return folder


@pytest.fixture
def tables(tmp_path):
    return write(tmp_path / "tables", "train_vqa_location.csv", LOCATION)


def qa(folder) -> dict[str, list[dict]]:
    return {
        e["id"]: e["qa"] for entries in load_manifest(folder).splits.values() for e in entries if "qa" in e
    }


def nodule(**more) -> dict:
    region = "lung/right lung"
    return {"kind": "location", "anatomy": region, "abnormality": "nodule", "answer": region, **more}


def test_rows_are_joined_to_their_volumes_in_the_tables_order(volumes, tables):
    add_questions(volumes, tables)
    found = qa(volumes)
    assert set(found) == {"train_1_a_1", "train_2_a_1"}
    assert found["train_1_a_1"][0] == nodule()
    assert [r["answer"] for rows in found.values() for r in rows] == ["lung/right lung", "pleura", "heart"]


def test_a_location_is_answered_by_the_anatomy_whatever_the_table_answers(tmp_path, volumes):
    rows = [
        ["Volumename", "Anatomy", "Abnormality", "Question", "Answer"],
        ["train_1_a_1", "lung", "cyst", "Where?", "left"],
        ["train_1_a_1", "", "pacemaker", "Where?", "left"],
    ]
    add_questions(volumes, write(tmp_path / "t", "train_vqa_location.csv", rows))
    first, second = qa(volumes)["train_1_a_1"]
    assert (first["answer"], first["question"]) == ("lung", "Where?")
    assert second["answer"] == "left"  # where the table names no anatomy


def test_answers_of_the_other_kinds(tmp_path, volumes):
    tables = tmp_path / "t"
    for kind, columns, values in (
        ("abnormality", ["Abnormality"], ["lung", "cyst"]),
        ("presence", ["Finding", "Presence"], ["", "cyst", "No"]),
        ("size", ["Abnormality", "Size"], ["lung", "cyst", "9 mm"]),
    ):
        rows = [["Volumename", "Anatomy", *columns], ["train_1_a_1", *values]]
        write(tables, f"train_vqa_{kind}.csv", rows)
    add_questions(volumes, tables)
    assert qa(volumes)["train_1_a_1"] == [
        {"kind": "abnormality", "anatomy": "lung", "abnormality": "cyst", "answer": "cyst"},
        {"kind": "presence", "anatomy": "", "abnormality": "cyst", "answer": "No"},
        {"kind": "size", "anatomy": "lung", "abnormality": "cyst", "size": "9 mm", "answer": "9 mm"},
    ]


def test_names_in_any_case_and_with_or_without_ending(tmp_path, volumes):
    for header, name in (
        ("VOLUMENAME", "train_1_a_1"),
        ("VolumeName", "Train_1_a_1.nii.gz"),
        (" volumename ", "train_1_a_1.nii"),
    ):
        rows = [[header, "ANATOMY", "abnormality"], [name, "lung/right lung", "nodule"]]
        add_questions(volumes, write(tmp_path / "t", "train_vqa_location.csv", rows))
        assert qa(volumes) == {"train_1_a_1": [nodule()]}


def test_a_volumes_own_id_may_have_upper_case(tables):
    found, refused = read_questions(tables, "train", ["Train_1_a_1", "train_2_A_1"])
    assert list(found) == ["Train_1_a_1", "train_2_A_1"] and refused == []


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path, volumes):
    add_questions(volumes, write(tmp_path / "t", "train_vqa_location.csv", LOCATION, "utf-8-sig", "\r\n"))
    assert qa(volumes)["train_1_a_1"][0] == nodule()


def test_a_repeated_row_is_a_question_of_its_own(tmp_path, volumes):
    add_questions(volumes, write(tmp_path / "t", "train_vqa_location.csv", [*LOCATION[:2], LOCATION[1]]))
    assert qa(volumes) == {"train_1_a_1": [nodule(), nodule()]}


def test_a_second_run_gives_the_same_file_and_other_tables_replace_the_questions(tmp_path, volumes, tables):
    add_questions(volumes, tables)
    first = (volumes / "manifest.json").read_bytes()
    add_questions(volumes, tables)
    assert (volumes / "manifest.json").read_bytes() == first
    add_questions(volumes, write(tmp_path / "t", "train_vqa_location.csv", LOCATION[:2]))
    assert qa(volumes) == {"train_1_a_1": [nodule()]}


def test_a_train_table_joins_no_validation_volume(tmp_path, volumes):
    rows = [*LOCATION, ["valid_1_a_1.nii.gz", "lung", "nodule"]]
    tables = write(tmp_path / "t", "train_vqa_location.csv", rows)
    with pytest.raises(InputError, match="train_vqa_location.csv: valid_1_a_1: not among the train volumes"):
        add_questions(volumes, tables)
    write(tables, "train_vqa_location.csv", LOCATION)
    write(
        tables,
        "validation_vqa_location.csv",
        [LOCATION[0], ["valid_1_a_1.nii.gz", "lung/right lung", "nodule"]],
    )
    add_questions(volumes, tables)
    assert qa(volumes)["valid_1_a_1"] == [nodule()]


def test_unknown_volumes_are_an_error_that_names_the_first_and_changes_nothing(volumes, tables):
    unknown = [[f"train_{n}_a_1.nii.gz", "lung", "nodule"] for n in (901, 902, 902, 903, 904, 905)]
    write(tables, "train_vqa_location.csv", [*LOCATION, *unknown])
    before = {p.name: p.read_bytes() for p in volumes.glob("[!.]*.*")}
    done = script(*RADGENOME, "--root", tables, "--out", volumes)
    line = error_line(done)
    assert (
        "train_vqa_location.csv: train_901_a_1, train_902_a_1, train_903_a_1 and 2 more" in line
        and "--allow-refused" in line
    )
    assert {p.name: p.read_bytes() for p in volumes.glob("[!.]*.*")} == before


def test_another_reconstruction_is_an_unknown_volume(volumes, tables):
    write(tables, "train_vqa_location.csv", [*LOCATION, ["train_1_a_9.nii.gz", "lung", "nodule"]])
    with pytest.raises(InputError, match="train_1_a_9: not among the train volumes"):
        add_questions(volumes, tables)


@pytest.mark.slow
def test_allowed_refusals_are_left_out_and_listed_beside_the_volumes(volumes, tables):
    with open(volumes / "refused.csv", "a", newline="") as file:
        csv.writer(file).writerow(["scan.nii.gz", "is truncated"])
    unknown = [["train_99_a_1", "lung", "nodule"], ["train_99_a_1", "heart", "cyst"]]
    write(
        tables,
        "train_vqa_location.csv",
        [*LOCATION, *unknown, ["train_3_a_1", "", "cyst"], ["train_3_a_1", "lung", ""]],
    )
    command = (*RADGENOME, "--root", tables, "--out", volumes, "--allow-refused")
    for _ in range(2):  # a second run lists nothing twice
        done = script(*command)
        assert done.returncode == 0 and "questions of location: 3 train, 0 validation" in done.stdout, (
            done.stderr
        )
        with open(volumes / "refused.csv", newline="") as file:
            rows = list(csv.reader(file))[1:]
        assert rows == [
            ["scan.nii.gz", "is truncated"],
            *(
                [str(tables / "train_vqa_location.csv"), f"questions: {reason}"]
                for reason in (
                    "train_3_a_1 line 7 has no answer",
                    "train_3_a_1 line 8 has no abnormality",
                    "train_99_a_1 not among the train volumes, 2 rows",
                )
            ),
        ]
    assert set(qa(volumes)) == {"train_1_a_1", "train_2_a_1"}


def test_tables_of_a_split_that_was_not_prepared_are_not_passed_over(volumes, tables):
    manifest = load_manifest(volumes)
    del manifest.splits["validation"]
    manifest.save()
    write(tables, "validation_vqa_location.csv", [LOCATION[0], ["valid_1_a_1", "lung", "nodule"]])
    with pytest.raises(
        InputError, match="validation_vqa_location.csv: valid_1_a_1: not among the validation volumes"
    ):
        add_questions(volumes, tables)


def test_questions_of_chosen_kinds_alone(volumes, phantom_root):
    done = script(*RADGENOME, "--root", phantom_root, "--out", volumes, "--questions", "location")
    assert done.returncode == 0, done.stderr
    assert {r["kind"] for rows in qa(volumes).values() for r in rows} == {"location"}


WRONG_TABLES = [
    ([row[:2] for row in LOCATION], "has no column abnormality; its columns are volumename, anatomy"),
    ([[*row, row[1]] for row in LOCATION], "has two columns anatomy; keep one"),
    ([*LOCATION, ["train_1_a_1"]], "line 5 has fewer fields than the header"),
    ([*LOCATION, ["train_1_a_1", "lung", "a", "b"]], "line 5 has more fields than the header"),
    (LOCATION[:1], "no row of its tables of location, abnormality, presence, size is of a volume of"),
    ([], "has no column volumename, anatomy, abnormality; its columns are none"),
]


@pytest.mark.parametrize(("rows", "words"), WRONG_TABLES)
def test_a_wrong_table_is_one_line_that_names_it(rows, words, volumes, tables):
    write(tables, "train_vqa_location.csv", rows)
    before = (volumes / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=words) as caught:
        add_questions(volumes, tables, allow_refused=True)
    assert str(tables) in str(caught.value) and "\n" not in str(caught.value)
    assert (volumes / "manifest.json").read_bytes() == before


def test_a_presence_table_needs_its_answers(tmp_path, volumes):
    rows = [["Volumename", "Anatomy", "Abnormality"], ["train_1_a_1", "lung", "cyst"]]
    with pytest.raises(InputError, match="train_vqa_presence.csv: has no column answer"):
        add_questions(volumes, write(tmp_path / "t", "train_vqa_presence.csv", rows))


def test_a_folder_without_tables_or_without_volumes_is_refused(tmp_path, volumes, tables):
    with pytest.raises(InputError, match="no RadGenome-ChestCT tables; expected train_vqa_location.csv"):
        add_questions(volumes, tmp_path)
    with pytest.raises(InputError, match="manifest.json: no such file; prepare CT-RATE's volumes first"):
        add_questions(tmp_path / "none", tables)
    assert "--root" in error_line(script(*RADGENOME, "--out", volumes))


@pytest.mark.slow
def test_questions_stay_when_the_volumes_are_prepared_again(phantom_root, tmp_path, tables):
    tree, out = shutil.copytree(phantom_root, tmp_path / "tree"), tmp_path / "out"
    shutil.rmtree(tree / "dataset/radgenome_files")
    command = ("preprocess.py", "--dataset", "ct-rate", "--root", tree, "--out", out, "--size", 16, 32, 32)
    assert script(*command).returncode == 0 and qa(out) == {}
    add_questions(out, tables)
    joined = (out / "manifest.json").read_bytes()
    assert script(*command).returncode == 0
    assert (out / "manifest.json").read_bytes() == joined and len(qa(out)) == 2


def test_a_question_about_no_volume_of_ct_rate_stops_the_reader(phantom_root, tmp_path):
    tree = shutil.copytree(phantom_root, tmp_path / "tree")
    with open(tree / "dataset/radgenome_files/train_vqa_size.csv", "a") as file:
        file.write("train_99_a_1.nii.gz,lung,cyst,9 mm,,\n")
    with pytest.raises(
        InputError, match="train_vqa_size.csv: train_99_a_1: not among the train volumes.*radgenome_files"
    ):
        read_ct_rate(tree)


def test_a_phantoms_anatomies_are_classes_of_the_published_report(phantom_root):
    source = read_ct_rate(phantom_root)
    named = {row["anatomy"] for split in source.splits.values() for c in split for row in c.questions} - {""}
    assert len(named) > 4 and "Others" not in {anatomy_of(name) for name in named}


def test_radgenomes_regions_are_the_published_classes(tmp_path):
    regions = (
        "lung/left lung/left lower lobe, trachea and bronchie, mediastinum/mediastinal lymph node, heart, "
        "esophagus, pleura, bone/rib, thyroid, breast, abdomen/liver, others"
    ).split(", ")
    rows = [LOCATION[0], *(["train_1_a_1", region, "cyst"] for region in regions)]
    found, refused = read_questions(
        write(tmp_path / "t", "train_vqa_location.csv", rows), "train", ["train_1_a_1"]
    )
    assert [anatomy_of(row["answer"]) for row in found["train_1_a_1"]] == list(ANATOMIES) and refused == []
