"""Tokenizers of every family: rules that the golden cases do not show, saving, and what a wrong folder is
told.
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, models, processors
from tokenizers import Tokenizer as Backend

from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.loading import has_wordpiece, load_tokenizer, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, WordPiece, check_fits

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = GOLDEN / "tokenizers"
FAMILIES = ("bytebpe", "bytebpe_split", "sentencepiece", "sentencepiece_unigram", "wordpiece")
CASE = json.loads((GOLDEN / "tokenizers.json").read_text())
ADDED = ["<one>", "<one>two", "[three]"]


def gpt2_folder(source: str, folder: Path) -> Path:
    """vocab.json and merges.txt of a golden tokenizer.json, which is copied beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FOLDERS / source / "tokenizer.json", folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in values["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    listed = {str(t.pop("id")): t for t in values["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    return folder


def llama3_folder(folder: Path) -> Path:
    """A tokenizer.json that puts <|begin_of_text|> first; its eos is the end of a turn, its pad is not
    named.
    """
    backend = Backend.from_file(str(FOLDERS / "bytebpe_split/tokenizer.json"))
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"content": bos, "lstrip": False}, "eos_token": "<|eot_id|>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one: Tokenizer, other: Tokenizer) -> bool:
    for text in (*CASE["texts"].values(), "x<one>two y[three]z <one> <one>two"):
        ids = one.encode(text)
        assert other.encode(text) == ids
        assert other.encode(text, 9, special_tokens=False) == one.encode(text, 9, special_tokens=False)
        assert other.decode(ids) == one.decode(ids)
        assert other.decode(ids, skip_special_tokens=True) == one.decode(ids, skip_special_tokens=True)
    return [len(one), one.bos_id, one.eos_id, one.pad_id] == [
        len(other),
        other.bos_id,
        other.eos_id,
        other.pad_id,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tokenizer_reads_back_the_same_with_its_added_tokens(family, tmp_path):
    tokenizer = load_tokenizer(FOLDERS / family)
    tokenizer.add_tokens(ADDED[:2])
    tokenizer.add_tokens(ADDED[2:], special=False)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer) and same(tokenizer, again)
    assert again.tokens(again.add_tokens(ADDED)) == ADDED and len(again) == len(tokenizer)
    assert "[three]" in again.decode(again.encode("a[three]<one>"), skip_special_tokens=True)
    assert "<one>" not in again.decode(again.encode("a[three]<one>"), skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pickled_tokenizer_is_the_same(family):
    tokenizer = load_tokenizer(FOLDERS / family)
    tokenizer.add_tokens(ADDED)
    assert same(tokenizer, pickle.loads(pickle.dumps(tokenizer)))


def test_sentencepiece_models_are_saved_byte_for_byte(tmp_path):
    load_tokenizer(FOLDERS / "sentencepiece").save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (
        FOLDERS / "sentencepiece/tokenizer.model"
    ).read_bytes()


def test_wordpiece_without_added_tokens_writes_the_files_of_a_bert_folder(tmp_path):
    load_wordpiece(FOLDERS / "wordpiece").save(tmp_path)
    assert (tmp_path / "vocab.txt").read_bytes() == (FOLDERS / "wordpiece/vocab.txt").read_bytes()
    assert (tmp_path / "tokenizer_config.json").read_text() == '{"do_lower_case": true}'


@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens_are_never_split(family):
    tokenizer = load_tokenizer(FOLDERS / family)
    before, size = tokenizer.encode("nodule", special_tokens=False), len(tokenizer)
    one, two, three = tokenizer.add_tokens(ADDED)
    assert [one, two, three] == [size, size + 1, size + 2] and len(tokenizer) == size + 3
    assert tokenizer.add_tokens(ADDED[::-1]) == [three, two, one] and len(tokenizer) == size + 3
    ids = tokenizer.encode("nodule<one>two[three]<one>", special_tokens=False)
    assert ids == [*before, two, three, one]  # the longest match, glued to a word
    inside = tokenizer.encode("nod<one>ule", special_tokens=False)
    assert inside.count(one) == 1 and 0 < inside.index(one) < len(inside) - 1
    assert tokenizer.decode(tokenizer.encode("[three]", special_tokens=False)) == "[three]"
    assert tokenizer.encode("<ONE>", special_tokens=False).count(one) == 0
    assert tokenizer.id_of("[three]") == three


@pytest.mark.parametrize("family", ("bytebpe", "bytebpe_split", "sentencepiece", "sentencepiece_unigram"))
def test_added_tokens_come_back_in_the_decoded_text(family):
    tokenizer = load_tokenizer(FOLDERS / family)
    tokenizer.add_tokens(ADDED)
    text = "<one><one>Where is the  nodule? no[three]dule <one>two \u00e9"
    assert tokenizer.decode(tokenizer.encode(text, special_tokens=False)) == text
    skipped = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
    assert skipped == "Where is the  nodule? nodule  \u00e9"


def test_a_sentencepiece_text_begins_with_a_word_unless_a_special_token_comes_first():
    tokenizer = load_tokenizer(FOLDERS / "sentencepiece")
    tokenizer.add_tokens(["[three]"], special=False)
    spelled = lambda text: tokenizer.tokens(tokenizer.encode(text, special_tokens=False))
    assert spelled("The") == ["\u2581The"] and spelled("<s>The")[:2] == ["<s>", "T"]
    assert spelled("<s> The") == ["<s>", "\u2581The"]
    assert spelled("[three]") == ["\u2581", "[three]"] and spelled("") == []
    assert spelled("a\u2581The") == spelled("a The")  # U+2581 in a text is a space


def test_bos_of_sentencepiece_follows_the_folder(tmp_path):
    shutil.copy(FOLDERS / "sentencepiece/tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).encode("a b c", 2) == load_tokenizer(tmp_path).encode("a b c")[:2]
    assert load_tokenizer(tmp_path).encode("")[:1] == [1]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    plain = load_tokenizer(tmp_path)
    assert plain.encode("a") == plain.encode("a", special_tokens=False) and plain.bos_id == 1
    plain.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("a") == plain.encode("a")


def test_vocab_json_with_merges_has_the_golden_ids_of_gpt2(tmp_path):
    tokenizer = load_tokenizer(gpt2_folder("bytebpe", tmp_path), "gpt2")
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, len(tokenizer)] == [0, 0, 0, 399]
    for name, want in CASE["outputs"]["bytebpe"]["texts"].items():
        assert tokenizer.encode(CASE["texts"][name]) == want["ids"], name
        assert tokenizer.decode(want["ids"], skip_special_tokens=True) == want["decoded_skip_special"]


def test_vocab_json_is_split_as_gpt2_whatever_tokenizer_json_says(tmp_path):
    folder = gpt2_folder("bytebpe_split", tmp_path / "both")
    gpt2, first = load_tokenizer(folder, "gpt2"), load_tokenizer(folder)
    text = "No effusion.\nImpression"
    assert same(first, load_tokenizer(folder, "tokenizer.json"))
    assert ".\u010a" in first.tokens(first.encode(text)) and ".\u010a" not in gpt2.tokens(gpt2.encode(text))
    gpt2.save(tmp_path / "saved")
    assert same(gpt2, load_tokenizer(tmp_path / "saved"))
    assert same(gpt2, load_tokenizer(folder / "merges.txt"))


def test_a_folder_is_searched_from_tokenizer_json_to_vocab_txt(tmp_path):
    for family in FAMILIES[2:3] + FAMILIES[4:]:
        shutil.copytree(FOLDERS / family, tmp_path, dirs_exist_ok=True)
    assert load_tokenizer(tmp_path).bos == "<s>"
    assert isinstance(load_tokenizer(tmp_path / "vocab.txt"), WordPiece)
    assert isinstance(load_tokenizer(tmp_path, "wordpiece"), WordPiece)
    gpt2_folder("bytebpe", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).bos == "<|endoftext|>"


def test_pad_is_unk_where_none_is_named(tmp_path):
    shutil.copy(FOLDERS / "sentencepiece/tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        "<s>",
        "</s>",
        1,
        2,
        0,
    )
    (tmp_path / "special_tokens_map.json").write_text(
        '{"pad_token": "</s>", "eos_token": {"content": "<unk>"}}'
    )
    assert [load_tokenizer(tmp_path).pad_id, load_tokenizer(tmp_path).eos_id] == [2, 0]
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": {"content": "<s>"}, "eos_token": null}')
    assert [load_tokenizer(tmp_path).pad_id, load_tokenizer(tmp_path).eos_id] == [1, 0]


def test_llama_3_ends_and_pads_with_end_of_text(tmp_path):
    tokenizer = load_tokenizer(llama3_folder(tmp_path))
    end = tokenizer.id_of("<|end_of_text|>")
    assert (
        tokenizer.eos == "<|end_of_text|>" and tokenizer.eos_id == tokenizer.pad_id == end != tokenizer.bos_id
    )
    tokenizer.save(tmp_path / "saved")
    assert same(tokenizer, load_tokenizer(tmp_path / "saved"))


def test_special_tokens_around_a_text_come_from_tokenizer_json(tmp_path):
    tokenizer = load_tokenizer(llama3_folder(tmp_path))
    plain = tokenizer.encode("No effusion.", special_tokens=False)
    assert tokenizer.encode("No effusion.") == [tokenizer.bos_id, *plain]
    assert tokenizer.encode("No effusion.", 3) == [tokenizer.bos_id, *plain[:2]]
    assert tokenizer.encode("No effusion.", 3, special_tokens=False) == plain[:3]


def test_padding_and_truncation_that_a_tokenizer_json_carries_are_not_used(tmp_path):
    backend = Backend.from_file(str(FOLDERS / "bytebpe/tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    backend.save(str(tmp_path / "tokenizer.json"))
    want = CASE["outputs"]["bytebpe"]["texts"]["plain"]["ids"]
    assert load_tokenizer(tmp_path).encode(CASE["texts"]["plain"]) == want


def test_added_tokens_json_of_older_folders_is_read(tmp_path):
    shutil.copy(FOLDERS / "sentencepiece/tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[SEG]": 401, "<im_patch>": 400}')
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<im_patch>"]}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<im_patch>a[SEG]", special_tokens=False)
    assert ids[0] == 400 and ids[-1] == 401 and tokenizer.decode(ids, skip_special_tokens=True) == "a[SEG]"


@pytest.mark.parametrize("family", ("bytebpe", "sentencepiece", "wordpiece"))
def test_rows_are_padded_on_either_side(family):
    tokenizer = load_tokenizer(FOLDERS / family)
    pad = tokenizer.pad_id
    ids, mask = tokenizer.batch([[7, 8, 9], [5]])
    assert ids.tolist() == [[7, 8, 9], [5, pad, pad]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids, mask = tokenizer.batch([[7, 8, 9], [5], []], 4, side="left")
    assert ids.tolist() == [[pad, 7, 8, 9], [pad, pad, pad, 5], [pad] * 4]
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0] * 4]


def test_a_folder_without_a_tokenizer_is_told_what_was_looked_for(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    message = error_of(load_tokenizer, tmp_path)
    assert str(tmp_path) in message
    assert "tokenizer.json, vocab.json with merges.txt, tokenizer.model, vocab.txt" in message
    assert "looked for tokenizer.model" in error_of(load_tokenizer, tmp_path, "sentencepiece")
    assert "absent" in error_of(load_tokenizer, tmp_path / "absent")
    assert "looked for" in error_of(load_tokenizer, FOLDERS / "wordpiece/vocab.txt", "gpt2")


@pytest.mark.parametrize("name", ("tokenizer.json", "tokenizer.model", "vocab.json"))
@pytest.mark.parametrize("content", (b"", b"{}", b'{"a": "b"}', b"\xff\xfe broken", b"[1, 2]"))
def test_a_broken_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    message = error_of(load_tokenizer, tmp_path)
    assert str(tmp_path / name) in message and "cannot be read" in message


def test_a_broken_tokenizer_config_is_named(tmp_path):
    shutil.copy(FOLDERS / "wordpiece/vocab.txt", tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for content, reason in (("{", "not valid JSON"), ("[]", "expected an object")):
        path.write_text(content)
        message = error_of(load_tokenizer, tmp_path)
        assert str(path) in message and reason in message


def test_an_added_token_with_another_id_is_refused(tmp_path):
    shutil.copy(FOLDERS / "sentencepiece/tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<im_patch>": 32000}')
    assert "<im_patch> has id 32000" in error_of(load_tokenizer, tmp_path)


def test_a_token_is_added_after_the_last_id_or_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "<|endoftext|>": 9}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 10 and tokenizer.encode("ba<|endoftext|>") == [1, 0, 9]
    assert tokenizer.add_tokens(["<one>"]) == [10]
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 12}')  # GPT-2's added ids may leave a gap
    assert load_tokenizer(tmp_path).encode("a<|end|>b") == [0, 12, 1]
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 9, "<|endoftext|>": 1}')
    assert "gaps" in error_of(load_tokenizer(tmp_path).add_tokens, ["<one>"])  # the library would take id 3


