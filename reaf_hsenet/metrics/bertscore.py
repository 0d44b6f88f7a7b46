"""BERTScore (Zhang et al. 2020) with any local BERT or RoBERTa folder.

precision: the mean over the generated text's tokens of the largest cosine with a token of the reference;
recall: the same the other way round; f1: their harmonic mean. The hidden states are those after a chosen
layer, by default the last. As in the bert_score library the class and end tokens carry no weight in the
means, but can be matched, a RoBERTa text begins with a space, and a pair with an empty text scores 0. Without
idf weights and without rescaling by a baseline, so that values compare with bert_score's defaults of the same
model and layer only. For `lang="en"`, which HSENet reports, these are roberta-large and layer 17.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.config import TextConfig
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.text_encoder import TextEncoder
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, check_fits
from reaf_hsenet.weights.files import load_strictly, read_weights
from reaf_hsenet.weights.names import BERT, import_state
from reaf_hsenet.weights.shapes import bert_config

AROUND = {"bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}


@dataclass(frozen=True)
class TextReader:
    """Texts to the ids of a BERT or RoBERTa encoder. limit: tokens of a text, special ones counted."""

    tokenizer: Tokenizer
    config: TextConfig
    first: int
    last: int
    limit: int

    def ids(self, text: str) -> list[int]:
        """Class token, text, end token; the end of a text that is too long is cut."""
        return [self.first, *self.tokenizer.encode(text, special_tokens=False)[: self.limit - 2], self.last]

    def batch(self, rows: Sequence[list[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Rows of ids -> ids (B, T), padded on the right, and mask (B, T), True at tokens."""
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.config.pad_id] * (length - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return ids, torch.arange(length, device=device) < lengths[:, None]


def load_text_reader(folder: Path) -> TextReader:
    """Read a folder's tokenizer and config.json. Raises InputError when they are absent or of two models."""
    config, tokenizer = bert_config(folder), load_tokenizer(folder)
    check_fits(tokenizer, config.vocab, {}, str(Path(folder) / "config.json"))
    first, last = (tokenizer.id_of(token) for token in AROUND[config.kind])
    limit = config.positions - (0 if config.kind == "bert" else config.pad_id + 1)
    return TextReader(tokenizer, config, first, last, limit)


@dataclass(frozen=True)
class Bert:
    """A BERT that bert_score compares texts by. variant: which BERTScore that gives, in words."""

    reader: TextReader
    model: TextEncoder
    variant: str


def load_bert(folder: Path, layer: int | None = None, device: torch.device | str = "cpu") -> Bert:
    """Load the encoder of a BERT or RoBERTa folder up to a layer, counted from 1; by default all."""
    folder, reader = Path(folder), load_text_reader(folder)
    depth = reader.config.depth
    if layer is not None and not 1 <= layer <= depth:
        raise InputError(f"BERTScore's layer {layer}: {folder} has {depth} layers; expected 1 to {depth}")
    model = TextEncoder(**vars(reader.config))
    load_strictly(model, import_state(BERT, read_weights(folder)), str(folder))
    model.blocks = model.blocks[:layer]
    variant = f"{folder.name}, layer {layer or depth} of {depth}, no idf, not rescaled"
    return Bert(reader, model.eval().to(device), variant)


@torch.no_grad()
def bert_score(
    predictions: Sequence[str], references: Sequence[str], bert: Bert, batch_size: int = 32
) -> dict[str, np.ndarray]:
    """{"precision", "recall", "f1"}: (n,) each."""
    space = " " if bert.reader.config.kind == "roberta" else ""
    sides = [
        [bert.reader.ids(space + t.strip() if t.strip() else "") for t in texts]
        for texts in (predictions, references)
    ]
    found = np.zeros((3, len(references)))
    # Texts of like length together, so that little is padded.
    order = sorted(range(len(references)), key=lambda i: len(sides[0][i]) + len(sides[1][i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        found[:, rows] = _greedy_matching(*([side[i] for i in rows] for side in sides), bert)
    return dict(zip(("precision", "recall", "f1"), found, strict=True))


def _greedy_matching(predictions: list[list[int]], references: list[list[int]], bert: Bert) -> np.ndarray:
    """Rows of ids -> (3, B): precision, recall, F1."""
    device = next(bert.model.parameters()).device
    units, masks, weights = [], [], []
    for rows in (predictions, references):
        ids, mask = bert.reader.batch(rows, device)
        units.append(torch.nn.functional.normalize(bert.model(ids, mask).float(), dim=-1))  # (B, T, C)
        masks.append(mask)
        special = (ids == bert.reader.first) | (ids == bert.reader.last)
        weights.append((mask & ~special).double())
    cosines = units[0] @ units[1].mT  # (B, T generated, T reference)
    best = (
        cosines.masked_fill(~masks[1][:, None], -2).amax(2),
        cosines.masked_fill(~masks[0][:, :, None], -2).amax(1),
    )
    counts = [w.sum(1) for w in weights]
    precision, recall = (
        (b * w).sum(1) / n.clamp(min=1) for b, w, n in zip(best, weights, counts, strict=True)
    )
    both = (counts[0] > 0) & (counts[1] > 0)
    precision, recall = precision * both, recall * both
    f1 = torch.where(precision + recall == 0, 0, 2 * precision * recall / (precision + recall))
    return torch.stack((precision, recall, f1)).cpu().numpy()
