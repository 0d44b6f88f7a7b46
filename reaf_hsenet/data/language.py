"""Layout of the language model's inputs, as HSENet publishes it: bos, image tokens, prompt, space, answer,
stop token.

Visual features replace the embeddings of the image tokens, columns 1 .. n after bos at column 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.tokenizer.tokenizer import Tokenizer

IGNORED = -100  # a label that is not learned
IMAGE_TOKEN = "<im_patch>"
ADDED_TOKENS = (IMAGE_TOKEN, "<bx_start>", "<bx_end>", "[SEG]")
CUE_TOKENS = 256  # at most, of a cue
Findings = tuple[tuple[str, str], ...]  # (label, place), the place "" for the label itself


class LanguageExample(NamedTuple):
    """Token ids, attention mask and labels of a question with its answer: lists of equal length."""

    ids: list[int]
    mask: list[int]
    labels: list[int]


def add_image_tokens(tokenizer: Tokenizer) -> list[int]:
    """Add ADDED_TOKENS and return their ids. [SEG] is an ordinary token, which decoded text keeps."""
    *special, ordinary = ADDED_TOKENS
    return tokenizer.add_tokens(special) + tokenizer.add_tokens([ordinary], special=False)


def cue_text(findings: Findings, told: Sequence[bool]) -> str:
    """Return a prompt's first sentence, as "Findings: consolidation (left lower lobe); cardiomegaly. "."""
    said: dict[str, list[str]] = {}
    for (label, place), present in zip(findings, told, strict=True):
        if present:
            said.setdefault(label.lower(), []).extend([place] if place else [])
    words = []
    for label, places in said.items():
        where = said_places(places)
        words.append(f"{label} ({', '.join(where)})" if where else label)
    return f"Findings: {'; '.join(words) or 'none'}. "


def said_places(places: Sequence[str]) -> list[str]:
    """Return the places of a finding without a side that one of its lobes says already."""
    return [place for place in places if not any(other.startswith(f"{place} ") for other in places)]


def cue_ids(tokenizer: Tokenizer, findings: Findings, told: Sequence[bool]) -> list[int]:
    """Return the tokens of a cue, which stands between the image tokens and the prompt."""
    return tokenizer.encode(cue_text(findings, told), CUE_TOKENS, special_tokens=False)


def question_text(tokenizer: Tokenizer, prompt: str, image_tokens: int) -> str:
    """bos as text, one <im_patch> per visual token, the prompt. To be encoded with special_tokens=False."""
    if image_tokens and tokenizer.bos is None:
        raise InputError(
            "the tokenizer has no bos token, after which the image tokens stand: name one in its "
            "tokenizer_config.json"
        )
    return (tokenizer.bos or "") + IMAGE_TOKEN * image_tokens + prompt


def language_example(tokenizer: Tokenizer, question: str, answer: str, max_length: int) -> LanguageExample:
    """Return the tokens of a question and its answer, at most max_length, with labels.

    question: as question_text makes it. answer: a report after clean_report, or an answer as it is. The
    answer, with the space before it, and the stop token are learned. Where a tokenizer pads with a token that
    may occur in an answer (unk or eos), that token is not learned there. The stop token has mask 0: it is
    predicted from the answer's last token, and nothing follows it. A text that fills max_length has none.
    Raises InputError when the question leaves no room for an answer.
    """
    if tokenizer.eos_id is None:
        raise InputError(
            "the tokenizer has no eos token to end an answer: name one in its tokenizer_config.json"
        )
    asked = len(tokenizer.encode(question, special_tokens=False))
    if asked >= max_length:
        raise InputError(
            f"a question of {asked} tokens, image tokens included, leaves no room for an answer in a text of "
            f"at most {max_length}: raise the text length (--max-text) or shorten the question "
            f"({question[-40:]!r})"
        )
    ids = tokenizer.encode(f"{question} {answer}", max_length, special_tokens=False)
    labels = [IGNORED if i < asked or token == tokenizer.pad_id else token for i, token in enumerate(ids)]
    mask = [1] * len(ids)
    if len(ids) < max_length:
        ids, mask, labels = [*ids, tokenizer.eos_id], [*mask, 0], [*labels, tokenizer.eos_id]
    return LanguageExample(ids, mask, labels)


def collate_examples(
    tokenizer: Tokenizer, examples: Sequence[LanguageExample], length: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, labels), (B, T) int64 padded on the right; T is `length` or the longest example's."""
    ids, valid = tokenizer.batch([example.ids for example in examples], length)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    mask[valid.bool()] = torch.tensor([value for example in examples for value in example.mask])
    labels[valid.bool()] = torch.tensor([value for example in examples for value in example.labels])
    return ids, mask, labels