def test_wrong_forms_sides_tokens_and_ids_are_refused(tmp_path):
    assert "form 'bpe'" in error_of(load_tokenizer, FOLDERS / "bytebpe", "bpe")
    for family in FAMILIES:
        tokenizer = load_tokenizer(FOLDERS / family)
        assert "side 'middle'" in error_of(tokenizer.batch, [[1]], side="middle")
        assert "<one>" in error_of(tokenizer.id_of, "<one>")
        assert "token id 1000" in error_of(tokenizer.decode, [5, 1000])
    backend = Backend.from_file(str(FOLDERS / "bytebpe/tokenizer.json"))
    assert "no pad" in error_of(Tokenizer(backend, {}).batch, [[1]])


def test_a_decoder_may_have_more_rows_than_its_tokenizer_has_tokens(tmp_path):
    gpt2 = load_tokenizer(FOLDERS / "bytebpe")
    check_fits(gpt2, 512, {"bos_token_id": 0, "eos_token_id": [0, 311], "pad_token_id": None}, "config.json")
    check_fits(load_tokenizer(FOLDERS / "sentencepiece"), 400, {"bos": 1, "eos": 2}, "config.json")
    check_fits(load_tokenizer(FOLDERS / "wordpiece"), 400, {"bos": 1}, "config.json")  # BERT has no bos
    llama3 = load_tokenizer(llama3_folder(tmp_path))
    for eos in ("<|end_of_text|>", "<|eot_id|>"):
        check_fits(llama3, 512, {"eos": llama3.id_of(eos)}, "config.json")


