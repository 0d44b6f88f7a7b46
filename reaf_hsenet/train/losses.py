"""Training losses: contrastive, over the global batch, and HSENet's relation between two models' logits."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Concatenate every rank's rows, in rank order, and give each rank its own rows' gradient.

    Every rank computes the same loss of the gathered rows, and so the same gradient for each row. The sum of
    these gradients over ranks is `world` times the local one: multiplying takes the place of communicating.
    DDP then averages over ranks, which gives exactly the gradient of one process with the whole batch.
    """

    @staticmethod
    def forward(ctx, features: Tensor, counts: list[int]) -> Tensor:
        # Where this rank's rows begin among all, for backward to cut their gradient out.
        ctx.start, ctx.rows = sum(counts[: dist.get_rank()]), len(features)
        padded = F.pad(features, (0, 0, 0, max(counts) - len(features)))  # every rank sends as much
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded.contiguous())
        # Padding is cut off again: a row of zeros would be one more negative of every pair.
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # Times world here and the mean over ranks in DDP: together the plain gradient of the global loss.
        # Without the factor the encoders would get 1 / world of it, and the logit scale all.
        return gradient[ctx.start : ctx.start + ctx.rows] * dist.get_world_size(), None


def gather_with_grad(features: Tensor, counts: list[int] | None = None) -> Tensor:
    """Gather the ranks' rows (B, C) into (sum of counts, C). counts: rows of every rank; None: equal."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    # dist.all_gather alone is unknown to autograd: the rows that it returns are constants, this rank's own
    # among them, and the loss would teach the encoders nothing.
    return _Gather.apply(features, counts or [len(features)] * dist.get_world_size())


def contrastive_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Return scale * image text^t, (B, B), of unit vectors: row i are volume i's similarities to reports."""
    return scale * image @ text.T


def contrastive_loss(logits: Tensor) -> Tensor:
    """Return the mean cross-entropy of both directions, for logits (B, B) whose diagonal holds the pairs."""
    # Volumes and reports are gathered in one order of ranks, so that pair i stands in row i and column i.
    target = torch.arange(len(logits), device=logits.device)
    # Row i: which of the B reports belongs to volume i? Column i: which of the B volumes to report i?
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Return the sigmoid loss (Zhai et al. 2023, SigLIP) of logits (B, B) whose diagonal holds the pairs.

    -1/B sum_ij log sigmoid(z_ij (l_ij + b)), z = 1 on the diagonal and -1 elsewhere. SigLIP learns b, from
    -10. Here b is the log odds of a pair, -log(B - 1): what SigLIP's start aims at, without another weight.
    """
    rows = len(logits)
    signs = 2 * torch.eye(rows, dtype=logits.dtype, device=logits.device) - 1
    # B^2 questions, each answered alone. Divided by B, as published: a row's B - 1 negatives together weigh
    # about as much as its pair at the start, which is what b is for.
    return -F.logsigmoid(signs * (logits - math.log(max(1, rows - 1)))).sum() / rows


LOSSES = {"softmax": contrastive_loss, "siglip": sigmoid_loss}


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the logits (B, B) of both stages.

    HSENet averages it over both directions, which are each other's transpose, so that one is enough. The
    teacher's logits come from its own features and the student's scale, and carry no gradient.
    """
    return F.mse_loss(student, teacher.detach())


def relation_weight(step: int, weight: float, steps: int) -> float:
    """Return `weight` at step 0, falling linearly to 0 at `steps`, and 0 from then on."""
    # lambda(t) of HSENet: 0.1 at first, 0 from step 5000 on.
    return weight * max(0.0, 1 - step / steps)
