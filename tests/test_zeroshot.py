"""evaluate.py --task zeroshot: prompts and labels as data, the table it writes, and what a user can get
wrong.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from conftest import ROOT, error_line, script
from reaf_hsenet.data.labels import LabelTable, load_label_set, read_label_table
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import zeroshot
from reaf_hsenet.evaluate.zeroshot import combine, define_task, load_prompts
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece

CT_RATE_16 = {"Medical material", "Lymphadenopathy"}


@pytest.fixture(scope="session")
def run(prepared, tmp_path_factory) -> Path:
    """The run folder of a small dual encoder with the weights it starts from."""
    folder = tmp_path_factory.mktemp("zeroshot") / "run"
    values = json.loads((prepared / "manifest.json").read_text())
    tokenizer = train_wordpiece([entry["text"] for entry in values["splits"]["train"]], 1000)
    preset = PRESETS["hsenet-tiny"]
    config = replace(
        preset,
        vision=replace(preset.vision, size=(16, 32, 32), patch=(8, 16, 16)),
        text=replace(preset.text, vocab=len(tokenizer.vocab)),
    )
    torch.manual_seed(0)
    Run(folder).write_config(
        {"stage": "clip1", "model": to_dict(config), "recipe": values["recipe"], "data": str(prepared)}
    )
    tokenizer.save(folder)
    Run(folder).save(1, build_dual_encoder(config).state_dict(), {}, keep=1, best=True)
    return folder


def evaluated(run: Path, out: Path, *more) -> dict:
    arguments = [
        "--task",
        "zeroshot",
        "--run",
        run,
        "--out",
        out,
        "--device",
        "cpu",
        "--bootstrap",
        20,
        *more,
    ]
    assert evaluate.main(list(map(str, arguments))) == 0
    return json.loads((out / "zeroshot.json").read_text())


def wrong(words: str, *arguments) -> None:
    with pytest.raises(InputError, match=words) as caught:
        evaluate.main(["--task", "zeroshot", "--device", "cpu", *map(str, arguments)])
    assert "\n" not in str(caught.value)


def scores_csv(out: Path) -> list[dict]:
    with open(out / "zeroshot_scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def entries(prepared: Path) -> tuple[list[str], list[dict]]:
    values = json.loads((prepared / "manifest.json").read_text())
    return values["labels"], values["splits"]["validation"]


def write_table(
    path: Path, prepared: Path, names: list[str], key: str = "VolumeName", ending: str = ".nii.gz"
) -> Path:
    """A label table of the validation volumes, in reverse; label j of volume i is (i + j) % 2."""
    rows = [
        [e["id"] + ending, *((i + j) % 2 for j in range(len(names)))]
        for i, e in enumerate(entries(prepared)[1])
    ]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([[key, *names], *reversed(rows)])
    return path


def user_prompts(path: Path, **classes) -> Path:
    texts = {name: {"positive": name, "negative": f"No {name}"} for name in classes}
    path.write_text(
        json.dumps(
            {"template": "Chest CT: {}.", "classes": {n: {**texts[n], **c} for n, c in classes.items()}}
        )
    )
    return path


def test_the_table_the_json_and_the_scores_agree(run, prepared, tmp_path, capsys):
    results = evaluated(run, tmp_path)
    printed, rows = capsys.readouterr().out, scores_csv(tmp_path)
    assert list(results["classes"]) == list(load_prompts("volume").texts) and len(results["classes"]) == 18
    names, listed = entries(prepared)
    assert [row["id"] for row in rows] == [entry["id"] for entry in listed]
    for name, found in results["classes"].items():
        labels = [entry["labels"][names.index(name)] for entry in listed]
        assert labels == [int(row[f"label: {name}"]) for row in rows] and found["positives"] == sum(labels)
        up = [float(row[name]) for row, label in zip(rows, labels, strict=True) if label]
        down = [float(row[name]) for row, label in zip(rows, labels, strict=True) if not label]
        line = next(x for x in printed.splitlines() if x.startswith(name + " "))
        if up and down:
            auroc = np.mean([(a > b) + 0.5 * (a == b) for a in up for b in down])
            assert found["auroc"] == pytest.approx(auroc) and f"{auroc:.3f}" in line
            low, high = found["interval_95"]["auroc"]
            assert f"{low:.3f} to {high:.3f}" in line and low <= found["auroc"] <= high
        else:
            assert found["auroc"] is None and f"{len(up):>6}      -" in line
            assert f"note: {name}: none of the {len(rows)} volumes" in printed
    usable = {name for name, found in results["classes"].items() if found["auroc"] is not None}
    assert usable < set(results["classes"]), "the phantoms should have a class with one label value"
    assert f"the mean is over {len(usable)} of 18 classes" in printed
    for mean, kept in (("mean", usable), ("mean_16", usable - CT_RATE_16)):
        assert results["means"][mean]["classes"] == len(kept) and f"{mean} of {len(kept)} " in printed
        assert results["means"][mean]["auroc"] == pytest.approx(
            np.mean([results["classes"][name]["auroc"] for name in kept])
        )


def test_a_score_is_the_softmax_of_the_two_prompts_encoded_one_by_one(run, prepared, tmp_path):
    evaluated(run, tmp_path, "--prompts", "organ")
    loaded = load_trained(run)
    model, tokenizer = loaded.model, loaded.tokenizer

    def vector(text: str) -> torch.Tensor:
        return model.encode_text(*tokenizer.batch([tokenizer.encode(text)]))[0]

    row, entry = scores_csv(tmp_path)[2], entries(prepared)[1][2]
    volume = torch.from_numpy(np.load(prepared / entry["volume"]).astype(np.float32))
    with torch.no_grad():
        image = model.encode_image(volume[None, None])[0]
        for name, negative, positive in (
            ("Lung nodule", "The lung shows: Not nodule.", "The lung shows: Nodule."),
            ("Atelectasis", "The lung shows: Not atelectatic.", "The lung shows: Atelectasis."),
            (
                "Medical material",
                "The volume shows: Not medical material.",
                "The volume shows: Medical material.",
            ),
        ):
            pair = torch.stack([image @ vector(text) for text in (negative, positive)])
            expected = (model.scale() * pair).softmax(0)[1].item()
            assert float(row[name]) == pytest.approx(expected, abs=1e-6)


def test_text_is_encoded_once_for_all_volumes(run, tmp_path, monkeypatch):
    from reaf_hsenet.models.clip import DualEncoder

    calls, encode = [], DualEncoder.encode_text
    monkeypatch.setattr(
        DualEncoder, "encode_text", lambda s, ids, mask: (calls.append(len(ids)), encode(s, ids, mask))[1]
    )
    evaluated(run, tmp_path, "--batch-size", 2)
    assert calls.count(36) == 1 and set(calls) <= {36, 2, 1}  # the prompts; reports by the batch


def test_the_built_in_prompts_are_the_published_ones():
    """Class order, the two templates, and the nodule and opacity prompts that differ between them."""
    golden = json.loads((ROOT / "tests/golden/metrics_zeroshot.json").read_text())["class_names"]
    volume, organ = load_prompts("volume").texts, load_prompts("organ").texts
    assert list(volume) == list(organ) == golden
    assert volume["Lung opacity"] == (
        "The volume shows: Not lung opacity.",
        "The volume shows: Lung opacity.",
    )
    assert organ["Lung opacity"] == ("The lung shows: Not opacity.", "The lung shows: Opacity.")
    assert organ["Hiatal hernia"][1] == "The esophagus shows: Hiatal hernia."
    assert organ["Arterial wall calcification"][1] == "The aorta shows: Arterial wall calcification."
    assert (
        organ["Coronary artery wall calcification"][1]
        == "The heart shows: Coronary artery wall calcification."
    )
    assert organ["Lymphadenopathy"][0] == "The mediastinum shows: Not lymphadenopathy."
    assert all(text.startswith("The volume shows: ") for pair in volume.values() for text in pair)


def test_the_class_order_is_the_prompts_not_the_label_tables(run, prepared, tmp_path):
    """A table in another order and with rows reversed gives every class its own labels."""
    names, listed = entries(prepared)
    table = tmp_path / "labels.csv"
    with open(table, "w", newline="") as file:
        rows = [[e["id"], *reversed(e["labels"])] for e in reversed(listed)]
        csv.writer(file).writerows([["VolumeName", *reversed(names)], *rows])
    ours = evaluated(run, tmp_path / "a", "--labels", table)
    theirs = evaluated(run, tmp_path / "b")
    assert ours["classes"] == theirs["classes"] and ours["means"] == theirs["means"]
    assert ours["labels"]["table"] == str(table)


def test_a_users_prompts_and_labels_may_be_of_other_classes(run, prepared, tmp_path):
    table = write_table(tmp_path / "labels.csv", prepared, ["Pneumothorax", "Rib fracture", "Emphysema"])
    prompts = user_prompts(
        tmp_path / "p.json", **{"Rib fracture": {"positive": "Broken rib"}, "Pneumothorax": {}}
    )
    results = evaluated(run, tmp_path / "a", "--labels", table, "--prompts", prompts)
    assert list(results["classes"]) == ["Rib fracture", "Pneumothorax"] and list(results["means"]) == ["mean"]
    assert results["prompts"]["texts"]["Rib fracture"] == [
        "Chest CT: No Rib fracture.",
        "Chest CT: Broken rib.",
    ]
    assert [row["label: Pneumothorax"] for row in scores_csv(tmp_path / "a")][:3] == ["0", "1", "0"]


def test_built_in_classes_that_the_labels_do_not_have_are_noted(run, prepared, tmp_path, capsys):
    table = write_table(tmp_path / "labels.csv", prepared, ["Atelectasis", "Emphysema"])
    results = evaluated(run, tmp_path / "a", "--labels", table)
    assert list(results["classes"]) == ["Emphysema", "Atelectasis"]
    assert "labels.csv has no labels of Lung nodule, Lung opacity" in capsys.readouterr().out


RAW = [
    "emphysema",
    "atelectasis",
    "nodule",
    "opacity",
    "fibrosis",
    "pleural_effusion",
    "bronchial_wall_thickening",
    "consolidation",
    "bronchiectasis",
    "septal_thickening",
    "cardiomegaly",
    "pericardial_effusion",
    "calcification",
    "hernia",
    "lymphadenopathy",
    "hardware",
    "catheter_or_port",
    "chest_tube",
    "clip",
    "gi_tube",
    "heart_valve_replacement",
    "pacemaker_or_defib",
    "staple",
    "stent",
    "suture",
    "tracheal_tube",
    "breast_implant",
    "scattered_calc",
]


def rad_task(names: list[str], rows: dict[str, dict], prompts: str = "volume"):
    return define_task(
        load_prompts(prompts), load_label_set("rad-chestct"), LabelTable(Path("t"), names, rows), list(rows)
    )


def test_rad_chestct_has_16_classes_and_a_mean_of_the_published_14(run, prepared, tmp_path):
    table = write_table(tmp_path / "rad.csv", prepared, RAW, key="NoteAcc_DEID", ending="")
    results = evaluated(run, tmp_path / "a", "--labels", table, "--label-set", "rad-chestct")
    assert len(results["classes"]) == 16 and "Mosaic attenuation pattern" not in results["classes"]
    # Some of the columns of Medical material are 1 in every row here, so that it has one label value.
    assert results["means"]["mean"]["classes"] == 15 and results["means"]["mean_14"]["classes"] == 14
    assert results["classes"]["Medical material"]["auroc"] is None
    assert set(load_prompts("volume").texts) - set(results["prompts"]["texts"]) == {
        "Mosaic attenuation pattern"
    }


def test_rad_chestct_columns_become_classes():
    empty = dict.fromkeys(RAW, "0")
    rows = {"a": empty, "b": {**empty, "fibrosis": "1", "stent": "1.0"}, "c": {**empty, "hernia": "1"}}
    task = rad_task(RAW, rows)
    found = {
        name: [i for i, row in zip(rows, task.labels[:, j], strict=True) if row]
        for j, name in enumerate(task.names)
    }
    positive = {name: ids for name, ids in found.items() if ids}
    assert positive == {
        "Pulmonary fibrotic sequela": ["b"],
        "Medical material": ["b"],
        "Hiatal hernia": ["c"],
    }


def test_rad_chestct_loads_as_an_already_mapped_table_too():
    names = [*list(load_label_set("rad-chestct").columns)[:14], "unused"]
    rows = {"a": dict.fromkeys(names, "1"), "b": {**dict.fromkeys(names, "0"), "unused": "text"}}
    task = rad_task(names, rows)
    assert set(task.names) == set(names) - {"unused"} and task.labels[0].all() and not task.labels[1].any()
    assert "no labels of Mosaic attenuation pattern, Medical material, Lymphadenopathy" in task.notes[0]


def test_calcification_takes_the_larger_score_if_either_is_positive_and_else_the_smaller(
    run, prepared, tmp_path
):
    scores = torch.tensor([[0.6, 0.2], [0.2, 0.6], [0.7, 0.9], [0.4, 0.1], [0.5, 0.3]])
    assert torch.equal(combine(scores), torch.tensor([0.6, 0.6, 0.9, 0.1, 0.3]))
    assert torch.equal(combine(scores[:, :1]), scores[:, 0])
    table = write_table(tmp_path / "rad.csv", prepared, RAW, key="NoteAcc_DEID", ending="")
    evaluated(run, tmp_path / "rad", "--labels", table, "--label-set", "rad-chestct")
    evaluated(run, tmp_path / "ct")
    for mapped, single in zip(scores_csv(tmp_path / "rad"), scores_csv(tmp_path / "ct"), strict=True):
        pair = [float(single[f"{c} wall calcification"]) for c in ("Coronary artery", "Arterial")]
        expected = max(pair) if max(pair) > 0.5 else min(pair)
        assert float(mapped["Calcification"]) == pytest.approx(expected, abs=1e-6)


def test_a_prompt_of_its_own_or_both_of_its_parts_score_calcification(tmp_path):
    rows = {"a": dict.fromkeys(RAW, 0)}
    own = user_prompts(tmp_path / "own.json", Calcification={})
    assert rad_task(RAW, rows, str(own)).scored_from == {"Calcification": ["Calcification"]}
    half = user_prompts(tmp_path / "half.json", **{"Arterial wall calcification": {}})
    with pytest.raises(
        InputError, match="half.json: Calcification is scored from .*add Coronary artery wall calc"
    ):
        rad_task(RAW, rows, str(half))


def test_an_unknown_class_names_class_file_and_known_classes(run, prepared, tmp_path):
    prompts = user_prompts(tmp_path / "p.json", Emphysema={}, Pneumonia={})
    wrong(
        r"p.json: the labels of .*manifest.json have no class Pneumonia .*they have .*Emphysema, Atelectasis",
        "--run",
        run,
        "--prompts",
        prompts,
    )
    rad = write_table(tmp_path / "rad.csv", prepared, RAW, key="NoteAcc_DEID", ending="")
    wrong(
        r"--prompts volume: the labels of .*rad.csv have no class Emphysema \(--label-set ct-rate\); they "
        r"have emphys",
        "--run",
        run,
        "--labels",
        rad,
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "p.json: is not valid JSON"),
        ("[]", "p.json: expected the keys classes, template; found list"),
        ({"classes": {}}, "p.json: expected the keys classes, template; found classes"),
        ({"template": "x {}", "classes": {}}, "p.json: classes is dict; expected at least one class"),
        ({"template": "x {}", "classes": ["Emphysema"]}, "p.json: classes is list"),
        (
            {"template": "x", "classes": {"E": {"positive": "a", "negative": "b"}}},
            "template is 'x'; expected .*one {}",
        ),
        ({"template": 3, "classes": {}}, "template is 3"),
        ({"template": {"lung": "x"}, "classes": {}}, "the template of lung is 'x'"),
        (
            {"template": "{}", "classes": {"E": {"positive": "a"}}},
            "class E: expected the keys negative, positive; found pos",
        ),
        (
            {"template": "{}", "classes": {"E": "a"}},
            "class E: expected the keys negative, positive; found str",
        ),
        (
            {"template": "{}", "classes": {"E": {"positive": "a", "negative": " "}}},
            "class E: negative is ' '",
        ),
        (
            {"template": "{}", "classes": {"E": {"positive": "a", "negative": "b", "organ": "lung"}}},
            "class E: expected",
        ),
        (
            {
                "template": {"lung": "{}"},
                "classes": {"E": {"positive": "a", "negative": "b", "organ": "leg"}},
            },
            "class E: no template of organ 'leg'; there are lung",
        ),
    ],
)
def test_a_malformed_prompt_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=words) as caught:
        load_prompts(str(path))
    assert "\n" not in str(caught.value)


def test_no_such_prompt_file_names_the_choices(run):
    wrong(
        "--prompts lungs: no such file; expected volume, organ or a json file",
        "--run",
        run,
        "--prompts",
        "lungs",
    )


def test_a_label_table_that_lacks_a_volume_is_refused(run, prepared, tmp_path):
    table = write_table(tmp_path / "labels.csv", prepared, ["Emphysema"])
    victim = entries(prepared)[1][1]["id"]
    table.write_text(
        "".join(x for x in table.read_text().splitlines(keepends=True) if not x.startswith(victim))
    )
    wrong(f"labels.csv: has no labels of volume {victim};", "--run", run, "--labels", table)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("scan,Emphysema\na,1\n", "has no column of volume ids; expected VolumeName or NoteAcc_DEID"),
        ("VolumeName,Emphysema\na,1\na.nii.gz,1\n", "volume a is listed twice"),
        ("VolumeName,Emphysema\na.nii.gz,2\n", "Emphysema of a is '2'; expected 0 or 1"),
        ("VolumeName,Emphysema\na.nii.gz,\n", "Emphysema of a is ''; expected 0 or 1"),
        (b"\xff\xfe\x00", "is not a UTF-8 csv file"),
    ],
)
def test_a_damaged_label_table_is_one_line(tmp_path, content, words):
    path = tmp_path / "labels.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"labels.csv: {words}"):
        read_label_table(path).values(["a"], [["Emphysema"]])


def test_volumes_without_labels_ask_for_a_table(run, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    values = json.loads((data / "manifest.json").read_text())
    values["splits"]["validation"][3]["labels"] = None
    (data / "manifest.json").write_text(json.dumps(values))
    victim = values["splits"]["validation"][3]["id"]
    wrong(f"manifest.json: has no labels of volume {victim}; .*--labels", "--run", run, "--data", data)
    for entry in values["splits"]["train"] + values["splits"]["validation"]:
        entry["labels"] = None
    (data / "manifest.json").write_text(json.dumps({**values, "labels": []}))
    wrong(
        "manifest.json: its volumes have no labels; name a table of them with --labels",
        "--run",
        run,
        "--data",
        data,
    )
    wrong("no such file|cannot be read", "--run", run, "--labels", tmp_path / "none.csv")


def test_wrong_flags_are_named(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong("--bootstrap -1: expected 0 or more", "--run", run, "--bootstrap", "-1")
    wrong("--label-set.*mimic", "--run", run, "--label-set", "mimic")
    wrong("the test split is empty", "--run", run, "--split", "test")
    wrong("runs/clip1-reaf: holds no run", "--model", "reaf", "--data", "nowhere")
    with pytest.raises(InputError, match="--prompts: is an option of --task zeroshot"):
        evaluate.main(["--task", "retrieval", "--run", str(run), "--prompts", "organ"])


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(run):
    line = error_line(script("evaluate.py", "--task", "zeroshot", "--run", run, "--prompts", "none.json"))
    assert line.startswith("error: --prompts none.json: no such file")


def test_a_model_that_gives_nan_is_refused(run):
    loaded = load_trained(run)
    with pytest.raises(InputError, match="step-000001: gives embeddings with NaN"):
        zeroshot.score(loaded, torch.full((2, 128), torch.nan), None)


def test_the_bootstrap_is_switched_off_and_seeded(run, tmp_path, capsys):
    assert "interval_95" not in evaluated(run, tmp_path / "a", "--bootstrap", 0)["means"]["mean"]
    found = [evaluated(run, tmp_path / f"b{seed}", "--seed", seed)["means"] for seed in (0, 1)]
    assert found[0] == evaluated(run, tmp_path / "c")["means"] != found[1]


@pytest.mark.slow
def test_two_processes_score_as_one(run, tmp_path):
    # Without the -- torchrun takes --run for an abbreviation of a flag of its own.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--",
        ROOT / "evaluate.py",
        "--task",
        "zeroshot",
        "--run",
        run,
        "--out",
        tmp_path / "two",
        "--device",
        "cpu",
        "--bootstrap",
        "20",
        "--batch-size",
        "2",
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    evaluated(run, tmp_path / "one")
    one, two = scores_csv(tmp_path / "one"), scores_csv(tmp_path / "two")
    assert [row["id"] for row in one] == [row["id"] for row in two]
    for a, b in zip(one, two, strict=True):
        assert all(
            float(a[k]) == pytest.approx(float(b[k]), abs=1e-6) for k in a if k not in ("id", "checkpoint")
        )


def test_figures_of_a_model_without_regions_are_the_curves_alone(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    evaluated(run, tmp_path, "--figures", tmp_path / "pictures")
    assert (
        evaluate.main(
            [
                "--task",
                "retrieval",
                "--run",
                str(run),
                "--out",
                str(tmp_path),
                "--device",
                "cpu",
                "--figures",
                str(tmp_path / "pictures"),
            ]
        )
        == 0
    )
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["recall.png", "roc.png"]
    assert "saliency: this encoder chooses no regions" in capsys.readouterr().out


def test_saliency_is_drawn_of_the_first_volumes_of_an_encoder_that_has_it(
    prepared, tmp_path, monkeypatch, capsys
):
    """The regions handed to the picture are the map inside the mask, of the volume that the file is named
    after.
    """
    pytest.importorskip("matplotlib")
    from reaf_hsenet.evaluate import figures

    def mean_map(volume):
        return torch.nn.functional.avg_pool3d(volume, (8, 16, 16))[:, 0] + 1

    vision = SimpleNamespace(
        salient_regions=lambda volume: {
            "scan": mean_map(volume) * (mean_map(volume) >= mean_map(volume).max())
        },
    )
    handed, draw = [], figures.saliency_figure
    monkeypatch.setattr(figures, "saliency_figure", lambda *a: (handed.append(a), draw(*a)))
    args = SimpleNamespace(split="validation", figure_volumes=2, figures=tmp_path)
    fake = SimpleNamespace(model=SimpleNamespace(vision=vision))
    evaluate.saliency_figures(args, fake, load_manifest(prepared), torch.device("cpu"))
    ids = [entry["id"] for entry in entries(prepared)[1]][:2]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"saliency_{i}.png" for i in ids)
    for volume_id, (path, volume, regions, title, axes, spacing) in zip(ids, handed, strict=True):
        stored = torch.from_numpy(np.load(prepared / f"volumes/{volume_id}.npy").astype(np.float32))
        assert path.name == f"saliency_{title}.png" and title == volume_id and torch.equal(volume, stored)
        assert (regions["scan"] > 0).sum() == 1 and regions["scan"].max() == mean_map(
            stored[None, None]
        ).max()
        assert (axes, spacing) == ("SLP", None)

    vision.salient_regions = lambda volume: {}
    evaluate.saliency_figures(args, fake, load_manifest(prepared), torch.device("cpu"))
    assert len(handed) == 2 and "chooses no regions" in capsys.readouterr().out


def test_prompts_and_label_sets_are_installed_with_the_package():
    settings = (ROOT / "pyproject.toml").read_text()
    assert '"reaf_hsenet.data" = ["prompts/*.json", "label_sets/*.json", "phantom/*.json"]' in settings
    files = {p.stem for p in (ROOT / "reaf_hsenet/data/prompts").glob("*.json")}
    assert files - {"report", "questions"} == set(zeroshot.PROMPTS)


def test_labels_are_found_by_the_last_part_of_an_id_and_under_any_ending(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("VolumeName,Emphysema\nval_0_a_1.pt.gz,1\nval_0_a_2.nii.gz,0\n")
    values = read_label_table(table).values(["deep/er/val_0_a_1", "val_0_a_2"], [["Emphysema"]])
    assert values.tolist() == [[True], [False]]


def test_test_volumes_need_no_report(prepared, tmp_path):
    from reaf_hsenet.data.sources.nifti import read_nifti_folder

    (tmp_path / "scans").mkdir()
    for name in "ab":
        (tmp_path / f"scans/{name}.nii.gz").touch()
    table = tmp_path / "scans/table.csv"
    table.write_text("id,text,split\na,,test\nb,,train\n")
    splits = read_nifti_folder(tmp_path / "scans", table).splits
    assert splits["test"][0].problem is None and "empty text" in splits["train"][0].problem
    manifest = load_manifest(prepared)
    manifest.entries("validation")[0]["text"] = ""
    manifest.check(["validation"], reports=False)
    with pytest.raises(InputError, match="the report of .* is empty"):
        manifest.check(["validation"])


def test_figures_into_a_file_are_refused_before_anything_is_computed(run, tmp_path):
    (tmp_path / "figures").touch()
    with pytest.raises(InputError, match="--figures .*figures: is a file"):
        evaluate.main(["--task", "zeroshot", "--run", str(run), "--figures", str(tmp_path / "figures")])
