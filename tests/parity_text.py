"""Checks of the language side: tokenisers and the layout of the decoder's inputs."""

from collections.abc import Iterator

from parity_case import Case, Check, equal
from reaf_hsenet.tokenizer import load_wordpiece


def check_tokenizers(case: Case) -> Iterator[Check]:
    expected = case["outputs"]["wordpiece"]
    tokenizer = load_wordpiece((case.folder / "tokenizers" / case["config"]["wordpiece"]["file"]).parent)
    yield equal("wordpiece vocabulary", len(tokenizer.vocab), expected["vocab_size"])
    for name, want in expected["texts"].items():
        text = case["texts"][name]
        plain = tokenizer.encode(text, special_tokens=False)
        yield equal(f"wordpiece {name} ids", tokenizer.encode(text), want["ids"])
        yield equal(f"wordpiece {name} plain ids", plain, want["ids_without_special_tokens"])
        yield equal(f"wordpiece {name} decoded", tokenizer.decode(plain), want["decoded"])
        skipped = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
        yield equal(f"wordpiece {name} decoded without special tokens", skipped, want["decoded_skip_special"])
        if "tokens" in want:
            yield equal(f"wordpiece {name} tokens", [tokenizer.vocab[i] for i in tokenizer.encode(text)], want["tokens"])
    for key in (k for k in expected if k.startswith("max_length_")):
        length = int(key.split("_")[2])
        for name, want in expected[key].items():
            ids, mask = tokenizer.batch([tokenizer.encode(case["texts"][name], length)], length)
            yield equal(f"wordpiece {name} padded", ids[0].tolist(), want["input_ids"])
            yield equal(f"wordpiece {name} mask", mask[0].tolist(), want["attention_mask"])
    if "pair" in expected:
        ids, types = tokenizer.encode_pair(*expected["pair"]["texts"])
        yield equal("wordpiece pair", ids, expected["pair"]["input_ids"])
        yield equal("wordpiece pair types", types, expected["pair"]["token_type_ids"])
    others = [n for n in case["outputs"] if n != "wordpiece"]
    if others:
        print(f"SKIP {case.name} [{', '.join(others)}]: not built yet")
