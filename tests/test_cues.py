"""Findings before words: which findings there are, the head that predicts them, the words that say them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluate
import infer
import train
from reaf_hsenet.config import Augmentation
from reaf_hsenet.data.language import add_image_tokens, cue_ids, cue_text
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import scan_model
from reaf_hsenet.evaluate.scan_model import contradictions
from reaf_hsenet.metrics.places import phantom_places, rule_places, rule_sizes
from reaf_hsenet.models.findings import SCALE, FindingsHead
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.runs.trained import load_trained
from reaf_hsenet.tokenizer.tokenizer import train_words
from reaf_hsenet.train.cues import CueTable, truth_sha256
from reaf_hsenet.train.language import measure_findings, token_mean
from test_mllm import inputs, model
from tiny import config_of, language, resume, wrong

FINDINGS = (
    ("Cardiomegaly", ""),
    ("Pleural effusion", ""),
    ("Pleural effusion", "left"),
    ("Pleural effusion", "left lower lobe"),
    ("Pleural effusion", "right"),
)
NAN = float("nan")


def test_a_cue_names_findings_with_their_places_and_no_side_twice():
    assert cue_text(FINDINGS, [1, 1, 1, 0, 1]) == "Findings: cardiomegaly; pleural effusion (left, right). "
    assert cue_text(FINDINGS, [0, 1, 1, 1, 0]) == "Findings: pleural effusion (left lower lobe). "
    assert cue_text(FINDINGS, [0, 0, 0, 0, 0]) == cue_text((), ()) == "Findings: none. "


def test_the_manifest_labels_and_reports_give_what_is_drawn(prepared):
    manifest = load_manifest(prepared)
    table = CueTable(manifest, None, ("train", "validation"), places=True)
    findings = table.findings()
    truth = table.truth(findings)
    assert [label for label, place in findings if not place] == list(manifest.labels)
    for entry in manifest.all_entries():
        read, sizes = phantom_places(entry["text"]), rule_sizes(entry["text"])
        for (label, place), value in zip(findings, truth[entry["id"]].tolist(), strict=True):
            told = {*read[label][0], *read[label][1], *sizes[label]} if label in read else set()
            assert value == (place in told if place else entry["labels"][manifest.labels.index(label)])
    plain = CueTable(manifest, None, ("train", "validation"), places=False)
    assert all(not place for _, place in plain.findings())


def test_rules_on_reports_give_labels_to_volumes_that_have_none(prepared):
    manifest = load_manifest(prepared)
    for entry in manifest.all_entries():
        entry["labels"] = None
    with pytest.raises(InputError, match="no labels.*--labels"):
        CueTable(replace(manifest, labels=()), None, ("train", "validation"), places=True)
    table = CueTable(manifest, "reports", ("train", "validation"), places=True)
    findings = table.findings()
    truth = table.truth(findings)
    for entry in manifest.entries("train"):
        read, shown = rule_places(entry["text"]), truth[entry["id"]]
        told = zip(findings, shown.tolist(), strict=True)
        assert {label for (label, place), value in told if not place and value} == {*read}
    for entry in manifest.entries("train"):
        entry["text"] = "The examination is unremarkable."
    with pytest.raises(InputError, match="--labels reports: no training volume has a finding"):
        CueTable(manifest, "reports", ("train", "validation"), places=True)


def test_a_table_corrects_labels_and_a_place_that_no_report_tells_is_unknown(prepared, tmp_path):
    manifest = load_manifest(prepared)
    rows = [(entry["id"], 1) for entry in manifest.all_entries()]
    path = tmp_path / "labels.csv"

    def write(rows):
        path.write_text("VolumeName,Pleural effusion\n" + "".join(f"{i}.nii.gz,{v}\n" for i, v in rows))

    write(rows)
    truth = CueTable(manifest, str(path), ("train", "validation"), places=True).truth(
        (("Pleural effusion", ""), ("Pleural effusion", "left"))
    )
    for entry in manifest.entries("train"):
        read = phantom_places(entry["text"])
        label, left = truth[entry["id"]].tolist()
        assert label == 1
        known = "Pleural effusion" in read
        assert np.isnan(left) != known and (not known or left == ("left" in read["Pleural effusion"][0]))
    write(rows[1:])
    with pytest.raises(InputError, match=f"has no labels of volume {rows[0][0]}"):
        CueTable(manifest, str(path), ("train", "validation"), places=True)


def test_the_hash_of_findings_changes_with_one_of_them():
    one = {"a": torch.tensor([1.0, NAN]), "b": torch.tensor([0.0, 0.0])}
    assert truth_sha256(one) == truth_sha256(dict(reversed(one.items())))
    assert truth_sha256(one) != truth_sha256(one | {"b": torch.tensor([0.0, 1.0])})


def head(dropout: float = 0.0) -> FindingsHead:
    torch.manual_seed(0)
    made = FindingsHead([6, 4], FINDINGS, dropout)
    made.start(
        torch.randn(50, 10) * 0.01 + 3,
        (torch.rand(200, 5) < torch.tensor([0.5, 0.2, 0.1, 0.02, 0.1])).float(),
    )
    return made


def test_a_new_head_says_how_frequent_findings_are_and_is_as_sensitive_to_any_size_of_tokens():
    made = head()
    tokens = [torch.randn(400, 7, 6), torch.randn(400, 7, 4)]
    scaled = [x - x.mean(1, keepdim=True) + 0.01 * torch.randn(400, 1, x.shape[2]) + 3 for x in tokens]
    logits = made(scaled)
    probability = made.probabilities(torch.zeros_like(logits) + SCALE * made.linear.bias)
    assert torch.allclose(probability[0], made.prior, atol=1e-6)
    assert logits.std(0).min() > 0.02  # of a difference of 0.01 between patients


def test_weights_by_frequency_change_the_optimum_of_the_logits_and_not_of_the_probabilities():
    """With a weight w on presence, the loss is least at logit p + log w: that is taken off again."""
    made, p = head(), 0.2
    logits = torch.zeros(1, 5, requires_grad=True)
    truth = (torch.arange(10) < 10 * p).float()[:, None].expand(-1, 5)
    optimizer = torch.optim.LBFGS([logits], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss, _ = made.loss(logits.expand(10, -1), truth)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(made.probabilities(logits.detach()), torch.tensor(p), atol=1e-3)
    assert not torch.allclose(logits.detach().sigmoid(), torch.tensor(p), atol=0.05)


def test_what_is_unknown_is_not_learned():
    made, logits = head(), torch.randn(3, 5, requires_grad=True)
    truth = torch.tensor([[1, 0, 0, 0, 0], [NAN] * 5, [1, 1, NAN, 0, 1]])
    loss, count = made.loss(logits, truth)
    loss.backward()
    assert torch.equal(logits.grad != 0, truth.isfinite()) and count == truth.isfinite().sum()
    assert made.loss(logits, torch.full((3, 5), NAN)) == (0, 0)


def test_error_rates_are_those_of_the_predictions_and_cues_in_training_have_them():
    torch.manual_seed(1)
    made, n = head(), 20_000
    truth = (torch.rand(n, 5) < 0.3).float()
    truth[:, 2:] *= truth[:, 1:2]
    probabilities = (0.5 * truth + 0.8 * torch.rand(n, 5)).clamp(0, 1)
    made.measure(probabilities, truth, torch.full((5,), 0.6))
    told = made.under_labels(probabilities > 0.6)
    told_places = told[:, 1]
    assert torch.isclose(
        made.missed[0], (~told & (truth == 1))[:, 0].sum() / (truth[:, 0] == 1).sum(), atol=1e-3
    )
    wrong = (told & (truth == 0))[:, 2] & told_places
    assert torch.isclose(made.invented[2], wrong.sum() / ((truth[:, 2] == 0) & told_places).sum(), atol=1e-3)

    noisy, kept = made.noisy(truth, torch.rand(n, 5))
    assert kept.all() and not (noisy[:, 2:] & ~noisy[:, 1:2]).any()
    for j in (0, 1):
        there = truth[:, j] == 1
        assert torch.isclose((~noisy[there, j]).float().mean(), made.missed[j], atol=0.01)
        assert torch.isclose(noisy[~there, j].float().mean(), made.invented[j], atol=0.01)


def test_rows_without_labels_or_draws_have_no_cue():
    truth, draws = torch.zeros(3, 5), torch.rand(3, 5)
    truth[0, 1], draws[1] = NAN, NAN
    assert head().noisy(truth, draws)[1].tolist() == [False, False, True]


def test_thresholds_are_of_best_f1_and_of_places_where_their_label_is():
    made = head()
    truth = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).float()
    probabilities = torch.tensor([[0.1, 0.8, 0.6], [0.2, 0.7, 0.3], [0.3, 0.2, 0.9], [0.4, 0.1, 0.9]])
    probabilities = torch.cat((probabilities, torch.full((4, 2), 0.5)), 1)
    before = measure_findings(made, probabilities, truth)
    assert before == pytest.approx(2 / 3) and measure_findings(made, probabilities, truth) == 1
    assert 0.2 < made.thresholds[0] < 0.3 and 0.2 < made.thresholds[1] < 0.7
    assert 0.3 < made.thresholds[2] < 0.6  # the 0.9 of rows without an effusion do not count
    assert made.thresholds[3] == 0.5 and made.missed[3] == 0.2  # nobody has it: both stay


def drawn(truth: torch.Tensor) -> torch.Tensor:
    """(B, 2, K) as batches have it: with draws that make no error."""
    return torch.stack((truth, torch.full_like(truth, 0.999)), 1)


def cued(dropout: float = 0.0) -> Mllm:
    """The small model with a head, whose cues are the findings' numbers as tokens 50, 51, ..."""
    made = model()
    made.findings = FindingsHead([24, 24], FINDINGS, dropout)
    made.cue_ids = lambda told: [50 + j for j, present in enumerate(told) if present]
    return made


