"""Train a stage: clip1, the dual encoder of CT volumes and reports; clip2, the same guided by 2D slices; mrg, a decoder
that writes reports from what the encoders see; vqa, one that answers questions.

    torchrun train.py --stage clip1                                   # phantom data, tiny preset, a laptop is enough
    torchrun --nproc-per-node 8 train.py --stage clip1 --data data/ct-rate --text-model google-bert/bert-base-uncased
    torchrun train.py --stage clip1 --model reaf                      # the second method, also on phantoms
    torchrun train.py --stage clip2                                   # HSENet's stage 2, from the run of stage 1
    torchrun train.py --stage mrg                                     # reports, from the run of stage 2
    torchrun train.py --stage vqa                                     # answers, likewise
    torchrun train.py --stage clip1 --resume                          # continue, exactly, where the run stopped
    torchrun train.py --stage clip1 --resume auto                     # start, or continue what was started

`python train.py` does the same with one process. Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint first; the exit code is
then 130, 143 or 138. Before the first step Ctrl-C and SIGTERM end at once, SIGUSR1 waits for that step. A mistake, or
numbers that are no longer finite, is 2.
"""

import signal

from reaf_hsenet.script import start_script

if __name__ == "__main__":
    start_script(signal.SIGUSR1)  # what is imported next takes seconds

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from reaf_hsenet import __version__, distributed
from reaf_hsenet.config import TrainConfig
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.layers import count_parameters
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.script import run_script
from reaf_hsenet.settings import from_dict, to_dict
from reaf_hsenet.train.contrastive_job import contrastive_job
from reaf_hsenet.train.guided_setup import keep_slice_encoder
from reaf_hsenet.train.language_job import language_job
from reaf_hsenet.train.language_setup import LanguageSetup, new_language_setup, resumed_language_setup
from reaf_hsenet.train.resumed_setup import resumed_setup
from reaf_hsenet.train.run_setup import Setup, new_setup
from reaf_hsenet.train.train_flags import LANGUAGE, parse
from reaf_hsenet.train.trainer import Trainer


def main(argv: list[str]) -> int:
    args = parse(argv, __doc__)
    code = train(args, distributed.start(args.device))
    distributed.stop()  # not after an error, which the other ranks would hear of as a lost connection first
    return code


def train(args: argparse.Namespace, ranks: Ranks) -> int:
    def say(text: str) -> None:
        if ranks.main:
            print(text, flush=True)

    language = args.stage in LANGUAGE
    run = Run(args.out or Path("runs") / f"{args.stage}-{args.model}")
    if run.named:
        raise InputError(f"--out {args.out}: is a checkpoint of a run; name the run's folder, {run.folder}")
    with run.writing() if ranks.main else nullcontext():
        begun, args.resume = distributed.on_main(lambda: begun_and_resumed(args, run))
        if args.resume:
            setup = (resumed_language_setup if language else resumed_setup)(args, run, ranks)
        else:
            setup = (new_language_setup if language else new_setup)(args, ranks, say)
            # Without a checkpoint there is nothing to lose or to continue: a run that died early starts anew.
            if begun:
                return already_there(args, run, setup, say)
            if ranks.main:
                run.forget_after(0)
        settings = setup.settings
        job = (language_job if language else contrastive_job)(setup, args, ranks, say)
        if args.compile:
            for block in job.blocks:
                block.compile()
        trainer = Trainer(
            job,
            settings,
            run,
            ranks,
            args.max_steps or setup.max_steps,
            args.workers if args.workers is not None else 4 if ranks.device.type == "cuda" else 0,
            args.log_every,
            make_writer(args.log, run, ranks),
            args.profile,
        )
        if args.resume:
            trainer.resume(say)
        elif ranks.main:
            setup.tokenizer.save(run.folder)
            if setup.guided:
                keep_slice_encoder(setup.manifest, run.folder)
        if ranks.main:
            values = {
                "version": __version__,
                "stage": args.stage,
                "best_of": "validation",  # the split whose rows choose `best`
                "preset": setup.preset,
                **setup.values(),
                "world": ranks.world,
                "max_steps": args.max_steps or setup.max_steps,
                "total_steps": trainer.total,
                "torch": torch.__version__,
            }
            if args.resume:  # on other ranks the batches differ, but not the command that started the run
                values["world"] = run.read_config()["world"]
                values["train"]["batch_size"] = settings.batch_size * ranks.world // values["world"]
            run.write_config(values)
        say(
            f"{run.folder}: {args.stage}, {setup.preset}, {count_parameters(job.model) / 1e6:.1f} M parameters, "
            f"{count_parameters(job.model, trained=True) / 1e6:.1f} M trained, {len(job.train_set)} samples, "
            f"global batch {settings.batch_size * settings.accumulate * ranks.world}, "
            f"{settings.precision} on {ranks.world} x {ranks.device.type}, step {trainer.progress.step} of "
            f"{trainer.total}"
        )
        code = trainer.fit()
        if code == 0:
            say(f"{run.folder}: finished; best checkpoint {run.pointer('best')}, which is taken by name only")
        return code


def begun_and_resumed(args: argparse.Namespace, run: Run) -> tuple[bool, bool]:
    """Return whether there is a run to continue, and whether --resume continues it."""
    begun = run.exists and run.pointer("last") is not None
    return begun, begun if args.resume == "auto" else bool(args.resume)


def already_there(args: argparse.Namespace, run: Run, setup: Setup | LanguageSetup, say) -> int:
    """A second start: fine when the same run is finished, else a mistake."""
    values, last = run.read_config(), run.pointer("last")
    if values.get("train"):  # a converted run has none. Settings that came after a run have their defaults in it
        values["train"] = to_dict(from_dict(TrainConfig, values["train"], str(run.folder / "config.json")))
    now, values = (json.loads(json.dumps(v)) for v in (setup.values(), values))
    same = all(values.get(name) == now[name] for name in now) and values["max_steps"] == args.max_steps
    # A last validation that was not finite is an error, which --resume says again.
    validated = {record["step"] for record in run.read_log() if "validation" in record}
    if same and last == run.at(values["total_steps"]) and values["total_steps"] in validated:
        say(f"{run.folder}: this run is finished already; evaluate it, or train another with --out FOLDER")
        return 0
    raise InputError(f"{run.folder}: holds a run already; continue it with --resume, or choose another --out")


def make_writer(name: str | None, run: Run, ranks: Ranks) -> Callable[[dict], None] | None:
    """A function that also sends log records to TensorBoard or Weights & Biases."""
    if name is None or not ranks.main:
        return None
    try:
        if name == "wandb":
            import wandb

            session = wandb.init(project="reaf_hsenet", name=run.folder.name, dir=run.folder)
            return lambda record: session.log(record, step=record["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"--log {name}: is not installed; pip install {name}, or leave the flag out"
        ) from error
    writer = SummaryWriter(run.folder / "tensorboard")

    def write(record: dict) -> None:
        for key, value in {**record, **record.get("validation", {})}.items():
            if isinstance(value, int | float):
                writer.add_scalar(key, value, record["step"])
        writer.flush()

    return write


if __name__ == "__main__":
    run_script(main)
