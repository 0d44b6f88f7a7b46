"""Gradient caching (Gao et al. 2021): a contrastive loss over a large batch with the memory of a chunk of it.

Pass 1 encodes the batch chunk by chunk, without a graph. The loss of all features, gathered over ranks, gives
the gradient of every feature. Pass 2 encodes each chunk again, from the random state it had in pass 1, so
that dropout and drop path agree, and takes its features' gradients back to the parameters. The gradients are
those of one pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class GradCache:
    """The features of a batch, without a graph, whose gradients are taken back to the parameters in chunks.

    encode(i) returns the outputs of chunk i: tensors whose first dimension is the chunk's rows, or a scalar
    that is equal in all chunks. features: leaf tensors that a loss is computed from; backward() continues
    from their gradients.
    """

    def __init__(self, encode: Callable[[int], tuple[Tensor, ...]], chunks: int, device: torch.device):
        self.encode, self.device = encode, device
        self.states, parts = [], []
        # Pass 1. Without a graph a chunk's activations are freed as soon as its features are there.
        with torch.no_grad():
            for i in range(chunks):
                # Pass 2 must draw the same dropout masks: other masks give other features, which the loss has
                # not seen.
                self.states.append(random_state(device))
                parts.append(encode(i))
        self.rows = [len(part[0]) for part in parts]
        # A scalar output, the logit scale, is equal in all chunks: the first stands for all.
        joined = [torch.cat(p) if p[0].ndim else p[0] for p in zip(*parts, strict=True)]
        # Leaves of the loss's graph: its backward pass stops here, with dL/df of every row in their grad.
        self.features = [f.detach().requires_grad_() for f in joined]

    def backward(self) -> None:
        """Accumulate the parameters' gradients, from those of the features."""
        # Pass 2. dL/dw is the sum over chunks of dL/df df/dw: one chunk's graph at a time is in memory.
        start, last = 0, len(self.rows) - 1
        for i, rows in enumerate(self.rows):
            set_random_state(self.states[i], self.device)
            outputs = self.encode(i)
            own = slice(start, start + rows)
            start = own.stop
            # A scalar's gradient is that of the whole batch: it is handed over once.
            pairs = [
                (out, feature.grad[own] if out.ndim else feature.grad)
                for out, feature in zip(outputs, self.features, strict=True)
                # What a frozen tower puts out has no graph to go back through.
                if out.requires_grad and feature.grad is not None and (out.ndim or i == last)
            ]
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the state of torch's generators, of the processor and of the GPU that is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
