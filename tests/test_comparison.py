"""evaluate.py --compare: paired differences of evaluated runs."""

import csv

import numpy as np
import pytest

import evaluate
from reaf_hsenet.comparison import compare
from reaf_hsenet.errors import InputError


def write_ranks(folder, ranks, ids=None):
    (folder / "eval").mkdir(parents=True)
    with open(folder / "eval/retrieval_queries.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "scan", "report_to_volume_rank", "volume_to_report_rank"])
        writer.writerows([i, i, r, r] for i, r in zip(ids or range(len(ranks)), ranks, strict=True))
    return folder


def write_scores(folder, scores, labels):
    (folder / "eval").mkdir(parents=True)
    with open(folder / "eval/zeroshot_scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "Emphysema", "label: Emphysema"])
        writer.writerows([i, s, label] for i, (s, label) in enumerate(zip(scores, labels, strict=True)))
    return folder


def test_differences_are_from_the_first_run_and_in_any_order_of_rows(tmp_path):
    one = write_ranks(tmp_path / "one", [1, 2, 9, 9, 1, 1, 30, 2, 2, 7])
    two = write_ranks(tmp_path / "two", [7, 2, 2, 30, 1, 1, 9, 9, 1, 1], ids=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    first, second = compare("retrieval", [one, two], 200, 0)["report to volume, R@1"]
    assert first == {"value": 0.3} and second["value"] == 0.4
    assert second["difference"] == pytest.approx(0.1)
    low, high = second["interval_95"]
    assert low <= 0.1 <= high and low < high


def test_a_run_compared_with_itself_differs_by_nothing(tmp_path):
    folder = write_ranks(tmp_path / "one", list(range(1, 41)))
    for runs in compare("retrieval", [folder, folder], 100, 0).values():
        assert runs[1]["difference"] == 0 and runs[1]["interval_95"] == [0, 0]


def test_the_bootstrap_is_paired():
    """Two runs that differ on one volume only: the paired interval is far narrower than either run's own."""
    from reaf_hsenet.comparison import _recalls

    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 3, 400)
    other = ranks.copy()
    other[0] = 3 - other[0]
    rows = [[{"report_to_volume_rank": r, "volume_to_report_rank": r} for r in run] for run in (ranks, other)]
    (_, one), (_, two) = (_recalls(r, 300, 0)["report to volume, R@1"] for r in rows)
    assert np.std(two - one) < 0.15 * np.std(one)


def test_zero_shot_runs_are_compared_by_class_and_mean(tmp_path):
    labels = [0, 0, 1, 1] * 10
    good = write_scores(tmp_path / "good", [0.1, 0.2, 0.8, 0.9] * 10, labels)
    bad = write_scores(tmp_path / "bad", [0.9, 0.2, 0.8, 0.1] * 10, labels)
    found = compare("zeroshot", [good, bad], 50, 0)
    assert found["AUROC, Emphysema"][0]["value"] == 1 and found["AUROC, Emphysema"][1]["value"] == pytest.approx(0.25)
    assert found["mean auroc"][1]["difference"] == pytest.approx(-0.75)
    assert found["mean auroc"][1]["interval_95"][1] < 0


def test_the_same_seed_gives_the_same_intervals(tmp_path):
    one, two = write_ranks(tmp_path / "a", [1, 5, 2, 9] * 9), write_ranks(tmp_path / "b", [2, 1, 1, 9] * 9)
    assert compare("retrieval", [one, two], 50, 3) == compare("retrieval", [one, two], 50, 3)
    assert compare("retrieval", [one, two], 50, 3) != compare("retrieval", [one, two], 50, 4)


def test_what_cannot_be_compared_is_named(tmp_path):
    one = write_ranks(tmp_path / "one", [1, 2, 3])
    other = write_ranks(tmp_path / "other", [1, 2], ids=["x", "y"])
    with pytest.raises(InputError, match="other.*other volumes than.*one.*2 and 3"):
        compare("retrieval", [one, other], 10, 0)
    with pytest.raises(InputError, match="zeroshot_scores.csv.*run evaluate.py --task zeroshot --run .*one first"):
        compare("zeroshot", [one, one], 10, 0)
    with pytest.raises(InputError, match="--compare: expected two"):
        evaluate.main(["--task", "retrieval", "--compare", str(one)])


def test_the_script_prints_and_writes_the_comparison(tmp_path, capsys):
    one, two = write_ranks(tmp_path / "a", [1, 5, 2, 9] * 9), write_ranks(tmp_path / "b", [2, 1, 1, 9] * 9)
    command = ["--task", "retrieval", "--compare", str(one), str(two), "--bootstrap", "50", "--out", str(tmp_path)]
    assert evaluate.main(command) == 0
    assert "[2]" in capsys.readouterr().out and (tmp_path / "comparison_retrieval.json").is_file()
