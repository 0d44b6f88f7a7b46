"""Train a stage: clip1, the dual encoder of CT volumes and reports; clip2, the same guided by 2D slices.

    torchrun train.py --stage clip1                                   # phantom data, tiny preset, a laptop is enough
    torchrun --nproc-per-node 8 train.py --stage clip1 --data data/ct-rate --text-model google-bert/bert-base-uncased
    torchrun train.py --stage clip1 --model reaf                      # the second method, also on phantoms
    torchrun train.py --stage clip2                                   # HSENet's stage 2, from the run of stage 1
    torchrun train.py --stage clip1 --resume                          # continue, exactly, where the run stopped

`python train.py` does the same with one process. Ctrl-C or SIGTERM writes a checkpoint first.
"""

import argparse
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from reaf_hsenet import distributed
from reaf_hsenet.calibration import calibrate
from reaf_hsenet.checkpoint import Run
from reaf_hsenet.config import FUSIONS, NO_AUGMENTATION, PRESETS, RECIPES, to_dict
from reaf_hsenet.contrastive import Contrastive, Guided, Teacher, encode
from reaf_hsenet.data.loader import CTReportDataset, plain_batch
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.embedding import embed, retrieval_score
from reaf_hsenet.errors import InputError, Parser, raise_on_sigterm, run_script
from reaf_hsenet.files import folder_lock
from reaf_hsenet.models.clip import DualEncoder, adapt, build_dual_encoder, freeze_text, set_grad_checkpoint
from reaf_hsenet.models.layers import count_parameters
from reaf_hsenet.pretrained import load_matching, load_strictly
from reaf_hsenet.run_setup import Setup, new_setup, resumed_setup
from reaf_hsenet.trainer import PRECISIONS, Trainer

STAGES = ("clip1", "clip2")
GUIDED_FLAGS = ("teacher", "relation", "relation_steps", "no_guidance", "slices_stay")  # of stage clip2 alone


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--model", choices=tuple(RECIPES), default="hsenet")
    model = parser.add_argument_group("model and data")
    model.add_argument(
        "--data", type=Path, help="folder written by preprocess.py (default: phantoms, made if missing)"
    )
    model.add_argument("--preset", help=f"{', '.join(PRESETS)} (default: tiny on phantoms, base with --data)")
    model.add_argument(
        "--text-model", help="BERT folder or hub id to start the text encoder from (default: new)"
    )
    model.add_argument(
        "--size", type=int, nargs=3, metavar=("D", "H", "W"), help="input size, when not the preset's"
    )
    model.add_argument(
        "--patch", type=int, nargs=3, metavar=("D", "H", "W"), help="patch size, when not the preset's"
    )
    model.add_argument("--logit-scale", choices=("raw", "exp"), help="raw: as HSENet publishes; exp: as CLIP")
    model.add_argument(
        "--init",
        help="checkpoint to start from: a run, M3D-CLIP, HSENet, HLIP, REAF or MAE ViT-B/16; file, folder or hub id",
    )
    model.add_argument(
        "--unfreeze-text",
        type=blocks,
        metavar="N|all",
        help="last blocks of the text encoder to train (reaf: 0; LayerNorms always are)",
    )
    model.add_argument("--lora", nargs="+", choices=("vision", "text"), help="towers to train by adapters only")
    model.add_argument("--lora-r", type=int, help="rank (default 8)")
    model.add_argument("--lora-alpha", type=float, help="scale, times 1 / rank (default 8)")
    model.add_argument("--lora-dropout", type=float, help="default 0")
    model.add_argument(
        "--lora-targets", nargs="+", help="layers: query, key, value, proj, fc1, fc2 (default: query value)"
    )
    reaf = parser.add_argument_group("REAF's encoder (defaults are the published ones)")
    reaf.add_argument("--fusion", choices=(*FUSIONS, "last", "none"), help="over layers; none: HLIP's encoder")
    reaf.add_argument("--fusion-seed", type=int, help="of random_weighted_mean")
    reaf.add_argument("--regions", type=int, help="salient regions that are kept; 0: no regions")
    reaf.add_argument("--region-size", type=int, nargs=3, metavar=("D", "H", "W"), help="patches")
    reaf.add_argument("--suppression", type=float, help="factor outside the regions")
    reaf.add_argument("--class-score", choices=("first_patch", "class_token"))
    reaf.add_argument("--remainder", choices=("suppressed", "regions"), help="patches that fill no whole region")
    reaf.add_argument("--slice-class", choices=("first", "mean"), help="class token of the slice branch")
    reaf.add_argument("--scan-layers", type=int, nargs="+", metavar="I", help="blocks that see the whole scan")
    reaf.add_argument("--drop-path", type=float)
    guided = parser.add_argument_group("stage clip2 (defaults are the published ones)")
    guided.add_argument(
        "--teacher", help="run of stage clip1 (default: --init or its teacher, else runs/clip1-hsenet)"
    )
    guided.add_argument("--relation", type=float, help="weight of the relation loss at the first step")
    guided.add_argument("--relation-steps", type=int, help="steps until it is 0")
    guided.add_argument("--no-guidance", action="store_true", help="a plain 3D ViT, without slices")
    guided.add_argument(
        "--slices-stay", action="store_true", help="slice features do not follow a flip, as published"
    )
    recipe = parser.add_argument_group("recipe (defaults are the stage's own, see config.py)")
    recipe.add_argument("--epochs", type=int)
    recipe.add_argument("--max-steps", type=int, help="number of optimizer steps, in place of epochs")
    recipe.add_argument("--batch-size", type=int, help="per process")
    recipe.add_argument("--accumulate", type=int, help="batches per optimizer step")
    recipe.add_argument("--lr", type=float)
    recipe.add_argument("--weight-decay", type=float)
    recipe.add_argument("--warmup", type=float, help="share of all steps")
    recipe.add_argument("--clip-norm", type=float)
    recipe.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: the recipe's on a GPU, else fp32"
    )
    recipe.add_argument(
        "--grad-checkpoint", action="store_true", default=None, help="less memory, a third more time"
    )
    recipe.add_argument(
        "--grad-cache", type=int, metavar="CHUNK", help="the whole batch's gradients, CHUNK volumes at a time"
    )
    recipe.add_argument("--no-augment", action="store_true")
    recipe.add_argument("--seed", type=int)
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, help="run folder (default: runs/STAGE-MODEL)")
    run.add_argument("--resume", action="store_true", help="continue the run in --out")
    run.add_argument("--validate-every", type=float, help="share of all steps between validations")
    run.add_argument("--validate-samples", type=int, help="first N of the validation split")
    run.add_argument("--save-every", type=int, help="steps between checkpoints")
    run.add_argument("--keep", type=int, help="checkpoints to keep, beside the best")
    run.add_argument("--log", choices=("tensorboard", "wandb"), help="also log there, when it is installed")
    run.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl")
    run.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    run.add_argument("--workers", type=int, help="loader processes (default: 4 with a GPU, else 0)")
    run.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    return parser.parse_args(argv)