def test_a_tokenizer_of_another_family_is_refused():
    sentencepiece = load_tokenizer(FOLDERS / "sentencepiece")
    message = error_of(check_fits, sentencepiece, 399, {}, "models/phi/config.json")
    assert "models/phi/config.json" in message and "399" in message and "400" in message
    message = error_of(check_fits, sentencepiece, 500, {"bos": 1, "eos": [0, 7]}, "models/phi/config.json")
    assert "models/phi/config.json: eos has id [0, 7], but [2]" in message
    assert "bos has id [0], but [1]" in error_of(
        check_fits, sentencepiece, 500, {"bos_token_id": 0}, "config.json"
    )


def test_a_known_piece_becomes_whole_once_it_is_added():
    tokenizer = load_tokenizer(FOLDERS / "bytebpe")
    known = tokenizer.id_of("he")
    assert tokenizer.encode("The").count(known) == 0
    assert tokenizer.add_tokens(["he"]) == [known] and tokenizer.encode("The").count(known) == 1
    assert isinstance(tokenizer.added[known], AddedToken) and len(tokenizer) == 399


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_in_a_tensor_are_decoded_as_those_in_a_list(family):
    tokenizer = load_tokenizer(FOLDERS / family)
    ids = tokenizer.encode("No nodule.")
    for skip in (False, True):
        assert tokenizer.decode(torch.tensor(ids), skip) == tokenizer.decode(ids, skip) != ""
    assert tokenizer.tokens(torch.tensor(ids)) == tokenizer.tokens(ids)
    assert "token id 1000 " in error_of(tokenizer.decode, torch.tensor([5, 1000]))


