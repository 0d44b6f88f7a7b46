"""Scores of generated text against one reference each: n-gram precisions, BLEU, ROUGE and METEOR, all in [0,
1].

Sources: Papineni et al. 2002, Lin 2004, Banerjee and Lavie 2005, with the tokenisation and the definitions of
the libraries that HSENet's evaluation (commit c7198f3) calls: evaluate's BLEU, rouge_score, NLTK's METEOR.
What it reports as "BLEU-1..4" are n-gram precisions averaged over reports, without brevity penalty or
geometric mean; here these are `ngram_precision_1..4`, and `corpus_bleu_1..4` are BLEU.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from reaf_hsenet.data.text import clean_report
from reaf_hsenet.metrics.porter import porter_stem

ORDERS = (1, 2, 3, 4)
SAMPLE_SCORES = (*(f"ngram_precision_{n}" for n in ORDERS), "rouge1", "rougeL", "meteor_without_synonyms")
ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
APART_13A = str.maketrans({c: f" {c} " for c in '!"#$%&()*+/:;<=>?@[\\]^_`{|}~'})
SPACED_13A = (
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def text_report(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | int | str]:
    """Scores of generated reports: means over reports of SAMPLE_SCORES, and those of the corpus.

    References lose quotes and round brackets, as published. `meteor`, with WordNet's synonyms, is computed by
    nltk; where that is missing it says so.
    """
    pairs = [(p.strip(), clean_report(r).strip()) for p, r in zip(predictions, references, strict=True)]
    rows = [sample_scores(*pair) for pair in pairs]
    return {
        "reports": len(rows),
        "empty_reports": sum(not prediction for prediction, _ in pairs),
        **means(rows),
        **corpus_bleu([(tokens_13a(p), tokens_13a(r)) for p, r in pairs]),
        "meteor": nltk_meteor(pairs),
    }


def sample_scores(prediction: str, reference: str) -> dict[str, float]:
    """SAMPLE_SCORES of one text. An empty one scores 0."""
    pair = tokens_13a(prediction), tokens_13a(reference)
    precisions = [_share(*found) for found in _ngram_matches(*pair)]
    rouge = rouge_scores(tokens_rouge(prediction), tokens_rouge(reference))
    return dict(zip(SAMPLE_SCORES, (*precisions, *rouge, meteor_without_synonyms(*pair)), strict=True))


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def tokens_13a(text: str) -> list[str]:
    """BLEU's tokens (mteval 13a): punctuation apart, but in numbers; case kept."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} ".translate(APART_13A)
    for pattern, spaced in SPACED_13A:
        text = pattern.sub(spaced, text)
    return text.split()


def tokens_rouge(text: str) -> list[str]:
    """ROUGE's tokens: runs of a-z and 0-9 of the lower-cased text. A text in another script has none."""
    return re.findall("[a-z0-9]+", text.lower())


def _ngram_matches(prediction: list[str], reference: list[str]) -> list[tuple[int, int]]:
    """Count the n-grams found in the reference, at most as often as they are there, and all; by ORDERS."""
    found = []
    for n in ORDERS:
        counts, known = (
            Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (prediction, reference)
        )
        found.append(((counts & known).total(), counts.total()))
    return found


def _share(matched: int, total: int) -> float:
    return matched / total if total else 0.0


def corpus_bleu(pairs: Sequence[tuple[list[str], list[str]]]) -> dict[str, float | int]:
    """BLEU of tokens (generated, reference): matches summed over all pairs, without smoothing.

    corpus_bleu_N is the geometric mean of the precisions of orders 1 to N times the brevity penalty; 0 when
    one of them is 0.
    """
    matches = [_ngram_matches(*pair) for pair in pairs]
    precisions = [_share(*map(sum, zip(*order, strict=True))) for order in zip(*matches, strict=True)]
    generated, references = (sum(map(len, side)) for side in zip(*pairs, strict=True))
    penalty = min(1.0, math.exp(1 - references / generated)) if generated else 0.0
    return {
        **{f"corpus_bleu_{n}": penalty * math.prod(precisions[:n]) ** (1 / n) for n in ORDERS},
        **{f"corpus_precision_{n}": p for n, p in zip(ORDERS, precisions, strict=True)},
        "brevity_penalty": penalty,
        "generated_tokens": generated,
        "reference_tokens": references,
    }


def rouge_scores(prediction: list[str], reference: list[str]) -> tuple[float, float]:
    """F1 of ROUGE-1 (words in common) and ROUGE-L (longest common subsequence of the text); no stemming."""
    common = (Counter(prediction) & Counter(reference)).total()
    lengths = len(prediction) + len(reference)
    # The harmonic mean of c / len(prediction) and c / len(reference) is 2 c / (their sum).
    found = [2 * c / lengths if c else 0.0 for c in (common, common_subsequence(prediction, reference))]
    return found[0], found[1]


def common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time, as the bits of an integer.

    A bit is 0 where the row grows by one (Hyyro 2004): O(len(second)) operations on integers of len(first)
    bits.
    """
    where: dict[str, int] = {}
    for i, token in enumerate(first):
        where[token] = where.get(token, 0) | 1 << i
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        match = row & where.get(token, 0)
        row = (row + match | row - match) & full
    return len(first) - row.bit_count()


def meteor_without_synonyms(prediction: list[str], reference: list[str]) -> float:
    """METEOR (alpha 0.9, beta 3, gamma 0.5) of words that are equal or of equal stem, in any case."""
    sides = [dict(enumerate(token.lower() for token in tokens)) for tokens in (prediction, reference)]
    matches: list[tuple[int, int]] = []
    for form in (str, porter_stem):
        places: dict[str, list[int]] = {}
        for place, word in sides[1].items():
            places.setdefault(form(word), []).append(place)
        # As NLTK pairs them: from the last word back, each with the last of its equals that is left.
        for place, word in reversed(list(sides[0].items())):
            if places.get(form(word)):
                matches.append((place, places[form(word)].pop()))
        for side, taken in zip(sides, zip(*matches, strict=True), strict=False):
            for place in taken:
                side.pop(place, None)
    if not matches:
        return 0.0
    matches.sort()
    steps = zip(matches, matches[1:], strict=False)
    chunks = 1 + sum(after != (before[0] + 1, before[1] + 1) for before, after in steps)
    precision, recall = len(matches) / len(prediction), len(matches) / len(reference)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / len(matches)) ** 3)


def nltk_meteor(pairs: Sequence[tuple[str, str]]) -> float | str:
    """Mean METEOR of (generated, reference) with WordNet's synonyms; else why it is not computed."""
    try:
        from nltk import word_tokenize
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError:
        return "not computed: pip install nltk"
    try:
        scores = [single_meteor_score(word_tokenize(r), word_tokenize(p)) for p, r in pairs]
    except LookupError:
        return "not computed: python -m nltk.downloader punkt_tab wordnet"
    return math.fsum(scores) / len(scores)
