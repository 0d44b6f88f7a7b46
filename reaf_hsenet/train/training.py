"""What the training loop (train.py) works on: data in order, counts, log, checkpoints, signals.

The randomness of a step is a function of (seed, step, rank), and the samples of a step of (seed, epoch), so a
resumed run needs no random state to continue.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch

from reaf_hsenet import distributed
from reaf_hsenet.config import TrainConfig
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.data.workers import batches, make_loader, worker_deaths_later
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.progress import progress_bar, say
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.script import early_signal
from reaf_hsenet.settings import check_ranges, from_dict, setting
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.stability import Stability
from reaf_hsenet.train.step_log import Meter, peak_flops, profiler
from reaf_hsenet.train.training_state import Outcome, TrainingState, reading_trainer

# Each writes a checkpoint and ends the run: Ctrl-C, a scheduler's end of time, its warning before.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Progress:
    """Where a run is.

    step: optimizer steps done. epoch, batch: batches of the epoch already used. validated: last validated
    step.
    best, best_step: best score so far.
    """

    step: int = setting(0, least=0)
    epoch: int = setting(0, least=0)
    batch: int = setting(0, least=0)
    validated: int = setting(0, least=0)
    best: float = setting(-math.inf, least=-math.inf)
    best_step: int = setting(0, least=0)

    def __post_init__(self):
        check_ranges(self)
        if max(self.validated, self.best_step) > self.step:
            raise InputError(f"Progress is at step {self.step}, and validated or best at a later one")


@dataclass
class TrainerFile:
    """The content of trainer.pt beside the optimizer's state. log_lines: length of log.jsonl at that time."""

    progress: Progress
    scaler: dict[str, float]
    stability: Stability = field(default_factory=Stability)
    bad: dict[str, str] = field(default_factory=dict)
    log_lines: int | None = setting(None, least=0)

    def __post_init__(self):
        check_ranges(self)