def flagged_folder(family: str, folder: Path, **flags: bool) -> Path:
    """A golden tokenizer whose tokenizer_config.json gives its next id to <t>, with these flags, unlike
    its own file.
    """
    shutil.copytree(FOLDERS / family, folder)
    number = len(load_tokenizer(folder))
    if (folder / "tokenizer.json").is_file():
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens([AddedToken("<t>", normalized=False)])
        backend.save(str(folder / "tokenizer.json"))
    token = {"content": "<t>", "normalized": False, "special": True, **flags}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {number: token}}))
    return folder


@pytest.mark.parametrize("flag", ("lstrip", "rstrip", "single_word"))
@pytest.mark.parametrize("family", FAMILIES)
def test_flags_of_added_tokens_count_and_are_saved(family, flag, tmp_path):
    tokenizer = load_tokenizer(flagged_folder(family, tmp_path / "read", **{flag: True}))
    tokenizer.save(tmp_path / "saved")
    again, number = load_tokenizer(tmp_path / "saved"), tokenizer.id_of("<t>")
    assert again.added == tokenizer.added and getattr(again.added[number], flag)
    for one in (tokenizer, again):
        assert (number in one.encode("no<t>no")) is (flag != "single_word")
        assert number in one.encode("no <t>, no")
        for side, spaced, glued in (("lstrip", "no  <t>", "no<t>"), ("rstrip", "<t>\n The", "<t>The")):
            taken = one.encode(spaced, special_tokens=False) == one.encode(glued, special_tokens=False)
            if family != "wordpiece" and flag != "single_word":  # BERT drops spaces anyway
                assert taken is (side == flag), spaced


