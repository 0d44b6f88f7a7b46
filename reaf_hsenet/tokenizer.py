"""WordPiece tokenisation of a vocab.txt, as BERT does it: [CLS] text [SEP], lower case, accents stripped.

The splitting itself is the tokenizers library's.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPiece:
    """Text to ids and back. vocab: tokens in the order of their ids, with BERT's five special tokens among them."""

    def __init__(self, vocab: list[str], lower_case: bool = True):
        missing = [token for token in SPECIAL if token not in vocab]
        if missing:
            raise InputError(f"the vocabulary has no {', '.join(missing)}; expected BERT's vocab.txt")
        self.vocab, self.lower_case = vocab, lower_case
        ids = {token: i for i, token in enumerate(vocab)}
        self.pad_id = ids["[PAD]"]
        self.backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self.backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        self.backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.backend.decoder = decoders.WordPiece(cleanup=False)
        self.backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
        self.backend.add_special_tokens(list(SPECIAL))

    def encode(self, text: str, max_length: int | None = None, special_tokens: bool = True) -> list[int]:
        """Ids; a text that is too long loses its end but keeps [SEP] as the last token."""
        ids = self.backend.encode(text, add_special_tokens=special_tokens).ids
        if max_length is None or len(ids) <= max_length:
            return ids
        return ids[: max_length - 1] + ids[-1:] if special_tokens else ids[:max_length]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """([CLS] first [SEP] second [SEP], token types 0 and 1)."""
        encoding = self.backend.encode(first, second)
        return encoding.ids, encoding.type_ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch(self, rows: list[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids (B, T) padded on the right and mask (B, T); T is `length` or the longest row's."""
        length = length or max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids, mask

    def save(self, folder: Path) -> None:
        """Write vocab.txt and tokenizer_config.json, as BERT folders have them."""
        with atomic_write(folder / "vocab.txt") as file:
            file.writelines(token + "\n" for token in self.vocab)
        with atomic_write(folder / "tokenizer_config.json") as file:
            json.dump({"do_lower_case": self.lower_case}, file)


def load_wordpiece(folder: Path) -> WordPiece:
    """Read vocab.txt, and whether it is lower-cased from tokenizer_config.json. Raises InputError when absent."""
    folder = Path(folder)
    try:
        vocab = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise InputError(
            f"{folder / 'vocab.txt'}: cannot be read ({error.strerror}); expected BERT's vocabulary"
        ) from error
    settings = folder / "tokenizer_config.json"
    lower_case = True
    if settings.is_file():
        lower_case = json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case", True)
    return WordPiece([token.removesuffix("\r") for token in vocab], lower_case)


def train_wordpiece(texts: list[str], size: int) -> WordPiece:
    """A vocabulary of at most `size` entries: special tokens, characters, then the most frequent words.

    The library's own trainer orders its entries by a random hash, so that two runs differ; this one depends on the
    texts alone. Words outside the vocabulary are spelled by characters.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(w for t in texts for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t)))
    characters = sorted({c for word in words for c in word})
    base = [*SPECIAL, *characters, *(f"##{c}" for c in characters)]
    frequent = sorted((w for w in words if len(w) > 1), key=lambda w: (-words[w], w))
    return WordPiece([*base, *frequent[: max(0, size - len(base))]])
