"""The subsets of volumes that retrieval is scored among, their intervals, and label tables of a user."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.protocols import PROTOCOLS, choose_protocols, in_plane_spacing, protocol_rows
from reaf_hsenet.evaluate.retrieval import Task, draws, intervals, score
from reaf_hsenet.files import read_json
from tiny import retrieval


def volume(name: str, spacing: float, text: str, **more) -> dict:
    table = {"spacing": [spacing, spacing, 5.0], "slope": None, "intercept": None}
    return {"id": name, "scan": name.rpartition("_")[0], "text": text, "table": table, **more}


# valid_10_a comes before valid_2_a and valid_3_a by name. Its text is that of valid_3_a.
VOLUMES = [
    volume("valid_2_a_10", 0.7, "clear"),
    volume("valid_2_a_2", 0.7, "clear"),
    volume("valid_3_a_1", 0.9, "effusion"),
    volume("valid_3_a_2", 0.6, "effusion"),
    volume("valid_10_a_2", 0.5, "effusion"),
    volume("valid_10_a_1", 0.8, "effusion"),
    volume("valid_4_a_1", 0.4, "skull", chest=False),
    volume("valid_4_a_2", 0.3, "skull"),
]


def of(volumes: list[dict], text: str = "findings") -> Manifest:
    return Manifest(Path("x"), "x", RECIPES["hsenet"], "float16", text, (), {"validation": volumes})


@pytest.mark.parametrize(
    "name, kept",
    [
        ("dup_all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("dup_nohead", [0, 1, 2, 3, 4, 5]),  # the whole study of the volume that is listed
        ("first_all", [0, 2, 5, 6]),  # _10 before _2, as file names are sorted
        ("first_nohead", [0, 2, 5]),
        (
            "smallestdeduptext_all",
            [0, 4, 7],
        ),  # equal spacing: by name; equal text: valid_10_a before valid_3_a
        ("smallestdeduptext_nohead", [0, 4]),
    ],
)
def test_a_protocol_keeps_the_volumes_that_radfinder_keeps(name, kept):
    manifest = of(VOLUMES)
    assert protocol_rows(name, manifest, "validation") == kept
    turned = of(VOLUMES[::-1])
    ids = {VOLUMES[i]["id"] for i in kept}
    assert {turned.entries("validation")[i]["id"] for i in protocol_rows(name, turned, "validation")} == ids
    assert name in choose_protocols((), manifest, "validation")[0] and len(PROTOCOLS) == 6


def test_spacing_is_the_tables_else_the_files_along_left_and_right():
    source = {"spacing": [5.0, 0.7, 0.9], "orientation": "SPR"}
    for table in ({"spacing": ["nan"] * 3, "slope": None, "intercept": None}, None):
        entry = {"source": source, **({"table": table} if table else {})}
        assert in_plane_spacing(entry) == 0.9
    assert in_plane_spacing({**VOLUMES[0], "source": source}) == 0.7
    assert np.isnan(in_plane_spacing({"source": {"file": "x"}}))


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("first_nohead", lambda v: v.pop("chest", 0), "marked as no chest; put the .*metadata/no_chest_"),
        (
            "smallestdeduptext_all",
            lambda v: v.pop("table"),
            "in-plane spacing of valid_2_a_10; prepare again",
        ),
        ("dup_nohead", lambda v: v.update(chest=False), "leaves none of the validation volumes"),
    ],
)
def test_what_the_data_do_not_tell_is_not_offered_and_refused_where_asked_for(name, change, words):
    changed = [dict(v) for v in VOLUMES]
    for one in changed:
        change(one)
    manifest = of(changed)
    rows, left_out = choose_protocols((), manifest, "validation")
    assert name in left_out and name not in rows and {"dup_all", "first_all"} <= set(rows)
    with pytest.raises(InputError, match=f"--protocol {name}: .*{words}"):
        choose_protocols((name,), manifest, "validation")


def test_texts_with_impressions_are_not_those_that_are_compared():
    with pytest.raises(InputError, match="texts have impressions; prepare the findings alone"):
        protocol_rows("smallestdeduptext_all", of(VOLUMES, "findings and impressions"), "validation")


def test_recall_is_by_exact_pair_inside_the_subset():
    """Volume 1 is nearest to report 0; without it report 0 finds its own."""
    image = torch.nn.functional.normalize(torch.tensor([[1, 0.2], [1, 0.1], [0, 1]]), dim=1)
    text = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    entries = [{"id": name, "scan": name[0]} for name in ("a1", "a2", "b1")]
    protocols = {"dup_all": [0, 1, 2], "first_all": [0, 2]}
    scores = score(image, text, entries, Task(protocols, {}, []), resamples=0, seed=0).values
    whole, first = (scores["protocols"][name] for name in ("dup_all", "first_all"))
    assert whole["report_to_volume"]["R@1"] == 2 / 3 and whole["chance"]["R@1"] == 1 / 3 and whole["n"] == 3
    assert first["report_to_volume"]["R@1"] == 1 and first["chance"]["R@1"] == 1 / 2 and first["n"] == 2
    assert whole["report_to_volume"]["interval_95"]["R@1"] == [None, None]
    assert scores["report_to_volume"] == {
        k: v for k, v in whole["report_to_volume"].items() if k != "interval_95"
    }


def test_intervals_draw_scans_with_all_their_volumes():
    values, scans = torch.tensor([[1.0], [1], [1], [0], [0.5]]), torch.tensor([4, 4, 4, 7, 9])
    means = []
    for counts in draws(3, 300, seed=5):
        drawn = [
            values[scans == scan] for scan, count in zip((4, 7, 9), counts, strict=True) for _ in range(count)
        ]
        means.append(torch.cat(drawn).double().mean().item())
    expected = pytest.approx(np.percentile(means, (2.5, 97.5)))
    assert intervals(values, scans, ["R@1"], 300, seed=5) == {"R@1": expected}


def evaluated(run: Path, *more) -> dict:
    assert evaluate.main(retrieval(run, *more)) == 0
    return read_json(run / "eval/retrieval.json")


def write_labels(path: Path, data: Path, rows: list[list[int]], names: str = "AB") -> Path:
    with open(path, "w", newline="") as file:
        ids = [entry["id"] for entry in load_manifest(data).entries("validation")]
        csv.writer(file).writerows([["id", *names], *([i, *row] for i, row in zip(ids, rows, strict=True))])
    return path


def test_protocols_are_printed_with_n_and_chance_and_seeded_intervals(run_copy, capsys):
    found = evaluated(run_copy, "--seed", 3)
    assert list(found["protocols"]) == ["dup_all", "first_all", "smallestdeduptext_all"]
    assert set(found["protocols_left_out"]) == {"dup_nohead", "first_nohead", "smallestdeduptext_nohead"}
    shown = capsys.readouterr().out
    first = found["protocols"]["first_all"]
    assert first["n"] == found["scans"] == 6 < found["n"] and first["chance"]["R@5"] == 5 / 6
    line = next(line for line in shown.splitlines() if line.startswith("report to volume, first_all"))
    assert line.split()[4:6] == ["6", "0.833"] and f"{first['report_to_volume']['R@5']:.3f}" in line
    low, high = first["report_to_volume"]["interval_95"]["R@5"]
    assert f"{low:.3f} to {high:.3f}" in line and low <= first["report_to_volume"]["R@5"] <= high
    assert "smallestdeduptext_all: the volumes of first_all\n" in shown and shown.count("first_all  ") == 3
    assert found["protocols_same"] == {"smallestdeduptext_all": "first_all"}
    assert found["protocols"]["smallestdeduptext_all"] == first
    assert shown.count("left out: dup_nohead, first_nohead, smallestdeduptext_nohead: ") == 1
    assert evaluated(run_copy, "--seed", 3)["protocols"] == found["protocols"]
    only = evaluated(run_copy, "--protocol", "first_all", "--bootstrap", 0)
    assert list(only["protocols"]) == ["first_all"] and only["report_to_volume"] == found["report_to_volume"]


def test_two_label_tables_are_named_and_scored_side_by_side(run_copy, prepared, tmp_path, capsys):
    count = len(load_manifest(prepared).entries("validation"))
    one = write_labels(tmp_path / "one.csv", prepared, [[1, 0]] * count)
    two = write_labels(tmp_path / "two.csv", prepared, [[i % 2, 0] for i in range(count)])
    found = evaluated(run_copy, "--labels", one, two, "--protocol", "dup_all")
    assert found["labels"] == {"table": str(one)} and found["second_labels"]["labels"] == {"table": str(two)}
    maps = [part["volume_to_volume"]["map"]["dup_all"] for part in (found, found["second_labels"])]
    assert [m["n"] for m in maps] == [count, count // 2]
    assert maps[0]["MAP@5"] == maps[0]["chance"]["5"] == 1  # every volume has the same label
    assert maps[0]["interval_95"]["5"] == [1, 1]
    shown = capsys.readouterr().out
    assert f"labels [1]: {one}\nlabels [2]: {two}\n" in shown and "n [2]" in shown
    own = evaluated(run_copy)
    assert own["labels"] == {"table": str(prepared / "manifest.json")} and "second_labels" not in own


def test_zeroshot_by_two_label_tables_prints_both(run_copy, prepared, tmp_path, capsys):
    count, names = len(load_manifest(prepared).entries("validation")), ("Emphysema", "Atelectasis")
    one = write_labels(tmp_path / "one.csv", prepared, [[i % 2, 1 - i % 2] for i in range(count)], names)
    two = write_labels(tmp_path / "two.csv", prepared, [[int(i < 2), i % 2] for i in range(count)], names)
    argv = ["--task", "zeroshot", "--run", run_copy, "--device", "cpu", "--labels"]
    single = []
    for table in (one, two):
        assert evaluate.main(list(map(str, [*argv, table]))) == 0
        single.append(read_json(run_copy / "eval/zeroshot.json"))
    assert f"labels: {two}\n" in capsys.readouterr().out
    assert evaluate.main(list(map(str, [*argv, one, two]))) == 0
    both = read_json(run_copy / "eval/zeroshot.json")
    assert both["classes"] == single[0]["classes"] and both["labels"]["table"] == str(one)
    assert both["second_labels"]["classes"] == single[1]["classes"]
    shown = capsys.readouterr().out
    auroc = [f"{part['classes']['Atelectasis']['auroc']:.3f}" for part in single]
    lines = [line.split() for line in shown.split("labels [2]")[1].splitlines()]
    assert [[line[2], line[5]] for line in lines if line[0] == "Atelectasis"] == [auroc]
