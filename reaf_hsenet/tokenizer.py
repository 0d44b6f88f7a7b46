"""Tokenizers of the text encoders and the language models: text to ids and back, behind one interface.

The splitting itself is a library's: `tokenizers` for tokenizer.json, for GPT-2's vocab.json with merges.txt and for
BERT's vocab.txt (`WordPiece`), `sentencepiece` for tokenizer.model (`SentencePiece`).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write, read_json, write_json

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("bos", "eos", "unk", "pad")
GPT2_NAMES = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
WORD_START = "\u2581"  # a space, as sentencepiece spells it
# The order in which a folder is searched: first the file that holds all rules by itself.
FORMS = {"tokenizer.json": ("tokenizer.json",), "gpt2": ("vocab.json", "merges.txt"),
         "sentencepiece": ("tokenizer.model",), "wordpiece": ("vocab.txt",)}  # fmt: skip
Added = Iterable[tuple[int, AddedToken]]


class Tokenizer:
    """Text to ids and back, by the `tokenizers` library. len() is the highest id + 1: the rows that a model needs.

    names: the texts of ROLES, as far as there are any. added: (id, token) that the vocabulary's own file may lack.
    As HSENet publishes, unk pads where there is no pad, and Llama-3 ends and pads with <|end_of_text|>.
    """

    def __init__(self, backend, names: dict[str, str], added: Added = ()):
        self.backend, self.names = backend, names
        self.ids, self.added = self._vocabulary()
        self.texts = {number: text for text, number in self.ids.items()}
        for number, token in added:
            if self._add(token) != number:
                raise InputError(
                    f"added token {token.content} has id {number} in tokenizer_config.json or added_tokens.json, "
                    f"{self.id_of(token.content)} by the vocabulary beside it: they are of two tokenizers"
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
            raise InputError(f"the tokenizer's ids have gaps: {token.content} cannot be added after the last one")

    def _add(self, token: AddedToken) -> int:
        number = self.ids.setdefault(token.content, len(self))
        self.texts[number] = token.content
        if number not in self.added:
            self.added[number] = token
            self._register(token)
        return number

    def add_tokens(self, texts: list[str], special: bool = True) -> list[int]:
        """Ids of tokens that are never split from now on. Known ones keep their id, others follow the last id.

        decode(skip_special_tokens=True) leaves the special ones out.
        """
        return [self._add(AddedToken(text, normalized=False, special=special)) for text in texts]

    def id_of(self, token: str) -> int:
        if token not in self.ids:
            raise InputError(f"the tokenizer has no token {token}; expected a tokenizer of this model's family")
        return self.ids[token]

    def tokens(self, ids: list[int]) -> list[str]:
        """The vocabulary's spelling of each id."""
        unknown = [number for number in ids if number not in self.texts]
        if unknown:
            raise InputError(f"token id {unknown[0]} is not one of the tokenizer's {len(self)}: another vocabulary's")
        return [self.texts[number] for number in ids]

    def encode(self, text: str, max_length: int | None = None, special_tokens: bool = True) -> list[int]:
        """Ids, with the special tokens that the family puts around a text; one that is too long loses its end."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        if max_length is not None:
            around = self.backend.num_special_tokens_to_add(False) if special_tokens else 0
            encoding.truncate(max(0, max_length - around))
        return self.backend.post_process(encoding, add_special_tokens=special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        self.tokens(ids)  # the library would leave unknown ids out
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch(self, rows: list[list[int]], length: int | None = None, side: str = "right") -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids (B, T) padded on one side and mask (B, T); T is `length` or the longest row's."""
        if side not in ("left", "right"):
            raise InputError(f"padding side {side!r}: expected left or right")
        if self.pad_id is None:
            raise InputError("the tokenizer has no pad and no unk token: name one in its tokenizer_config.json")
        length = length or max(map(len, rows))
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


