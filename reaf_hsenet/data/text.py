"""Report text as the published pipelines prepare it: cleaning, and HSENet's shortening of what is too
long.
"""

import html
from collections.abc import Callable

import numpy as np

QUOTES_AND_BRACKETS = str.maketrans("", "", "\"'()")


def clean_report(text: str) -> str:
    """Remove double and single quotes and round brackets."""
    return text.translate(QUOTES_AND_BRACKETS)


def plain_report(text: str) -> str:
    """Resolve HTML entities, twice, and make white space one space, as REAF (open_clip) does."""
    return " ".join(html.unescape(html.unescape(text)).split())


def shorten_report(
    text: str, limit: int, count_tokens: Callable[[str], int], rng: np.random.Generator
) -> str:
    """A report of more than `limit` tokens keeps its first sentence and randomly drawn others, joined by full
    stops.

    count_tokens counts with special tokens. As published the first sentence is not counted, so that the
    tokenizer may still have to truncate; a repeated sentence is taken once.
    """
    if count_tokens(text) <= limit:
        return text
    first, *rest = text.split(".")
    kept, used = [first], 0
    for i in rng.permutation(len(rest)):
        tokens = count_tokens(rest[i])
        if used + tokens <= limit and rest[i] not in kept:
            kept.append(rest[i])
            used += tokens
    return ".".join(kept)
