"""Dual encoders at work: embed a split, score retrieval on it."""

import torch
from torch import Tensor

from reaf_hsenet import distributed
from reaf_hsenet.data.bad_volumes import BadVolumes
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.samplers import InOrder
from reaf_hsenet.data.workers import batches, make_loader, worker_deaths_named
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.metrics.retrieval import cross_retrieval
from reaf_hsenet.models.clip import DualEncoder
from reaf_hsenet.progress import progress_bar

# What the validation of a dual encoder measures.
SCORES = tuple(
    f"{direction}/R@{k}" for direction in ("report_to_volume", "volume_to_report") for k in (1, 5, 10)
)


@worker_deaths_named()
@torch.inference_mode()
def embed(
    model: DualEncoder,
    dataset: CTReportDataset,
    ranks: Ranks,
    batch: int,
    rows: int | None = None,
    workers: int = 0,
    progress: bool = False,
    reports: bool = True,
    bad: BadVolumes | None = None,
) -> tuple[Tensor, Tensor]:
    """Unit vectors of the first `rows` volumes and reports, (N, C) each, on the CPU and the same on every
    rank.

    Without `reports` there are none of them, (N, 0). bad: takes what cannot be read, up to its limit; without
    it the first such volume is an InputError.
    """
    rows = min(rows or len(dataset), len(dataset))
    loader = make_loader(dataset, InOrder(rows, batch, ranks.rank, ranks.world), workers)
    index, image, text, unreadable = [], [], [], []
    with progress_bar(len(loader), "embed", "batch", shown=progress and ranks.main) as bar:
        for part in batches(loader, ranks.device, tolerant=bad is not None):
            bar.update()
            index, unreadable = index + part.index, unreadable + part.bad
            if not part.index:
                continue
            image.append(model.encode_image(part.volume, part.slices).float().cpu())
            text.append(
                model.encode_text(part.ids, part.mask).float().cpu()
                if reports
                else torch.empty(len(part.index), 0)
            )
    if bad is not None:
        bad.agree(unreadable)
    parts = distributed.gather_objects((index, image, text))
    if not any(index for index, _, _ in parts):
        raise InputError(f"{dataset.manifest.name}: of its first {rows} volumes here none can be read")
    order = torch.tensor([i for index, _, _ in parts for i in index]).argsort()
    image = torch.cat([x for _, images, _ in parts for x in images])[order]
    text = torch.cat([x for _, _, texts in parts for x in texts])[order]
    return image, text


def retrieval_score(image: Tensor, text: Tensor) -> tuple[float, dict[str, float]]:
    """Return (mean R@5 of both directions, the numbers to show), for choosing the best checkpoint."""
    tables = cross_retrieval(image, text).tables
    numbers = {f"{direction}/R@{k}": tables[direction][f"R@{k}"] for direction in tables for k in (1, 5, 10)}
    return sum(table["R@5"] for table in tables.values()) / 2, numbers
