"""Checks of the scores of generated text and of answers, and of the stemmer behind METEOR."""

from collections.abc import Iterator

from parity_case import Case, Check, equal
from reaf_hsenet.metrics.porter import porter_stem
from reaf_hsenet.metrics.text import ORDERS, corpus_bleu, sample_scores, text_report, tokens_13a, tokens_rouge
from reaf_hsenet.metrics.vqa import ANATOMIES, anatomy_of, answer_accuracies, vqa_report

EXACT = 1e-12
METEOR = {"meteor_13a_no_synonyms": "meteor_without_synonyms"}
PRECISIONS = [f"ngram_precision_{n}" for n in ORDERS]
# Needs NLTK's own tokeniser, which NLTK applies where it is installed.
NOT_OURS = ("meteor_treebank_no_synonyms",)


def check_porter(case: Case) -> Iterator[Check]:
    for word, stem in case["stems"].items():
        yield equal(f"stem of {word}", porter_stem(word), stem)


def check_text_scores(case: Case) -> Iterator[Check]:
    example = case["tokenisation_example"]
    yield equal("13a tokens", tokens_13a(example["text"]), example["tokens_13a"])
    yield equal("ROUGE tokens", tokens_rouge(example["text"]), example["tokens_rouge"])
    for i, pair in enumerate(case["pairs"]):
        texts = pair["prediction"], pair["reference"]
        found = sample_scores(*texts) | corpus_bleu([tuple(map(tokens_13a, texts))])
        yield from _compare(f"pair {i}", found, pair["scores"])
    found = text_report([p["prediction"] for p in case["pairs"]], [p["reference"] for p in case["pairs"]])
    want = dict(case["aggregate"])
    want["bleu_precisions"] = want.pop("mean_of_per_sample_precisions")
    corpus, library = want.pop("corpus_bleu"), want.pop("sacrebleu")
    yield from _compare("corpus", found, want)
    yield Check("corpus BLEU", abs(found["corpus_bleu_4"] - corpus["bleu"]), EXACT)
    if min(corpus["precisions"]) > 0:  # else sacrebleu smooths
        yield Check("sacrebleu's", abs(100 * found["corpus_bleu_4"] - library["score"]), 100 * EXACT)
    yield Check("brevity penalty", abs(found["brevity_penalty"] - corpus["brevity_penalty"]), EXACT)
    yield equal("generated tokens", found["generated_tokens"], corpus["translation_length"])
    yield equal("reference tokens", found["reference_tokens"], corpus["reference_length"])
    for n, number in zip(ORDERS, corpus["precisions"], strict=True):
        yield Check(f"corpus precision {n}", abs(found[f"corpus_precision_{n}"] - number), EXACT)


def check_vqa(case: Case) -> Iterator[Check]:
    yield equal("anatomies", list(ANATOMIES), case["classes"])
    samples = case["samples"]
    for i, want in enumerate(samples):
        texts = want["generated"], want["answer"]
        named = {"true_class": anatomy_of(want["answer"]), "predicted_class": anatomy_of(want["generated"])}
        for name, anatomy in named.items():
            yield equal(f"sample {i} {name}", anatomy, want[name])
        scores = {k: v for k, v in want.items() if k not in ("generated", "answer", *named)}
        yield from _compare(f"sample {i}", answer_accuracies(*texts) | sample_scores(*texts), scores)
    found = vqa_report([s["generated"] for s in samples], [s["answer"] for s in samples])
    yield from _compare("micro", found["micro_average"], case["micro_average"])
    yield from _compare("macro", found["macro_average"], case["macro_average_over_true_classes"])
    yield equal("anatomies that occur", list(found["per_anatomy"]), list(case["per_true_class"]))
    for name, want in case["per_true_class"].items():
        yield from _compare(name, found["per_anatomy"][name], want)
    mine = found["classification"]
    rows = mine["anatomies"] | {"macro avg": mine["macro"], "weighted avg": mine["weighted"]}
    report = dict(case["classification_report"])
    yield Check("accuracy", abs(mine["accuracy"] - report.pop("accuracy")), EXACT)
    for name, want in report.items():
        for metric, number in want.items():
            if metric == "support" and name.endswith(" avg"):
                yield equal(f"{name} support", found["questions"], number)
            else:
                got = rows[name]["f1" if metric == "f1-score" else metric]
                yield Check(f"{name} {metric}", abs(got - number), EXACT)


def _compare(label: str, found: dict, want: dict) -> Iterator[Check]:
    """Scores under the kit's names; a list of precisions is four of ours."""
    ours = {"bleu": "corpus_bleu_4", **METEOR}
    for name, value in want.items():
        if name == "bleu_precisions":
            for key, number in zip(PRECISIONS, value, strict=True):
                yield Check(f"{label} {key}", abs(found[key] - number), EXACT)
        elif name == "sacrebleu_sentence":
            # In percent; smoothed, which changes nothing where every order has a match.
            if min(want["bleu_precisions"]) > 0:
                yield Check(f"{label} {name}", abs(100 * found["corpus_bleu_4"] - value), 100 * EXACT)
        elif name not in NOT_OURS:
            yield Check(f"{label} {name}", abs(found[ours.get(name, name)] - value), EXACT)
