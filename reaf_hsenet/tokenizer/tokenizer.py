"""Tokenizers of the text encoders and the language models: text to ids and back, behind one interface.

`loading.py` reads them from folders. `train_wordpiece` and `train_words` make the vocabularies of the small
models that phantoms train from scratch. Those depend on the texts alone: the library's own trainers choose
among equally frequent entries by a random hash, so that two runs differ.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, is_text, write_json

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("bos", "eos", "unk", "pad")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# BERT's rules by their names in tokenizer_config.json: the library's name in tokenizer.json, and the default.
BERT_RULES = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),  # None: accents are stripped if the text is lowercased
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
WORDS = r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]"
WORDS_NAMES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
Added = Iterable[tuple[int, AddedToken]]


class Tokenizer:
    """Converts text to ids and back with the `tokenizers` library.

    len() is the highest id + 1: the number of embedding rows that a model needs.

    names: the texts of those ROLES that the tokenizer has.
    added: (id, token) that the vocabulary's own file may lack, or may have with other flags.
    As HSENet publishes, unk pads if there is no pad, and Llama-3 ends and pads with <|end_of_text|>.
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
        add_to_backend(self.backend, token)
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
        """Add tokens that are never split from now on; return their ids.

        Known tokens keep their id, others follow the last id. decode(skip_special_tokens=True) leaves special
        ones out.
        """
        return [self._add(AddedToken(text, normalized=False, special=special)) for text in texts]

    def id_of(self, token: str) -> int:
        if token not in self.ids:
            raise InputError(
                f"the tokenizer has no token {token}; expected a tokenizer of this model's family"
            )
        return self.ids[token]

    def tokens(self, ids: list[int] | Tensor) -> list[str]:
        """Return the vocabulary's spelling of each id."""
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
        """Return how many tokens of the text fit beside `around` special ones; None for all of them."""
        if max_length is not None and max_length < 0:
            raise InputError(f"max_length {max_length}: expected 0 or more tokens")
        return None if max_length is None else max(0, max_length - around)

    def encode(self, text: str, max_length: int | None = None, special_tokens: bool = True) -> list[int]:
        """Return ids, with the special tokens that the family puts around a text.

        A text that is longer than max_length loses its end.
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
        """Pad rows of ids on one side: ids (B, T) and mask (B, T).

        T is `length`, or the length of the longest row.
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
            part = slice(length - len(row), length) if side == "left" else slice(len(row))
            ids[i, part], mask[i, part] = torch.tensor(row), 1
        return ids, mask

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, added tokens included, and tokenizer_config.json."""
        with atomic_write(Path(folder) / "tokenizer.json") as file:
            file.write(self.backend.to_str())
        self._save_settings(folder, {"tokenizer_class": "PreTrainedTokenizerFast"})

    def _save_settings(self, folder: Path, settings: dict) -> None:
        roles = {f"{role}_token": text for role, text in self.names.items()}
        write_json(Path(folder) / "tokenizer_config.json", {**settings, **roles, **self._added_settings()})

    def _added_settings(self) -> dict:
        """Return the added tokens with their flags, as tokenizer_config.json has them."""
        tokens = {
            str(number): {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
            for number, token in sorted(self.added.items())
        }
        return {"added_tokens_decoder": tokens}


def add_to_backend(backend: Backend, token: AddedToken) -> None:
    (backend.add_special_tokens if token.special else backend.add_tokens)([token])


class WordPiece(Tokenizer):
    """BERT's tokenizer: [CLS] text [SEP].

    vocab: tokens in the order of their ids, with BERT's five special ones among them.
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
        backend.normalizer = normalizers.BertNormalizer(
            **{known: self.rules[name] for name, (known, _) in BERT_RULES.items()}
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
        backend.add_special_tokens(list(SPECIAL))
        super().__init__(backend, {"unk": "[UNK]", "pad": "[PAD]"}, added)

    def save(self, folder: Path) -> None:
        """Write vocab.txt and tokenizer_config.json, as BERT folders have them."""
        with atomic_write(Path(folder) / "vocab.txt") as file:
            file.writelines(token + "\n" for token in self.vocab)
        settings = {"do_lower_case": self.rules["do_lower_case"]}
        settings |= {name: value for name, value in self.rules.items() if value != BERT_RULES[name][1]}
        usual = {self.ids[text]: AddedToken(text, normalized=False, special=True) for text in SPECIAL}
        if self.added != usual:
            settings |= self._added_settings()
        with atomic_write(Path(folder) / "tokenizer_config.json") as file:
            json.dump(settings, file)


def train_wordpiece(texts: list[str], size: int) -> WordPiece:
    """Make a vocabulary of at most `size` entries: special tokens, characters, the most frequent words.

    Words outside the vocabulary are spelled by characters.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = Counter(w for t in texts for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t)))
    characters = sorted({c for word in words for c in word})
    return WordPiece(_most_frequent(words, [*SPECIAL, *characters, *(f"##{c}" for c in characters)], size))


def train_words(texts: list[str], size: int) -> Tokenizer:
    """Make a vocabulary of whole words, of at most `size` entries, for a small decoder.

    It has special tokens, printable ASCII, the other characters of the texts and their most frequent words. A
    word keeps the space before it. Numbers are spelled by digits, other words by characters, so that decoding
    gives the text back.
    """
    words = Counter(word for text in texts for word in re.findall(WORDS, text))
    characters = sorted({chr(code) for code in range(32, 127)}.union(*words))
    entries = _most_frequent(words, [*WORDS_NAMES.values(), *characters], size)
    # WordPiece without a prefix takes the longest known start of what is left of a word, again and again.
    model = models.WordPiece(
        {entry: i for i, entry in enumerate(entries)},
        unk_token=WORDS_NAMES["unk"],
        continuing_subword_prefix="",
    )
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, WORDS_NAMES)


def _most_frequent(words: Counter, base: list[str], size: int) -> list[str]:
    """Fill `base` up to `size` with the most frequent words; the alphabet decides between equals."""
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    return [*base, *frequent[: max(0, size - len(base))]]


def check_fits(
    tokenizer: Tokenizer, vocab: int, special: dict[str, int | list[int] | None], source: str
) -> None:
    """Raise InputError when `tokenizer`, before anything is added to it, does not belong to a decoder.

    vocab: number of the decoder's embedding rows, which may be more than the tokenizer needs.
    special: ids of the decoder's config.json by role (`bos` or `bos_token_id`). A role is compared if both
        sides have it.
    source: name of the config.
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