def test_a_special_token_that_takes_the_spaces_before_it_begins_a_sentencepiece_text(tmp_path):
    tokenizer = load_tokenizer(flagged_folder("sentencepiece", tmp_path / "one", lstrip=True))
    assert tokenizer.encode("  <t>The") == tokenizer.encode("<t>The") and tokenizer.encode("<t>The")[1] == 400


def test_a_flag_that_only_tokenizer_json_has_stays_without_tokenizer_config(tmp_path):
    backend = Backend.from_file(str(FOLDERS / "bytebpe/tokenizer.json"))
    backend.add_special_tokens([AddedToken("<t>", normalized=False, lstrip=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "added_tokens.json").write_text('{"<t>": 399}')
    assert load_tokenizer(tmp_path).added[399].lstrip and load_tokenizer(tmp_path).added[399].special


def test_flags_of_a_token_of_berts_own_are_saved(tmp_path):
    shutil.copy(FOLDERS / "wordpiece/vocab.txt", tmp_path)
    mask = {"content": "[MASK]", "lstrip": True, "special": True}
    number = load_tokenizer(tmp_path).id_of("[MASK]")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {number: mask}}))
    load_tokenizer(tmp_path).save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").added[number].lstrip


def test_eos_of_sentencepiece_follows_the_folder(tmp_path):
    shutil.copy(FOLDERS / "sentencepiece/tokenizer.model", tmp_path)
    plain = load_tokenizer(tmp_path).encode("a b c")
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b c") == [*plain, 2] and tokenizer.encode("a b c", 3) == [*plain[:2], 2]
    assert tokenizer.encode("a b c", special_tokens=False) == plain[1:]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("a") == tokenizer.encode("a")


def test_an_eos_to_add_that_a_sentencepiece_model_does_not_have_is_refused(tmp_path):
    with open(tmp_path / "tokenizer.model", "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["no nodule"] * 9),
            model_writer=file,
            vocab_size=12,
            hard_vocab_limit=False,
            eos_id=-1,
            minloglevel=2,
        )
    assert load_tokenizer(tmp_path).eos is None
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    assert "no eos" in error_of(load_tokenizer, tmp_path)


@pytest.mark.parametrize("form", ("bytebpe", "sentencepiece"))
@pytest.mark.parametrize(
    "file, content, problem",
    (
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder is []"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<a>"}}}, "has 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"0": "<unk>"}}, "is '<unk>'"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"0": {"content": "<unk>", "lstrip": "no"}}},
            "'lstrip': 'no'",
        ),
        ("tokenizer_config", {"bos_token": {"lstrip": False}}, "bos_token is {'lstrip': False}"),
        ("tokenizer_config", {"bos_token": 5}, "bos_token is 5"),
        ("tokenizer_config", {"bos_token": ""}, "bos_token is ''"),
        ("tokenizer_config", {"add_eos_token": "no"}, "add_eos_token is 'no'"),
        ("special_tokens_map", {"pad_token": []}, "pad_token is []"),
        ("special_tokens_map", {"additional_special_tokens": "<a>"}, "additional_special_tokens is '<a>'"),
        ("added_tokens", {"<a>": "400"}, "'<a>' is '400'"),
        ("added_tokens", {"<a>": [1]}, "'<a>' is [1]"),
        ("added_tokens", {"": 400}, "token 400"),
    ),
)
def test_settings_that_mean_nothing_are_refused_by_file_and_name(form, file, content, problem, tmp_path):
    shutil.copytree(FOLDERS / form, tmp_path, dirs_exist_ok=True)
    (tmp_path / f"{file}.json").write_text(json.dumps(content))
    message = error_of(load_tokenizer, tmp_path)
    assert str(tmp_path / f"{file}.json") in message and problem in message and "expected" in message