class SentencePiece(Tokenizer):
    """A sentencepiece model, read as transformers' LlamaTokenizer with legacy False does, whatever the folder says.

    The text begins with a word, so with WORD_START, unless a special token comes first; what follows a token does not.
    """

    def __init__(self, model: bytes, names: dict[str, str], added: Added = (), add_bos: bool = True):
        # normalizer_spec.add_dummy_prefix = False: of a protocol buffer's joined values the last counts. encode writes it.
        backend = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        own = {role: getattr(backend, f"{role}_id")() for role in ("bos", "eos", "unk")}
        own = {role: backend.id_to_piece(number) for role, number in own.items() if number >= 0}
        self.model, self.add_bos = model, add_bos
        super().__init__(backend, own | names, added)

    def _vocabulary(self) -> tuple[dict[str, int], dict[int, AddedToken]]:
        return {self.backend.id_to_piece(i): i for i in range(self.backend.get_piece_size())}, {}

    def _register(self, token: AddedToken) -> None:
        longest_first = sorted((known.content for known in self.added.values()), key=len, reverse=True)
        self.splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str, max_length: int | None = None, special_tokens: bool = True) -> list[int]:
        parts = self.splitter.split(text)  # text, token, text, token, ..., text
        if text and not (len(parts) > 1 and not parts[0] and self.added[self.ids[parts[1]]].special):
            parts[0] = WORD_START + parts[0]
        ids = [self.bos_id] if self.add_bos and special_tokens and self.bos else []
        for i, part in enumerate(parts):
            ids += [self.ids[part]] if i % 2 else self.backend.encode(part)
        return ids[:max_length]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        self.tokens(ids)
        kept = [i for i in ids if not (skip_special_tokens and i in self.added and self.added[i].special)]
        text = ""
        for is_added, run in groupby(kept, self.added.__contains__):
            numbers = list(run)
            text += "".join(self.tokens(numbers)) if is_added else self.backend.decode(numbers)
        return text.removeprefix(" ") if kept and self.texts[kept[0]].startswith(WORD_START) else text

    def save(self, folder: Path) -> None:
        """Write tokenizer.model as it was read, and tokenizer_config.json with the added tokens."""
        with atomic_write(Path(folder) / "tokenizer.model", "wb") as file:
            file.write(self.model)
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": self.add_bos}
        self._save_settings(folder, settings)


