"""evaluate.py --task mrg and --task vqa: generation over a split, resumed and split over processes, and
its scores.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
from conftest import ROOT, error_line, script
from language_run import CONTEXT, write_language_run
from reaf_hsenet.config import GENERATION, ClipConfig, TextConfig, VisionConfig
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import read_prepared
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.phantom.findings import LABELS
from reaf_hsenet.data.slice_features import add_slice_features
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import language_evaluation, language_scores
from reaf_hsenet.evaluate.language_evaluation import AnsweredRows, Asked, asked_rows
from reaf_hsenet.metrics.clinical import load_classifier, phantom_labels
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.runs import answering
from reaf_hsenet.runs.answering import answer
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.generation import generate
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.settings import to_dict
from reaf_hsenet.tokenizer.tokenizer import train_wordpiece
from reaf_hsenet.weights.slice_encoder import describe
from test_text_metrics import bert_folder

NEW = 12  # new tokens


def write_run(folder: Path, data: Path, stage: str, **options) -> Path:
    """A run whose answers depend on the volume and on every word of the question: large weights
    everywhere.
    """
    write_language_run(folder, data, stage, **options)
    path = next(folder.glob("checkpoints/step-*/model.safetensors"))
    state, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.ndim > 1 and name.startswith(("decoder.", "projectors.")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(state, path)
    (path.parent / "checkpoint.json").unlink()  # which knows of other weights
    return folder


@pytest.fixture(scope="module")
def vqa_run(prepared, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "vqa", prepared, "vqa")


@pytest.fixture(scope="module")
def mrg_run(prepared, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mrg", prepared, "mrg")


def command(task: str, run: Path, out: Path, *more) -> list[str]:
    flags = (
        "--task",
        task,
        "--run",
        run,
        "--out",
        out,
        "--device",
        "cpu",
        "--new-tokens",
        NEW,
        "--batch-size",
        3,
        *more,
    )
    return list(map(str, flags))


def evaluated(task: str, run: Path, out: Path, *more) -> tuple[list[dict], dict]:
    """The rows of the csv, and the json."""
    assert evaluate.main(command(task, run, out, *more)) == 0
    return read(task, out)


def read(task: str, out: Path) -> tuple[list[dict], dict]:
    with open(out / f"{task}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), json.loads((out / f"{task}.json").read_text())


@pytest.fixture(scope="module")
def whole(vqa_run, tmp_path_factory) -> Path:
    """The results of an evaluation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    evaluated("vqa", vqa_run, out)
    return out


def asked(run: Path, data: Path, kind: str = "location") -> tuple:
    """(the loaded run, the rows of the validation split, each row's volume (B, 1, D, H, W))."""
    loaded, manifest = load_trained(run), load_manifest(data)
    dataset = LanguageDataset(
        manifest, "validation", kind, loaded.tokenizer, loaded.model.visual_tokens, CONTEXT
    )
    rows = asked_rows(dataset)
    return loaded, rows, torch.stack([read_prepared(manifest, dataset.entries[row.entry]) for row in rows])


def test_questions_of_different_lengths_are_answered_in_a_batch_as_alone(vqa_run, prepared):
    run, rows, volume = asked(vqa_run, prepared)
    questions = [row.question for row in rows]
    alone = [
        answer(run.model, run.tokenizer, [q], v[None], None, NEW)[0]
        for q, v in zip(questions, volume, strict=True)
    ]
    assert answer(run.model, run.tokenizer, questions, volume, None, NEW) == alone
    assert len({len(ids) for ids in answering.question_ids(run.model, run.tokenizer, questions)}) > 2
    assert len(set(alone)) > len(rows) // 2
    other = answer(run.model, run.tokenizer, questions, volume.flip(0), None, NEW)
    assert sum(a != b for a, b in zip(alone, other, strict=True)) > 2  # the volume is looked at


