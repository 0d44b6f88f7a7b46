"""Tokenizers of the text encoders and the language models: text to ids and back, behind one interface.

The splitting itself is a library's: `tokenizers` for tokenizer.json, for GPT-2's vocab.json with merges.txt and for
BERT's vocab.txt (`WordPiece`), `sentencepiece` for tokenizer.model (sentencepiece_tokenizer.py).
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
from reaf_hsenet.files import atomic_write, named, read_json, read_object, write_json
from reaf_hsenet.pretrained import find_folder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROLES = ("bos", "eos", "unk", "pad")
GPT2_NAMES = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SWITCHES = ("add_bos_token", "add_eos_token", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "do_basic_tokenize")
# BERT's rules by the names of tokenizer_config.json: the library's name in tokenizer.json, and the default.
BERT_RULES = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),  # as lower case is
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
# What else of a tokenizer.json is as every BERT has it.
BERT_ONLY = {
    ("normalizer", "clean_text"): True, ("pre_tokenizer", "type"): "BertPreTokenizer", ("model", "unk_token"): "[UNK]",
    ("model", "continuing_subword_prefix"): "##", ("model", "max_input_chars_per_word"): 100,
}  # fmt: skip
# Other ways to split that BERT folders may ask for, with the value that asks for nothing.
OTHER_SPLITS = {"do_basic_tokenize": True, "never_split": None, "word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
# The order in which a folder is searched: first the file that holds all rules by itself.
FORMS = {"tokenizer.json": ("tokenizer.json",), "gpt2": ("vocab.json", "merges.txt"),
         "sentencepiece": ("tokenizer.model",), "wordpiece": ("vocab.txt",)}  # fmt: skip
HUB_FILES = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"]
Added = Iterable[tuple[int, AddedToken]]


class Tokenizer:
    """Text to ids and back, by the `tokenizers` library. len() is the highest id + 1: the rows that a model needs.

    names: the texts of ROLES, as far as there are any. added: (id, token) that the vocabulary's own file may lack, or
    may have with other flags.
    As HSENet publishes, unk pads where there is no pad, and Llama-3 ends and pads with <|end_of_text|>.
    """

    def __init__(self, backend, names: dict[str, str], added: Added = ()):
        self.backend, self.names = backend, names
        self.ids, self.added = self._vocabulary()
        self.texts = {number: text for text, number in self.ids.items()}
        for number, token in added:
            if self._add(token, replace=True) != number:
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

    def _add(self, token: AddedToken, replace: bool = False) -> int:
        number = self.ids.setdefault(token.content, len(self))
        self.texts[number] = token.content
        if number not in self.added or replace and self.added[number] != token:
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

    def tokens(self, ids: list[int] | Tensor) -> list[str]:
        """The vocabulary's spelling of each id."""
        return [self.texts[number] for number in self._known(ids)]

    def _known(self, ids: list[int] | Tensor) -> list[int]:
        ids = [int(number) for number in ids]
        unknown = [number for number in ids if number not in self.texts]
        if unknown:
            raise InputError(f"token id {unknown[0]} is not one of the tokenizer's {len(self)}: another vocabulary's")
        return ids

    def _room(self, max_length: int | None, around: int) -> int | None:
        """Tokens of the text itself that fit beside `around` special ones; None for all of them."""
        if max_length is not None and max_length < 0:
            raise InputError(f"max_length {max_length}: expected 0 or more tokens")
        return None if max_length is None else max(0, max_length - around)

    def encode(self, text: str, max_length: int | None = None, special_tokens: bool = True) -> list[int]:
        """Ids, with the special tokens that the family puts around a text; one that is too long loses its end."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        room = self._room(max_length, self.backend.num_special_tokens_to_add(False) if special_tokens else 0)
        if room is not None:
            encoding.truncate(room)
        return self.backend.post_process(encoding, add_special_tokens=special_tokens).ids

    def decode(self, ids: list[int] | Tensor, skip_special_tokens: bool = False) -> str:
        # The library would leave unknown ids out.
        return self.backend.decode(self._known(ids), skip_special_tokens=skip_special_tokens)

    def batch(self, rows: list[list[int]], length: int | None = None, side: str = "right") -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids (B, T) padded on one side and mask (B, T); T is `length` or the longest row's."""
        if side not in ("left", "right"):
            raise InputError(f"padding side {side!r}: expected left or right")
        if self.pad_id is None:
            raise InputError("the tokenizer has no pad and no unk token: name one in its tokenizer_config.json")
        if not rows:
            raise InputError("there are no rows of ids to batch; expected one or more")
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise InputError(f"a row of {longest} ids does not fit length {length}: encode it with this max_length")
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
    """BERT's [CLS] text [SEP]. vocab: tokens in the order of their ids, with BERT's five special ones among them.

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
        if self.added != {self.ids[text]: AddedToken(text, normalized=False, special=True) for text in SPECIAL}:
            settings["added_tokens_decoder"] = _to_json(self.added)
        with atomic_write(Path(folder) / "tokenizer_config.json") as file:
            json.dump(settings, file)


def load_tokenizer(name: Path | str, form: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, of one of its files or of a hub id; form: one of FORMS, else the first that is there.

    bos, eos, unk, pad and added tokens come from tokenizer_config.json and special_tokens_map.json, if there are any.
    Raises InputError when there is no tokenizer, or one that cannot be read.
    """
    if form not in (None, *FORMS):
        raise InputError(f"tokenizer form {form!r}: expected one of {', '.join(FORMS)}")
    path, wanted = Path(name), FORMS if form is None else {form: FORMS[form]}
    is_file = path.is_file() or any(path.name in files for files in FORMS.values())  # an absent one is no hub id
    folder = path.parent if is_file else find_folder(str(name), HUB_FILES)
    for kind, files in wanted.items():
        if all((folder / file).is_file() for file in files) and (not is_file or path.name in files):
            return load_wordpiece(folder) if kind == "wordpiece" else _read(folder, kind)
    names = ", ".join(" with ".join(files) for files in wanted.values())
    raise InputError(f"{path}: no tokenizer found; looked for {names}")


