"""The vocabulary of whole words: text comes back, numbers by digits, the same entries every time."""

from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.tokenizer.tokenizer import train_words

TEXTS = [
    "A nodule of 12 mm is seen in the right lung.",
    "No nodule. The heart is normal (CTR 0.48).",
    "The lung is clear.",
]


def test_decoding_gives_the_text_back():
    tokenizer = train_words(TEXTS, 140)
    for text in (*TEXTS, "the right heart in 2012,  clear", " Nodules seen", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_frequent_words_are_one_token_and_numbers_are_digits():
    tokenizer = train_words(TEXTS, 140)
    assert tokenizer.tokens(tokenizer.encode("The nodule of 12")) == ["The", " nodule", " of", " 1", "2"]
    assert tokenizer.tokens(tokenizer.encode("rich")) == list("rich")


def test_two_runs_and_any_order_of_texts_give_the_same_vocabulary():
    one, two = train_words(TEXTS, 105), train_words(TEXTS[::-1], 105)
    assert one.ids == two.ids and len(one) == 105


def test_it_has_bos_eos_pad_and_takes_image_tokens_and_survives_saving(tmp_path):
    tokenizer = train_words(TEXTS, 140)
    patch, *_ = add_image_tokens(tokenizer)
    text = "<s><im_patch><im_patch>The lung"
    ids = tokenizer.encode(text, special_tokens=False)
    assert (
        ids[:3] == [tokenizer.bos_id, patch, patch]
        and len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3
    )
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (
        again.encode(text, special_tokens=False) == ids
        and again.decode(ids) == text
        and len(again) == len(tokenizer)
    )
    assert (again.bos_id, again.eos_id, again.pad_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert again.decode(ids, skip_special_tokens=True) == "The lung"
