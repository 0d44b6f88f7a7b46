"""Train a stage: clip1, the dual encoder of CT volumes and reports; clip2, the same guided by 2D slices; mrg,
a decoder that writes reports from what the encoders see; vqa, one that answers questions.

    torchrun train.py --stage clip1                               # phantoms, tiny preset: a laptop is enough
    torchrun --nproc-per-node 8 train.py --stage clip1 --data DATA --text-model google-bert/bert-base-uncased
    torchrun train.py --stage clip1 --model reaf                  # the second method, also on phantoms
    torchrun train.py --stage clip2                               # HSENet's stage 2, from the run of stage 1
    torchrun train.py --stage mrg                                 # reports, from the run of stage 2
    torchrun train.py --stage vqa                                 # answers, likewise
    torchrun train.py --stage clip1 --resume                      # continue, exactly, where the run stopped
    torchrun train.py --stage clip1 --resume auto                 # start, or continue what was started

`python train.py` does the same with one process. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint first; the
exit code is then 130, 143 or 138. Before the first step Ctrl-C and SIGTERM end at once, SIGUSR1 waits for
that step. A mistake, or numbers that are no longer finite, is 2.
"""

import signal

from reaf_hsenet.script import start_script

if __name__ == "__main__":
    start_script(signal.SIGUSR1)  # what is imported next takes seconds

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from reaf_hsenet import __version__, distributed
from reaf_hsenet.config import LANGUAGE, TrainConfig
from reaf_hsenet.data.loader import Batch
from reaf_hsenet.data.workers import worker_deaths_named
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.layers import count_parameters
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.script import run_script
from reaf_hsenet.settings import from_dict, to_dict
from reaf_hsenet.train.command import Command, parse
from reaf_hsenet.train.optimizer import learning_rate
from reaf_hsenet.train.setup import Setup, keep_slice_encoder, resumed_setup
from reaf_hsenet.train.stability import clip_gradients, diagnosis, not_finite
from reaf_hsenet.train.step_log import make_writer
from reaf_hsenet.train.training import Training
from reaf_hsenet.train.training_state import Outcome, TrainingState


def main(argv: list[str]) -> int:
    command = parse(argv, __doc__)
    # Under torchrun every process runs this file; its rank and the world size are in the environment.
    code = train(command, distributed.start(command.device))
    # The process group is left when train() has returned, and its models are freed. After an error it is not
    # left: the other ranks would report a lost connection before this error.
    distributed.stop()
    return code


def train(command: Command, ranks: Ranks) -> int:
    """Train a run in its folder, which no other process may write into. Returns the exit code."""
    run = Run(command.out or Path("runs") / f"{command.stage}-{command.model}")
    if run.named:
        raise InputError(
            f"--out {command.out}: is a checkpoint of a run; name the run's folder, {run.folder}"
        )
    # Rank 0 alone writes. The lock keeps a second process, such as a job that was queued twice, out of the
    # folder.
    with run.writing() if ranks.main else nullcontext():  # locks the folder
        training = start(command, run, ranks)
        if training is None:
            return 0
        code = fit(training)
        if code == 0 and ranks.main:
            chosen_on = run.read_config()["best_of"]
            taken = "by name only" if chosen_on == "validation" else "unless another one is named"
            best = f"best checkpoint {run.pointer('best')} (chosen on the {chosen_on} split)"
            print(f"{run.folder}: finished; {best}, taken {taken}", flush=True)
        return code


