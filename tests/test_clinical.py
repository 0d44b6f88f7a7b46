"""Clinical scores of generated reports: findings, their attributes, and classifiers that label texts."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fill
from reaf_hsenet.data.phantom.findings import LABELS, sample_findings
from reaf_hsenet.data.phantom.reports import write_report
from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics.bertscore import load_text_reader
from reaf_hsenet.metrics.clinical import (
    clinical_report,
    crg,
    load_classifier,
    phantom_labels,
    size_agreement,
)
from reaf_hsenet.models.text_encoder import TextEncoder
from reaf_hsenet.weights.names import BERT, import_state
from reaf_hsenet.weights.shapes import bert_config
from test_text_metrics import bert_folder

TEXTS = ["A nodule in the left lung.", "", "Ground-glass opacities in both lungs, 12 mm.", "心脏", "  "]
HEAD = {"weight": torch.from_numpy(fill.normal("head.weight", (18, 64), 0)), "bias": torch.zeros(18)}
ROBERTA_DENSE = {
    "weight": torch.from_numpy(fill.fill("classifier.dense.weight", (64, 64), 0)),
    "bias": torch.from_numpy(fill.fill("classifier.dense.bias", (64,), 0)),
}


def named(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


# kind, head under its published names, published name of each name of the bare encoder ("" leaves it out)
LAYOUTS = {
    "BertForSequenceClassification": ("bert", named("classifier.", HEAD), lambda n: f"bert.{n}"),
    "RobertaForSequenceClassification": (
        "roberta",
        named("classifier.out_proj.", HEAD) | named("classifier.dense.", ROBERTA_DENSE),
        lambda n: "" if n.startswith("pooler") else f"roberta.{n}",
    ),
    "RadBertClassifier": ("roberta", named("classifier.", HEAD), lambda n: f"model.{n}"),
}


@pytest.fixture
def matrices():
    """Of three findings, the last is in no true report."""
    truth = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]])
    predicted = np.array([[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]])
    return predicted, truth


def test_micro_is_over_all_findings_and_macro_over_those_that_occur(matrices):
    report = clinical_report(*matrices, names=("a", "b", "c"))
    assert report["classes"]["a"] == {
        "precision": 1,
        "recall": 2 / 3,
        "f1": 0.8,
        "support": 3,
        "predicted": 2,
    }
    assert report["micro"] == {"precision": 2 / 4, "recall": 2 / 5, "f1": 4 / 9}
    assert report["macro"] == {"precision": 1 / 2, "recall": 1 / 3, "f1": 0.4}


def test_a_class_without_positives_is_left_out_of_the_mean_and_named(matrices):
    report = clinical_report(*matrices, names=("a", "b", "c"))
    assert report["classes"]["c"]["recall"] is None and report["classes"]["c"]["precision"] == 0
    assert report["left_out_of_macro"] == ["c"] and report["classes_in_macro"] == 2


def test_reports_without_any_finding_have_no_recall():
    nothing = np.zeros((2, 18), int)
    report = clinical_report(nothing, nothing)
    assert report["micro"]["recall"] is None and report["macro"]["f1"] is None
    assert report["left_out_of_macro"] == list(LABELS)
    json.dumps(report, allow_nan=False)


def test_a_phantoms_own_report_is_perfect_and_an_empty_one_names_nothing():
    rng = np.random.default_rng(1)
    reports = [write_report(sample_findings(rng), rng)[0] for _ in range(60)]
    labels = phantom_labels(reports)
    perfect = clinical_report(labels, labels)
    assert perfect["micro"] == {"precision": 1, "recall": 1, "f1": 1} and not perfect["left_out_of_macro"]
    empty = phantom_labels([""] * 60)
    assert not empty.any() and clinical_report(empty, labels)["micro"] == {
        "precision": 0,
        "recall": 0,
        "f1": 0,
    }
    agreement = size_agreement(reports, reports)
    assert agreement["agreement"] == 1 and agreement["mean_abs_error_mm"] == 0 and agreement["compared"] > 60


# 2 reports of 5 findings, 2 of them present: r = 8 / (2 * 2) = 2, U = 8 / 2 = 4.
TWO = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (TWO, 1),  # s = 4, 4 / (8 - 4)
        (TWO * 0, 1 / 3),  # s = -4, 4 / (8 + 4)
        (TWO * 0 + 1, 1 / 3),  # s = 4 - 8, 4 / (8 + 4)
        ([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], 4 / 9),  # s = 2 - 2 - 1, 4 / (8 + 1)
        (1 - TWO, 4 / 20),  # s = -4 - 8, 4 / (8 + 12)
    ],
)
def test_crg_is_that_of_the_challenge(predicted, expected):
    assert crg(np.array(predicted), TWO) == pytest.approx(expected)
    assert clinical_report(np.array(predicted), TWO, "abcde")["crg"] == pytest.approx(expected)


def test_without_positives_or_negatives_there_is_no_crg():
    assert crg(TWO, TWO * 0) is None and crg(TWO, TWO * 0 + 1) is None


NODULE = "A solid nodule measuring {} mm is observed in the {} lobe."


@pytest.mark.parametrize(("size", "agrees"), [(20, 1), (22, 1), (23, 0)])
def test_a_size_agrees_within_two_mm(size, agrees):
    found = size_agreement([NODULE.format(size, "left upper")], [NODULE.format(20, "right upper")])
    assert (found["agreement"], found["mean_abs_error_mm"]) == (agrees, size - 20)


def test_only_sizes_of_findings_of_both_reports_are_compared_and_leaving_open_does_not_agree():
    reference = [NODULE.format(20, "right upper"), "There is cardiomegaly; the cardiothoracic ratio is 0.6."]
    found = size_agreement(["A nodule is seen.", NODULE.format(20, "right upper")], reference)
    assert found == {"agreement": 0, "compared": 1, "both_stated": 0, "mean_abs_error_mm": None}


def test_a_cardiothoracic_ratio_is_no_size_in_mm():
    texts = ["There is cardiomegaly; the cardiothoracic ratio is 0.6."]
    assert size_agreement(texts, texts)["compared"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_classifier_gives_its_labels(tmp_path, layout):
    kind, head, rename = LAYOUTS[layout]
    folder = bert_folder(tmp_path / "made", kind, head, rename)
    classify = load_classifier(folder, batch_size=2)
    found = classify(TEXTS)
    bare = bert_folder(tmp_path / "bare", kind)
    published = load_file(bare / "model.safetensors")
    encoder = TextEncoder(**vars(bert_config(bare))).eval()
    encoder.load_state_dict(import_state(BERT, published))
    dense = (
        ROBERTA_DENSE
        if layout.startswith("Roberta")
        else {part: published[f"pooler.dense.{part}"] for part in ("weight", "bias")}
    )
    for i, text in enumerate(TEXTS):
        if not text.strip():
            assert not found[i].any()
            continue
        around = (
            [2, 3] if kind == "bert" else [0, 2]
        )  # places of the class and the end token in the vocabulary
        ids = load_text_reader(folder).ids(text)
        assert [ids[0], ids[-1]] == around
        with torch.no_grad():
            state = encoder(torch.tensor([ids]))[0, 0]
        logits = HEAD["weight"] @ torch.tanh(dense["weight"] @ state + dense["bias"]) + HEAD["bias"]
        assert found[i].tolist() == (logits >= 0).int().tolist()
        assert 0 < found[i].sum() < 18
    assert classify([]).shape == (0, 18)


def test_ct_rates_file_beside_a_bare_encoder_is_the_one_that_is_read(tmp_path):
    kind, head, rename = LAYOUTS["RadBertClassifier"]
    whole, bare = bert_folder(tmp_path / "whole", kind, head, rename), bert_folder(tmp_path / "bare", kind)
    with pytest.raises(InputError, match="head.weight is missing"):
        load_classifier(bare)
    torch.save(load_file(whole / "model.safetensors"), bare / "RadBertClassifier.pth")
    assert (load_classifier(bare)(TEXTS) == load_classifier(whole)(TEXTS)).all()


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_columns_follow_the_names_in_the_config(tmp_path):
    folder = bert_folder(tmp_path / "made", *LAYOUTS["BertForSequenceClassification"])
    plain = load_classifier(folder)(TEXTS)
    edit_config(folder, id2label={str(i): name for i, name in enumerate(reversed(LABELS))})
    assert (load_classifier(folder)(TEXTS) == plain[:, ::-1]).all() and (plain != plain[:, ::-1]).any()


def test_classifiers_of_other_labels_and_unknown_weights_are_refused_by_name(tmp_path):
    kind, head, rename = LAYOUTS["BertForSequenceClassification"]
    folder = bert_folder(tmp_path / "made", kind, head, rename)
    edit_config(folder, id2label={str(i): name for i, name in enumerate((*LABELS[:17], "Tree in bud"))})
    with pytest.raises(InputError, match="id2label differs from CT-RATE's 18 labels in .*tree in bud"):
        load_classifier(folder)
    edit_config(folder, id2label={"0": "LABEL_0", "1": "LABEL_1"})
    state = load_file(folder / "model.safetensors")
    for change, problem in (
        ({"adapter.down": torch.zeros(2)}, "adapter.down is not known"),
        ({"classifier.weight": torch.zeros(20, 64)}, r"head.weight is \(20, 64\), expected \(18, 64\)"),
    ):
        save_file(state | change, folder / "model.safetensors")
        with pytest.raises(InputError, match=problem):
            load_classifier(folder)
