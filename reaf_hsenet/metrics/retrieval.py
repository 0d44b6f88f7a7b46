"""Retrieval scores: report <-> volume recall and ranks, and CT-RATE's volume-to-volume label overlap.

Embeddings are unit vectors, (N, C), and the similarity of two is their dot product in float32. Sources:
HSENet (commit c7198f3) for the recall of exact pairs, CT-CLIP (`volume_to_volume.py`) for the label overlap;
the other scores answer what those two leave open, and carry names of their own. What CT-CLIP prints as MAP@K
is its label overlap; average_precision is the textbook's.

No (Q, G) matrix is ever built: queries go in blocks of as many rows as give 32 MB of similarities. Equal
similarities are ordered by gallery index, as the published stable sort does; so a model that collapsed to one
embedding scores chance, not R@1 = 1. Everything runs on the device the embeddings are on.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from reaf_hsenet.errors import InputError

BLOCK_SIMILARITIES = 2**23
RECALL_KS = (1, 5, 10, 50, 100)
OVERLAP_KS = (1, 5, 10, 50)
MAP_KS = (5, 10, 50)


@dataclass(frozen=True)
class CrossRetrieval:
    """Both directions of report <-> volume retrieval; the keys are `report_to_volume` and `volume_to_report`.

    ranks: (Q,) int64, from 1, of each direction's queries.
    query_rows: (Q,) int64, the row of the embeddings that each query is.
    """

    ranks: dict[str, torch.Tensor]
    query_rows: dict[str, torch.Tensor]

    @property
    def tables(self) -> dict[str, dict[str, float | int]]:
        return {direction: recall_table(found) for direction, found in self.ranks.items()}


@torch.no_grad()
def ranks(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    target: torch.Tensor,
    items: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rank, from 1, of each query's own item: 1 + items more similar + equally similar items of lower index.

    queries: (Q, C). gallery: (G, C). target: (Q,) int64, the index of the query's own item.
    items: (G,) int64 from 0, the item each gallery row belongs to; an item's similarity is that of its most
        similar row. Without it, each gallery row is an item.
    Returns (Q,) int64. Raises InputError for embeddings with NaN or infinity.
    """
    require_finite(queries=queries, gallery=gallery)
    count = len(gallery) if items is None else int(items.max()) + 1
    index = torch.arange(count, device=gallery.device)
    found = torch.empty_like(target)
    for rows, similarity in _similarity_blocks(queries, gallery):  # (b, G)
        if items is not None:
            nothing = similarity.new_full((len(similarity), count), -torch.inf)
            similarity = nothing.scatter_reduce_(1, items.expand_as(similarity), similarity, "amax")
        own_index = target[rows, None]
        # From this very block: the same dot product computed in another shape may differ in its last bit.
        own = similarity.gather(1, own_index)
        ahead = (similarity > own) | ((similarity == own) & (index < own_index))
        found[rows] = 1 + ahead.sum(1)
    return found