def start(command: Command, run: Run, ranks: Ranks) -> Training | None:
    """Build all that the loop needs, of a new run or of the one to resume, and write config.json.

    Returns None when the command's run is finished already.
    """

    def say(text: str) -> None:
        if ranks.main:
            print(text, flush=True)

    # The modules that build the stage; those of the other stages are not loaded.
    if command.stage in LANGUAGE:
        from reaf_hsenet.train.language import build
        from reaf_hsenet.train.language_setup import new_setup
    else:
        from reaf_hsenet.train.contrastive import build
        from reaf_hsenet.train.contrastive_setup import new_setup

    # Settings, data and tokenizer: from the command line, or from the run's own config.json.
    begun, resumed = distributed.on_main(lambda: begun_and_resumed(command, run))
    if resumed:
        setup = resumed_setup(command, run, ranks)
    else:
        setup = new_setup(command, ranks, say)
        if begun:
            require_finished(command, run, setup)  # raises where another run, or an unfinished one, is there
            say(
                f"{run.folder}: this run is finished already; evaluate it, or train another with --out FOLDER"
            )
            return None
        # Without a checkpoint there is nothing to lose: a run that died early is started again.
        if ranks.main:
            run.forget_after(0)
    settings = setup.train

    # The stage: model with its weights, training set, loss and validation.
    job = build(setup, command, ranks, say)
    if command.compile:
        # In place, so that parameters keep their names in checkpoints.
        for block in job.blocks:
            block.compile()

    # The optimizer, the order of the samples, the log and the counts, of a resumed run from its checkpoint.
    workers = command.workers
    if workers is None:
        workers = 4 if ranks.device.type == "cuda" else 0
    training = Training(
        job,
        settings,
        run,
        ranks,
        max_steps=command.max_steps or setup.max_steps,
        workers=workers,
        log_every=command.log_every,
        writer=make_writer(command.log, run, ranks),
        profile=command.profile,
    )
    if resumed:
        training.resume(say)
    # A run's folder holds what its weights mean nothing without: the vocabulary, and the phantoms' slice
    # encoder.
    elif ranks.main:
        setup.tokenizer.save(run.folder)
        if setup.guided:
            keep_slice_encoder(setup.manifest, run.folder)
    if ranks.main:
        values = {
            "version": __version__,
            "stage": command.stage,
            "preset": setup.preset,
            **setup.values(),
            "world": ranks.world,
            "max_steps": command.max_steps or setup.max_steps,
            "total_steps": training.total,
            "torch": torch.__version__,
        }
        # The file keeps the number of ranks and the batch size that the run was started with.
        if resumed:
            values["world"] = run.read_config()["world"]
            values["train"]["batch_size"] = settings.batch_size * ranks.world // values["world"]
        run.write_config(values)
    say(
        f"{run.folder}: {command.stage}, {setup.preset}, {count_parameters(job.model) / 1e6:.1f} M "
        f"parameters, {count_parameters(job.model, trained=True) / 1e6:.1f} M trained, {len(job.train_set)} "
        f"samples, global batch {settings.batch_size * settings.accumulate * ranks.world}, "
        f"{settings.precision} on {ranks.world} x {ranks.device.type}, step {training.progress.step} of "
        f"{training.total}"
    )
    return training


