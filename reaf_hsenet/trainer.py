"""The one training loop: optimizer, schedule, precision, accumulation, validation, checkpoints, signals.

A stage gives a model, its outputs for a batch, the loss of these and a validation; everything else is here. The
randomness of a step is a function of (seed, step, rank), and the samples of a step of (seed, epoch), so a resumed run
needs no random state to continue.
"""

import math
import resource
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from reaf_hsenet import distributed
from reaf_hsenet.checkpoint import Run
from reaf_hsenet.config import TrainConfig
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.data.workers import batches, make_loader, worker_deaths_named
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.grad_cache import cached_backward
from reaf_hsenet.job import Job
from reaf_hsenet.models.decoder import RMSNorm
from reaf_hsenet.pretrained import load_strictly

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Decayed and undecayed parameters by the published rule of each method.

    hsenet: norms and biases are not decayed (class token, positions and logit scale are). reaf: nothing with
    fewer than two dimensions is, nor the logit scale. `rate` of a group: its share of the learning rate.
    """
    norms = {
        f"{name}.{parameter}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | RMSNorm)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = name in norms or name.endswith("bias") or (config.no_decay == "reaf" and parameter.ndim < 2)
        groups.setdefault((bare, name.startswith("encoders.")), []).append(parameter)
    return [
        {
            "params": groups[bare, encoder],
            "weight_decay": 0.0 if bare else config.weight_decay,
            "rate": config.encoder_rate if encoder else 1.0,
        }
        for bare, encoder in sorted(groups)
    ]


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """Linear from 0 (or from the first step's share) over the warm-up, then half a cosine to 0."""
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return config.lr * (step + config.first_step) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass
class Progress:
    """Optimizer steps done, the epoch, batches of it already used, the last validated step, the best score so far."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    validated: int = 0
    best: float = -math.inf


class Trainer:
    """Of a job: encode(model, batch) -> outputs; loss(outputs, batch, step) -> (scalar, {name: number or 0-d tensor});
    validate(model) -> (score to maximise, {name: number}). Outputs have the batch's rows first, or are scalars."""

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        run: Run,
        ranks: Ranks,
        max_steps: int | None = None,
        workers: int = 0,
        log_every: int = 10,
        writer: Callable[[dict], None] | None = None,
    ):
        self.config, self.run, self.ranks, self.writer = config, run, ranks, writer
        self.job, self.log_every = job, log_every
        self.model = job.model.to(ranks.device)
        self.ddp = self.model
        if ranks.world > 1:
            devices = [ranks.device] if ranks.device.type == "cuda" else None
            # Buffers are fixed tables, the same on every rank.
            self.ddp = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config), lr=config.lr, betas=config.betas, eps=config.eps
        )
        self.optimizer.register_step_post_hook(lambda *_: job.after_step())
        self.dtype = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        self.sampler = GlobalBatches(len(job.train_set), config.batch_size, ranks.rank, ranks.world, config.seed)
        self.loader = make_loader(job.train_set, self.sampler, workers, pin=ranks.device.type == "cuda")
        steps = len(self.sampler) // config.accumulate
        if steps == 0:
            needed = config.batch_size * config.accumulate * ranks.world
            raise InputError(
                f"--batch-size {config.batch_size}, --accumulate {config.accumulate}: a step needs {needed} samples, "
                f"there are {len(job.train_set)}; lower one"
            )
        self.total = max_steps or steps * config.epochs
        self.validate_every = max(1, round(config.validate_every * self.total))
        self.progress, self.signal = Progress(), 0

    def resume(self) -> None:
        """Take up the last checkpoint, exactly."""
        model, state = self.run.load_trainer()
        load_strictly(self.model, model, str(self.run.pointer("last")), self.job.saved(self.model))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.job.bad.restore(state.get("bad", {}))
        if self.ranks.main:
            self.run.forget_after(self.progress.step)

    @worker_deaths_named()
    def fit(self) -> int:
        """Train to the end. Returns 0, or 128 + the number of the signal that stopped it (after a checkpoint)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note_signal)
        bar = tqdm(
            total=self.total,
            initial=self.progress.step,
            desc="train",
            unit="step",
            disable=not self.ranks.main,
            dynamic_ncols=True,
        )
        self.clock = time.perf_counter()
        self._record_bad(self.progress.step)
        with bar:
            if self._validation_due():  # the run was stopped between a step and its validation
                self._save(self._validate(bar))
            while self.progress.step < self.total:
                for group in self._groups():
                    stopped = self._step(group, bar)
                    if stopped:
                        bar.write(
                            f"stopped by signal {stopped} at step {self.progress.step}: checkpoint written, "
                            "continue with --resume"
                        )
                        return 128 + stopped
                    if self.progress.step == self.total:
                        return 0
        return 0

    def _groups(self):
        """The rest of the epoch, as lists of `accumulate` batches."""
        self.sampler.start_at(self.progress.epoch, self.progress.batch)
        group = []
        # With gradient caching only a chunk of the batch is ever on the device.
        place = torch.device("cpu") if self.config.grad_cache else self.ranks.device
        for batch in batches(self.loader, place, tolerant=True):
            group.append(batch)
            if len(group) == self.config.accumulate:
                self.job.bad.count(group, self.config.batch_size)
                self._record_bad(self.progress.step + 1)
                yield group
                group = []
        self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def _step(self, group: list[Batch], bar: tqdm) -> int:
        """One optimizer step, and what is due after it. Returns the number of a signal to stop for, or 0."""
        progress, ranks = self.progress, self.ranks
        seed = (self.config.seed * 1_000_003 + progress.step) * 65_536 + ranks.rank
        torch.manual_seed(seed % 2**63)
        rate = learning_rate(progress.step, self.total, self.config)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters["rate"]
        self.ddp.train()
        loss, numbers, norm = self._update(group)
        progress.step, progress.batch = progress.step + 1, progress.batch + len(group)
        bar.update()
        last = progress.step == self.total
        if last or progress.step % self.log_every == 0:
            numbers = {"loss": distributed.mean_over_ranks(loss), "lr": rate, "grad_norm": norm, **numbers}
            self._log(bar, {name: float(value) for name, value in numbers.items()})
        stopped = 0 if last else distributed.any_rank(self.signal, ranks.device)
        best = self._validate(bar) if self._validation_due() and not stopped else False
        if best or last or stopped or progress.step % self.config.save_every == 0:
            self._save(best)
        return stopped

    def _update(self, group: list[Batch]) -> tuple[Tensor, dict, Tensor]:
        total = 0.0
        group = [batch for batch in group if sum(batch.counts)]
        if not group:  # no rank could read anything
            return torch.zeros((), device=self.ranks.device), {}, torch.zeros(())
        for i, batch in enumerate(group):
            loss, numbers = self._backward(batch, 1 / len(group), sync=i == len(group) - 1)
            total = total + loss.detach() / len(group)
        self.scaler.unscale_(self.optimizer)
        clip = self.config.clip_norm if self.config.clip_norm is not None else math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total, numbers, norm

    def _backward(self, batch: Batch, weight: float, sync: bool) -> tuple[Tensor, dict]:
        """Add `weight` times the gradients of one batch; those of the last batch are averaged over ranks (`sync`)."""
        result = {}

        def loss_backward(outputs) -> None:
            loss, result["numbers"] = self.job.loss(outputs, batch, self.progress.step)
            self.scaler.scale(loss * weight).backward()
            result["loss"] = loss

        if self.config.grad_cache is None:
            loss_backward(self._encode(batch, sync))
        else:
            chunks = batch.split(self.config.grad_cache)
            cached_backward(
                lambda i: self._encode(chunks[i].to(self.ranks.device), sync and i == len(chunks) - 1),
                len(chunks),
                loss_backward,
                self.ranks.device,
            )
        return result["loss"], result["numbers"]

    def _encode(self, batch: Batch, sync: bool) -> tuple[Tensor, ...]:
        """The outputs for a batch; the backward pass from them averages gradients over ranks when `sync`."""
        model = self.ddp if torch.is_grad_enabled() else self.model
        # Autocast in a context of its own: it keeps its copies of the weights, and those made without gradients have none.
        with self.autocast(), nullcontext() if sync or self.ranks.world == 1 else self.ddp.no_sync():
            return self.job.encode(model, batch)

    def autocast(self):
        return torch.autocast(
            self.ranks.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        )

    def _log(self, bar: tqdm, numbers: dict) -> None:
        now = time.perf_counter()
        done = self.progress.step - getattr(self, "logged_step", self.progress.step - self.log_every)
        samples = done * self.config.batch_size * self.config.accumulate * self.ranks.world
        numbers |= {
            "samples_per_s": samples / (now - self.clock),
            "memory_gb": peak_memory_gb(self.ranks.device),
        }
        self.clock, self.logged_step = now, self.progress.step
        bar.set_postfix_str(f"loss {numbers['loss']:.3f}, {numbers['samples_per_s']:.1f} samples/s")
        self._record({"step": self.progress.step, "epoch": self.progress.epoch, **numbers})

    def _validation_due(self) -> bool:
        step = self.progress.step
        return step > self.progress.validated and (step == self.total or step % self.validate_every == 0)

    def _validate(self, bar: tqdm) -> bool:
        self.model.eval()
        self.progress.validated = self.progress.step
        started = time.perf_counter()
        with torch.inference_mode(), self.autocast():
            score, numbers = self.job.validate(self.model)
        self._record_bad(self.progress.step)
        self.clock += time.perf_counter() - started  # not part of the training speed
        if self.ranks.main:
            shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
            bar.write(f"step {self.progress.step}: validation {shown}")
        self._record({"step": self.progress.step, "validation": numbers})
        better = score > self.progress.best
        self.progress.best = max(score, self.progress.best)
        return better

    def _record_bad(self, step: int) -> None:
        """Volumes that were found bad since, into the log of that step."""
        for one in self.job.bad.new:
            self._record({"step": step, "bad": one.id, "reason": one.reason})
        self.job.bad.new.clear()

    def _record(self, record: dict) -> None:
        if self.ranks.main:
            self.run.log(record)
            if self.writer:
                self.writer(record)

    def _save(self, best: bool) -> None:
        if self.ranks.main:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": vars(self.progress),
                "bad": self.job.bad.found,
            }
            self.run.save(self.progress.step, self.job.saved(self.model), state, self.config.keep, best)
        distributed.barrier()

    def _note_signal(self, number: int, frame) -> None:
        self.signal = number


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: the GPU's where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