def recall_table(ranks: torch.Tensor, ks: Sequence[int] = RECALL_KS) -> dict[str, float | int]:
    """`R@K`, the fraction in [0, 1] of ranks up to K, for each K; `mean_rank`; `median_rank`.

    ranks: (Q,) from 1. Both averages count from 1, and the median is rounded down, as published.
    """
    ordered = ranks.sort().values
    middle = int(ordered[(len(ordered) - 1) // 2]) + int(ordered[len(ordered) // 2])
    table: dict[str, float | int] = {f"R@{k}": int((ranks <= k).sum()) / len(ranks) for k in ks}
    return table | {"mean_rank": int(ranks.sum()) / len(ranks), "median_rank": middle // 2}


def cross_retrieval(image: torch.Tensor, text: torch.Tensor) -> CrossRetrieval:
    """Report <-> volume retrieval by exact index, as published: row i of text has one hit, row i of image.

    image, text: (N, C). A reconstruction of the same scan, whose report is the same, counts as a miss.
    """
    rows = torch.arange(len(image), device=image.device)
    found = {"report_to_volume": ranks(text, image, rows), "volume_to_report": ranks(image, text, rows)}
    return CrossRetrieval(found, dict.fromkeys(found, rows))


def cross_retrieval_per_scan(image: torch.Tensor, text: torch.Tensor, scans: torch.Tensor) -> CrossRetrieval:
    """Report <-> volume retrieval among scans, so that each reconstruction of the query's scan is a hit.

    CT-RATE holds several reconstructions of a scan with one and the same report. Here the gallery is the
    scans, each as similar as the most similar of its rows, in order of scan number.
    image, text: (N, C). scans: (N,) int64, equal for the rows of a scan.
    Report queries: one a scan, the text of its first row. Volume queries: every row of image.
    """
    rows = torch.arange(len(image), device=image.device)
    numbers, items = torch.unique(scans, return_inverse=True)
    first = torch.full_like(numbers, len(image)).scatter_reduce_(0, items, rows, "amin")
    found = {
        "report_to_volume": ranks(text[first], image, items[first], items),
        "volume_to_report": ranks(image, text, items, items),
    }
    return CrossRetrieval(found, {"report_to_volume": first, "volume_to_report": rows})


@torch.no_grad()
def label_overlap(
    image: torch.Tensor,
    labels: torch.Tensor,
    scans: torch.Tensor,
    ks: Sequence[int] = OVERLAP_KS,
) -> dict[str, int | dict[str, float | None]]:
    """Volume-to-volume retrieval: the share of labels that a volume and its k nearest volumes have in common.

    image: (N, C). labels: (N, L) of 0 and 1. scans: (N,) int64, equal for the reconstructions of a scan.

    A pair scores |both positive| / |either positive|. Every volume is a query; the gallery is the volumes
    with a positive label, so 0/0 does not occur, and a query without a positive label scores 0. A query's
    score is the mean over its k nearest, or over all there are if fewer; the value is the mean over queries:

    as_published_accumulating: as CT-CLIP prints it. The query is in its own gallery, which makes k = 1 the
        fraction of volumes with a positive label, and the list of scores is kept from one k to the next, so
        that the value of the third k is the mean over the first three.
    per_k: the same with a list for each k.
    per_k_excluding_the_query_itself, per_k_excluding_all_reconstructions_of_the_query_scan: the query, or all
        rows of its scan, are left out of its gallery. A query left without a gallery is left out of the mean.

    Returns these four, each {str(k): value}, and gallery_size, queries and queries_without_positive. Values
    are None where no query has a gallery. Raises InputError for embeddings with NaN or infinity.
    """
    require_finite(image=image)
    labels = labels.to(device=image.device, dtype=torch.bool)
    rows = torch.arange(len(image), device=image.device)
    gallery = rows[labels.any(1)]
    # A row's gallery excludes the rows of its own group. Groups grow, so one block of keys serves all three.
    excluded_group = {
        "per_k": None,
        "per_k_excluding_the_query_itself": rows,
        "per_k_excluding_all_reconstructions_of_the_query_scan": scans,
    }
    nearest = min(max(ks), len(gallery))
    scores = {name: image.new_empty((len(image), nearest), dtype=torch.float64) for name in excluded_group}
    for block_rows, similarity in _similarity_blocks(image, image[gallery]):
        keys = _sort_keys(similarity)  # (b, G)
        for name, group in excluded_group.items():
            if group is not None:
                keys.masked_fill_(group[block_rows, None] == group[gallery], _NEVER)
            best, column = keys.topk(nearest, dim=1)
            query, neighbour = labels[block_rows, None], labels[gallery[column]]  # (b, 1, L), (b, k, L)
            overlap = (query & neighbour).sum(2).double() / (query | neighbour).sum(2)
            scores[name][block_rows] = overlap.masked_fill_(best == _NEVER, torch.nan)  # no such neighbour
    per_k = {name: {str(k): _mean_over_queries(scores[name][:, :k]) for k in ks} for name in excluded_group}
    # Each k adds one score a query, so the mean of the growing list is the mean of the values so far.
    values = list(per_k["per_k"].values())
    accumulating = {
        str(k): sum(values[:count]) / count if len(gallery) else None for count, k in enumerate(ks, start=1)
    }
    return {
        "gallery_size": len(gallery),
        "queries": len(image),
        "queries_without_positive": len(image) - len(gallery),
        "as_published_accumulating": accumulating,
        **per_k,
    }


@torch.no_grad()
def average_precision(
    image: torch.Tensor, labels: torch.Tensor, ks: Sequence[int] = MAP_KS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Volume-to-volume retrieval among volumes with a positive label: the average precision of each query.

    A volume that shares a positive label is relevant, the query itself is left out. AP@k is the sum of the
    precisions at the relevant of the k nearest, over min(k, relevant): 1 where none could be ranked better.
    image: (N, C). labels: (N, L) of 0 and 1.
    Returns (rows of the Q queries that have a relevant volume; (Q, len(ks)) float64 AP@k; the mean over
    queries of what a random order is expected to have, (len(ks),)). Raises InputError as label_overlap.
    """
    require_finite(image=image)
    labels = labels.to(device=image.device, dtype=torch.bool)
    rows = torch.arange(len(image), device=image.device)[labels.any(1)]
    image, marks, count = image[rows], labels[rows].float(), len(rows)
    index = torch.arange(count, device=image.device)
    nearest = max(0, min(max(ks), count - 1))
    hits = image.new_empty((count, nearest), dtype=torch.float64)
    relevant = image.new_empty(count, dtype=torch.float64)
    for block, similarity in _similarity_blocks(image, image):  # (b, G)
        keys = _sort_keys(similarity).masked_fill_(index[block, None] == index, _NEVER)
        shared = marks[block] @ marks.T > 0
        hits[block] = shared.gather(1, keys.topk(nearest, dim=1).indices).double()
        relevant[block] = (shared.sum(1) - 1).double()
    queries = relevant > 0
    rows, hits, relevant = rows[queries], hits[queries], relevant[queries, None]
    rank = 1 + torch.arange(nearest, device=image.device)
    # A hit at a rank, times the hits up to it, which at random are this one and those expected before it.
    expected = relevant / (count - 1) * (1 + (rank - 1) * (relevant - 1) / max(1, count - 2)) / rank
    precisions = hits * hits.cumsum(1) / rank
    found, chance = (
        torch.stack([part[:, :k].sum(1) / relevant[:, 0].clamp(max=k) for k in ks], dim=1)
        for part in (precisions, expected)
    )
    return rows, found, chance.mean(0)


def _mean_over_queries(scores: torch.Tensor) -> float | None:
    """Mean over queries of a query's mean score; scores: (Q, k), NaN where a query has no such neighbour."""
    mean = float(scores.nanmean(1).nanmean())
    return None if math.isnan(mean) else mean


_NEVER = torch.iinfo(torch.int64).min


def _sort_keys(similarity: torch.Tensor) -> torch.Tensor:
    """(b, G) int64 keys ordered by similarity, then lower index: topk alone takes any of two equals.

    The high half is the float32's bits made monotone (negative floats count down), the low half the index,
    reversed. Overwrites `similarity`. No key is _NEVER, which would be the bits of a NaN.
    """
    bits = similarity.add_(0.0).view(torch.int32)  # -0 + 0 is +0, which has the bits of its equal
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long()
    keys <<= 32
    keys |= torch.arange(keys.shape[1] - 1, -1, -1, device=keys.device)
    return keys


def _similarity_blocks(queries: torch.Tensor, gallery: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the rows of each block of queries and their (b, G) float32 similarities, overwritten by the next.

    One buffer, and results written into tensors made beforehand: small results allocated between blocks split
    the freed memory into holes that the next block does not fit, and the process grows by a block each time.
    """
    block = max(1, BLOCK_SIMILARITIES // max(1, len(gallery)))
    gallery = gallery.float()
    buffer = gallery.new_empty(min(block, len(queries)), len(gallery))
    for start in range(0, len(queries), block):
        rows = slice(start, min(start + block, len(queries)))
        yield rows, torch.mm(queries[rows].float(), gallery.T, out=buffer[: rows.stop - start])


def require_finite(**embeddings: torch.Tensor) -> None:
    """Raise InputError for embeddings with NaN or infinity, by their name.

    A NaN is more similar than nothing and less similar than nothing: it would rank every query first.
    """
    for name, value in embeddings.items():
        if not value.isfinite().all():
            raise InputError(f"{name}: expected finite embeddings, found NaN or infinity")