@worker_deaths_named()
def fit(training: Training) -> int:
    """Train to the end. Returns 0, or 128 + the number of the signal that stopped it, after a checkpoint.

    Raises InputError when too many steps were not finite, or the last validation was not.
    """
    config, progress, total = training.config, training.progress, training.total
    # The files were looked through when the job was built: what was absent goes into the log first.
    training.record_bad(progress.step)
    # From here on a signal is only noted. The loop obeys it between two steps, so that no checkpoint is of
    # half a step.
    with training.listening(), training.bar, training.trace:
        # A run that was stopped between a step and its validation makes up for that.
        if training.validation_due():
            training.save(validate(training))
        while progress.step < total:
            # The rest of the epoch, `accumulate` micro-batches a step. Which samples they have, seed and
            # epoch say.
            for group in training.groups():
                training.count_flops(group[0])
                # The rate is a function of the step and the run's length alone: a resumed run has no
                # scheduler to restore.
                step, rate = progress.step, learning_rate(progress.step, total, config)
                # The signal is asked for inside the step, beside the losses: every rank must stop after the
                # same step, or the others would wait for its gradients for ever.
                done = train_step(training.state, group, step, rate, lambda: training.signal)
                training.take_in(done, group)  # skipped steps are counted, and too many of them end the run

                # Log, on rank 0.
                last = progress.step == total
                if last or progress.step % training.log_every == 0:
                    training.log(done, rate)

                # Validate when it is due. A signal is obeyed first, and the resumed run validates; after the
                # last step there is nothing to stop.
                stopped = 0 if last else done.signal
                best = validate(training) if training.validation_due() and not stopped else False

                # A checkpoint: of a best validation, of the last step, before stopping, and now and then.
                if best or last or stopped or progress.step % config.save_every == 0:
                    training.save(best)
                if stopped:
                    training.say_stopped(stopped)
                    return 128 + stopped
                if last:
                    break
                training.profile_step()
    # All steps are taken, but weights whose validation is not finite are no result.
    if training.stability.invalid:
        raise InputError(
            f"step {progress.step}: the last validation is not finite, {training.stability.invalid}; "
            f"{training.stability.way_back(training.run)}"
        )
    return 0


def train_step(
    state: TrainingState,
    group: list[Batch],
    step: int,
    rate: float,
    signal: Callable[[], int],
) -> Outcome:
    """Run one optimizer step on the micro-batches of `group`, or skip it where it is not finite.

    step: number of steps before this one, skipped ones included. rate: learning rate.
    signal: returns the number of a signal that this rank has received, or 0; called after the backward pass.
    Returns the same outcome on every rank.
    """
    job, config, model = state.job, state.config, state.model
    optimizer, scaler = state.optimizer, state.scaler
    for parameters in optimizer.param_groups:
        parameters["lr"] = rate * parameters["rate"]  # encoders of a language stage may have a lower one

    # Dropout and drop path depend on (seed, step, rank) alone, so that a resumed run needs no random state.
    torch.manual_seed(((config.seed * 1_000_003 + step) * 65_536 + state.ranks.rank) % 2**63)
    # A validation has left the model in evaluation mode.
    state.ddp.train()

    # A micro-batch of which no rank could read anything has no part in the step. counts: rows of every rank.
    group = [batch for batch in group if sum(batch.counts)]
    # The loss is summed on the device: reading it would wait for the GPU in every micro-batch.
    loss = norm = torch.zeros((), device=state.ranks.device)
    for i, batch in enumerate(group):
        last = i == len(group) - 1  # gradients are averaged over ranks once, in the last backward pass

        # Forward: the whole micro-batch at once, or in chunks (--grad-cache), whose gradients are the same.
        if config.grad_cache is None:
            cache, outputs = None, state.encode(batch, sync=last)
        else:
            cache = state.encode_chunks(batch, sync=last)
            outputs = cache.features

        # Loss over the gathered batch of all ranks, and the backward pass from it.
        value, numbers = job.loss(outputs, batch, step)
        # The mean over micro-batches, so that --accumulate leaves the gradients' size as it is. fp16's scale
        # keeps small gradients from rounding to 0.
        scaler.scale(value / len(group)).backward()
        # That pass has ended at the cached features. This one takes their gradients to the weights.
        if cache is not None:
            cache.backward()
        loss = loss + value.detach() / len(group)

    # Clip the gradients' norm, without fp16's loss scale. unscale_ and the check below stand for scaler.step,
    # which would look at this rank's gradients alone.
    if group:
        scaler.unscale_(optimizer)
        norm = clip_gradients(model, config.clip_norm)

    # The step's only wait for the device. Every rank gets the losses, norms and signals of all, and decides
    # as they do.
    own = torch.stack([loss, norm, torch.full_like(norm, signal())])
    losses, norms, signals = zip(*distributed.gather_equal(own).tolist(), strict=True)
    stop = int(max(signals))
    # No rank could read anything: there is no gradient, and every rank has been part of the exchange above.
    if not group:
        return Outcome(loss=math.nan, numbers={}, norm=math.nan, signal=stop)

    # Step, or skip it where any rank's loss or gradient is not finite.
    trouble, overflow = None, False
    if all(map(math.isfinite, (*losses, *norms))):
        optimizer.step()
    else:
        # Gradients are searched by name only now: a step that is finite never reads them on the host.
        names = not_finite(model)
        # Overflow is normal at the start of fp16 training: the scaler halves its scale until gradients fit.
        # In other precisions the scale is 1.
        overflow = bool(names) and all(map(math.isfinite, losses)) and scaler.get_scale() > 1
        trouble = None if overflow else diagnosis(losses, names)
    # Halves fp16's scale after an overflow, and doubles it after 2,000 steps without one.
    scaler.update()
    # Also after a skipped step, or its NaN would be added to the next gradients.
    optimizer.zero_grad(set_to_none=True)
    # The loss of the global batch: contrastive ranks all have that value, and a language rank's value is its
    # tokens' sum over the mean number of tokens.
    mean = sum(losses) / len(losses)
    return Outcome(mean, numbers, norm=norms[0], signal=stop, trouble=trouble, overflow=overflow)


