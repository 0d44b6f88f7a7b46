"""Prompts and questions: the published lists, seeded drawing, and what a manifest holds of them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from conftest import script
from reaf_hsenet.config import RECIPES
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.prepare import Options, list_as_is
from reaf_hsenet.data.questions import (
    question_answer,
    question_text,
    questions,
    report_prompt,
    report_prompts,
    templates,
)
from reaf_hsenet.data.sources.ct_rate import read_ct_rate
from reaf_hsenet.data.sources.radgenome import KINDS
from reaf_hsenet.errors import InputError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_42_published_report_prompts_hold_one_twice():
    prompts = report_prompts()
    assert len(prompts) == 42 and len(set(prompts)) == 41
    assert Counter(prompts)["Please caption this medical scan with findings."] == 2
    assert prompts[0] == "Can you provide a caption consists of findings for this medical image?"
    assert prompts[6] == "Can you summarize with findings the images presented?"  # the one of generation
    assert prompts[-1] == "Can you provide a diagnosis based on this image?"


def test_a_report_prompt_is_drawn_uniformly_from_the_list():
    drawn = Counter(report_prompt(rng(seed)) for seed in range(8400))
    assert set(drawn) == set(report_prompts())
    twice = drawn.pop("Please caption this medical scan with findings.")
    assert 330 < twice < 470 and 130 < min(drawn.values()) and max(drawn.values()) < 280


@pytest.mark.parametrize("kind", KINDS)
def test_every_template_has_the_slots_of_its_kind_and_no_other(kind):
    slots = {
        "location": "abnormality",
        "abnormality": "anatomy",
        "presence": "abnormality",
        "size": "abnormality",
    }
    for template in templates(kind):
        assert template.count(f"{{{slots[kind]}}}") == 1
        filled = template.format(abnormality="A", anatomy="B")  # KeyError for any other slot
        assert "{" not in filled
    assert len(set(templates(kind))) == len(templates(kind))


def test_the_first_location_template_is_the_published_one():
    assert (
        templates("location")[0] == "Where is the {abnormality} located in the image?"
        and len(templates("location")) == 25
    )
    assert all("{anatomy}" not in t for t in templates("location"))  # that would give the answer away


def test_the_same_seed_asks_the_same_question_and_others_vary():
    asked = [question_text("location", "lung nodule", "lung", rng(seed)) for seed in range(200)]
    assert asked == [question_text("location", "lung nodule", "lung", rng(seed)) for seed in range(200)]
    assert {t.format(abnormality="lung nodule") for t in templates("location")} == set(asked)


def test_a_row_without_a_question_gets_a_template_and_keeps_its_answer():
    row = {
        "kind": "location",
        "anatomy": "lung/left lung",
        "abnormality": "cyst {x}",
        "answer": "lung/left lung",
    }
    question, answer = question_answer(row, rng())
    assert answer == "lung/left lung" and "cyst {x}" in question


def test_a_rows_own_question_is_asked_as_it_is():
    row = {"kind": "size", "anatomy": "", "abnormality": "cyst", "question": "How wide?", "answer": "9 mm"}
    assert {question_answer(row, rng(seed)) for seed in range(20)} == {("How wide?", "9 mm")}


@pytest.mark.parametrize(
    ("anatomy", "named"),
    [
        ("lung/right lung/right upper lobe", "right upper lobe"),
        ("", "whole scan"),
        ("Others", "other regions"),
    ],
)
def test_a_question_names_the_last_part_of_an_anatomy(anatomy, named):
    asked = {question_text("abnormality", "", anatomy, rng(seed)) for seed in range(60)}
    assert asked == {t.format(anatomy=named) for t in templates("abnormality")}


def test_prepared_phantoms_carry_the_questions_of_their_tables(prepared, phantom_root):
    manifest, source = load_manifest(prepared), read_ct_rate(phantom_root)
    for split, cases in source.splits.items():
        assert [tuple(e["qa"]) for e in manifest.splits[split]] == [c.questions for c in cases]
        for kind in KINDS:
            table = phantom_root / f"dataset/radgenome_files/{split}_vqa_{kind}.csv"
            lines = table.read_text().splitlines()[1:]
            found = questions(manifest, split, kind)
            entries = manifest.entries(split)
            assert Counter(entries[i]["id"] for i, _ in found) == Counter(s.split(".")[0] for s in lines)
            assert all(row["kind"] == kind and row["answer"] and row["question"] for _, row in found)


def test_questions_are_in_the_manifests_order_and_of_one_kind():
    row = {"anatomy": "lung", "abnormality": "cyst", "answer": "x"}
    entries = [
        {"qa": [{"kind": "size", **row}, {"kind": "location", **row, "answer": "a"}]},
        {},
        {"qa": [{"kind": "location", **row, "answer": "b"}, {"kind": "location", **row, "answer": "c"}]},
    ]
    manifest = Manifest(
        None,
        "ct-rate",
        recipe=RECIPES["hsenet"],
        dtype="float16",
        text="",
        labels=[],
        splits={"train": entries},
    )
    assert [(i, r["answer"]) for i, r in questions(manifest, "train", "location")] == [
        (0, "a"),
        (2, "b"),
        (2, "c"),
    ]


def test_a_manifest_without_questions_says_what_to_run(phantom_root, tmp_path):
    source = read_ct_rate(phantom_root)
    source.splits.update(
        {s: [replace(c, questions=None) for c in cases] for s, cases in source.splits.items()}
    )
    list_as_is(source, tmp_path, Options(RECIPES["hsenet"]))
    manifest = load_manifest(tmp_path)  # as phantoms were prepared before there were questions
    assert not any("qa" in e for e in manifest.entries("train"))
    with pytest.raises(
        InputError, match=f"no questions of kind location.*--dataset radgenome .* --out {tmp_path}"
    ):
        questions(manifest, "train", "location")
    done = script("preprocess.py", "--dataset", "radgenome", "--root", phantom_root, "--out", tmp_path)
    assert done.returncode == 0 and "questions of location: " in done.stdout, done.stderr
    assert questions(load_manifest(tmp_path), "train", "location")


def test_an_unknown_kind_is_named(prepared):
    with pytest.raises(
        InputError, match="kind 'colour': expected one of location, abnormality, presence, size"
    ):
        questions(load_manifest(prepared), "train", "colour")


def test_a_question_without_answer_in_a_manifest_is_refused(prepared, tmp_path):
    manifest = load_manifest(prepared)
    del manifest.splits["train"][0]["qa"][0]["answer"]
    replace(manifest, folder=tmp_path).save()
    with pytest.raises(InputError, match="qa is"):
        load_manifest(tmp_path)
