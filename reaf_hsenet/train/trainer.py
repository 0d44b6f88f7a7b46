"""The one training loop: steps, their log, validation, checkpoints, signals.

A stage gives a model, its outputs for a batch, the loss of these and a validation; everything else is here. The
randomness of a step is a function of (seed, step, rank), and the samples of a step of (seed, epoch), so a resumed run
needs no random state to continue.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from reaf_hsenet import distributed
from reaf_hsenet.config import TrainConfig
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.data.samplers import GlobalBatches
from reaf_hsenet.data.workers import batches, make_loader, worker_deaths_later, worker_deaths_named
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError, OutputError
from reaf_hsenet.progress import progress_bar, say
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.script import early_signal
from reaf_hsenet.settings import check_ranges, from_dict, setting
from reaf_hsenet.train.job import Job
from reaf_hsenet.train.optimizer import learning_rate
from reaf_hsenet.train.stability import Stability
from reaf_hsenet.train.step_log import Meter, peak_flops, profiler
from reaf_hsenet.train.training_step import Outcome, TrainingStep, other_form

# Each writes a checkpoint and ends the run: Ctrl-C, a scheduler's end of time, its warning before.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Progress:
    """Optimizer steps done, the epoch, batches of it already used, the last validated step, the best score so far and
    its step."""

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
class Saved:
    """What trainer.pt holds beside the optimizer's state. log_lines: of log.jsonl when it was written."""

    progress: Progress
    scaler: dict[str, float]
    stability: Stability = field(default_factory=Stability)
    bad: dict[str, str] = field(default_factory=dict)
    log_lines: int | None = setting(None, least=0)

    def __post_init__(self):
        check_ranges(self)