def test_a_cue_stands_after_the_image_tokens_and_is_seen_but_not_learned():
    mllm, given = cued(), inputs(cued())
    at = 1 + mllm.visual_tokens
    ids, mask, labels = mllm.with_cues([[50, 51], []], given["ids"], given["mask"], given["labels"])
    assert ids[0, at : at + 2].tolist() == [50, 51] and mask[0, at : at + 2].tolist() == [1, 1]
    assert torch.equal(ids[0, at + 2 :], given["ids"][0, at:]) and torch.equal(
        ids[1, at:-2], given["ids"][1, at:]
    )
    assert (labels[0, at : at + 2] == -100).all() and (labels[1, -2:] == -100).all()
    assert mask[1, -2:].tolist() == [0, 0] and (labels != -100).sum() == (given["labels"] != -100).sum()


def test_training_says_the_truth_and_evaluation_what_the_head_predicts():
    mllm, truth = cued(), torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]]).float()
    mllm.findings.missed.zero_(), mllm.findings.invented.zero_()
    seen = []
    mllm.with_cues = lambda cues, *columns: seen.append(cues) or columns
    mllm.train()(**inputs(mllm), findings=drawn(truth))
    mllm.findings.linear.bias.data.copy_(torch.tensor([9.0, -9, 9, 9, 9]))
    mllm.eval()(**inputs(mllm), findings=drawn(truth))
    assert seen == [[[50], [51, 54]], [[50], [50]]]  # a place is not said without its label


