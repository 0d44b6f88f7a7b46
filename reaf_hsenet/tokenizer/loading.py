"""Folders of tokenizers -> Tokenizer: which files there are, their settings, and what is refused.

A library does the splitting: `tokenizers` for tokenizer.json, for GPT-2's vocab.json with merges.txt and for
BERT's vocab.txt (`WordPiece`), `sentencepiece` for tokenizer.model (sentencepiece_tokenizer.py).
"""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder, named, read_json, read_object
from reaf_hsenet.tokenizer.sentencepiece_tokenizer import SentencePiece
from reaf_hsenet.tokenizer.tokenizer import BERT_RULES, FLAGS, ROLES, Tokenizer, WordPiece, add_to_backend

AddedList = list[tuple[int, AddedToken]]

GPT2_NAMES = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
SWITCHES = ("add_bos_token", "add_eos_token", *BERT_RULES, "do_basic_tokenize")
# The other settings of a tokenizer.json, with the values that every BERT has.
BERT_ONLY = {
    ("normalizer", "clean_text"): True,
    ("pre_tokenizer", "type"): "BertPreTokenizer",
    ("model", "unk_token"): "[UNK]",
    ("model", "continuing_subword_prefix"): "##",
    ("model", "max_input_chars_per_word"): 100,
}
# Other ways to split that BERT folders may ask for, with the value that asks for nothing.
OTHER_SPLITS = {
    "do_basic_tokenize": True,
    "never_split": None,
    "word_tokenizer_type": "basic",
    "subword_tokenizer_type": "wordpiece",
}
# The order in which a folder is searched: first the file that holds all rules by itself.
FORMS = {
    "tokenizer.json": ("tokenizer.json",),
    "gpt2": ("vocab.json", "merges.txt"),
    "sentencepiece": ("tokenizer.model",),
    "wordpiece": ("vocab.txt",),
}
HUB_FILES = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"]


def load_tokenizer(name: Path | str, form: str | None = None) -> Tokenizer:
    """Read the tokenizer of a folder, of one of its files or of a hub id.

    form: one of FORMS; None for the first that is there.
    bos, eos, unk, pad and added tokens come from tokenizer_config.json and special_tokens_map.json, if there
    are any. Raises InputError when there is no tokenizer, or one that cannot be read.
    """
    if form not in (None, *FORMS):
        raise InputError(f"tokenizer form {form!r}: expected one of {', '.join(FORMS)}")
    path, wanted = Path(name), FORMS if form is None else {form: FORMS[form]}
    # An absent file with a tokenizer's name is no hub id.
    is_file = path.is_file() or any(path.name in files for files in FORMS.values())
    folder = path.parent if is_file else find_folder(str(name), HUB_FILES)
    for kind, files in wanted.items():
        if all((folder / file).is_file() for file in files) and (not is_file or path.name in files):
            return load_wordpiece(folder) if kind == "wordpiece" else _read(folder, kind)
    names = ", ".join(" with ".join(files) for files in wanted.values())
    raise InputError(f"{path}: no tokenizer found; looked for {names}")


def _read(folder: Path, form: str) -> Tokenizer:
    settings, names, added = _settings(folder)
    path = folder / FORMS[form][0]
    try:
        if form == "sentencepiece":
            around = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
            return SentencePiece(path.read_bytes(), names, added, *around)
        backend = _backend(path) if form == "tokenizer.json" else _gpt2(folder, added)
        backend.encode("A text, 1 of 2.")  # some damage is only met here
    except InputError:
        raise
    except BaseException as error:
        # `tokenizers` raises plain Exceptions, and its panics are no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{path}: cannot be read as a tokenizer ({error}); copy it again from its source"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    if form == "gpt2" or not names and backend.token_to_id(GPT2_NAMES["bos"]) is not None:
        names = GPT2_NAMES | names
    if not settings.get("added_tokens_decoder"):  # added_tokens.json has no flags: tokenizer.json's stay
        own = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        added = [(number, own.get(token.content, token)) for number, token in added]
    return Tokenizer(backend, names, added)


def _backend(path: Path) -> Backend:
    """Read a tokenizer.json, with its added tokens at the ids that the file gives them.

    The library adds all of them together, and counts on from the vocabulary's size even if its ids have gaps.
    Added one by one they follow the last id.
    """
    backend = Backend.from_file(str(path))
    values = read_json(path)
    added = _listed(path, values["added_tokens"])
    if all(backend.token_to_id(token.content) == number for number, token in added):
        return backend
    backend = Backend.from_str(json.dumps(values | {"added_tokens": []}))
    for number, token in added:
        add_to_backend(backend, token)
        if (found := backend.token_to_id(token.content)) != number:
            raise InputError(
                f"{path}: its added token {token.content} has id {number}, but becomes {found}; "
                "fetch it again"
            )
    return backend