def test_an_answer_ends_before_its_stop_token_and_has_no_special_tokens(vqa_run, prepared, tmp_path):
    run, rows, volume = asked(vqa_run, prepared)
    embeddings, mask = answering.prompt_embeddings(
        run.model, run.tokenizer, [rows[0].question], volume[:1], None
    )
    ids = generate(run.model.decoder, embeddings=embeddings, mask=mask, new_tokens=NEW)[0].tolist()
    stop = next(token for token in ids[3:] if token not in ids[:3])
    before = run.tokenizer.decode(ids[: ids.index(stop)]).strip()
    folder = shutil.copytree(vqa_run, tmp_path / "run")
    values = json.loads((folder / "config.json").read_text())
    values["model"]["decoder"]["eos_ids"].append(stop)
    (folder / "config.json").write_text(json.dumps(values))
    again = load_trained(folder)
    first, *others = answer(again.model, again.tokenizer, [row.question for row in rows], volume, None, NEW)
    assert first == before and any(len(text) > len(first) for text in others)
    assert answering.answer_text(
        run.model, run.tokenizer, [*ids[:2], run.tokenizer.id_of("<im_patch>"), run.tokenizer.eos_id, ids[3]]
    ) == (run.tokenizer.decode(ids[:2]).strip())


def test_each_volume_of_a_batch_is_encoded_once(vqa_run, prepared, whole, tmp_path, monkeypatch):
    seen = []
    features = language_evaluation.image_features
    monkeypatch.setattr(
        language_evaluation, "image_features", lambda m, v, s: seen.append(len(v)) or features(m, v, s)
    )
    rows, _ = evaluated("vqa", vqa_run, tmp_path, "--batch-size", 100)
    assert seen == [len({row["id"] for row in rows})] and seen[0] < len(rows)
    assert rows == read("vqa", whole)[0]


def test_the_answers_csv_and_json_have_the_published_columns_and_all_scores(prepared, vqa_run, whole, capsys):
    rows, scores = read("vqa", whole)
    entries = load_manifest(prepared).entries("validation")
    qa = [(e["id"], q["question"], q["answer"]) for e in entries for q in e["qa"] if q["kind"] == "location"]
    assert [(r["id"], r["Question"], r["Ground Truth"]) for r in rows] == qa
    published = [
        "Question",
        "Anatomy Type",
        "Ground Truth",
        "pred",
        "bleu1",
        "bleu2",
        "bleu3",
        "bleu4",
        "rouge1",
        "rougeL",
    ]
    assert [name for name in rows[0] if name in published] == published
    assert {"acc_class", "acc_text", "acc_class_strict"} <= set(rows[0])
    assert scores["n"] == scores["questions"] == len(rows) and scores["questions"] > 5
    assert scores["micro_average"]["acc_class"] == np.mean([int(row["acc_class"]) for row in rows])
    assert scores["micro_average"]["rouge1"] == pytest.approx(np.mean([float(row["rouge1"]) for row in rows]))
    assert set(scores["chance"]) == {"acc_anatomy", "acc_text", "acc_class", "acc_class_strict"}
    assert sum(a["support"] for a in scores["classification"]["anatomies"].values()) == len(rows)
    assert (scores["split"], scores["new_tokens"], scores["prompt"]) == ("validation", NEW, None)
    assert scores["checkpoint_sha256"] == load_trained(vqa_run).sha256()
    assert not list(whole.glob("*.jsonl"))
    language_scores.print_answers(scores)
    shown = capsys.readouterr().out
    assert (
        "class accuracy" in shown
        and "exact match" in shown
        and "chance" in shown
        and "Trachea and Bronchie" in shown
    )
    assert f"always {scores['majority']['answer']!r}" in shown