def test_with_cue_dropout_1_a_model_computes_what_one_without_cues_does():
    mllm, findings = cued(dropout=1.0), torch.tensor([1.0, NAN])[None, :, None].expand(2, -1, 5)
    given, plain = inputs(mllm), model()
    for mode in (True, False):
        torch.manual_seed(2)
        with_head = mllm.train(mode)(**given, findings=findings)
        torch.manual_seed(2)
        without = plain.train(mode)(**given)
        assert torch.equal(with_head[0], without[0]) and torch.equal(with_head[1], without[1])


def test_answers_get_worse_with_the_cues_of_other_patients():
    """Tokens of scans are noise here: what the decoder has learned to say it can know by the cue alone."""
    mllm = cued()
    mllm.findings.missed.zero_(), mllm.findings.invented.zero_()
    mllm.train()
    optimizer = torch.optim.AdamW(mllm.parameters(), lr=3e-3)

    def draw() -> dict:
        """Rows whose four answer tokens say which of the findings 0, 1, 2 and 4 are there."""
        given, truth = inputs(mllm, batch=16), (torch.rand(16, 5) < 0.5).float()
        truth[:, 2:] *= truth[:, 1:2]
        answers = 60 + torch.arange(4) * 2 + truth[:, [0, 1, 2, 4]].long()
        given["ids"][:, -4:], given["labels"][:, -4:], given["mask"][:] = answers, answers, 1
        return {**given, "features": list(torch.randn(2, 16, 64, 24)), "findings": drawn(truth)}

    for _ in range(150):
        total, tokens, _ = mllm(**draw())
        (total / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def loss(given: dict, order: Tensor) -> float:
        cues = [mllm.cue_ids(row) for row in (given["findings"][order, 0] > 0.5).tolist()]
        mllm.predicted_cues = lambda logits: cues
        total, tokens, _ = mllm(**given)
        return (total / tokens).item()

    mllm.eval()
    given, own = draw(), torch.arange(16)
    assert loss(given, own) < 0.2 < 0.6 < loss(given, own.roll(1))


def test_the_heads_loss_reaches_encoders_that_are_trained_and_its_weight_scales_it():
    mllm, truth = cued(), torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]]).float()
    mllm.encoders.requires_grad_(True)
    outputs = mllm.train()(**inputs(mllm), findings=drawn(truth))
    batch = SimpleNamespace(findings=drawn(truth))
    alone, _ = token_mean(outputs, batch, 0)
    both, numbers = token_mean(outputs, batch, 0, head=mllm.findings, weight=2.0)
    assert torch.isclose(both - alone, 2 * numbers["findings"])
    mllm.findings.loss(outputs[2], truth)[0].backward()
    assert mllm.encoders[0].patch_embed.proj.weight.grad.abs().sum() > 0


