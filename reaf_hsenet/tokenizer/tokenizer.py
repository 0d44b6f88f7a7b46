"""Tokenizers of the text encoders and the language models: text to ids and back, behind one interface;
loading.py reads them.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, is_text, write_json

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("bos", "eos", "unk", "pad")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# BERT's rules by the names of tokenizer_config.json: the library's name in tokenizer.json, and the default.
BERT_RULES = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),  # as lower case is
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
Added = Iterable[tuple[int, AddedToken]]


class Tokenizer:
    """Text to ids and back, by the `tokenizers` library. len() is the highest id + 1: the rows that a model
    needs.

    names: the texts of ROLES, as far as there are any. added: (id, token) that the vocabulary's own file may
    lack, or may have with other flags. As HSENet publishes, unk pads where there is no pad, and Llama-3 ends
    and pads with <|end_of_text|>.
    """

    def __init__(self, backend, names: dict[str, str], added: Added = ()):
        self.backend, self.names = backend, names
        self.ids, self.added = self._vocabulary()
        self.texts = {number: text for text, number in self.ids.items()}
        for number, token in added:
            if self._add(token, replace=True) != number:
                raise InputError(
                    f"added token {token.content} has id {number} in tokenizer_config.json or "
                    f"added_tokens.json, {self.id_of(token.content)} by the vocabulary beside it: they are "
                    "of two tokenizers"
                )
        self.add_tokens(list(names.values()))
        self.bos, self.eos, pad = names.get("bos"), names.get("eos"), names.get("pad", names.get("unk"))
        if self.bos == "<|begin_of_text|>":
            self.eos = pad = "<|end_of_text|>"
        self.bos_id, self.eos_id, self.pad_id = (t and self.id_of(t) for t in (self.bos, self.eos, pad))

    def __len__(self) -> int:
        return max(self.texts, default=-1) + 1

    def _vocabulary(self) -> tuple[dict[str, int], dict[int, AddedToken]]:
        return self.backend.get_vocab(), self.backend.get_added_tokens_decoder()

    def _register(self, token: AddedToken) -> None:
        (self.backend.add_special_tokens if token.special else self.backend.add_tokens)([token])
        if self.backend.token_to_id(token.content) != self.ids[token.content]:
            raise InputError(
                f"the tokenizer's ids have gaps: {token.content} cannot be added after the last one"
            )

    def _add(self, token: AddedToken, replace: bool = False) -> int:
        number = self.ids.setdefault(token.content, len(self))
        self.texts[number] = token.content
        if number not in self.added or replace and self.added[number] != token:
            self.added[number] = token
            self._register(token)
        return number

    def add_tokens(self, texts: list[str], special: bool = True) -> list[int]:
        """Ids of tokens that are never split from now on. Known ones keep their id, others follow the last
        id.

        decode(skip_special_tokens=True) leaves the special ones out.
        """
        return [self._add(AddedToken(text, normalized=False, special=special)) for text in texts]

    def id_of(self, token: str) -> int:
        if token not in self.ids:
            raise InputError(
                f"the tokenizer has no token {token}; expected a tokenizer of this model's family"
            )
        return self.ids[token]

    def tokens(self, ids: list[int] | Tensor) -> list[str]:
        """The vocabulary's spelling of each id."""
        return [self.texts[number] for number in self._known(ids)]

    def _known(self, ids: list[int] | Tensor) -> list[int]:
        ids = [int(number) for number in ids]
        unknown = [number for number in ids if number not in self.texts]
        if unknown:
            raise InputError(
                f"token id {unknown[0]} is not one of the tokenizer's {len(self)}: another vocabulary's"
            )
        return ids

    def _room(self, max_length: int | None, around: int) -> int | None:
        """Tokens of the text itself that fit beside `around` special ones; None for all of them."""
        if max_length is not None and max_length < 0:
            raise InputError(f"max_length {max_length}: expected 0 or more tokens")
        return None if max_length is None else max(0, max_length - around)

    def encode(self, text: str, max_length: int | None = None, special_tokens: bool = True) -> list[int]:
        """Ids, with the special tokens that the family puts around a text; one that is too long loses its
        end.
        """
        if not is_text(text):
            raise InputError(f"{text!r:.60}: holds bytes that are no UTF-8 text; write it in UTF-8")
        encoding = self.backend.encode(text, add_special_tokens=False)
        room = self._room(max_length, self.backend.num_special_tokens_to_add(False) if special_tokens else 0)
        if room is not None:
            encoding.truncate(room)
        return self.backend.post_process(encoding, add_special_tokens=special_tokens).ids

    def decode(self, ids: list[int] | Tensor, skip_special_tokens: bool = False) -> str:
        # The library would leave unknown ids out.
        return self.backend.decode(self._known(ids), skip_special_tokens=skip_special_tokens)

    def batch(
        self, rows: list[list[int]], length: int | None = None, side: str = "right"
    ) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids (B, T) padded on one side and mask (B, T); T is `length` or the longest
        row's.
        """
        if side not in ("left", "right"):
            raise InputError(f"padding side {side!r}: expected left or right")
        if self.pad_id is None:
            raise InputError(
                "the tokenizer has no pad and no unk token: name one in its tokenizer_config.json"
            )
        if not rows:
            raise InputError("there are no rows of ids to batch; expected one or more")
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise InputError(
                f"a row of {longest} ids does not fit length {length}: encode it with this max_length"
            )
        ids = torch.full((len(rows), length), self.pad_id)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            start = length - len(row) if side == "left" else 0
            ids[i, start : start + len(row)] = torch.tensor(row)
            mask[i, start : start + len(row)] = 1
        return ids, mask

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, added tokens included, and tokenizer_config.json."""
        with atomic_write(Path(folder) / "tokenizer.json") as file:
            file.write(self.backend.to_str())
        self._save_settings(folder, {"tokenizer_class": "PreTrainedTokenizerFast"})

    def _save_settings(self, folder: Path, settings: dict) -> None:
        roles = {f"{role}_token": text for role, text in self.names.items()}
        added = {"added_tokens_decoder": _to_json(self.added)}
        write_json(Path(folder) / "tokenizer_config.json", {**settings, **roles, **added})


