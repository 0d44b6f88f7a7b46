"""Batches of the language stages: layout, prompts, padding, determinism."""

import numpy as np
import pytest
import torch

from reaf_hsenet.config import Augmentation
from reaf_hsenet.data.language import IMAGE_TOKEN, add_image_tokens
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.manifest import load_manifest
from reaf_hsenet.data.questions import report_prompts
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.tokenizer import train_words


@pytest.fixture(scope="module")
def manifest(prepared):
    return load_manifest(prepared)


@pytest.fixture(scope="module")
def tokenizer(manifest):
    made = train_words([*(e["text"] for e in manifest.entries("train")), *report_prompts()], 400)
    add_image_tokens(made)
    return made


def reports(manifest, tokenizer, **settings) -> LanguageDataset:
    return LanguageDataset(
        manifest,
        "train",
        task="mrg",
        tokenizer=tokenizer,
        image_tokens=6,
        max_text=settings.pop("max_text", 600),
        **settings,
    )


def test_a_row_is_bos_image_tokens_prompt_report_and_stop(manifest, tokenizer):
    data = reports(manifest, tokenizer)
    batch = data.collate([data[0, row] for row in range(3)])
    patch = tokenizer.id_of(IMAGE_TOKEN)
    for row in range(3):
        ids, learned = batch.ids[row], batch.labels[row][batch.labels[row] != -100]
        assert ids[0] == tokenizer.bos_id and (ids[1:7] == patch).all() and (ids == patch).sum() == 6
        asked = tokenizer.decode(ids[7 : (batch.labels[row] == -100).int().argmin()].tolist())
        assert asked in report_prompts()
        answer = tokenizer.decode(learned[:-1].tolist()).strip()
        assert learned[-1] == tokenizer.eos_id
        assert answer == data.entries[row]["text"].translate(str.maketrans("", "", "\"'()")).strip()
    assert batch.volume.shape == (3, 1, 16, 32, 32) and batch.slices is None and batch.index == [0, 1, 2]
    assert (
        batch.ids.shape[1] == (batch.labels != -100).int().cumsum(1).argmax(1).max() + 1
    )  # as long as the longest


def test_prompts_and_augmentation_are_a_function_of_seed_epoch_and_row(manifest, tokenizer):
    one, two, other = (reports(manifest, tokenizer, seed=s, augmentation=Augmentation()) for s in (1, 1, 2))
    a, b = one[3, 5], two[3, 5]
    assert a.text == b.text and torch.equal(a.volume, b.volume)
    drawn = lambda data, epoch: [
        data.text(row, np.random.default_rng((data.seed, epoch, row)))[0] for row in range(12)
    ]
    assert drawn(one, 0) != drawn(one, 1) != drawn(other, 1) and len(set(drawn(one, 0))) > 3


def test_one_prompt_for_all_in_evaluation(manifest, tokenizer):
    data = reports(manifest, tokenizer, prompt="Describe these findings.")
    assert {data.text(row, np.random.default_rng(row))[0] for row in range(6)} == {"Describe these findings."}


def test_questions_are_rows_of_their_own(manifest, tokenizer):
    data = LanguageDataset(
        manifest, "train", task="location", tokenizer=tokenizer, image_tokens=6, max_text=200
    )
    total = sum(q["kind"] == "location" for e in manifest.entries("train") for q in e["qa"])
    assert len(data) == total > 0
    entry, asked = data.rows[-1]
    sample = data[0, total - 1]
    assert sample.row == total - 1 and sample.volume.shape == (1, 16, 32, 32)
    learned = [label for label in sample.text.labels if label != -100]
    assert tokenizer.decode(learned[:-1]).strip() == asked["answer"]


def test_a_report_is_cut_at_the_text_length_and_a_question_without_room_is_refused(manifest, tokenizer):
    data = reports(manifest, tokenizer, max_text=60)
    example = data[0, 0].text
    assert len(example.ids) == 60 and example.labels[-1] != tokenizer.eos_id
    data = reports(manifest, tokenizer, max_text=8)
    found = data.collate([data[0, 0]])
    assert isinstance(found, InputError) and "leaves no room for an answer" in str(found)


def test_a_question_of_the_tables_without_room_is_found_before_training(manifest, tokenizer):
    data = LanguageDataset(
        manifest, "train", task="location", tokenizer=tokenizer, image_tokens=6, max_text=60
    )
    data.check_questions()
    entry, asked = data.rows[-1]
    data.rows[-1] = entry, {**asked, "question": "Where is the effusion? " * 30}
    with pytest.raises(InputError, match=f"{data.name(len(data) - 1)}: a question of .* tokens.*--max-text"):
        data.check_questions()


def test_a_batch_moves_to_a_device_whole(manifest, tokenizer):
    data = reports(manifest, tokenizer)
    batch = data.collate([data[0, 0]]).to(torch.device("meta"))
    assert batch.ids.is_meta and batch.volume.is_meta and batch.slices is None and batch.index == [0]