def validate(training: Training) -> bool:
    """Measure the split that chooses checkpoints, and log it. Returns whether it is finite and the best."""
    progress, stability, by = training.progress, training.stability, training.config.best_by
    # Without dropout, and without DDP, which has no gradients to average here.
    training.state.model.eval()
    # Counts as validated even where it is not finite: a resumed run would only measure the same again.
    progress.validated = progress.step
    with training.meter.paused(), torch.no_grad(), training.state.autocast():
        try:
            (score, numbers), stability.invalid = training.job.validate(training.state.model), ""
        except FloatingPointError as error:
            stability.invalid = str(error)
    training.record_bad(progress.step)
    if stability.invalid:
        training.say(f"warning: step {progress.step}: the validation is not finite, {stability.invalid}")
        training.record({"step": progress.step, "not_finite": stability.invalid})
        return False
    if by is not None:  # --best-by; a loss is better when it is lower
        score = -numbers[by] if by == "loss" else numbers[by]
    training.say(f"step {progress.step}: validation " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    training.record({"step": progress.step, "validation": numbers})
    # Every rank has the score of the whole split, so that all save, or none.
    better = score > progress.best
    if better:
        progress.best, progress.best_step = score, progress.step
    return better


def begun_and_resumed(command: Command, run: Run) -> tuple[bool, bool]:
    """Return whether there is a run to continue, and whether --resume continues it."""
    begun = run.pointer("last") is not None or bool(run.all())
    if begun and not run.exists:
        raise InputError(
            f"{run.config}: no such file beside {run.checkpoints}; put the run's own back, or choose "
            f"another --out"
        )
    return begun, begun if command.resume == "auto" else bool(command.resume)


def require_finished(command: Command, run: Run, setup: Setup) -> None:
    """Raise InputError unless the folder holds the very run that the command would start, finished."""
    values, last = run.read_config(), run.pointer("last")
    # Settings that came after the run was made have their defaults in it. A converted run has no settings.
    if values.get("train"):
        values["train"] = to_dict(from_dict(TrainConfig, values["train"], str(run.folder / "config.json")))
    now, values = (json.loads(json.dumps(v)) for v in (setup.values(), values))
    values.setdefault("training_sha256", now["training_sha256"])
    same = all(values.get(name) == now[name] for name in now) and values["max_steps"] == command.max_steps
    # A last validation that was not finite is an error, which --resume says again.
    validated = {record["step"] for record in run.read_log() if "validation" in record}
    total = values["total_steps"]
    if not (same and last == run.at(total) and total in validated):
        raise InputError(
            f"{run.folder}: holds a run already; continue it with --resume, or choose another --out"
        )


if __name__ == "__main__":
    run_script(main)