def _read(folder: Path, form: str) -> Tokenizer:
    from reaf_hsenet.sentencepiece_tokenizer import SentencePiece  # it is a Tokenizer, so imports this module

    settings, names, added = _settings(folder)
    path = folder / FORMS[form][0]
    try:
        if form == "sentencepiece":
            around = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
            return SentencePiece(path.read_bytes(), names, added, *around)
        backend = _backend(path) if form == "tokenizer.json" else _gpt2(folder, added)
        backend.encode("A text, 1 of 2.")  # some damage is only met here
    except BaseException as error:  # what `tokenizers` raises is of no narrower class, and its panics are no Exception
        panic = type(error).__name__ == "PanicException"
        if isinstance(error, InputError) or not isinstance(error, Exception) and not panic:
            raise
        raise InputError(f"{path}: cannot be read as a tokenizer ({error}); copy it again from its source") from error
    backend.no_truncation()
    backend.no_padding()
    if form == "gpt2" or not names and backend.token_to_id(GPT2_NAMES["bos"]) is not None:
        names = GPT2_NAMES | names
    if not settings.get("added_tokens_decoder"):  # added_tokens.json has no flags: tokenizer.json's stay
        own = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        added = [(number, own.get(token.content, token)) for number, token in added]
    return Tokenizer(backend, names, added)


def _backend(path: Path) -> Backend:
    """The library adds a file's tokens together, and then counts on from the vocabulary's size where its ids have gaps.

    Added one by one they follow the last id, which is what the file says.
    """
    backend = Backend.from_file(str(path))
    values = read_json(path)
    wanted = sorted(values["added_tokens"], key=lambda token: token["id"])
    if all(backend.token_to_id(token["content"]) == token["id"] for token in wanted):
        return backend
    backend = Backend.from_str(json.dumps(values | {"added_tokens": []}))
    for token in wanted:
        added = AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS if flag in token})
        (backend.add_special_tokens if token["special"] else backend.add_tokens)([added])
        if backend.token_to_id(token["content"]) != token["id"]:
            found = backend.token_to_id(token["content"])
            raise InputError(f"{path}: its added token {token['content']} has id {token['id']}, but becomes {found}; fetch it again")
    return backend


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
    settings, texts, more = {}, {}, []
    for path, values in zip(paths[:2], found[:2], strict=True):
        values = {name: value for name, value in values.items() if value is not None}
        for name in SWITCHES:
            _expect(path, name, values.get(name, True), bool, "true or false")
        for role in (*ROLES, "cls", "sep", "mask"):
            if f"{role}_token" in values:
                texts[role] = _token(path, f"{role}_token", values[f"{role}_token"]).content
        listed = _expect(path, "additional_special_tokens", values.get("additional_special_tokens", []), list, "a list")
        more += [_token(path, "additional_special_tokens", value).content for value in listed]
        settings |= values
    name, kind = "added_tokens_decoder", "an object with a token's content and flags by id"
    added = []
    for number, value in _expect(paths[1], name, settings.get(name, {}), dict, kind).items():
        if not number.isdecimal():
            raise InputError(f"{paths[1]}: {name} has {number!r}; expected {kind}")
        added.append((int(number), _token(paths[1], name, _expect(paths[1], name, value, dict, kind))))
    if not added:
        for text, number in found[2].items():
            flags = {"normalized": False, "special": text in (*texts.values(), *more)}
            _expect(paths[2], repr(text), number, int, "an id")
            added.append((number, _token(paths[2], f"token {number}", {"content": text, **flags})))
    return settings, {role: texts[role] for role in ROLES if role in texts}, sorted(added, key=lambda item: item[0])


