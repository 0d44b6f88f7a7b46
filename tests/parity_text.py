"""Checks of the language side: tokenisers and the layout of the decoder's inputs."""

import re
from collections.abc import Iterator

from parity_case import Case, Check, equal
from reaf_hsenet.data.language import (
    ADDED_TOKENS,
    add_image_tokens,
    collate_examples,
    language_example,
    question_text,
)
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.tokenizer.loading import load_tokenizer


def check_tokenizers(case: Case) -> Iterator[Check]:
    for family, expected in case["outputs"].items():
        tokenizer = load_tokenizer(case.folder / "tokenizers" / case["config"][family]["file"])
        yield equal(f"{family} vocabulary", len(tokenizer), expected["vocab_size"])
        for name, want in expected["texts"].items():
            text, label = case["texts"][name], f"{family} {name}"
            ids, plain = tokenizer.encode(text), tokenizer.encode(text, special_tokens=False)
            yield equal(f"{label} ids", ids, want["ids"])
            yield equal(f"{label} plain ids", plain, want["ids_without_special_tokens"])
            yield equal(f"{label} decoded", tokenizer.decode(plain), want["decoded"])
            skipped = tokenizer.decode(ids, skip_special_tokens=True)
            yield equal(f"{label} decoded without special tokens", skipped, want["decoded_skip_special"])
            if "tokens" in want:
                yield equal(f"{label} tokens", tokenizer.tokens(ids), want["tokens"])
        for key, entries in expected.items():
            padded = re.match(r"max_length_(\d+)_", key)
            for name, want in entries.items() if padded else ():
                length = int(padded[1])
                row = tokenizer.encode(case["texts"][name], length, "without_special_tokens" not in key)
                ids, mask = tokenizer.batch([row], length)
                yield equal(f"{family} {name} padded", ids[0].tolist(), want["input_ids"])
                yield equal(f"{family} {name} mask", mask[0].tolist(), want["attention_mask"])
        if "pair" in expected:
            pair = tokenizer.backend.encode(*expected["pair"]["texts"])
            yield equal(f"{family} pair", pair.ids, expected["pair"]["input_ids"])
            yield equal(f"{family} pair types", pair.type_ids, expected["pair"]["token_type_ids"])


def check_llm_inputs(case: Case) -> Iterator[Check]:
    yield equal("added tokens", list(ADDED_TOKENS), case["special_tokens"]["added"])
    for want in case["worked_examples"]:
        name, length = want["name"], want["max_length"]
        tokenizer = load_tokenizer(case.folder / want["tokenizer"])
        added = add_image_tokens(tokenizer)
        yield equal(f"{name} added ids", added, list(range(want["im_patch_id"], want["im_patch_id"] + 4)))
        for role in ("bos_id", "eos_id", "pad_id"):
            yield equal(f"{name} {role}", getattr(tokenizer, role), want[role])
        found = want["abnormality"]
        prompt = want["prompt"] if found is None else want["prompt"].format(abnormality=found)
        answer = clean_report(want["raw_answer"]) if found is None else want["raw_answer"]
        question = question_text(tokenizer, prompt, want["image_tokens"])
        yield equal(f"{name} question", question, want["question"])
        yield equal(f"{name} answer", answer, want["answer"])
        example = language_example(tokenizer, question, answer, length)
        whole = collate_examples(tokenizer, [example], length)
        short = collate_examples(tokenizer, [example])
        for key, padded, unpadded in zip(
            ("input_ids", "attention_mask", "labels"), whole, short, strict=True
        ):
            yield equal(f"{name} {key}", padded[0].tolist(), want[key])
            yield equal(f"{name} unpadded {key}", unpadded[0].tolist(), want[key][: len(example.ids)])