class WordPiece(Tokenizer):
    """BERT's [CLS] text [SEP]. vocab: tokens in the order of their ids, with BERT's five special ones among them."""

    def __init__(self, vocab: list[str], lower_case: bool = True, added: Added = ()):
        missing = [token for token in SPECIAL if token not in vocab]
        if missing:
            raise InputError(f"the vocabulary has no {', '.join(missing)}; expected BERT's vocab.txt")
        self.vocab, self.lower_case = vocab, lower_case
        ids = {token: i for i, token in enumerate(vocab)}
        backend = Backend(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
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
        settings = {"do_lower_case": self.lower_case}
        if len(self) > len(self.vocab):
            settings["added_tokens_decoder"] = _to_json(self.added)
        with atomic_write(Path(folder) / "tokenizer_config.json") as file:
            json.dump(settings, file)


def load_tokenizer(folder: Path, form: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, or of one of its files; form: one of FORMS, else the first of them that is there.

    bos, eos, unk, pad and added tokens come from tokenizer_config.json and special_tokens_map.json, if there are any.
    Raises InputError when there is no tokenizer, or one that cannot be read.
    """
    path = Path(folder)
    if form not in (None, *FORMS):
        raise InputError(f"tokenizer form {form!r}: expected one of {', '.join(FORMS)}")
    wanted = FORMS if form is None else {form: FORMS[form]}
    folder = path.parent if path.is_file() else path
    for kind, files in wanted.items():
        if all((folder / name).is_file() for name in files) and (path == folder or path.name in files):
            return load_wordpiece(folder) if kind == "wordpiece" else _read(folder, kind)
    names = ", ".join(" with ".join(files) for files in wanted.values())
    raise InputError(f"{path}: no tokenizer found; looked for {names}")


def _read(folder: Path, form: str) -> Tokenizer:
    settings, names, added = _settings(folder)
    path = folder / FORMS[form][0]
    try:
        if form == "sentencepiece":
            return SentencePiece(path.read_bytes(), names, added, settings.get("add_bos_token", True))
        backend = Backend.from_file(str(path)) if form == "tokenizer.json" else _gpt2(folder, added)
    except InputError:
        raise
    except Exception as error:  # what `tokenizers` raises is of no narrower class
        raise InputError(f"{path}: cannot be read as a tokenizer ({error}); copy it again from its source") from error
    backend.no_truncation()
    backend.no_padding()
    if form == "gpt2" or not names and backend.token_to_id(GPT2_NAMES["bos"]) is not None:
        names = GPT2_NAMES | names
    return Tokenizer(backend, names, added)


def _gpt2(folder: Path, added: Added) -> Backend:
    """GPT-2's own split of the text, whatever a tokenizer.json beside it says (transformers' GPT2Tokenizer)."""
    vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(models.BPE(vocab | {token.content: number for number, token in added}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _settings(folder: Path) -> tuple[dict, dict[str, str], Added]:
    """tokenizer_config.json over special_tokens_map.json: (all settings, texts of ROLES, added tokens by id)."""
    paths = [folder / f"{name}.json" for name in ("special_tokens_map", "tokenizer_config", "added_tokens")]
    found = [read_json(path) if path.is_file() else {} for path in paths]
    for path, values in zip(paths, found, strict=True):
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected a JSON object, as transformers writes it")
    settings = {name: value for values in found[:2] for name, value in values.items() if value is not None}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in settings.items()
             if name.endswith("_token")}  # fmt: skip
    names = {role: texts[f"{role}_token"] for role in ROLES if f"{role}_token" in texts}
    listed = {int(number): AddedToken(**token) for number, token in settings.get("added_tokens_decoder", {}).items()}
    special = [*texts.values(), *settings.get("additional_special_tokens", [])]
    older = {number: AddedToken(text, normalized=False, special=text in special) for text, number in found[2].items()}
    return settings, names, sorted((listed or older).items(), key=lambda item: item[0])


def _to_json(added: dict[int, AddedToken]) -> dict[str, dict]:
    return {str(i): {"content": t.content, "normalized": False, "special": t.special} for i, t in sorted(added.items())}


def load_wordpiece(folder: Path) -> WordPiece:
    """Read vocab.txt, and whether it is lower-cased from tokenizer_config.json. Raises InputError when absent."""
    folder = Path(folder)
    try:
        vocab = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise InputError(
            f"{folder / 'vocab.txt'}: cannot be read ({error.strerror}); expected BERT's vocabulary"
        ) from error
    settings, _, added = _settings(folder)
    return WordPiece([token.removesuffix("\r") for token in vocab], settings.get("do_lower_case", True), added)


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


def check_fits(tokenizer: Tokenizer, vocab: int, special: dict[str, int | list[int] | None], source: str) -> None:
    """Raise InputError when `tokenizer`, nothing added to it yet, is not that of a decoder.

    vocab: the decoder's rows, which may be more than the tokenizer needs. special: ids of its config.json by role
    (`bos` or `bos_token_id`), of which those that either side leaves open are not compared. source: names the config.
    """
    advice = "expected the tokenizer of the decoder's own folder"
    if len(tokenizer) > vocab:
        raise InputError(f"{source}: {vocab} rows of embeddings for a tokenizer of {len(tokenizer)} tokens; {advice}")
    for name, wanted in special.items():
        role = name.removesuffix("_token_id")
        own = {getattr(tokenizer, f"{role}_id"), tokenizer.ids.get(tokenizer.names.get(role))} - {None}
        wanted = {*(wanted if isinstance(wanted, list) else [wanted])} - {None}
        if own and wanted and not own & wanted:
            raise InputError(f"{source}: {role} has id {sorted(wanted)}, but {sorted(own)} in the tokenizer; {advice}")