def blocks(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of blocks nor all")
    return text if text == "all" else int(text)


def main(argv: list[str]) -> int:
    args = parse(argv)
    positive = (
        "epochs",
        "max_steps",
        "batch_size",
        "accumulate",
        "lr",
        "clip_norm",
        "validate_every",
        "validate_samples",
        "save_every",
        "keep",
        "log_every",
        "grad_cache",
        "relation_steps",
        "lora_r",
        "lora_alpha",
    )
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers {args.workers}: expected 0 or more")
    for name, low, high in (
        ("seed", 0, 2**31),
        ("fusion_seed", 0, 2**31),
        ("weight_decay", 0, math.inf),
        ("warmup", 0, 1),
        ("suppression", 0, 1),
        ("drop_path", 0, 0.99),
        ("lora_dropout", 0, 0.99),
        ("relation", 0, 1000),
    ):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    for name in GUIDED_FLAGS if args.stage != "clip2" else ():
        if (value := getattr(args, name)) is not None and value is not False:
            raise InputError(f"--{name.replace('_', '-')}: is an option of --stage clip2; leave it out")
    if args.no_guidance and args.slices_stay:
        raise InputError("--slices-stay: with --no-guidance there are no slice features; leave one out")
    raise_on_sigterm()
    ranks = distributed.start(args.device)
    try:
        return train(args, ranks)
    finally:
        distributed.stop()


def train(args: argparse.Namespace, ranks: Ranks) -> int:
    def say(text: str) -> None:
        if ranks.main:
            print(text, flush=True)

    run = Run(args.out or Path("runs") / f"{args.stage}-{args.model}")
    with folder_lock(run.folder) if ranks.main else nullcontext():
        if args.resume:
            setup = resumed_setup(args, run, ranks)
        else:
            setup = new_setup(args, ranks, say)
            # Without a checkpoint there is nothing to lose or to continue: a run that died early starts anew.
            if run.exists and run.pointer("last") is not None:
                return already_there(args, run, setup, say)
            if ranks.main:
                run.forget_after(0)
        manifest, settings = setup.manifest, setup.settings
        guided = setup.guided
        manifest.check(["train", "validation"], slices=guided)
        data = partial(
            CTReportDataset,
            manifest,
            tokenizer=setup.tokenizer,
            max_text=setup.model_config.max_text,
            style=args.model,
            slices=guided,
        )
        train_set = data(
            split="train",
            augmentation=settings.augment,
            seed=settings.seed,
            slices_follow=settings.slices_follow,
        )
        validation_set = data(split="validation")
        stage = Contrastive()
        if setup.teacher is not None:
            dtype = PRECISIONS[settings.precision]
            chunk = settings.grad_cache or settings.batch_size
            changes = settings.augment != NO_AUGMENTATION
            teacher = Teacher(setup.teacher.model, ranks.device, dtype, chunk, changes)
            stage = Guided(teacher, settings.relation, settings.relation_steps)
            say(f"{setup.teacher.checkpoint}: the teacher")

        def validate(model: DualEncoder) -> tuple[float, dict]:
            return retrieval_score(
                *embed(model, validation_set, ranks, settings.batch_size, settings.validate_samples)
            )

        model = build_dual_encoder(setup.model_config)
        if not args.resume:
            start_weights(model, setup, data, args, say)
        if settings.text_blocks is not None:
            if settings.text_blocks > len(model.text.blocks) + 1:
                raise InputError(
                    f"--unfreeze-text {settings.text_blocks}: the text encoder has {len(model.text.blocks)} blocks; say all"
                )
            freeze_text(model, settings.text_blocks)
        if setup.model_config.lora:
            try:
                adapt(model, setup.model_config.lora)
            except ValueError as error:
                raise InputError(f"--lora-targets: {error}") from error
        set_grad_checkpoint(model, settings.grad_checkpoint)
        if args.compile:
            for block in [*model.vision.blocks, *model.text.blocks]:
                block.compile()
        workers = args.workers if args.workers is not None else 4 if ranks.device.type == "cuda" else 0
        trainer = Trainer(
            model,
            encode,
            stage.loss,
            validate,
            train_set,
            settings,
            run,
            ranks,
            args.max_steps or setup.max_steps,
            workers,
            args.log_every,
            make_writer(args.log, run, ranks),
        )
        trainer.optimizer.register_step_post_hook(lambda *_: model.clamp_scale())
        if args.resume:
            trainer.resume()
        elif ranks.main:
            setup.tokenizer.save(run.folder)
        if ranks.main:
            run.write_config(setup.to_json(args, ranks, trainer.total))
        say(
            f"{run.folder}: {args.stage}, {setup.preset}, {count_parameters(model) / 1e6:.1f} M parameters, "
            f"{count_parameters(model, trained=True) / 1e6:.1f} M trained, {len(train_set)} volumes, "
            f"global batch {settings.batch_size * settings.accumulate * ranks.world}, "
            f"{settings.precision} on {ranks.world} x {ranks.device.type}, step {trainer.progress.step} of "
            f"{trainer.total}"
        )
        code = trainer.fit()
        if code == 0:
            say(f"{run.folder}: finished; best checkpoint {run.pointer('best')}")
        return code


def start_weights(model: DualEncoder, setup: Setup, data: Callable, args: argparse.Namespace, say) -> None:
    """Pretrained weights as the command line names them; what starts from nothing is calibrated where the recipe says."""
    if setup.text_weights is not None:
        load_strictly(model.text, setup.text_weights, args.text_model)
    if setup.init_state is not None:
        say(load_matching(model, setup.init_state, setup.origin["init"]) + setup.init_account)
    elif setup.settings.calibrate:
        sample = plain_batch(data(split="train"), setup.settings.calibrate)
        calibrate(model, sample.volume, sample.ids if setup.text_weights is None else None, sample.mask)


def already_there(args: argparse.Namespace, run: Run, setup: Setup, say) -> int:
    """A second start: fine when the same run is finished, else a mistake."""
    values, last = run.read_config(), run.pointer("last")
    same = values["model"] == json.loads(json.dumps(to_dict(setup.model_config)))
    same &= values["origin"] == setup.origin
    same &= values["train"] == json.loads(json.dumps(to_dict(setup.settings)))
    same &= values["max_steps"] == args.max_steps and values["data"] == str(setup.manifest.location.absolute())
    if same and last is not None and last.name == f"step-{values['total_steps']:06d}":
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
