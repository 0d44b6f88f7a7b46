"""The tokenizer.model of the Llama and Phi-3 families: sentencepiece's pieces between added tokens.

Source: LlamaTokenizer of transformers with legacy False. A text begins with a word, hence with WORD_START,
unless a special token comes first. Text after an added token gets no WORD_START.
"""

import re
from itertools import groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import atomic_write
from reaf_hsenet.tokenizer.tokenizer import Added, Tokenizer

WORD_START = "\u2581"  # a space, as sentencepiece spells it


class SentencePiece(Tokenizer):
    """A sentencepiece model; the folder's `legacy` is ignored.

    add_bos, add_eos: whether encode puts bos first and eos last.
    """

    def __init__(
        self,
        model: bytes,
        names: dict[str, str],
        added: Added = (),
        add_bos: bool = True,
        add_eos: bool = False,
    ):
        # Append normalizer_spec.add_dummy_prefix = False: the last value in a protocol buffer counts. encode
        # writes WORD_START itself.
        backend = SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        own = {role: getattr(backend, f"{role}_id")() for role in ("bos", "eos", "unk")}
        own = {role: backend.id_to_piece(number) for role, number in own.items() if number >= 0}
        self.model, self.add_bos, self.add_eos = model, add_bos, add_eos
        super().__init__(backend, own | names, added)
        if add_eos and not self.eos:
            raise InputError(
                "add_eos_token is true, but the tokenizer has no eos: name one in its tokenizer_config.json"
            )

    def _vocabulary(self) -> tuple[dict[str, int], dict[int, AddedToken]]:
        return {self.backend.id_to_piece(i): i for i in range(self.backend.get_piece_size())}, {}

    def _register(self, token: AddedToken) -> None:
        longest_first = sorted(self.added.values(), key=lambda known: len(known.content), reverse=True)
        self.splitter = re.compile(f"({'|'.join(map(_pattern, longest_first))})")

    def _split(self, text: str) -> list[str]:
        """Return [text, token, text, ..., text]. A token with lstrip or rstrip takes the spaces beside it."""
        parts = self.splitter.split(text)
        for i in range(1, len(parts), 2):
            token = self.added[self.ids[parts[i]]]
            parts[i - 1] = parts[i - 1].rstrip() if token.lstrip else parts[i - 1]
            parts[i + 1] = parts[i + 1].lstrip() if token.rstrip else parts[i + 1]
        return parts

    def encode(self, text: str, max_length: int | None = None, special_tokens: bool = True) -> list[int]:
        parts = self._split(text)
        if text and not (len(parts) > 1 and not parts[0] and self.added[self.ids[parts[1]]].special):
            parts[0] = WORD_START + parts[0]
        first = [self.bos_id] if self.add_bos and special_tokens and self.bos else []
        last = [self.eos_id] if self.add_eos and special_tokens else []
        ids = []
        for i, part in enumerate(parts):
            ids += [self.ids[part]] if i % 2 else self.backend.encode(part)
        return [*first, *ids[: self._room(max_length, len(first + last))], *last][:max_length]

    def decode(self, ids: list[int] | Tensor, skip_special_tokens: bool = False) -> str:
        ids = self._known(ids)
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
        around = {"add_bos_token": self.add_bos, "add_eos_token": self.add_eos}
        self._save_settings(folder, {"tokenizer_class": "LlamaTokenizer", "legacy": False, **around})


def _pattern(token: AddedToken) -> str:
    text = re.escape(token.content)
    return rf"(?<!\w){text}(?!\w)" if token.single_word else text
