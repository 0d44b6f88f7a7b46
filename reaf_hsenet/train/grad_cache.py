"""Gradient caching (Gao et al. 2021): a contrastive loss over a large batch with the memory of a chunk of it.

Pass 1 encodes the batch chunk by chunk, without a graph. The loss of all features, gathered over ranks, gives
the gradient of every feature. Pass 2 encodes each chunk again, from the random state it had in pass 1, so
that dropout and drop path agree, and takes its features' gradients back to the parameters. The gradients are
those of one pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of torch's generators, of the processor and of the GPU that is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def cached_backward(
    encode: Callable[[int], tuple[Tensor, ...]],
    chunks: int,
    backward: Callable[[list[Tensor]], None],
    device: torch.device,
) -> None:
    """Accumulate the gradients of backward(features) into the parameters behind `encode`.

    encode(i): the outputs of chunk i, each with the chunk's rows first, or a scalar that all chunks share.
    backward(features): computes the loss of all rows and calls its backward, which fills the features'
    gradients.
    """
    states, parts = [], []
    with torch.no_grad():
        for i in range(chunks):
            states.append(random_state(device))
            parts.append(encode(i))
    joined = [torch.cat(p) if p[0].ndim else p[0] for p in zip(*parts, strict=True)]
    features = [f.detach().requires_grad_() for f in joined]
    backward(features)
    row = 0
    for i in range(chunks):
        set_random_state(states[i], device)
        outputs = encode(i)
        rows = slice(row, row + len(parts[i][0]))
        row = rows.stop
        # A scalar's gradient is that of the whole batch: it is handed over once.
        pairs = [
            (out, feature.grad[rows] if out.ndim else feature.grad)
            for out, feature in zip(outputs, features, strict=True)
            if out.requires_grad and feature.grad is not None and (out.ndim or i == chunks - 1)
        ]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