class Trainer:
    """Of a job: encode(model, batch) -> outputs; loss(outputs, batch, step) -> (scalar, {name: number or 0-d tensor});
    validate(model) -> (score to maximise, {name: number}). Outputs have the batch's rows first, or are scalars.

    profile: write a trace of some steps into the run's folder.
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
        self.job, self.log_every, self.profile = job, log_every, profile
        if config.best_by is not None and config.best_by not in job.measured:
            raise InputError(f"--best-by {config.best_by}: the validation measures {', '.join(job.measured)}")
        self.update = TrainingStep(job, config, ranks)
        self.model = self.update.model
        self.sampler = GlobalBatches(len(job.train_set), config.batch_size, ranks.rank, ranks.world, config.seed)
        self.loader = make_loader(job.train_set, self.sampler, workers, pin=ranks.device.type == "cuda")
        steps = len(self.sampler) // config.accumulate
        needed = config.batch_size * config.accumulate * ranks.world
        if steps == 0:
            raise InputError(
                f"--batch-size {config.batch_size}, --accumulate {config.accumulate}: a step needs {needed} samples, "
                f"there are {len(job.train_set)}; lower one"
            )
        self.total = max_steps or steps * config.epochs
        self.validate_every = max(1, round(config.validate_every * self.total))
        self.progress, self.stability, self.signal = Progress(), Stability(), 0
        self.meter = Meter(needed, ranks.world, ranks.device)
        self.saved_best = self.progress.best, self.progress.best_step

    def resume(self, say: Callable[[str], None]) -> None:
        """Take up the newest checkpoint that is whole, exactly."""
        folder, reasons = distributed.on_main(self.run.newest_valid)
        for reason in reasons:
            say(f"{reason}; continuing from {folder.name}")
        state = self.update.load(lambda: self.run.load_trainer(folder), str(folder))
        saved = from_dict(Saved, state, str(folder / "trainer.pt"))
        if self.update.scaler.is_enabled() and saved.scaler:  # empty after steps in another precision
            with other_form(str(folder)):
                self.update.scaler.load_state_dict(saved.scaler)
        self.stability, self.progress = saved.stability, saved.progress
        progress = self.progress
        if self.run.at(progress.step) != folder:
            raise InputError(f"{folder / 'trainer.pt'}: is of step {progress.step}; put the one of this step back")
        self.job.bad.restore(saved.bad)

        def as_it_was() -> bool:
            """The folder, when the checkpoint was written. Whether its best checkpoint is still there."""
            self.run.forget_after(progress.step, saved.log_lines)
            if "best_step" in state["progress"]:
                self.run.point("best", progress.best_step)
            return self.run.pointer("best") is not None

        if not distributed.on_main(as_it_was):
            progress.best = -math.inf
        self._saved()

    @worker_deaths_named()
    def fit(self) -> int:
        """Train to the end. Returns 0, or 128 + the number of the signal that stopped it (after a checkpoint).

        Raises InputError when too many steps were not finite, or the last validation was not.
        """
        handlers = {number: signal.signal(number, self._note_signal) for number in STOPPING}
        self.signal = self.signal or early_signal()
        try:
            code = self._train()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if code == 0 and self.stability.invalid:
            raise InputError(
                f"step {self.progress.step}: the last validation is not finite, {self.stability.invalid}; {self.stability.way_back(self.run)}"
            )
        return code

    def _train(self) -> int:
        self.bar = progress_bar(self.total, "train", "step", done=self.progress.step, shown=self.ranks.main)
        self.peak = peak_flops(self.ranks.device, self.update.dtype)
        trace = profiler(self.run.folder / "profile") if self.profile and self.ranks.main else nullcontext()
        self._record_bad(self.progress.step)
        with self.bar, trace:
            if self._validation_due():  # the run was stopped between a step and its validation
                self._save(self._validate())
            while self.progress.step < self.total:
                for group in self._groups():
                    stopped = self._step(group)
                    if stopped:
                        self._say(self._stopped_by(stopped))
                        return 128 + stopped
                    if self.progress.step == self.total:
                        return 0
                    if self.profile and self.ranks.main:
                        trace.step()
        return 0

    def _groups(self) -> Iterator[list[Batch]]:
        """The rest of the epoch, as lists of `accumulate` batches."""
        self.sampler.start_at(self.progress.epoch, self.progress.batch)
        group = []
        # With gradient caching only a chunk of the batch is ever on the device.
        place = torch.device("cpu") if self.config.grad_cache else self.ranks.device
        for batch in self.meter.waiting(batches(self.loader, place, tolerant=True)):
            group.append(batch)
            if len(group) == self.config.accumulate:
                self.job.bad.count(group, self.config.batch_size)
                self._record_bad(self.progress.step + 1)
                yield group
                group = []
        self.progress.epoch, self.progress.batch = self.progress.epoch + 1, 0

    def _step(self, group: list[Batch]) -> int:
        """One optimizer step, and what is due after it. Returns the number of a signal to stop for, or 0."""
        progress = self.progress
        if self.peak and self.meter.flops is None:
            self.meter.flops = self.update.flops(group[0])
        done = self._update(group)
        last = progress.step == self.total
        if last or progress.step % self.log_every == 0:
            self._log(done)
        stopped = 0 if last else done.signal
        best = self._validate() if self._validation_due() and not stopped else False
        if best or last or stopped or progress.step % self.config.save_every == 0:
            self._save(best)
        return stopped

    def _update(self, group: list[Batch]) -> Outcome:
        """The step itself, which may be skipped."""
        progress, stability = self.progress, self.stability
        self.rate = learning_rate(progress.step, self.total, self.config)
        done = self.update(group, progress.step, self.rate, lambda: self.signal)
        progress.step, progress.batch = progress.step + 1, progress.batch + len(group)
        self.meter.steps += 1
        self.bar.update()
        if done.overflow:
            stability.overflows += 1
        elif done.trouble is not None:
            self._skipped(done.trouble, group)
        elif math.isfinite(done.loss):
            stability.good = stability.saved
        return done

    def _skipped(self, why: str, group: list[Batch]) -> None:
        """Log a step that was left out, and stop when there have been too many. The weights are as before it."""
        self.stability.skipped += 1
        self._record({**self._place(), "skipped": why, "samples": self._samples(group)})
        self._say(f"step {self.progress.step}: skipped, {why}")
        if self.stability.skipped > self.config.max_skipped:
            self._save(False)
            raise InputError(
                f"step {self.progress.step}: {why}; more than --max-skipped {self.config.max_skipped} steps were skipped, "
                f"with the samples that {self.run.folder / 'log.jsonl'} names; the last checkpoint has the weights from "
                f"before: --resume with a larger --max-skipped; or, if it is they that are spoiled, {self.stability.way_back(self.run)}"
            )

    def _samples(self, group: list[Batch]) -> list[str]:
        """Names of the step's samples, of all ranks."""
        rows = distributed.gather_objects([row for batch in group for row in batch.index])
        return [self.job.train_set.name(row) for part in rows for row in part]

    def _log(self, done: Outcome) -> None:
        numbers = {"loss": done.loss, "lr": self.rate, "grad_norm": done.norm}
        numbers |= {name: float(value) for name, value in done.numbers.items()}
        counts = {"skipped_steps": self.stability.skipped, "overflows": self.stability.overflows}
        measured = self.meter.read(self.peak, "hfu" if self.config.grad_checkpoint else "mfu")
        shown = [f"loss {done.loss:.3f}", f"gradient {done.norm:.2g}", f"{measured['samples_per_s']:.1f} samples/s"]
        shown += [f"{name} {measured[name]:.0%}" for name in ("waiting", "mfu", "hfu") if name in measured]
        self.bar.set_postfix_str(", ".join([*shown, f"{measured['memory_gb']:.1f} GB"]))
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}  # JSON has no others
        self._record({**self._place(), **finite, **{k: n for k, n in counts.items() if n}, **measured})

    def _place(self) -> dict:
        return {"step": self.progress.step, "epoch": self.progress.epoch}

    def _validation_due(self) -> bool:
        step = self.progress.step
        return step > self.progress.validated and (step == self.total or step % self.validate_every == 0)

    def _validate(self) -> bool:
        """Log the validation. Returns whether it is the best so far, which one that is not finite never is."""
        progress, stability, name = self.progress, self.stability, self.config.best_by
        self.model.eval()
        progress.validated = progress.step
        with self.meter.paused(), torch.no_grad(), self.update.autocast():
            try:
                (score, numbers), stability.invalid = self.job.validate(self.model), ""
            except FloatingPointError as error:
                stability.invalid = str(error)
        self._record_bad(progress.step)
        if stability.invalid:
            self._say(f"warning: step {progress.step}: the validation is not finite, {stability.invalid}")
            self._record({"step": progress.step, "not_finite": stability.invalid})
            return False
        if name is not None:
            score = -numbers[name] if name == "loss" else numbers[name]
        self._say(f"step {progress.step}: validation " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
        self._record({"step": progress.step, "validation": numbers})
        better = score > progress.best
        if better:
            progress.best, progress.best_step = score, progress.step
        return better

    def _record_bad(self, step: int) -> None:
        """Volumes that were found bad since, into the log of that step."""
        for one in self.job.bad.new:
            self._record({"step": step, "bad": one.id, "reason": one.reason})
        self.job.bad.new.clear()

    def _record(self, record: dict) -> None:
        if not self.ranks.main:
            return
        try:
            self.run.log(record)
        except OutputError as error:
            if len(self.run.unwritten) == 1:  # once, not at every step of a full disk
                self._say(f"warning: {error}: free space; training goes on, its log is kept until there is room")
        if self.writer:
            self.writer(record)

    def _save(self, best: bool) -> None:
        """Write a checkpoint. A disk that is full ends the run only after its last step."""
        progress = self.progress
        model, optimizer = self.update.state()
        state = {
            "optimizer": optimizer,
            "scaler": self.update.scaler.state_dict(),
            "progress": vars(progress),
            "stability": vars(self.stability),
            "bad": self.job.bad.found,
            "log_lines": self.run.lines,
        }
        try:
            keep, good = self.config.keep, self.stability.good
            with worker_deaths_later():
                distributed.on_main(lambda: self.run.save(progress.step, model, state, keep, best, good))
        except OutputError as error:
            if progress.step == self.total:
                raise OutputError(f"{error}, continue with --resume") from error
            progress.best, progress.best_step = self.saved_best
            self._say(f"warning: {error}; training goes on, the next checkpoint is tried when it is due")
        else:
            self._saved()

    def _saved(self) -> None:
        """Note that there is a checkpoint of this step."""
        progress = self.progress
        self.saved_best = progress.best, progress.best_step
        self.stability.checkpoint(progress.step, progress.validated)

    def _stopped_by(self, number: int) -> str:
        last = self.run.pointer("last")
        written = last == self.run.at(self.progress.step)
        state = "checkpoint written" if written else f"no checkpoint could be written, the last is {last and last.name}"
        return f"stopped by {signal.Signals(number).name} at step {self.progress.step}: {state}; continue with --resume"

    def _say(self, text: str) -> None:
        if self.ranks.main:
            say(text)

    def _note_signal(self, number: int, frame) -> None:
        self.signal = number
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun passes one Ctrl-C on twice
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._say("stopping after this step, with a checkpoint; Ctrl-C again stops at once, without")