def test_a_cue_in_words_of_an_existing_vocabulary_adds_no_token():
    tokenizer = train_words([cue_text(FINDINGS, [1] * 5), cue_text((), ())], 100)
    size = len(tokenizer)
    ids = cue_ids(tokenizer, FINDINGS, [0, 1, 1, 0, 0])
    assert tokenizer.decode(ids).strip() == "Findings: pleural effusion (left)." and len(tokenizer) == size


def test_findings_and_sides_that_the_report_contradicts_are_named():
    rows = [("Cardiomegaly", True, []), ("Pleural effusion", True, ["left"]), ("Emphysema", False, [])]
    rows += [("Lung nodule", True, ["right upper lobe"]), ("Own label", True, [])]
    cues = [{"name": name, "present": present, "places": places} for name, present, places in rows]
    text = "There is pleural effusion on the right. Emphysema. No cardiomegaly. A nodule in the right lung."
    assert contradictions(cues, text) == [
        "Cardiomegaly: present by its probability, not named in the report",
        "Pleural effusion: left by its probability, right in the report",
        "Emphysema: absent by its probability, named in the report",
    ]


def test_one_scan_or_copies_of_it_leave_the_scale_as_it_is():
    for rows in (1, 5):
        made = FindingsHead([4], FINDINGS, 0.1)
        made.start(torch.ones(rows, 4), torch.zeros(3, 5))
        assert made.std.tolist() == [1] * 4 and made([torch.randn(2, 7, 4)]).isfinite().all()