def test_a_question_without_words_of_its_own_is_drawn_as_in_the_data_set(prepared, vqa_run, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    values = json.loads((data / "manifest.json").read_text())
    for entry in values["splits"]["validation"]:
        for row in entry["qa"]:
            row.pop("question")
    (data / "manifest.json").write_text(json.dumps(values))
    rows, _ = evaluated("vqa", vqa_run, tmp_path / "a", "--data", data)
    run, manifest = load_trained(vqa_run), load_manifest(data)
    dataset = LanguageDataset(manifest, "validation", "location", run.tokenizer, 8, CONTEXT)
    drawn = [dataset.text(i, np.random.default_rng((0, 0, i)))[0] for i in range(len(dataset))]
    assert [row["Question"] for row in rows] == drawn and len(set(drawn)) > 3
    assert rows == evaluated("vqa", vqa_run, tmp_path / "b", "--data", data)[0]


def test_the_kind_of_questions_is_the_flags_else_the_runs(prepared, vqa_run, tmp_path):
    run = shutil.copytree(vqa_run, tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    values["train"]["questions"] = "presence"
    (run / "config.json").write_text(json.dumps(values))
    rows, scores = evaluated("vqa", run, tmp_path / "a")
    assert scores["questions"] == len(rows) and {row["Ground Truth"] for row in rows} == {"yes", "no"}
    rows, _ = evaluated("vqa", run, tmp_path / "b", "--questions", "size")
    assert all(row["Ground Truth"].endswith("mm") for row in rows)


def test_reports_are_asked_for_with_one_prompt_and_scored(prepared, mrg_run, tmp_path, capsys):
    rows, scores = evaluated("mrg", mrg_run, tmp_path / "a")
    entries = load_manifest(prepared).entries("validation")
    assert {row["Question"] for row in rows} == {GENERATION["mrg"]["prompt"]} == {scores["prompt"]}
    assert [(r["id"], r["Ground Truth"]) for r in rows] == [
        (e["id"], clean_report(e["text"])) for e in entries
    ]
    assert scores["labeler"] == "phantoms" and scores["clinical"]["reports"] == len(entries)
    supports = [row["support"] for row in scores["clinical"]["classes"].values()]
    assert supports == np.array([e["labels"] for e in entries]).sum(0).tolist()
    assert {"ngram_precision_1", "corpus_bleu_4", "rouge1", "rougeL", "meteor_without_synonyms"} <= set(
        scores["text"]
    )
    assert set(scores["attributes"]) == {"size"} and scores["places"]["reader"] == "phantoms"
    assert {"chance", "all_findings", "most_frequent_report"} <= set(scores["baselines"])
    shown = capsys.readouterr().out
    assert all(
        word in shown
        for word in ("micro-F1", "macro-F1", "BLEU-1", "ROUGE-L", "METEOR", "CRG", "all findings", "rows/s")
    )
    other, scores = evaluated(
        "mrg", mrg_run, tmp_path / "b", "--prompt", "Describe this chest CT.", "--limit", 2
    )
    assert [row["Question"] for row in other] == ["Describe this chest CT."] * 2 and scores["n"] == 2
    assert other[0]["pred"] != rows[0]["pred"]


def rows_of(reports: list[str]) -> list[Asked]:
    return [Asked(str(i), i, "Describe.", report) for i, report in enumerate(reports)]


def test_the_true_report_scores_one_and_the_baselines_less(prepared):
    entries = load_manifest(prepared).entries("train")
    reports, truth = [e["text"] for e in entries], np.array([e["labels"] for e in entries])
    readers = language_scores.Readers(phantom_labels, phantoms=True)
    scores, table = language_scores.report_scores(
        reports, rows_of(reports), readers, truth, phantom_labels(reports)
    )
    found, rates = scores["clinical"], truth.mean(0)
    assert (
        found["micro"]["f1"]
        == found["macro"]["f1"]
        == scores["text"]["rougeL"]
        == scores["text"]["corpus_bleu_4"]
        == 1
    )
    assert all(scores["places"][n]["recall"] == 1 for n in ("presence", "side", "lobe"))
    assert table[0]["bleu1"] == found["crg"] == 1 and not scores["not_beaten"]
    base = scores["baselines"]
    assert base["all_findings"]["micro_f1"] == pytest.approx(2 * truth.sum() / (truth.sum() + truth.size))
    assert base["all_findings"]["crg"] == pytest.approx(1 / 3) and base["all_findings"]["recall"] == 1
    assert base["chance"]["micro_f1"] == pytest.approx((rates**2).sum() / rates.sum())
    frequent = base["most_frequent_report"]
    assert frequent["report"] in reports and frequent["rougeL"] < 1
    labels = np.tile(phantom_labels([frequent["report"]]), (len(reports), 1))
    assert frequent["macro_f1"] == language_scores.clinical_report(labels, truth)["macro"]["f1"]


def test_what_generated_reports_do_not_beat_is_said_of_every_baseline(prepared, capsys):
    entries = load_manifest(prepared).entries("train")
    reports, truth = [e["text"] for e in entries], np.array([e["labels"] for e in entries])
    others = {"copied_reports": reports, "silence": [""] * len(reports)}
    texts, readers = [reports[0]] * len(reports), language_scores.Readers(phantom_labels)
    scores, _ = language_scores.report_scores(
        texts, rows_of(reports), readers, truth, phantom_labels(texts), others
    )
    lost = scores["not_beaten"]
    assert lost["copied_reports"] == ["micro-F1", "macro-F1", "CRG", "BLEU-4", "METEOR"]
    assert "micro-F1" in lost["all_findings"] and "silence" not in lost
    language_scores.print_reports(scores)
    shown = capsys.readouterr().out
    assert "do not beat copied reports in micro-F1, macro-F1, CRG, BLEU-4, METEOR\n" in shown
    assert "do not beat silence" not in shown


def test_chance_is_what_shuffled_labels_score():
    rng = np.random.default_rng(0)
    truth = (rng.random((4000, 18)) < np.linspace(0.05, 0.6, 18)).astype(int)
    drawn = (rng.random((4000, 18)) < np.linspace(0.05, 0.6, 18)).astype(int)
    expected = language_scores.guesses(truth)["chance"]
    report = language_scores.clinical_report(drawn, truth)
    assert expected["micro_f1"] == pytest.approx(report["micro"]["f1"], abs=0.01)
    assert expected["macro_f1"] == pytest.approx(report["macro"]["f1"], abs=0.01)
    empty = language_scores.guesses(np.zeros((3, 18), int))
    assert empty["chance"] == {"micro_f1": None, "macro_f1": None}
    json.dumps(empty, allow_nan=False)


def test_chance_of_a_class_is_over_pairs_of_answers():
    answers = ["lung/left lung", "lung", "heart", "heart"]
    # Drawn lung (2 of 4) is in 2, drawn heart in 2: 2 * 2 + 2 * 2 of 16 pairs.
    assert language_scores.class_chance(answers) == {"acc_class": 8 / 16, "acc_class_strict": 8 / 16}
    assert language_scores.class_chance(["lung", "mediastinum/lung hilum"]) == {
        "acc_class": 3 / 4,
        "acc_class_strict": 2 / 4,
    }


def test_only_phantoms_have_the_phantoms_labeler(prepared, mrg_run, tmp_path, capsys):
    data = shutil.copytree(prepared, tmp_path / "data")
    values = json.loads((data / "manifest.json").read_text())
    labels = values["splits"]["train"][0]["labels"]
    labels[0] = 1 - labels[0]
    (data / "manifest.json").write_text(json.dumps(values))
    assert language_scores.are_phantoms(load_manifest(prepared)) and not language_scores.are_phantoms(
        load_manifest(data)
    )
    _, scores = evaluated("mrg", mrg_run, tmp_path / "out", "--data", data)
    assert "clinical" not in scores and "attributes" not in scores and scores["labeler"] is None
    assert "findings: left out; name a classifier of reports with --classifier" in capsys.readouterr().out


def test_labels_in_another_order_are_put_in_order(prepared):
    manifest = load_manifest(prepared)
    entries = manifest.entries("validation")
    expected = language_scores.true_labels(manifest, entries)
    manifest.labels = ["Age", *reversed(LABELS)]
    turned = [{**e, "labels": [9, *reversed(e["labels"])]} for e in entries]
    assert (language_scores.true_labels(manifest, turned) == expected).all() and expected.any()
    assert language_scores.true_labels(manifest, [{**entries[0], "labels": None}]) is None


def test_a_classifier_and_a_bert_score_where_they_are_named(prepared, mrg_run, tmp_path, capsys):
    head = {
        "classifier.weight": torch.randn(18, 64, generator=torch.Generator().manual_seed(0)),
        "classifier.bias": torch.zeros(18),
    }
    classifier = bert_folder(tmp_path / "classifier", "bert", head, lambda n: f"bert.{n}")
    bert = bert_folder(tmp_path / "bert")
    data = shutil.copytree(prepared, tmp_path / "data")
    values = json.loads((data / "manifest.json").read_text())
    for entry in values["splits"]["validation"]:
        entry["labels"] = None
    (data / "manifest.json").write_text(json.dumps(values))
    rows, scores = evaluated(
        "mrg",
        mrg_run,
        tmp_path / "out",
        "--data",
        data,
        "--classifier",
        classifier,
        "--bertscore",
        bert,
        "--bertscore-layer",
        1,
    )
    labels = load_classifier(classifier)([row["Ground Truth"] for row in rows])
    assert [c["support"] for c in scores["clinical"]["classes"].values()] == labels.sum(
        0
    ).tolist() and labels.any()
    assert scores["labeler"] == str(classifier) and "places" not in scores
    assert "layer 1 of" in scores["bertscore"]["variant"]
    assert scores["bertscore"]["f1"] == pytest.approx(np.mean([float(row["bert_f1"]) for row in rows]))
    assert "BERTScore f1" in capsys.readouterr().out


def interrupted(vqa_run: Path, out: Path, how: str, after: int) -> subprocess.CompletedProcess:
    """An evaluation that a signal stops when `after` batches are answered."""
    code = f"""
import os, signal, sys
import torch
torch.set_num_threads(1)
import evaluate
from reaf_hsenet.evaluate import language_evaluation
from reaf_hsenet.script import run_script
answer, calls = language_evaluation.answer, []
def counted(*arguments, **named):
    calls.append(1)
    if len(calls) > {after}:
        os.kill(os.getpid(), signal.{how})
    return answer(*arguments, **named)
language_evaluation.answer = counted
run_script(evaluate.main, sys.argv[1:])
"""
    arguments = [sys.executable, "-c", code, *command("vqa", vqa_run, out)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def killed(vqa_run, tmp_path_factory) -> Path:
    """Results of which 6 rows are done."""
    out = tmp_path_factory.mktemp("killed")
    assert interrupted(vqa_run, out, "SIGKILL", after=2).returncode == -signal.SIGKILL
    return out


@pytest.fixture
def begun(killed, tmp_path) -> Path:
    """A copy of these."""
    return shutil.copytree(killed, tmp_path / "begun")


@pytest.mark.slow
def test_an_interrupted_evaluation_generates_only_what_is_missing(vqa_run, whole, begun, monkeypatch, capsys):
    path = begun / "vqa.rows-0.jsonl"
    assert len(path.read_text().splitlines()) == 1 + 6 and not (begun / "vqa.csv").exists()
    path.write_bytes(path.read_bytes()[:-4])  # its last line was cut off
    asked_again, function = [], language_evaluation.answer

    def counted(model, tokenizer, questions, *more, **named):
        asked_again.extend(questions)
        return function(model, tokenizer, questions, *more, **named)

    monkeypatch.setattr(language_evaluation, "answer", counted)
    rows, scores = evaluated("vqa", vqa_run, begun)
    assert (rows, scores) == read("vqa", whole)
    assert asked_again == [row["Question"] for row in rows[5:]]
    assert (
        f"5 of {len(rows)} answers are there already, {len(rows) - 5} are generated"
        in capsys.readouterr().out
    )
    assert not list(begun.glob("*.jsonl"))


@pytest.mark.slow
def test_ctrl_c_is_one_line_that_says_what_is_changeable(vqa_run, tmp_path):
    done = interrupted(vqa_run, tmp_path, "SIGINT", after=1)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"interrupted; {tmp_path} keeps 3 answers, start again to go on"


def torchrun(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--",
        str(ROOT / "evaluate.py"),
    ]
    return subprocess.run(
        [*launch, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_and_answer_as_one(vqa_run, whole, begun, tmp_path):
    done = torchrun(*command("vqa", vqa_run, begun), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (begun / "vqa.csv").read_text() == (whole / "vqa.csv").read_text()
    assert (begun / "vqa.json").read_text() == (whole / "vqa.json").read_text()
    half = (len(read("vqa", whole)[0]) - 6) // 2
    assert f"row {half} of {half}, " in done.stderr  # of the first process
    assert (
        done.stdout.count("6 of") == 1
        and done.stdout.count("written to") == 1
        and not list(begun.glob("*.jsonl"))
    )


def test_one_process_goes_on_where_several_were(vqa_run, whole, begun, monkeypatch):
    head, *records = (begun / "vqa.rows-0.jsonl").read_text().splitlines()
    (begun / "vqa.rows-0.jsonl").write_text("\n".join([head, *records[:3]]) + "\n")
    # A machine that went down may leave a file's last block empty.
    (begun / "vqa.rows-7.jsonl").write_text("\n".join([head, *records[3:], "\0" * 40]) + "\n")
    asked_again, function = [], language_evaluation.answer
    monkeypatch.setattr(
        language_evaluation, "answer", lambda *a, **n: asked_again.extend(a[2]) or function(*a, **n)
    )
    rows, _ = evaluated("vqa", vqa_run, begun)
    assert rows == read("vqa", whole)[0] and len(asked_again) == len(rows) - 6
    assert not list(begun.glob("*.jsonl"))


@pytest.mark.parametrize(
    "change", [["--new-tokens", "5"], ["--questions", "presence"], ["--split", "train"], ["--anew"]]
)
def test_answers_to_something_else_are_not_used(vqa_run, begun, change, capsys):
    rows, _ = evaluated("vqa", vqa_run, begun, *change)
    reason = (
        "as --anew says" if change == ["--anew"] else "they are of another checkpoint, data set or setting"
    )
    shown = capsys.readouterr().out
    assert f"6 answers of before are not used: {reason}" in shown and f"\n{len(rows)} answers in" in shown
    assert not list(begun.glob("*.jsonl"))


def test_answers_of_another_checkpoint_are_not_used(vqa_run, begun, tmp_path, capsys):
    run = shutil.copytree(vqa_run, tmp_path / "run")
    path = next(run.glob("checkpoints/step-*/model.safetensors"))
    save_file({n: -t for n, t in load_file(path).items()}, path)
    evaluated("vqa", run, begun)
    assert "6 answers of before are not used: they are of another checkpoint" in capsys.readouterr().out


def test_answers_about_volumes_that_were_prepared_anew_are_not_used(
    prepared, vqa_run, begun, tmp_path, capsys
):
    data = shutil.copytree(prepared, tmp_path / "data")
    values = json.loads((data / "manifest.json").read_text())
    values["splits"]["validation"][0]["source"]["rescale"] = "header"
    (data / "manifest.json").write_text(json.dumps(values))
    evaluated("vqa", vqa_run, begun, "--data", data)
    assert (
        "6 answers of before are not used: they are of another checkpoint, data set"
        in capsys.readouterr().out
    )


def test_a_first_look_leaves_the_answers_of_the_rest(vqa_run, whole, begun, capsys):
    rows, scores = evaluated("vqa", vqa_run, begun, "--limit", 4)
    assert rows == read("vqa", whole)[0][:4] and scores["n"] == 4 and "rows/s" not in capsys.readouterr().out
    assert evaluated("vqa", vqa_run, begun) == read("vqa", whole)
    assert "6 of" in capsys.readouterr().out and not list(begun.glob("*.jsonl"))


def test_a_guided_run_takes_slice_features(prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    torch.manual_seed(0)
    encoder = SliceEncoder(size=32, patch=16, width=24, depth=1, heads=2, mlp=48)
    add_slice_features(data, encoder, describe(encoder, "tiny", recipe="phantom"), progress=False)
    run = write_run(tmp_path / "run", data, "vqa", guided=True)
    rows, _ = evaluated("vqa", run, tmp_path / "a")
    for path in (data / "slices").glob("*.npy"):
        np.save(path, np.load(path)[::-1] * np.float16(3))
    others, _ = evaluated("vqa", run, tmp_path / "b")
    assert [r["pred"] for r in rows] != [r["pred"] for r in others]
    with pytest.raises(InputError, match="has no slice features; make them with preprocess.py --slices"):
        evaluate.main(command("vqa", run, tmp_path / "c", "--data", prepared))
    values = json.loads((data / "manifest.json").read_text())
    values["slices"]["sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(values))
    wrong("manifest.json: its slice features have another sha256 than", *command("vqa", run, tmp_path / "c"))


def test_bf16_is_of_the_decoder_and_other_answers_are_not_mixed_with_its_own(vqa_run, begun, capsys):
    rows, scores = evaluated("vqa", vqa_run, begun, "--precision", "bf16")
    assert scores["precision"] == "torch.bfloat16" and "not used" in capsys.readouterr().out
    assert all(row["pred"] for row in rows)


def test_the_usual_number_of_new_tokens_is_cut_to_the_context(mrg_run, tmp_path):
    flags = ["--task", "mrg", "--run", mrg_run, "--out", tmp_path, "--device", "cpu", "--limit", 1]
    assert evaluate.main(list(map(str, flags))) == 0
    run = load_trained(mrg_run)
    length = len(answering.question_ids(run.model, run.tokenizer, [GENERATION["mrg"]["prompt"]])[0])
    assert read("mrg", tmp_path)[1]["new_tokens"] == CONTEXT - length


def test_embeddings_say_which_model_made_them(prepared, tmp_path):
    manifest = load_manifest(prepared)
    tokenizer = train_wordpiece([e["text"] for e in manifest.entries("train")], 300)
    config = ClipConfig(
        vision=VisionConfig((16, 32, 32), (4, 8, 8), 32, 1, 2, 64),
        text=TextConfig(vocab=len(tokenizer), width=32, depth=1, heads=2, mlp=64),
        embed=16,
    )
    run = Run(tmp_path / "run")
    run.save(1, build_dual_encoder(config).state_dict(), {}, keep=1, best=True)
    tokenizer.save(run.folder)
    run.write_config(
        {
            "stage": "clip1",
            "model": to_dict(config),
            "recipe": to_dict(manifest.recipe),
            "data": str(prepared),
        }
    )
    assert evaluate.main(["--task", "retrieval", "--run", str(run.folder), "--device", "cpu"]) == 0
    with safe_open(run.folder / "eval/embeddings_validation.safetensors", "pt") as file:
        found = file.metadata()
    assert found["model"] == load_trained(run.folder).sha256()
    assert found["ids"].split("\n") == [e["id"] for e in manifest.entries("validation")]


def wrong(words: str, *flags) -> None:
    with pytest.raises(InputError, match=words) as caught:
        evaluate.main(list(map(str, flags)))
    assert "\n" not in str(caught.value)


def test_mistakes_are_named_before_anything_is_generated(prepared, vqa_run, mrg_run, tmp_path, monkeypatch):
    monkeypatch.setattr(language_evaluation, "answer", None)  # would be a TypeError
    out, vqa, mrg = tmp_path / "out", ("--task", "vqa", "--run", vqa_run), ("--task", "mrg", "--run", mrg_run)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text(json.dumps({"stage": "clip1", "model": {}, "recipe": {}}))
    wrong(
        "clip: is a run of stage 'clip1', which has no decoder", "--task", "mrg", "--run", tmp_path / "clip"
    )
    wrong("none: holds no run", "--task", "vqa", "--run", tmp_path / "none")
    wrong("--limit 0: expected 1 or more", *vqa, "--limit", 0)
    wrong("--new-tokens 0: expected 1 or more", *vqa, "--new-tokens", 0)
    wrong(
        f"--new-tokens 600: a question of .* of the decoder's context of {CONTEXT}", *mrg, "--new-tokens", 600
    )
    wrong("--bertscore .*none: no such folder", *vqa, "--bertscore", tmp_path / "none")
    wrong(
        "clip.*vocab_size|config.json",
        *mrg,
        "--classifier",
        tmp_path / "clip",
        "--out",
        out,
        "--device",
        "cpu",
    )
    wrong("--classifier .*none: no such folder", *mrg, "--classifier", tmp_path / "none")
    wrong("--bertscore-layer: is of the model that --bertscore names", *mrg, "--bertscore-layer", 1)
    wrong("--prompt: is empty", *mrg, "--prompt", " ")
    wrong("the test split is empty", *vqa, "--split", "test")
    wrong("--questions.*colour", *vqa, "--questions", "colour")
    data = shutil.copytree(prepared, tmp_path / "data")
    values = json.loads((data / "manifest.json").read_text())
    for entry in values["splits"]["validation"]:
        entry["qa"] = [row for row in entry["qa"] if row["kind"] != "size"]
    (data / "manifest.json").write_text(json.dumps(values))
    wrong(
        "manifest.json: its validation split has no questions of kind size",
        *vqa,
        "--questions",
        "size",
        "--data",
        data,
    )
    values["recipe"]["window"] = [-1150, 350]
    (data / "manifest.json").write_text(json.dumps(values))
    wrong("have window -1150x350, but .*vqa needs window -1000x200", *vqa, "--data", data)
    assert not out.exists()


@pytest.mark.parametrize(
    ("task", "flag", "owners"),
    [
        ("vqa", "--prompt x", "mrg"),
        ("vqa", "--classifier x", "mrg"),
        ("mrg", "--questions size", "vqa"),
        ("mrg", "--figures x", "retrieval and zeroshot and probe"),
        ("vqa", "--bootstrap 5", "retrieval and zeroshot and probe"),
        ("retrieval", "--new-tokens 5", "mrg and vqa"),
        ("zeroshot", "--limit 3", "mrg and vqa"),
        ("probe", "--protocol dup_all", "retrieval"),
        ("retrieval", "--predictions x", "mrg"),
        ("mrg", "--compare a b", "retrieval and zeroshot and probe"),
    ],
)
def test_flags_of_other_tasks_are_refused_by_name(task, flag, owners):
    wrong(f"{flag.split()[0]}: is an option of --task {owners}; leave it out", "--task", task, *flag.split())


@pytest.mark.slow
def test_the_default_run_is_the_tasks_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong("runs/mrg-hsenet: holds no run", "--task", "mrg")
    wrong("runs/vqa-reaf: holds no run", "--task", "vqa", "--model", "reaf")
    line = error_line(script("evaluate.py", "--task", "vqa", "--limit", 0, cwd=tmp_path))
    assert line == "error: --limit 0: expected 1 or more"


def test_a_volume_that_cannot_be_read_is_named_and_the_answers_before_it_are_changeable(
    prepared, vqa_run, tmp_path
):
    data = shutil.copytree(prepared, tmp_path / "data")
    last = load_manifest(data).entries("validation")[-1]
    path = data / last["volume"]
    voxels = np.load(path)
    voxels[0, 0, 0] = np.nan
    np.save(path, voxels)
    flags = command("vqa", vqa_run, tmp_path / "out", "--data", data, "--batch-size", 1)
    wrong(f"{path}: holds NaN", *flags)
    kept = len((tmp_path / "out/vqa.rows-0.jsonl").read_text().splitlines()) - 1
    assert 0 < kept
    shutil.copy(prepared / last["volume"], path)
    assert evaluate.main(flags) == 0


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "5",
        "null",
        '{"a": 1}',
        '{"row": [1], "answer": "x"}',
        '{"row": "1", "answer": "x"}',
        '{"row": -1, "answer": "x"}',
        '{"row": 1, "answer": 5}',
        "[" * 50_000,
    ],
)
def test_a_damaged_line_of_kept_answers_costs_that_row_alone(tmp_path, line):
    ranks = Ranks(0, 1, torch.device("cpu"))
    AnsweredRows(tmp_path, "mrg", {"a": 1}, ranks).add({0: "one"})
    with open(tmp_path / "mrg.rows-0.jsonl", "a") as file:
        file.write(line + "\n")
    assert AnsweredRows(tmp_path, "mrg", {"a": 1}, ranks).kept == {0: "one"}