def _expect(path: Path, name: str, value, kind: type, expected: str):
    if type(value) is not kind:  # True is an int too
        raise InputError(f"{path}: {name} is {value!r}; expected {expected}")
    return value


def _token(path: Path, name: str, value) -> AddedToken:
    """A token as transformers writes it: its text, or an object with the text as its content and with flags."""
    values = value if isinstance(value, dict) else {"content": value}
    text, flags = values.get("content"), {flag: values[flag] for flag in FLAGS if flag in values}
    if not isinstance(text, str) or not text or not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(f"{path}: {name} is {value!r}; expected a text, or an object with a text as content and true or false flags")
    return AddedToken(text, **flags)


def _to_json(added: dict[int, AddedToken]) -> dict[str, dict]:
    return {str(i): {"content": t.content} | {flag: getattr(t, flag) for flag in FLAGS} for i, t in sorted(added.items())}


def has_wordpiece(folder: Path) -> bool:
    """Return whether a folder has a BERT's vocabulary."""
    whole = Path(folder) / "tokenizer.json"
    return (Path(folder) / "vocab.txt").is_file() or whole.is_file() and bool(_bert_rules(whole)[1])


def load_wordpiece(folder: Path) -> WordPiece:
    """Read a BERT folder's vocab.txt, or tokenizer.json where there is none, and its rules.

    The rules are tokenizer_config.json's, and those that it leaves open tokenizer.json's, as in transformers.
    Raises InputError when there is no vocabulary, and for rules that are not BERT's.
    """
    folder = Path(folder)
    settings, _, added = _settings(folder)
    for name, usual in OTHER_SPLITS.items():
        if settings.get(name) not in (usual, None, []):
            raise InputError(f"{folder / 'tokenizer_config.json'}: {name} is {settings[name]!r}, which is not supported; use a BERT that leaves it out")
    whole, rules, ids, more = folder / "tokenizer.json", {}, {}, []
    if whole.is_file():
        rules, ids, more = _bert_rules(whole)
    if ids and not (folder / "vocab.txt").is_file():
        if not all(type(i) is int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
            raise InputError(f"{whole}: its ids are not those from 0 to {len(ids) - 1}; fetch it again")
        vocab = sorted(ids, key=ids.get)
    else:
        with named(folder / "vocab.txt", "is not UTF-8 text", "expected BERT's vocabulary"):
            text = (folder / "vocab.txt").read_text(encoding="utf-8")
        vocab = [token.removesuffix("\r") for token in text.rstrip("\n").split("\n")]
        if wrong := [token for token, i in ids.items() if i < len(vocab) and vocab[i] != token]:
            raise InputError(f"{whole}: {wrong[0]!r:.60} has another id than in the vocab.txt beside it; fetch both again")
    rules |= {name: settings[name] for name in BERT_RULES if name in settings}
    return WordPiece(vocab, added or [(i, token) for i, token in more if i >= len(vocab)], **rules)


def _bert_rules(path: Path) -> tuple[dict[str, bool], dict[str, int], list[tuple[int, AddedToken]]]:
    """Return the rules, the vocabulary and the added tokens of a tokenizer.json; nothing of one that is no WordPiece."""
    values = read_object(path)
    model, normalizer = values.get("model"), values.get("normalizer")
    if not isinstance(model, dict) or model.get("type", "WordPiece") != "WordPiece" or not isinstance(model.get("vocab"), dict):
        return {}, {}, []
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        raise InputError(f"{path}: its normalizer is {kind!r:.60}; expected a BERT's, BertNormalizer")
    parts = {"normalizer": normalizer, "pre_tokenizer": values.get("pre_tokenizer"), "model": model}
    for (part, key), usual in BERT_ONLY.items():
        held = parts[part].get(key, usual) if isinstance(parts[part], dict) else parts[part]
        if held != usual:
            raise InputError(f"{path}: {key} of its {part} is {held!r:.60}; expected a BERT's, {usual!r}")
    rules = {}
    for name, (known, default) in BERT_RULES.items():
        value = normalizer.get(known, default)
        if not (value is None or isinstance(value, bool)):
            raise InputError(f"{path}: {known} of its normalizer is {value!r}; expected true or false")
        rules[name] = value
    more = []
    for listed in _expect(path, "added_tokens", values.get("added_tokens") or [], list, "a list"):
        number = _expect(path, "id of an added token", _expect(path, "an added token", listed, dict, "an object").get("id"), int, "an id")
        more.append((number, _token(path, f"added token {number}", listed)))
    return rules, model["vocab"], sorted(more, key=lambda item: item[0])


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