def test_draws_are_by_seed_epoch_and_row_and_take_nothing_from_the_others(prepared):
    manifest = load_manifest(prepared)
    tokenizer = train_words([entry["text"] for entry in manifest.entries("train")], 300)
    add_image_tokens(tokenizer)
    known = {volume: torch.tensor([1.0, 0.0]) for volume in manifest.ids("train")}
    common = {"task": "mrg", "tokenizer": tokenizer, "image_tokens": 4, "max_text": 400, "seed": 3}
    plain, cued, dropped = (
        LanguageDataset(manifest, "train", augmentation=Augmentation(), **common, **more)
        for more in ({}, {"truth": known}, {"truth": known, "cue_dropout": 1.0})
    )
    one, same, other = cued[2, 5], cued[2, 5], cued[3, 5]
    assert torch.equal(one.findings, same.findings) and not torch.equal(one.findings, other.findings)
    assert one.findings[0].tolist() == [1, 0] and (0 <= one.findings[1]).all()
    assert dropped[2, 5].findings[1].isnan().all()
    assert all(torch.equal(x.volume, plain[2, 5].volume) for x in (one, dropped[2, 5]))
    assert one.text == plain[2, 5].text
    assert cued.collate([]).findings.isnan().all() and plain.collate([]).findings is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"train": None, "validation": None}, "no training volume has a finding"),
        ({"train": None}, "no training volume has a finding"),
        ({"validation": None}, "no volume of the validation split has labels"),
        ({"train": 0}, "no training volume has a finding"),
    ],
)
def test_labels_that_nothing_can_be_learned_from_are_refused(prepared, spoil, words):
    manifest = load_manifest(prepared)
    for split, value in spoil.items():
        for entry in manifest.entries(split):
            entry["labels"] = value if value is None else [value] * len(manifest.labels)
    with pytest.raises(InputError, match=words):
        CueTable(manifest, None, ("train", "validation"), places=True)


@pytest.mark.parametrize(
    ("columns", "words"),
    [("", "no training volume has a finding"), (",Emphysema,emphysema", "two labels are called emphysema")],
)
def test_tables_without_labels_or_with_two_of_a_name_are_refused(prepared, tmp_path, columns, words):
    manifest, path = load_manifest(prepared), tmp_path / "labels.csv"
    rows = [entry["id"] + ",1" * columns.count(",") for entry in manifest.all_entries()]
    path.write_text("\n".join([f"VolumeName{columns}", *rows, ""]))
    with pytest.raises(InputError, match=words):
        CueTable(manifest, str(path), ("train", "validation"), places=True)


@pytest.mark.parametrize(
    "findings",
    [(("a", ""), ("a", "")), (("a", ""), ("b", "left")), ()],
)
def test_findings_that_do_not_fit_each_other_or_the_cues_are_refused(mrg, findings):
    model = load_trained(mrg, "last").config
    with pytest.raises(InputError, match="findings"):
        replace(model, findings=findings)


# Whole runs.


def test_a_new_decoder_has_cues_of_places_and_its_run_says_where_the_findings_are_from(mrg):
    config = config_of(mrg)
    assert config["model"]["cues"] == "places" and ["Cardiomegaly", ""] in config["model"]["findings"]
    assert config["origin"]["labels"]["source"] is None and len(config["origin"]["labels"]["sha256"]) == 64
    run = load_trained(mrg, "last")
    assert run.model.findings.thresholds.unique().numel() > 3  # measured at a validation
    assert run.model.cue_ids([False] * len(run.config.findings))


