"""Scores of generated text: BLEU and its precisions, ROUGE, METEOR, BERTScore. Stems and METEOR:
test_parity.py.
"""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

import fill
from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics.bertscore import bert_score, load_bert
from reaf_hsenet.metrics.porter import porter_stem
from reaf_hsenet.metrics.text import (
    common_subsequence,
    corpus_bleu,
    meteor_without_synonyms,
    nltk_meteor,
    sample_scores,
    text_report,
    tokens_13a,
    tokens_rouge,
)

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["A nodule in the left lung.", "No effusion.", "Ground-glass in both lungs, 12 mm."]
# Synthetic sentences with every score worked out by hand.
GENERATED, REFERENCE = "the heart is large", "the heart is not so large"


def bert_folder(folder: Path, kind: str = "bert", extra: dict | None = None, rename=lambda n: n) -> Path:
    """A made BERT or RoBERTa with a tokenizer; `extra` are more weights, `rename` gives the names in the
    file.
    """
    case = json.loads((GOLDEN / f"{kind}_tiny.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**case["config"], "vocab_size": 400}))
    shapes = {n: [400, *s[1:]] if "word_embeddings" in n else s for n, s in case["weights"].items()}
    state = {rename(n): torch.from_numpy(fill.fill(n, s, 0)) for n, s in shapes.items()}
    save_file({n: t for n, t in (state | (extra or {})).items() if n}, folder / "model.safetensors")
    if kind == "bert":
        (folder / "vocab.txt").write_text((GOLDEN / "tokenizers/wordpiece/vocab.txt").read_text())
    else:
        words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
        (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        roles = zip(("bos", "pad", "eos", "unk"), words, strict=False)
        (folder / "special_tokens_map.json").write_text(json.dumps({f"{r}_token": w for r, w in roles}))
    return folder


def test_precisions_are_of_one_report_and_have_no_brevity_penalty():
    scores = sample_scores(GENERATED, REFERENCE)
    assert [scores[f"ngram_precision_{n}"] for n in (1, 2, 3, 4)] == [1, 2 / 3, 1 / 2, 0]


def test_an_ngram_counts_no_more_often_than_in_the_reference():
    assert sample_scores("the the the the", "the heart")["ngram_precision_1"] == 1 / 4


def test_corpus_bleu_sums_counts_and_punishes_short_texts():
    pairs = [
        (GENERATED.split(), REFERENCE.split()),
        ("no effusion is seen".split(), "no effusion is seen".split()),
    ]
    found = corpus_bleu(pairs)
    penalty = math.exp(1 - 10 / 8)
    precisions = [8 / 8, 5 / 6, 3 / 4, 1 / 2]
    for n in (1, 2, 3, 4):
        assert found[f"corpus_precision_{n}"] == precisions[n - 1]
        assert found[f"corpus_bleu_{n}"] == pytest.approx(
            penalty * math.prod(precisions[:n]) ** (1 / n), abs=1e-15
        )
    assert found["brevity_penalty"] == penalty and found["generated_tokens"] == 8


def test_long_texts_get_no_reward_and_an_order_without_match_gives_no_bleu():
    found = corpus_bleu([(REFERENCE.split(), GENERATED.split())])
    assert found["brevity_penalty"] == 1 and found["corpus_bleu_4"] == 0 < found["corpus_bleu_2"]


def test_13a_keeps_numbers_whole_and_case_as_it_is():
    text = "Ground-glass opacity (12.5 mm, 3-4 cm) is seen; no effusion, size 1,5 cm."
    assert tokens_13a(text) == (
        "Ground-glass opacity ( 12.5 mm , 3 - 4 cm ) is seen ; no effusion , size 1,5 cm .".split()
    )
    assert tokens_13a("a &amp; b-\nc<skipped>\nd") == ["a", "&", "bc", "d"]
    assert tokens_rouge("Ground-glass, 12.5 mm") == ["ground", "glass", "12", "5", "mm"]


def test_rouge_is_the_f1_of_common_words_and_of_the_longest_common_subsequence():
    scores = sample_scores("large heart the", "the heart is large")
    assert scores["rouge1"] == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert scores["rougeL"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))


def test_common_subsequence_agrees_with_the_table_of_all_prefixes():
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = (list(map(str, rng.integers(4, size=rng.integers(0, 80)))) for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
        assert common_subsequence(a, b) == table[-1][-1]


def test_meteor_matches_stems_and_punishes_chunks():
    nodules, nodule = ["Nodules", "seen"], ["seen", "nodule"]
    assert meteor_without_synonyms(nodules, nodule) == pytest.approx(1 * (1 - 0.5 * (2 / 2) ** 3))
    assert meteor_without_synonyms(nodules, nodules) == pytest.approx(1 - 0.5 * (1 / 2) ** 3)
    one_of_two = (1 * 0.5 / (0.9 * 1 + 0.1 * 0.5)) * 0.5
    assert meteor_without_synonyms(["seen"], nodules) == pytest.approx(one_of_two)


def test_meteor_pairs_words_from_the_last_one_back():
    found = meteor_without_synonyms(["no", "effusion", "no"], ["no", "effusion"])
    mean = (2 / 3) * 1 / (0.9 * 2 / 3 + 0.1)
    assert found == pytest.approx(mean * (1 - 0.5))  # two chunks; from the front it would be one


def test_stems_leave_short_and_irregular_words():
    words = {
        "is": "is",
        "skies": "sky",
        "lying": "lie",
        "ties": "tie",
        "opacities": "opac",
        "": "",
        "Éàü": "éàü",
    }
    assert {word: porter_stem(word) for word in words} == words


def test_empty_texts_score_zero_and_are_counted():
    for prediction, reference in (("", "a b"), ("a b", ""), ("", "")):
        assert set(sample_scores(prediction, reference).values()) == {0.0}
    report = text_report(["", "no effusion"], ["no effusion", "no effusion"])
    assert (
        report["empty_reports"] == 1 and report["rouge1"] == 0.5 and report["corpus_bleu_1"] == math.exp(-1)
    )
    assert text_report(["", ""], ["a", "b"])["corpus_bleu_1"] == 0


def test_references_lose_quotes_and_brackets_but_generated_texts_keep_them():
    assert text_report(["a 3 mm nodule"], ["a (3 mm) 'nodule' "])["ngram_precision_4"] == 1
    assert text_report(["a (3 mm) nodule"], ["a 3 mm nodule"])["ngram_precision_1"] == 4 / 6


def test_other_scripts_have_words_for_bleu_and_meteor_but_none_for_rouge():
    report = text_report(["kalp büyümüş 心脏"], ["kalp büyümüş 心脏"])
    assert report["ngram_precision_3"] == 1 and report["meteor_without_synonyms"] > 0.9
    assert sample_scores("心脏", "心脏")["rougeL"] == 0


def test_meteor_with_synonyms_is_not_computed_without_nltk(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert text_report(["a"], ["a"])["meteor"] == "not computed: pip install nltk"


@pytest.fixture
def stand_in_nltk(monkeypatch):
    """Modules of nltk's names, whose score tells the two sides apart."""
    nltk, translate, score = (
        types.ModuleType(n) for n in ("nltk", "nltk.translate", "nltk.translate.meteor_score")
    )
    nltk.word_tokenize = str.split
    score.single_meteor_score = lambda reference, hypothesis: len(reference) + 10 * len(hypothesis)
    for module in (nltk, translate, score):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return nltk


def test_nltk_gets_tokens_of_the_reference_first(stand_in_nltk):
    assert nltk_meteor([("generated", "the true text"), ("generated", "true")]) == (13 + 11) / 2


def test_nltk_without_its_data_says_what_to_fetch(stand_in_nltk):
    def missing(text):
        raise LookupError("punkt_tab")

    stand_in_nltk.word_tokenize = missing
    assert nltk_meteor([("a", "a")]).startswith("not computed: python -m nltk.downloader punkt_tab wordnet")


@pytest.mark.parametrize("kind, layer", [("bert", None), ("bert", 2), ("roberta", None)])
def test_bertscore_is_greedy_matching_token_by_token(tmp_path, kind, layer):
    bert = load_bert(bert_folder(tmp_path / "made", kind), layer)
    generated, references = TEXTS, [TEXTS[1], "No pleural effusion", "ground glass"]
    found = bert_score(generated, references, bert, batch_size=2)
    for i, pair in enumerate(zip(generated, references, strict=True)):
        units = []
        for text in pair:
            ids = torch.tensor([bert.reader.ids(text if kind == "bert" else " " + text)])
            states = []
            hooks = [
                b.register_forward_hook(lambda _, __, out, s=states: s.append(out[0]))
                for b in bert.model.blocks
            ]
            with torch.no_grad():
                bert.model(ids)
            for hook in hooks:
                hook.remove()
            units.append([state / state.norm() for state in states[-1]])
        assert len(states) == (layer or 3)
        sums = []
        for one, other in (
            units,
            units[::-1],
        ):  # the first and the last token carry no weight, but can be matched
            sums.append(np.mean([max(float(x @ y) for y in other) for x in one[1:-1]]))
        assert found["precision"][i] == pytest.approx(sums[0], abs=1e-5)
        assert found["recall"][i] == pytest.approx(sums[1], abs=1e-5)
        assert found["f1"][i] == pytest.approx(2 * sums[0] * sums[1] / sum(sums), abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_bertscore_of_the_same_text_is_one_of_an_empty_one_zero_and_long_texts_are_cut(tmp_path, kind):
    bert = load_bert(bert_folder(tmp_path / "made", kind))
    found = bert_score(
        ["no effusion", "", "lung " * 300], ["no effusion", "no effusion", "lung " * 400], bert
    )
    assert found["f1"] == pytest.approx([1, 0, 1], abs=1e-5)
    assert len(bert.reader.ids("lung " * 300)) == 64


def test_bertscore_says_which_variant_it_is(tmp_path):
    assert load_bert(bert_folder(tmp_path / "made"), 2).variant == "made, layer 2 of 3, no idf, not rescaled"


def test_a_layer_that_the_folder_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match="has 3 layers; expected 1 to 3"):
        load_bert(bert_folder(tmp_path / "made"), 4)
