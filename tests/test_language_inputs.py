"""The layout of the language model's inputs, beyond the published worked examples."""

from pathlib import Path

import pytest

from reaf_hsenet.data.language import (
    ADDED_TOKENS,
    IGNORED,
    add_image_tokens,
    collate_examples,
    language_example,
    question_text,
)
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.loading import load_tokenizer

FOLDERS = Path(__file__).parent / "golden" / "tokenizers"


@pytest.fixture(params=("bytebpe", "sentencepiece"))
def tokenizer(request):
    tokenizer = load_tokenizer(FOLDERS / request.param)
    add_image_tokens(tokenizer)
    return tokenizer


def test_the_four_tokens_follow_the_vocabulary_in_the_published_order():
    tokenizer = load_tokenizer(FOLDERS / "sentencepiece")
    assert add_image_tokens(tokenizer) == [400, 401, 402, 403] == add_image_tokens(tokenizer)
    assert tokenizer.tokens([400, 401, 402, 403]) == list(ADDED_TOKENS)
    assert tokenizer.decode([400, 401, 402, 403], skip_special_tokens=True) == "[SEG]"


def test_bos_is_the_first_column_and_the_image_follows_it(tokenizer):
    ids = tokenizer.encode(question_text(tokenizer, "Where?", 3), special_tokens=False)
    image = tokenizer.id_of("<im_patch>")
    assert ids[:4] == [tokenizer.bos_id, image, image, image] and image not in ids[4:]
    assert tokenizer.bos_id not in ids[1:]


def test_the_stop_token_is_learned_but_not_attended_to(tokenizer):
    example = language_example(tokenizer, question_text(tokenizer, "Where?", 3), "left lung", 60)
    asked = len(tokenizer.encode(question_text(tokenizer, "Where?", 3), special_tokens=False))
    assert example.ids[-1] == example.labels[-1] == tokenizer.eos_id and example.mask == [1] * (
        len(example.ids) - 1
    ) + [0]
    assert example.labels[:asked] == [IGNORED] * asked and example.labels[asked:] == example.ids[asked:]
    assert tokenizer.decode(example.ids[asked:-1]).strip() == "left lung"


def test_a_text_that_fills_the_length_has_no_stop_token(tokenizer):
    question = question_text(tokenizer, "Where?", 3)
    tokens = len(language_example(tokenizer, question, "left lung", 60).ids) - 1
    exact = language_example(tokenizer, question, "left lung", tokens)
    assert len(exact.ids) == tokens and exact.mask == [1] * tokens and exact.labels[-1] == exact.ids[-1]
    assert exact.ids[-1] != tokenizer.eos_id
    room = language_example(tokenizer, question, "left lung", tokens + 1)
    assert room.ids == [*exact.ids, tokenizer.eos_id]


def test_a_pad_inside_an_answer_is_not_learned(tokenizer):
    pad = tokenizer.texts[tokenizer.pad_id]
    example = language_example(tokenizer, question_text(tokenizer, "Where?", 1), f"left{pad}lung", 60)
    at = example.ids.index(tokenizer.pad_id, 2)
    assert example.labels[at] == IGNORED and example.mask[at] == 1
    assert example.labels[at - 1] != IGNORED and example.labels[-1] == tokenizer.eos_id


def test_an_answer_keeps_its_quotes_and_brackets(tokenizer):
    example = language_example(tokenizer, question_text(tokenizer, "Where?", 1), 'left ("lower")', 60)
    assert tokenizer.decode([i for i in example.labels if i != IGNORED][:-1]).strip() == 'left ("lower")'


def test_a_batch_is_as_long_as_its_longest_text_or_as_asked(tokenizer):
    question = question_text(tokenizer, "Where?", 2)
    examples = [
        language_example(tokenizer, question, answer, 60) for answer in ("left lung", "heart and pleura", "a")
    ]
    short, whole = collate_examples(tokenizer, examples), collate_examples(tokenizer, examples, 60)
    longest = max(len(example.ids) for example in examples)
    for part, padded, filler in zip(short, whole, (tokenizer.pad_id, 0, IGNORED), strict=True):
        assert part.shape == (3, longest) and padded.shape == (3, 60) and part.dtype == padded.dtype
        assert padded[:, :longest].equal(part) and (padded[:, longest:] == filler).all()
    for row, example in enumerate(examples):
        n = len(example.ids)
        assert [part[row, :n].tolist() for part in short] == list(map(list, example))
        assert (short[0][row, n:] == tokenizer.pad_id).all() and (short[2][row, n:] == IGNORED).all()
        assert not short[1][row, n:].any()


def test_a_question_without_room_for_an_answer_is_refused(tokenizer):
    question = question_text(tokenizer, "Where is it?", 8)
    asked = len(tokenizer.encode(question, special_tokens=False))
    for limit in (asked, 4):
        with pytest.raises(InputError, match=f"question of {asked} tokens.*at most {limit}: "):
            language_example(tokenizer, question, "left", limit)
    assert language_example(tokenizer, question, "left", asked + 1).labels[-1] != IGNORED


def test_a_tokenizer_without_bos_or_eos_is_refused(tmp_path):
    wordpiece = load_tokenizer(FOLDERS / "wordpiece")
    with pytest.raises(InputError, match="no bos token"):
        question_text(wordpiece, "Where?", 4)
    assert question_text(wordpiece, "Where?", 0) == "Where?"
    with pytest.raises(InputError, match="no eos token"):
        language_example(wordpiece, "where?", "left", 50)


def test_image_tokens_survive_a_saved_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    question = question_text(tokenizer, "Where?", 5)
    assert language_example(again, question, "left", 50) == language_example(tokenizer, question, "left", 50)
