"""--templates: a user's wordings of questions, HSENet's own file among them, in training, in resuming and
in evaluation.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from reaf_hsenet.data.questions import question_answer, read_templates
from reaf_hsenet.errors import InputError
from reaf_hsenet.runs.trained import load_trained
from tiny import config_of, language, losses, wrong

# In the form of HSENet's prompt_templates.py; the wordings are the test's.
PUBLISHED = """
import os
raise SystemExit("is never run")
Caption_templates = ["Describe the image.", "What is seen?"]
Computed = {"location": [os.name]}
Radgeome_vqa_templates = {
    "location": [  # fifty
        "Where is the {abnormality} located in the image?",
        "In which part lies the {abnormality}?",
    ],
    "size": ["How large is the {abnormality}?"],
}
"""
ROW = dict(kind="location", anatomy="lung/left lung", abnormality="cyst", answer="left", question="Whence?")


@pytest.fixture
def published(tmp_path) -> Path:
    path = tmp_path / "prompt_templates.py"
    path.write_text(PUBLISHED)
    return path


def test_hsenets_own_file_is_read_and_not_run(published, tmp_path):
    assert read_templates(published, "size") == ("How large is the {abnormality}?",)
    location = read_templates(published, "location")
    assert location[1] == "In which part lies the {abnormality}?" and len(location) == 2
    same = tmp_path / "same.json"
    same.write_text(json.dumps({"location": location}))
    assert read_templates(same, "location") == location


def test_every_question_is_one_of_the_users_drawn_uniformly(published):
    own = read_templates(published, "location")
    asked = Counter(question_answer(ROW, np.random.default_rng(seed), own) for seed in range(400))
    assert set(asked) == {
        ("Where is the cyst located in the image?", "left"),
        ("In which part lies the cyst?", "left"),
    }
    assert min(asked.values()) > 150


NONE = "has no list of questions of this kind; expected "


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.py", "x = [1", "a.py: cannot be read"),
        ("a.py", "x = {'presence': ['Is it {abnormality}?']}", f'a.py: {NONE}{{"location"'),
        ("a.json", '["Where?"]', f"a.json: {NONE}"),
        ("a.json", '{"location": []}', f"a.json: {NONE}"),
        (
            "a.json",
            '{"location": ["Where?"]}',
            "'Where?' is no question with {abnormality} or {anatomy} in",
        ),
        ("a.json", '{"location": [3]}', "3 is no question"),
        ("a.json", "{", "a.json: is not valid JSON"),
        ("none.py", None, "none.py: no such file"),
    ],
)
def test_a_file_that_has_none_is_one_line(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read_templates(tmp_path / name, "location")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_keeps_its_templates_and_is_evaluated_with_them(stages, decoder_folder, published, tmp_path):
    out = tmp_path / "vqa"
    flags = ("--decoder", decoder_folder, "--templates", published, "--max-steps", 1, "--frozen-dropout")
    start = language(stages, out, *flags, stage="vqa")
    assert train.main(start) == 0
    kept = config_of(out)["train"]
    assert kept["templates"] == list(read_templates(published, "location")) and kept["frozen_dropout"]
    assert train.main([*start, "--resume"]) == 0
    published.write_text(PUBLISHED.replace("fifty", "still fifty").replace("In which", "In what"))
    wrong([*start, "--resume"], "--templates: with --resume a run keeps its settings")
    flags = ["--task", "vqa", "--run", str(out), "--device", "cpu", "--new-tokens", "2", "--limit", "8"]
    for more, words in (([], "In which part"), (["--templates", str(published)], "In what part")):
        assert evaluate.main([*flags, "--out", str(tmp_path / words[:7]), *more]) == 0
        asked = (tmp_path / words[:7] / "vqa.csv").read_text()
        assert words in asked and ("In which" in asked) != ("In what" in asked)


@pytest.mark.slow
def test_frozen_encoders_keep_their_dropout_when_that_is_asked_for(stages, decoder_folder, tmp_path):
    flags = ("--decoder", decoder_folder, "--max-steps", 1)
    assert train.main(language(stages, tmp_path / "run", *flags)) == 0
    model = load_trained(tmp_path / "run").model
    guidance = model.encoders[1].guidance
    assert model.train() and not guidance.training and guidance.dropout.p > 0
    model.frozen_dropout = True
    assert model.train() and guidance.training and not model.eval().encoders[1].guidance.training
    plain, dropped = tmp_path / "plain", tmp_path / "dropout"
    assert train.main(language(stages, plain, *flags, "--no-augment")) == 0
    assert train.main(language(stages, dropped, *flags, "--no-augment", "--frozen-dropout")) == 0
    assert losses(plain)[0] != losses(dropped)[0]
