"""evaluate.py --compare: paired differences of evaluated runs."""

import csv
import json

import numpy as np
import pytest

import evaluate
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.comparison import compare, fingerprint


def write_ranks(folder, ranks, ids=None):
    (folder / "eval").mkdir(parents=True)
    with open(folder / "eval/retrieval_queries.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "scan", "report_to_volume_rank", "volume_to_report_rank"])
        writer.writerows([i, i, r, r] for i, r in zip(ids or range(len(ranks)), ranks, strict=True))
    return write_subject(folder, "retrieval")


def write_subject(folder, task, **change):
    """What evaluate.py says of what it evaluated."""
    values = {"split": "validation", "reports_sha256": "0"}
    if task == "zeroshot":
        values |= {
            "prompts": {"source": "volume", "texts": {"Emphysema": ["no", "yes"]}},
            "labels": {"set": "ct-rate"},
        }
    (folder / f"eval/{task}.json").write_text(json.dumps(values | change))
    return folder


def write_scores(folder, scores, labels):
    (folder / "eval").mkdir(parents=True)
    with open(folder / "eval/zeroshot_scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "Emphysema", "label: Emphysema"])
        writer.writerows([i, s, label] for i, (s, label) in enumerate(zip(scores, labels, strict=True)))
    return write_subject(folder, "zeroshot")


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
    from reaf_hsenet.evaluate.comparison import _recalls

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
    assert found["AUROC, Emphysema"][0]["value"] == 1 and found["AUROC, Emphysema"][1][
        "value"
    ] == pytest.approx(0.25)
    assert found["mean auroc"][1]["difference"] == pytest.approx(-0.75)
    assert found["mean auroc"][1]["interval_95"][1] < 0


def test_the_same_seed_gives_the_same_intervals(tmp_path):
    one, two = write_ranks(tmp_path / "a", [1, 5, 2, 9] * 9), write_ranks(tmp_path / "b", [2, 1, 1, 9] * 9)
    assert compare("retrieval", [one, two], 50, 3) == compare("retrieval", [one, two], 50, 3)
    assert compare("retrieval", [one, two], 50, 3) != compare("retrieval", [one, two], 50, 4)


def test_what_cannot_be_compared_is_named(tmp_path):
    one = write_ranks(tmp_path / "one", [1, 2, 3])
    other = write_ranks(tmp_path / "other", [1, 2], ids=["x", "y"])
    with pytest.raises(InputError, match=r"other: was evaluated on other volumes \(2 and 3\) than .*one;"):
        compare("retrieval", [one, other], 10, 0)
    with pytest.raises(
        InputError, match="zeroshot_scores.csv.*run evaluate.py --task zeroshot --run .*one first"
    ):
        compare("zeroshot", [one, one], 10, 0)
    with pytest.raises(InputError, match="--compare: expected two"):
        evaluate.main(["--task", "retrieval", "--compare", str(one)])


@pytest.mark.parametrize("change", [{"split": "test"}, {"reports_sha256": "1"}])
def test_runs_on_another_data_set_or_split_are_not_paired(tmp_path, change):
    one, two = write_ranks(tmp_path / "one", [1, 2, 3]), write_ranks(tmp_path / "two", [1, 2, 3])
    compare("retrieval", [one, two], 10, 0)
    write_subject(two, "retrieval", **change)
    with pytest.raises(
        InputError, match=f"two: was evaluated on other {'split' if 'split' in change else 'data'} than"
    ):
        compare("retrieval", [one, two], 10, 0)


def test_the_fingerprint_is_of_reports_not_of_where_volumes_lie():
    entries = [{"id": "a", "text": "x", "volume": "1.npy"}, {"id": "b", "text": "y", "volume": "2.npy"}]
    elsewhere = [{**e, "volume": "z.npy"} for e in reversed(entries)]
    assert fingerprint(entries) == fingerprint(elsewhere)
    assert fingerprint(entries) != fingerprint([{**entries[0], "text": "z"}, entries[1]])


def test_other_prompts_classes_or_labels_are_not_paired(tmp_path):
    scores, labels = [0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]
    one, two = (write_scores(tmp_path / name, scores, labels) for name in ("one", "two"))

    def refused(words):
        with pytest.raises(InputError, match=f"two: was evaluated on other {words} than"):
            compare("zeroshot", [one, two], 10, 0)

    write_subject(two, "zeroshot", prompts={"texts": {"Emphysema": ["none", "some"]}})
    refused("prompts")
    write_subject(two, "zeroshot", labels={"set": "ct-rate-16"})
    refused("label set")
    write_subject(two, "zeroshot")
    path = two / "eval/zeroshot_scores.csv"
    whole = path.read_text()
    path.write_text(whole.replace("0.1,0", "0.1,1"))
    refused("classes or labels")
    path.write_text(whole.replace("Emphysema", "Effusion"))
    refused("classes or labels")


def test_damaged_results_are_named(tmp_path):
    one, two = write_ranks(tmp_path / "one", [1, 2, 3]), write_ranks(tmp_path / "two", [1, 2, 3])
    path = two / "eval/retrieval_queries.csv"
    for content, words in (
        (
            b"id,scan\n0,0\n1,1\n2,2\n",
            "queries.csv: has no column report_to_volume_rank, volume_to_report_rank",
        ),
        (path.read_bytes().replace(b"3,3", b"x,3"), "queries.csv: is damaged"),
        (b"id\xff\xfe,scan\n", "queries.csv: is not a UTF-8 csv file"),
        (b"", "queries.csv: has no column id"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            compare("retrieval", [one, two], 10, 0)
    (one / "eval/retrieval.json").write_text("{}")
    with pytest.raises(InputError, match="one/eval/retrieval.json: does not say what was evaluated .*again"):
        compare("retrieval", [one, one], 10, 0)


def test_too_little_to_compare_is_said(tmp_path):
    one = write_ranks(tmp_path / "one", [1])
    with pytest.raises(InputError, match="one: its 1 volumes are too few"):
        compare("retrieval", [one, one], 10, 0)
    same = write_scores(tmp_path / "same", [0.1, 0.2], [0, 0])
    with pytest.raises(InputError, match="same: its 2 volumes are too few to compare, or of one label"):
        compare("zeroshot", [same, same], 10, 0)


def test_resamples_that_lack_a_label_leave_no_nan_in_the_file(tmp_path):
    folder = write_scores(tmp_path / "run", [0.1, 0.9], [0, 1])
    for seed in range(4):  # some of these resamples are of one volume twice
        command = [
            "--task",
            "zeroshot",
            "--compare",
            *[str(folder)] * 2,
            "--bootstrap",
            "1",
            "--seed",
            str(seed),
        ]
        assert evaluate.main([*command, "--out", str(tmp_path / str(seed))]) == 0
    files = [json.loads((tmp_path / str(seed) / "comparison_zeroshot.json").read_text()) for seed in range(4)]
    intervals = [file["AUROC, Emphysema"][1]["interval_95"] for file in files]
    assert [None, None] in intervals and [0, 0] in intervals


FOREIGN = [
    "--data x",
    "--split test",
    "--run x",
    "--model reaf",
    "--checkpoint last",
    "--batch-size 2",
    "--workers 1",
    "--device cpu",
    "--figures x",
    "--figure-volumes 2",
    "--prompts organ",
    "--labels x",
]


@pytest.mark.parametrize("flag", FOREIGN)
def test_flags_of_one_runs_evaluation_are_refused_beside_compare(flag):
    with pytest.raises(
        InputError, match=f"{flag.split()[0]}: belongs to the evaluation of one run, not to --compare"
    ):
        evaluate.main(["--task", "zeroshot", "--compare", "a", "b", *flag.split()])


def test_results_below_a_file_are_refused_at_once(tmp_path):
    one = write_ranks(tmp_path / "one", [1, 2, 3])
    (tmp_path / "file").touch()
    for out in ("file", "file/below/it"):
        for flags in (["--compare", str(one), str(one)], ["--run", str(tmp_path / "none")]):
            with pytest.raises(InputError, match=f"--out {tmp_path}/file: is a file; expected a folder"):
                evaluate.main(["--task", "retrieval", *flags, "--out", str(tmp_path / out)])


def test_the_script_prints_and_writes_the_comparison(tmp_path, capsys):
    one, two = write_ranks(tmp_path / "a", [1, 5, 2, 9] * 9), write_ranks(tmp_path / "b", [2, 1, 1, 9] * 9)
    command = [
        "--task",
        "retrieval",
        "--compare",
        str(one),
        str(two),
        "--bootstrap",
        "50",
        "--out",
        str(tmp_path),
    ]
    assert evaluate.main(command) == 0
    assert "[2]" in capsys.readouterr().out and (tmp_path / "comparison_retrieval.json").is_file()
