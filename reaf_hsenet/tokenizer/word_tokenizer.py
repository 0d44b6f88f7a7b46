"""A vocabulary of whole words for the small decoder that phantoms train from nothing.

Byte-level vocabularies are made by a library whose choice among equals changes from run to run; this one
depends on the texts alone. A word keeps the space before it, numbers are spelled by digits, other words by
characters, so that decoding gives the text back.
"""

import re
from collections import Counter

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from reaf_hsenet.tokenizer.tokenizer import Tokenizer

PIECES = r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]"
NAMES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}


def train_words(texts: list[str], size: int) -> Tokenizer:
    """At most `size` entries: special tokens, printable ASCII and the other characters of the texts, then
    their most frequent words.
    """
    counts = Counter(piece for text in texts for piece in re.findall(PIECES, text))
    printable = {chr(code) for code in range(32, 127)}
    characters = sorted(printable.union(*counts))
    base = [*NAMES.values(), *characters]
    frequent = sorted(
        (piece for piece in counts if len(piece) > 1), key=lambda piece: (-counts[piece], piece)
    )
    vocab = {piece: i for i, piece in enumerate([*base, *frequent[: max(0, size - len(base))]])}
    # The longest known start of what is left of a word, over and over: whole words where known, else
    # characters.
    backend = Backend(models.WordPiece(vocab, unk_token=NAMES["unk"], continuing_subword_prefix=""))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, NAMES)