@pytest.mark.slow
def test_infer_shows_findings_first_and_contradictions_last(mrg, prepared, capsys, monkeypatch):
    scan = load_manifest(prepared).entries("validation")[0]["source"]["file"]
    text = "There is pleural effusion on the left."
    monkeypatch.setattr(scan_model, "stream_answer", lambda *a, **k: iter([text]))
    monkeypatch.setattr(FindingsHead, "predicted", lambda self, logits: logits == logits[:, :1])
    command = ["report", scan, "--run", str(mrg), "--device", "cpu"]
    assert infer.main(command) == 0
    shown = capsys.readouterr().out
    first = load_trained(mrg, "last").config.findings[0][0]
    assert shown.index("findings that the prompt tells:") < shown.index(f"  {first}  0.") < shown.index(text)
    assert f"contradiction: {first}: present by its probability, not named" in shown.split(text)[1]
    assert infer.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = {row["name"]: row for row in found["findings"]}
    assert found["report"] == text and told[first]["present"] and 0 < told[first]["probability"] < 1
    assert len(told) == 18 and {"threshold", "places"} <= told[first].keys()
    assert "Pleural effusion: absent by its probability, named in the report" in found["contradictions"]
    monkeypatch.setattr(FindingsHead, "predicted", lambda self, logits: logits == logits)
    assert infer.main([*command, "--json"]) == 0
    places = [row["places"] for row in json.loads(capsys.readouterr().out)["findings"]]
    assert any("left lower lobe" in row for row in places)
    assert not any("left" in row and "left lower lobe" in row for row in places)


@pytest.mark.slow
def test_evaluation_writes_from_what_the_head_predicts(mrg, tmp_path, monkeypatch):
    """Of each volume its own: the answers are to the cues that the head's predictions make."""
    seen = []
    monkeypatch.setattr(
        Mllm, "predicted_cues", lambda self, logits: seen.extend(logits) or [[5]] * len(logits)
    )
    flags = ("--new-tokens", "2", "--checkpoint", "last", "--device", "cpu", "--out", str(tmp_path))
    evaluate.main(["--task", "mrg", "--run", str(mrg), *flags])
    assert len(seen) == len(set(map(tuple, seen))) == 7


@pytest.mark.slow
def test_a_resumed_run_needs_the_findings_it_was_started_with(stages, tmp_path, prepared):
    manifest = load_manifest(prepared)
    table, out = tmp_path / "labels.csv", tmp_path / "run"

    def write(value):
        rows = [f"{entry['id']},{value},{i % 2}\n" for i, entry in enumerate(manifest.all_entries())]
        table.write_text("VolumeName,Cardiomegaly,Emphysema\n" + "".join(rows))

    write(1)
    flags = ("--max-steps", 4, "--save-every", 2, "--cues", "labels", "--labels", table)
    assert train.main(language(stages, out, *flags)) == 0
    assert config_of(out)["model"]["findings"] == [["Cardiomegaly", ""], ["Emphysema", ""]]
    (out / "checkpoints" / "last").write_text("step-000002")
    wrong(resume(out, "--labels", "reports", stage="mrg"), "--labels: with --resume a run keeps its settings")
    write(0)
    wrong(resume(out, stage="mrg"), "labels.csv: its findings are not those that the run was started with")


@pytest.mark.slow
def test_without_cues_nothing_of_the_head_is_in_a_run(stages, tmp_path):
    out = tmp_path / "none"
    assert train.main(language(stages, out, "--max-steps", 2, "--cues", "none")) == 0
    config = config_of(out)
    assert config["model"]["findings"] == [] and config["origin"].get("labels") is None
    assert not any(name.startswith("findings.") for name in load_trained(out, "last").model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--cues", "none", "--labels", "reports"),
            "--labels: goes with --cues labels or places",
        ),
        (("--cues", "labels", "--labels", "absent.csv"), "absent.csv"),
        (("--cue-dropout", 2), "--cue-dropout 2.0: expected 1 or less"),
    ],
)
def test_wrong_cue_flags_are_one_line(stages, tmp_path, flags, words):
    wrong(language(stages, tmp_path / "run", *flags), words)