class WordPiece(Tokenizer):
    """BERT's [CLS] text [SEP]. vocab: tokens in the order of their ids, with BERT's five special ones among
    them.

    rules: those of BERT_RULES that are not the default.
    """

    def __init__(self, vocab: list[str], added: Added = (), **rules: bool):
        missing = [token for token in SPECIAL if token not in vocab]
        if missing:
            raise InputError(f"the vocabulary has no {', '.join(missing)}; expected BERT's vocab.txt")
        self.vocab = vocab
        self.rules = {name: rules.get(name, default) for name, (_, default) in BERT_RULES.items()}
        ids = {token: i for i, token in enumerate(vocab)}
        backend = Backend(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        named = {known: self.rules[name] for name, (known, _) in BERT_RULES.items()}
        backend.normalizer = normalizers.BertNormalizer(**named)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
        backend.add_special_tokens(list(SPECIAL))
        super().__init__(backend, {"unk": "[UNK]", "pad": "[PAD]"}, added)

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """([CLS] first [SEP] second [SEP], token types 0 and 1)."""
        encoding = self.backend.encode(first, second)
        return encoding.ids, encoding.type_ids

    def save(self, folder: Path) -> None:
        """Write vocab.txt and tokenizer_config.json, as BERT folders have them."""
        with atomic_write(Path(folder) / "vocab.txt") as file:
            file.writelines(token + "\n" for token in self.vocab)
        settings = {"do_lower_case": self.rules["do_lower_case"]}
        settings |= {name: value for name, value in self.rules.items() if value != BERT_RULES[name][1]}
        if self.added != {
            self.ids[text]: AddedToken(text, normalized=False, special=True) for text in SPECIAL
        }:
            settings["added_tokens_decoder"] = _to_json(self.added)
        with atomic_write(Path(folder) / "tokenizer_config.json") as file:
            json.dump(settings, file)


def _to_json(added: dict[int, AddedToken]) -> dict[str, dict]:
    return {
        str(i): {"content": t.content} | {flag: getattr(t, flag) for flag in FLAGS}
        for i, t in sorted(added.items())
    }


def train_wordpiece(texts: list[str], size: int) -> WordPiece:
    """A vocabulary of at most `size` entries: special tokens, characters, then the most frequent words.

    The library's own trainer orders its entries by a random hash, so that two runs differ; this one depends
    on the texts alone. Words outside the vocabulary are spelled by characters.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(w for t in texts for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t)))
    characters = sorted({c for word in words for c in word})
    base = [*SPECIAL, *characters, *(f"##{c}" for c in characters)]
    frequent = sorted((w for w in words if len(w) > 1), key=lambda w: (-words[w], w))
    return WordPiece([*base, *frequent[: max(0, size - len(base))]])


def check_fits(
    tokenizer: Tokenizer, vocab: int, special: dict[str, int | list[int] | None], source: str
) -> None:
    """Raise InputError when `tokenizer`, nothing added to it yet, is not that of a decoder.

    vocab: the decoder's rows, which may be more than the tokenizer needs. special: ids of its config.json by
    role (`bos` or `bos_token_id`), of which those that either side leaves open are not compared. source:
    names the config.
    """
    advice = "expected the tokenizer of the decoder's own folder"
    if len(tokenizer) > vocab:
        raise InputError(
            f"{source}: {vocab} rows of embeddings for a tokenizer of {len(tokenizer)} tokens; {advice}"
        )
    for name, wanted in special.items():
        role = name.removesuffix("_token_id")
        own = {getattr(tokenizer, f"{role}_id"), tokenizer.ids.get(tokenizer.names.get(role))} - {None}
        wanted = {*(wanted if isinstance(wanted, list) else [wanted])} - {None}
        if own and wanted and not own & wanted:
            raise InputError(
                f"{source}: {role} has id {sorted(wanted)}, but {sorted(own)} in the tokenizer; {advice}"
            )