def test_additional_special_tokens_may_be_objects(tmp_path):
    shutil.copy(FOLDERS / "sentencepiece/tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a>": 400, "<b>": 401}')
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": [{"content": "<a>"}]}')
    assert load_tokenizer(tmp_path).decode([400, 401], skip_special_tokens=True) == "<b>"


def test_a_vocabulary_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe\n")
    message = error_of(load_tokenizer, tmp_path)
    assert str(tmp_path / "vocab.txt") in message and "UTF-8" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_lengths_that_do_not_fit_are_refused(family):
    tokenizer = load_tokenizer(FOLDERS / family)
    assert "a row of 3 ids does not fit length 2" in error_of(tokenizer.batch, [[1], [1, 2, 3]], 2)
    assert "does not fit length 0" in error_of(tokenizer.batch, [[1]], 0)
    assert "no rows" in error_of(tokenizer.batch, [])
    assert "max_length -1" in error_of(tokenizer.encode, "No nodule.", -1)
    assert tokenizer.encode("No nodule.", 0, special_tokens=False) == []


def test_a_hub_id_is_fetched_with_every_file_of_a_tokenizer(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return FOLDERS / "sentencepiece"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert len(load_tokenizer("lab/phantom-llama@v1")) == 400 and asked[0][:2] == ("lab/phantom-llama", "v1")
    files = (
        "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
        "tokenizer.model vocab.json"
    )
    for file in (*files.split(), "vocab.txt", "merges.txt"):
        assert any(Path(file).match(pattern) for pattern in asked[0][2]), file
    assert not any(Path("model.safetensors").match(pattern) for pattern in asked[0][2])
    for absent in ("models/tokenizer.json", "models/vocab.txt", tmp_path / "absent"):
        assert "absent" in error_of(load_tokenizer, absent) or "looked for" in error_of(
            load_tokenizer, absent
        )
    assert len(asked) == 1  # an absent file is no hub id


def test_a_vocabulary_with_gaps_takes_image_tokens_and_is_read_again(tmp_path):
    # Phi-4-mini's ids have gaps before its special tokens.
    words = {character: number for number, character in enumerate("abcdefghi")} | {"<unk>": 9, "<s>": 15}
    Backend(models.WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == 15 and add_image_tokens(tokenizer) == [16, 17, 18, 19]
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.ids == tokenizer.ids and again.encode("a<im_patch>", special_tokens=False) == [0, 16]


def test_an_added_token_that_cannot_have_its_id_is_named(tmp_path):
    backend = Backend(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    values = json.loads(backend.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"] = [{"id": 9, "content": "<s>", "special": True, **flags}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="tokenizer.json: its added token <s> has id 9, but becomes 2"):
        load_tokenizer(tmp_path)


BERT_WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK] hacía hacia Hacía pulmón pulmon 胸 水 胸水".split()]


def bert_folder(folder: Path, config: dict, whole: dict | None = None, vocab: bool = True) -> Path:
    """A BERT folder with a tokenizer_config.json, and a tokenizer.json of these normalizer settings."""
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if vocab:
        (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    if whole is not None:
        model = {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        }
        model["vocab"] = {word: i for i, word in enumerate(BERT_WORDS)}
        normalizer = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        }
        split = {"type": "BertPreTokenizer"}
        (folder / "tokenizer.json").write_text(
            json.dumps({"model": model, "normalizer": normalizer | whole, "pre_tokenizer": split})
        )
    return folder


@pytest.mark.parametrize(
    ("config", "whole", "tokens"),
    [
        ({}, None, ["hacia", "pulmon", "胸", "水"]),
        ({"do_lower_case": True, "strip_accents": False}, None, ["hacía", "pulmón", "胸", "水"]),
        ({"do_lower_case": False}, None, ["Hacía", "pulmón", "胸", "水"]),
        ({"do_lower_case": False, "strip_accents": True}, None, ["[UNK]", "pulmon", "胸", "水"]),
        ({"tokenize_chinese_chars": False}, None, ["hacia", "pulmon", "胸水"]),
        ({}, {"lowercase": False}, ["Hacía", "pulmón", "胸", "水"]),
        ({}, {"strip_accents": False, "handle_chinese_chars": False}, ["hacía", "pulmón", "胸水"]),
        ({"do_lower_case": True}, {"lowercase": False}, ["hacia", "pulmon", "胸", "水"]),
    ],
)
def test_a_berts_own_rules_are_kept_with_the_run(tmp_path, config, whole, tokens):
    """The tokens are those of the library's BertNormalizer with these rules, which transformers'
    BertTokenizer uses.
    """
    folder = bert_folder(tmp_path / "bert", config, whole)
    load_wordpiece(folder).save(tmp_path / "run")
    for place in (folder, tmp_path / "run"):
        tokenizer = load_wordpiece(place)
        assert tokenizer.tokens(tokenizer.encode("Hacía pulmón 胸水", special_tokens=False)) == tokens


def test_a_folder_with_only_a_tokenizer_json_has_a_berts_vocabulary(tmp_path):
    folder = bert_folder(tmp_path / "bert", {}, {"lowercase": False}, vocab=False)
    assert has_wordpiece(folder) and load_wordpiece(folder).vocab == BERT_WORDS
    assert not has_wordpiece(tmp_path)


@pytest.mark.parametrize(
    ("config", "whole", "words"),
    [
        ({"word_tokenizer_type": "mecab"}, None, "word_tokenizer_type is 'mecab', which is not supported"),
        ({"do_basic_tokenize": False}, None, "do_basic_tokenize is False, which is not supported"),
        ({"strip_accents": 3}, None, "strip_accents is 3; expected true or false"),
        ({}, {"type": "NFC"}, "its normalizer is 'NFC'; expected a BERT's"),
        ({}, {"lowercase": "no"}, "lowercase of its normalizer is 'no'"),
        ({}, {"clean_text": False}, "clean_text of its normalizer is False; expected a BERT's, True"),
    ],
)
def test_rules_that_are_not_berts_are_refused_by_name(tmp_path, config, whole, words):
    with pytest.raises(InputError, match=words):
        load_wordpiece(bert_folder(tmp_path / "bert", config, whole))


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x"},
    ],
)
def test_a_tokenizer_json_that_makes_the_library_panic_is_one_error(tmp_path, normalizer):
    values = json.loads((GOLDEN / "tokenizers/bytebpe/tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"normalizer": normalizer}))
    with pytest.raises(InputError, match="tokenizer.json: cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("pre_tokenizer", None, "type of its pre_tokenizer is None; expected a BERT's"),
        ("pre_tokenizer", {"type": "Whitespace"}, "type of its pre_tokenizer is 'Whitespace'"),
        ("model", {"continuing_subword_prefix": "@@"}, "continuing_subword_prefix of its model is '@@'"),
        (
            "model",
            {"vocab": {word: i for i, word in enumerate(reversed(BERT_WORDS))}},
            "has another id than in the vocab.txt beside it",
        ),
    ],
)
def test_a_tokenizer_json_that_splits_as_no_bert_is_refused(tmp_path, part, values, words):
    path = bert_folder(tmp_path / "bert", {}, {}) / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole[part] = values and whole[part] | values
    path.write_text(json.dumps(whole))
    with pytest.raises(InputError, match=f"tokenizer.json: .*{words}"):
        load_wordpiece(path.parent)


def test_added_tokens_of_a_tokenizer_json_are_kept_with_the_run(tmp_path):
    path = bert_folder(tmp_path / "bert", {}, {}) / "tokenizer.json"
    added = {"id": len(BERT_WORDS), "content": "GGO", "special": False, "normalized": False}
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"added_tokens": [{"id": 0, "content": "[PAD]", "special": True}, added]}
        )
    )
    load_wordpiece(path.parent).save(tmp_path / "run")
    for folder in (path.parent, tmp_path / "run"):
        tokenizer = load_wordpiece(folder)
        assert tokenizer.tokens(tokenizer.encode("GGO 水", special_tokens=False)) == ["GGO", "水"]
        assert len(tokenizer) == len(BERT_WORDS) + 1