def _gpt2(folder: Path, added: AddedList) -> Backend:
    """Read vocab.json and merges.txt, split as transformers' GPT2Tokenizer does.

    A tokenizer.json beside them may say otherwise.
    """
    vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(models.BPE(vocab | {token.content: number for number, token in added}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _settings(folder: Path) -> tuple[dict, dict[str, str], AddedList]:
    """Read tokenizer_config.json over special_tokens_map.json: settings, texts of ROLES, added tokens.

    Older folders have their added tokens in added_tokens.json, without flags.
    """
    names = ("special_tokens_map", "tokenizer_config", "added_tokens")
    special_map, config, older = paths = [folder / f"{name}.json" for name in names]
    held = {path: read_object(path) if path.is_file() else {} for path in paths}
    settings, texts, special = {}, {}, set()
    for path in (special_map, config):
        values = {name: value for name, value in held[path].items() if value is not None}
        for name in SWITCHES:
            _expect(path, name, values.get(name, True), bool, "true or false")
        for role in (*ROLES, "cls", "sep", "mask"):
            if (name := f"{role}_token") in values:
                texts[role] = _token(path, name, values[name]).content
        name = "additional_special_tokens"
        for value in _expect(path, name, values.get(name, []), list, "a list"):
            special.add(_token(path, name, value).content)
        settings |= values
    added = []
    name, kind = "added_tokens_decoder", "an object with a token's content and flags by id"
    for number, value in _expect(config, name, settings.get(name, {}), dict, kind).items():
        if not number.isdecimal():
            raise InputError(f"{config}: {name} has {number!r}; expected {kind}")
        added.append((int(number), _token(config, name, _expect(config, name, value, dict, kind))))
    if not added:
        special |= {*texts.values()}
        for text, number in held[older].items():
            _expect(older, repr(text), number, int, "an id")
            value = {"content": text, "normalized": False, "special": text in special}
            added.append((number, _token(older, f"token {number}", value)))
    roles = {role: texts[role] for role in ROLES if role in texts}
    return settings, roles, sorted(added, key=lambda item: item[0])


def _listed(path: Path, values) -> AddedList:
    """Return the added tokens of a tokenizer.json, in the order of their ids."""
    added = []
    for value in _expect(path, "added_tokens", values, list, "a list"):
        number = _expect(path, "an added token", value, dict, "an object").get("id")
        _expect(path, "id of an added token", number, int, "an id")
        added.append((number, _token(path, f"added token {number}", value)))
    return sorted(added, key=lambda item: item[0])


def _token(path: Path, name: str, value) -> AddedToken:
    """Return a token that transformers wrote as its text, or as an object with its content and flags."""
    values = value if isinstance(value, dict) else {"content": value}
    text, flags = values.get("content"), {flag: values[flag] for flag in FLAGS if flag in values}
    if not isinstance(text, str) or not text or not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(
            f"{path}: {name} is {value!r}; expected a text, or an object with a text as content and true "
            f"or false flags"
        )
    return AddedToken(text, **flags)


def _expect(path: Path, name: str, value, kind: type, expected: str):
    if type(value) is not kind:  # True is an int too
        raise InputError(f"{path}: {name} is {value!r}; expected {expected}")
    return value


def has_wordpiece(folder: Path) -> bool:
    """Return whether a folder has a BERT's vocabulary."""
    whole = Path(folder) / "tokenizer.json"
    return (Path(folder) / "vocab.txt").is_file() or whole.is_file() and bool(_bert_rules(whole)[1])


def load_wordpiece(folder: Path) -> WordPiece:
    """Read a BERT folder's vocab.txt, or tokenizer.json if there is none, and its rules.

    The rules are tokenizer_config.json's, and those that it leaves open tokenizer.json's, as in transformers.
    Raises InputError when there is no vocabulary, and for rules that are not BERT's.
    """
    folder = Path(folder)
    settings, _, added = _settings(folder)
    for name, usual in OTHER_SPLITS.items():
        if settings.get(name) not in (usual, None, []):
            raise InputError(
                f"{folder / 'tokenizer_config.json'}: {name} is {settings[name]!r}, which is not "
                f"supported; use a BERT that leaves it out"
            )
    whole, listing = folder / "tokenizer.json", folder / "vocab.txt"
    rules, ids, more = _bert_rules(whole) if whole.is_file() else ({}, {}, [])
    if ids and not listing.is_file():
        if not all(type(i) is int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
            raise InputError(f"{whole}: its ids are not those from 0 to {len(ids) - 1}; fetch it again")
        vocab = sorted(ids, key=ids.get)
    else:
        with named(listing, "is not UTF-8 text", "expected BERT's vocabulary"):
            text = listing.read_text(encoding="utf-8")
        vocab = [token.removesuffix("\r") for token in text.rstrip("\n").split("\n")]
        if wrong := [token for token, i in ids.items() if i < len(vocab) and vocab[i] != token]:
            raise InputError(
                f"{whole}: {wrong[0]!r:.60} has another id than in the vocab.txt beside it; fetch both again"
            )
    rules |= {name: settings[name] for name in BERT_RULES if name in settings}
    return WordPiece(vocab, added or [(i, token) for i, token in more if i >= len(vocab)], **rules)


def _bert_rules(path: Path) -> tuple[dict[str, bool], dict[str, int], AddedList]:
    """Return the rules, the vocabulary and the added tokens of a tokenizer.json.

    All three are empty for a tokenizer that is no WordPiece. Raises InputError for rules that are not BERT's.
    """
    values = read_object(path)
    model, normalizer = values.get("model"), values.get("normalizer")
    is_wordpiece = isinstance(model, dict) and model.get("type", "WordPiece") == "WordPiece"
    if not is_wordpiece or not isinstance(model.get("vocab"), dict):
        return {}, {}, []
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        raise InputError(f"{path}: its normalizer is {kind!r:.60}; expected a BERT's, BertNormalizer")
    parts = {"normalizer": normalizer, "pre_tokenizer": values.get("pre_tokenizer"), "model": model}
    for (part, key), usual in BERT_ONLY.items():
        held = parts[part].get(key, usual) if isinstance(parts[part], dict) else parts[part]
        if held != usual:
            raise InputError(f"{path}: {key} of its {part} is {held!r:.60}; expected a BERT's, {usual!r}")
    rules = {name: normalizer.get(known, default) for name, (known, default) in BERT_RULES.items()}
    for name, value in rules.items():
        if not (value is None or isinstance(value, bool)):
            known = BERT_RULES[name][0]
            raise InputError(f"{path}: {known} of its normalizer is {value!r}; expected true or false")
    return rules, model["vocab"], _listed(path, values.get("added_tokens") or [])
