"""Training losses: contrastive, over the whole (global) batch, HSENet's relation between two models'
logits, and the next token's cross-entropy.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Concatenate every rank's rows, in rank order, and give each rank its own rows' gradient.

    Every rank computes the same loss of the gathered rows, so the sum of the ranks' gradients for a row is
    world times its own: no second communication is needed. Averaging over ranks, as DDP does, then gives
    exactly the gradient of one process with the concatenated batch.
    """

    @staticmethod
    def forward(ctx, features: Tensor, counts: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(counts[: dist.get_rank()]), len(features)
        padded = F.pad(features, (0, 0, 0, max(counts) - len(features)))  # every rank sends as much
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded.contiguous())
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.start : ctx.start + ctx.rows] * dist.get_world_size(), None


def gather_with_grad(features: Tensor, counts: list[int] | None = None) -> Tensor:
    """(B, C) on each rank -> (sum of counts, C) on every rank. counts: rows of every rank; None, as many
    as this one has.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    return _Gather.apply(features, counts or [len(features)] * dist.get_world_size())


def contrastive_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Unit vectors (B, C), (B, C) -> scale * image text^t, (B, B): row i are volume i's similarities to
    all reports.
    """
    return scale * image @ text.T


def contrastive_loss(logits: Tensor) -> Tensor:
    """(B, B) logits whose diagonal holds the pairs -> mean of both directions' cross-entropy, a scalar."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Logits (B, B) of both stages -> their mean squared difference, a scalar.

    HSENet averages it over both directions, which are each other's transpose, so that one is enough. The
    teacher's logits are of its own features and the student's scale, and carry no gradient.
    """
    return F.mse_loss(student, teacher.detach())


def relation_weight(step: int, weight: float, steps: int) -> float:
    """`weight` at step 0, falling linearly to 0 at `steps`, and 0 from then on."""
    return weight * max(0.0, 1 - step / steps)


def language_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, a scalar, in float32. logits: (B, T, V).

    labels: (B, T), the ids themselves, -100 where nothing is learned; the logits at t are compared with t +
    1.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
