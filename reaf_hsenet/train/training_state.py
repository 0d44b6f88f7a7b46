"""What an optimizer step changes: the model on its device, its optimizer, fp16's loss scale."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from reaf_hsenet.config import TrainConfig
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.files import named
from reaf_hsenet.train.grad_cache import GradCache
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.optimizer import parameter_groups
from reaf_hsenet.train.sharding import load_whole_state, shard, whole_state
from reaf_hsenet.train.step_log import count_flops
from reaf_hsenet.weights.files import require_fit

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Outcome:
    """Result of one optimizer step, identical on every rank.

    loss, norm (of the gradients): NaN where no rank could read anything. numbers: what the stage logs.
    signal: a signal received by any rank, else 0. trouble: what was not finite, so that the step was skipped.
    overflow: whether it was skipped because fp16's loss scale was too large.
    """

    loss: float
    numbers: dict
    norm: float
    signal: int
    trouble: str | None = None
    overflow: bool = False


def reading_trainer(checkpoint: str):
    """Return a block that reads trainer.pt: an exception in it becomes one line."""
    advice = (
        "write the name of an older step's folder into checkpoints/last, or start again with another --out"
    )
    return named(Path(checkpoint) / "trainer.pt", "is not the state of this run's training", advice)


class TrainingState:
    """Model, optimizer and loss scale. ddp: the model, with DistributedDataParallel on several ranks."""

    def __init__(self, job: Job, config: TrainConfig, ranks: Ranks):
        self.job, self.config, self.ranks = job, config, ranks
        self.dtype = PRECISIONS[config.precision]
        # Before the optimizer, whose moments then are of the parts that this rank holds.
        if config.shard:
            shard(job.model, ranks, self.dtype)
        self.model = job.model.to(ranks.device)
        self.ddp = self.model
        if ranks.world > 1 and not config.shard:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # Buffers are fixed tables, the same on every rank.
            self.ddp = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)
        # Decay is decoupled from the gradient: w -= rate (m / (sqrt(v) + eps) + decay w).
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config), lr=config.lr, betas=config.betas, eps=config.eps
        )
        # Called for steps that are taken, not for skipped ones: REAF's scale is put back into [1, 100].
        self.optimizer.register_step_post_hook(lambda *_: job.after_step())
        # bf16 has float32's range and needs no scale; in fp16 small gradients would round to 0.
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)

    def encode(self, batch: Batch, sync: bool) -> tuple[Tensor, ...]:
        """Return the model's outputs for a batch. sync: their backward pass averages gradients over ranks."""
        # Pass 1 of gradient caching has no gradients for DDP to average, and must not set it waiting for
        # them.
        model = self.ddp if torch.is_grad_enabled() else self.model
        # Enter autocast anew for each call: it keeps the cast weights, and a copy made under no_grad would
        # have no gradient.
        with self.autocast(), nullcontext() if sync or self.ddp is self.model else self.ddp.no_sync():
            return self.job.encode(model, batch)

    def encode_chunks(self, batch: Batch, sync: bool) -> GradCache:
        """Return a batch's outputs, computed without a graph, --grad-cache volumes at a time."""
        # Chunks go to the device one at a time. DDP averages in the last one's backward pass, when the
        # gradients of all have been added up.
        chunks = batch.split(self.config.grad_cache)

        def encode(i: int) -> tuple[Tensor, ...]:
            return self.encode(chunks[i].to(self.ranks.device), sync=sync and i == len(chunks) - 1)

        return GradCache(encode, len(chunks), self.ranks.device)

    def autocast(self):
        return torch.autocast(
            self.ranks.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        )

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Return a checkpoint's tensors and the optimizer's state; of a sharded model on rank 0 alone."""
        # What is trained: a stage leaves out what is frozen, and config.json names that by its hash.
        saved = self.job.saved(self.model)
        return (
            whole_state(self.model, self.optimizer, saved)
            if self.config.shard
            else (saved, self.optimizer.state_dict())
        )

    def load(self, read: Callable[[], tuple[dict[str, Tensor], dict]], source: str) -> dict:
        """Load the checkpoint that read() returns. Returns the rest of it."""

        def fitting() -> tuple[dict[str, Tensor], dict, dict]:
            tensors, state = read()
            require_fit(tensors, self.job.saved(self.model), source)
            with reading_trainer(source):
                return tensors, self._moments(state.pop("optimizer")), state

        if self.config.shard:
            return load_whole_state(self.model, self.optimizer, fitting)
        tensors, optimizer, rest = fitting()
        # Not strict, because of what is frozen and not saved; require_fit has compared all that is.
        self.model.load_state_dict(tensors, strict=False)
        self.optimizer.load_state_dict(optimizer)
        return rest

    def _moments(self, saved: dict) -> dict:
        """Return a checkpoint's optimizer state with this run's own settings.

        Raises ValueError for the state of another optimizer.
        """
        # Moments belong to parameters by number: other parameters, or another order, would be trained on with
        # the wrong ones and no error.
        own = self.optimizer.state_dict()["param_groups"]
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("its optimizer has other parameters")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, moments in saved["state"].items():
            shape = parameters[number].shape
            if {name: tensor.shape for name, tensor in moments.items()} != {
                "step": (),
                "exp_avg": shape,
                "exp_avg_sq": shape,
            }:
                raise ValueError(f"its optimizer has other moments of parameter {number}")
        return {"state": saved["state"], "param_groups": own}

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a sample, forward and backward, with what --grad-checkpoint computes again."""
        self.ddp.train()
        part = (
            batch.split(self.config.grad_cache)[0].to(self.ranks.device) if self.config.grad_cache else batch
        )
        # Uncompiled: torch.compile leaves a block alone for good when it first meets it under a counter.
        compiled = {block: block._compiled_call_impl for block in self.job.blocks}
        for block in compiled:
            block._compiled_call_impl = None
        counted = count_flops(lambda: self.encode(part, sync=False)) / len(part.ids)
        for block, call in compiled.items():
            block._compiled_call_impl = call
        self.optimizer.zero_grad(set_to_none=True)
        return counted