class Training:
    """A run's job, its samples in order, its optimizer, and what is counted, logged and saved of it.

    max_steps: optimizer steps, in place of config.epochs. workers: loader processes. log_every: steps between
    lines of the log. writer: also takes each record of the log. profile: write a trace of some steps.
    """

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
        profile: bool = False,
    ):
        self.config, self.run, self.ranks, self.writer = config, run, ranks, writer
        self.job, self.log_every = job, log_every
        if config.best_by is not None and config.best_by not in job.measured:
            raise InputError(f"--best-by {config.best_by}: the validation measures {', '.join(job.measured)}")
        self.state = TrainingState(job, config, ranks)
        # Every rank shuffles alike, by (seed, epoch), and takes its part of each global batch.
        self.sampler = GlobalBatches(
            len(job.train_set), config.batch_size, ranks.rank, ranks.world, config.seed
        )
        self.loader = make_loader(job.train_set, self.sampler, workers, pin=ranks.device.type == "cuda")
        # Batches of an epoch that fill no step are left out; another epoch leaves out others.
        steps = len(self.sampler) // config.accumulate
        needed = config.batch_size * config.accumulate * ranks.world
        if steps == 0:
            raise InputError(
                f"--batch-size {config.batch_size}, --accumulate {config.accumulate}: a step needs {needed} "
                f"samples, there are {len(job.train_set)}; lower one"
            )
        self.total = max_steps or steps * config.epochs
        # A share of the run, so that a short run is validated as often as a long one.
        self.validate_every = max(1, round(config.validate_every * self.total))
        self.progress, self.stability, self.signal = Progress(), Stability(), 0
        self.meter = Meter(needed, ranks.world, ranks.device)
        self.saved_best = self.progress.best, self.progress.best_step
        self.peak = peak_flops(ranks.device, self.state.dtype)
        self.trace = profiler(run.folder / "profile") if profile and ranks.main else nullcontext()

    @cached_property
    def bar(self):
        """The progress bar, from the step at which the run starts or continues."""
        return progress_bar(self.total, "train", "step", done=self.progress.step, shown=self.ranks.main)

    def resume(self, say: Callable[[str], None]) -> None:
        """Continue exactly from the newest checkpoint that is whole."""
        # Rank 0 checks sizes and hashes, and all ranks take the folder that it found whole.
        folder, reasons = distributed.on_main(self.run.newest_valid)
        for reason in reasons:
            say(f"{reason}; continuing from {folder.name}")
        # Weights and moments; with the sampler's place and the step's seed, that is all a step depends on.
        state = self.state.load(lambda: self.run.load_trainer(folder), str(folder))
        saved = from_dict(TrainerFile, state, str(folder / "trainer.pt"))
        if self.state.scaler.is_enabled() and saved.scaler:  # empty after steps in another precision
            with reading_trainer(str(folder)):
                self.state.scaler.load_state_dict(saved.scaler)
        self.stability, self.progress = saved.stability, saved.progress
        progress = self.progress
        if self.run.at(progress.step) != folder:
            raise InputError(
                f"{folder / 'trainer.pt'}: is of step {progress.step}; put the one of this step back"
            )
        self.job.bad.restore(saved.bad)

        def as_it_was() -> bool:
            """Put the run's folder back to this checkpoint. Returns whether the best one still exists."""
            # Steps after the checkpoint are taken again: their log lines, checkpoints and choice of the best
            # go.
            self.run.forget_after(progress.step, saved.log_lines)
            self.run.point("last", progress.step)
            if "best_step" in state["progress"]:
                self.run.point("best", progress.best_step)
            return self.run.pointer("best") is not None

        # Where the best checkpoint is gone, its score must not keep the next from being the best.
        if not distributed.on_main(as_it_was):
            progress.best = -math.inf
        self.note_checkpoint()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals of STOPPING while the block runs, also one that came before it."""
        # Python's handler runs between two instructions of this rank: it notes the number and no more.
        handlers = {number: signal.signal(number, self._note_signal) for number in STOPPING}
        self.signal = self.signal or early_signal()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def groups(self) -> Iterator[list[Batch]]:
        """Yield the rest of the epoch, as lists of `accumulate` batches."""
        # A resumed run starts within the epoch: what was used is not read again.
        self.sampler.start_at(self.progress.epoch, self.progress.batch)
        group = []
        # With gradient caching only a chunk of the batch is ever on the device.
        place = torch.device("cpu") if self.config.grad_cache else self.ranks.device
        for batch in self.meter.waiting(batches(self.loader, place, tolerant=True)):
            group.append(batch)
            if len(group) == self.config.accumulate:
                # Before any rank computes: all must know how many rows each will hand in, to gather them.
                self.job.bad.exchange(group, self.config.batch_size)
                self.record_bad(self.progress.step + 1)
                yield group
                group = []
        # Batches that fill no step are not carried over: each epoch is a new permutation.
        self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def count_flops(self, batch: Batch) -> None:
        """Count the FLOPs of a sample, once, where the GPU's peak is known."""
        if self.peak and self.meter.flops is None:
            self.meter.flops = self.state.flops(batch)

    def take_in(self, done: Outcome, group: list[Batch]) -> None:
        """Count a step. Raises InputError when more than --max-skipped were skipped."""
        progress, stability = self.progress, self.stability
        # A skipped step counts too: its samples would give the same NaN again.
        progress.step, progress.batch = progress.step + 1, progress.batch + len(group)
        self.meter.steps += 1
        self.bar.update()
        if done.overflow:
            stability.overflows += 1
        elif done.trouble is not None:
            self._skipped(done.trouble, group)
        # The newest checkpoint's weights have come to a finite step: they are good.
        elif math.isfinite(done.loss):
            stability.good = stability.saved

    def _skipped(self, why: str, group: list[Batch]) -> None:
        """Log a step that was left out, and stop when there have been too many."""
        self.stability.skipped += 1
        self.record({**self._place(), "skipped": why, "samples": self._samples(group)})
        self.say(f"step {self.progress.step}: skipped, {why}")
        # Skipping changes nothing of the weights; when it goes on, it may be they that are spoiled. They are
        # kept for --resume with a larger limit.
        if self.stability.skipped > self.config.max_skipped:
            self.save(False)
            raise InputError(
                f"step {self.progress.step}: {why}; more than --max-skipped {self.config.max_skipped} steps "
                f"were skipped, with the samples that {self.run.folder / 'log.jsonl'} names; the last "
                "checkpoint has the weights from before: --resume with a larger --max-skipped; or, if it is "
                f"they that are spoiled, {self.stability.way_back(self.run)}"
            )

    def _samples(self, group: list[Batch]) -> list[str]:
        """Return names of the step's samples, of all ranks."""
        rows = distributed.gather_objects([row for batch in group for row in batch.index])
        return [self.job.train_set.name(row) for part in rows for row in part]

    def log(self, done: Outcome, rate: float) -> None:
        """Write a line of log.jsonl, and the bar's remark."""
        numbers = {"loss": done.loss, "lr": rate, "grad_norm": done.norm}
        numbers |= {name: float(value) for name, value in done.numbers.items()}
        # The loss is the global batch's, the norm that before clipping; how fast, and how much of it was
        # waiting for data.
        counts = {"skipped_steps": self.stability.skipped, "overflows": self.stability.overflows}
        measured = self.meter.read(self.peak, "hfu" if self.config.grad_checkpoint else "mfu")
        shown = [
            f"loss {done.loss:.3f}",
            f"gradient {done.norm:.2g}",
            f"{measured['samples_per_s']:.1f} samples/s",
        ]
        shown += [f"{name} {measured[name]:.0%}" for name in ("waiting", "mfu", "hfu") if name in measured]
        self.bar.set_postfix_str(", ".join([*shown, f"{measured['memory_gb']:.1f} GB"]))
        finite = {
            name: value for name, value in numbers.items() if math.isfinite(value)
        }  # JSON has no others
        self.record({**self._place(), **finite, **{k: n for k, n in counts.items() if n}, **measured})

    def _place(self) -> dict:
        return {"step": self.progress.step, "epoch": self.progress.epoch}

    def validation_due(self) -> bool:
        step = self.progress.step
        return step > self.progress.validated and (step == self.total or step % self.validate_every == 0)

    def record_bad(self, step: int) -> None:
        """Log volumes that were found unreadable since the last call, at this step."""
        for one in self.job.bad.new:
            self.record({"step": step, "bad": one.id, "reason": one.reason})
        self.job.bad.new.clear()

    def record(self, record: dict) -> None:
        """Write a record into log.jsonl and to the writer, on rank 0. A full disk is no reason to stop."""
        if not self.ranks.main:
            return
        try:
            self.run.log(record)
        except OutputError as error:
            if len(self.run.unwritten) == 1:  # once, not at every step of a full disk
                self.say(
                    f"warning: {error}: free space; training goes on, its log is kept until there is room"
                )
        if self.writer:
            try:
                self.writer(record)
            except OSError as error:
                self.say(f"warning: --log: cannot be written ({error.strerror}); training goes on without it")
                self.writer = None

    def save(self, best: bool) -> None:
        """Write a checkpoint. A disk that is full ends the run only after its last step."""
        progress = self.progress
        # On every rank, because a sharded model is gathered; rank 0 writes.
        model, optimizer = self.state.state()
        # trainer.pt. The samples' order and a step's random numbers are functions of what `progress` has, so
        # no generator's state is in it.
        state = {
            "optimizer": optimizer,
            "scaler": self.state.scaler.state_dict(),
            "progress": vars(progress),
            "stability": vars(self.stability),
            "bad": self.job.bad.found,
            "log_lines": self.run.lines,
        }
        try:
            keep, good = self.config.keep, self.stability.good
            # A loader process that dies meanwhile is reported afterwards: the checkpoint is written first.
            with worker_deaths_later():
                distributed.on_main(
                    lambda: self.run.save(progress.step, model, state, keep=keep, best=best, good=good)
                )
        except OutputError as error:
            if progress.step == self.total:
                raise OutputError(f"{error}{', continue with --resume' if self.run.all() else ''}") from error
            # A best score without its checkpoint would keep the next, lower one from being saved as best.
            progress.best, progress.best_step = self.saved_best
            self.say(f"warning: {error}; training goes on, the next checkpoint is tried when it is due")
        else:
            self.note_checkpoint()

    def note_checkpoint(self) -> None:
        """Note that there is a checkpoint of this step."""
        progress = self.progress
        self.saved_best = progress.best, progress.best_step
        self.stability.checkpoint(progress.step, progress.validated)

    def say_stopped(self, number: int) -> None:
        """Say which signal stopped the run, and whether its checkpoint was written."""
        last = self.run.pointer("last")
        written = last == self.run.at(self.progress.step)
        state = (
            "checkpoint written"
            if written
            else f"no checkpoint could be written, the last is {last and last.name}"
        )
        self.say(
            f"stopped by {signal.Signals(number).name} at step {self.progress.step}: {state}; continue "
            f"with --resume"
        )

    def profile_step(self) -> None:
        """Tell --profile that a step has ended."""
        if not isinstance(self.trace, nullcontext):
            self.trace.step()

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self.ranks.main:
            say(text)

    def _note_signal(self, number: int, frame) -> None:
        self.signal = number
        # A second Ctrl-C stops at once; not under torchrun, which passes one on twice.
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.say("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without")
