"""Embeddings of scans in a file, to be searched: written by `infer.py embed --out`, and by evaluate.py.

A safetensors file with `image` (N, C), unit vectors, and the metadata `ids` (a line a scan) and `model`, the
sha256 of the weights that made them: vectors of two models have nothing in common.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.embeddings import read_tensors, write_tensors
from reaf_hsenet.files import is_text, named


@dataclass(frozen=True)
class SearchIndex:
    """image: (N, C) float32 unit vectors of the scans `ids`. model: sha256 of the weights."""

    image: Tensor
    ids: list[str]
    model: str

    def write(self, path: Path) -> None:
        if odd := [name for name in self.ids if "\n" in name or not is_text(name)]:
            raise InputError(f"{odd[0]!r}: a name in an index is one line of UTF-8 text; rename the file")
        write_tensors(path, {"image": self.image}, {"ids": "\n".join(self.ids), "model": self.model})

    def nearest(self, query: Tensor, top: int) -> list[tuple[str, float]]:
        """The `top` scans with the largest cosine to a unit vector (C,), best first."""
        scores, rows = (self.image @ query).topk(min(top, len(self.ids)))
        return [(self.ids[row], score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]


def read_index(path: Path) -> SearchIndex:
    """Raises InputError, naming the file, for anything that is not an index."""
    path = Path(path)
    again = f"make an index with infer.py embed SCAN... --out {path}"
    with named(path, "is truncated or not a safetensors file", again):
        tensors, known = read_tensors(path)
    image = tensors.get("image")
    ids = known.get("ids", "").split("\n")
    if (
        image is None
        or image.ndim != 2
        or not image.is_floating_point()
        or not image.isfinite().all()
        or len(ids) != len(image)
    ):
        raise InputError(
            f"{path}: is no index: expected unit vectors `image` and their ids, as infer.py embed --out "
            f"writes"
        )
    if "model" not in known:
        raise InputError(
            f"{path}: does not say which model made it; make it again with infer.py embed or evaluate.py"
        )
    return SearchIndex(image.to(torch.float32), ids, known["model"])
