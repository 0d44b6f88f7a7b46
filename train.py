"""Train a stage: clip1, the dual encoder of CT volumes and reports.

    torchrun train.py --stage clip1                                   # phantom data, tiny preset, a laptop is enough
    torchrun --nproc-per-node 8 train.py --stage clip1 --data data/ct-rate --text-model google-bert/bert-base-uncased
    torchrun train.py --stage clip1 --resume                          # continue, exactly, where the run stopped

`python train.py` does the same with one process. Ctrl-C or SIGTERM writes a checkpoint first.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from reaf_hsenet import __version__, distributed
from reaf_hsenet.calibration import calibrate
from reaf_hsenet.checkpoint import Run
from reaf_hsenet.config import (
    NO_AUGMENTATION,
    PRESETS,
    RECIPES,
    ClipConfig,
    Recipe,
    TrainConfig,
    from_dict,
    stage_config,
    to_dict,
)
from reaf_hsenet.data.datasets import read_ct_rate
from reaf_hsenet.data.loader import Batch, CTReportDataset, plain_batch
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.phantom.dataset import write_phantom_dataset
from reaf_hsenet.data.prepare import Options, prepare
from reaf_hsenet.data.text import clean_report
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.embedding import embed, retrieval_score
from reaf_hsenet.errors import InputError, Parser, raise_on_sigterm, run_script
from reaf_hsenet.files import folder_lock
from reaf_hsenet.losses import contrastive_logits, contrastive_loss, gather_with_grad
from reaf_hsenet.models.clip import DualEncoder, build_dual_encoder, set_grad_checkpoint
from reaf_hsenet.models.layers import count_parameters
from reaf_hsenet.pretrained import bert_config, bert_state, find_folder, load_strictly, read_weights
from reaf_hsenet.tokenizer import WordPiece, load_wordpiece, train_wordpiece
from reaf_hsenet.trainer import Trainer

PHANTOM = Path("data/phantom")
PHANTOM_TRAIN, PHANTOM_VALID, PHANTOM_SEED = 2000, 160, 0
STAGES = ("clip1",)


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
    run.add_argument("--workers", type=int, help="loader processes (default: 4 with a GPU, else 0)")
    run.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    return parser.parse_args(argv)


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
    )
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers {args.workers}: expected 0 or more")
    for name, low, high in (("seed", 0, 2**31), ("weight_decay", 0, math.inf), ("warmup", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
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
        manifest.check(["train", "validation"])
        data = partial(
            CTReportDataset, manifest, tokenizer=setup.tokenizer, max_text=setup.model_config.max_text
        )
        train_set = data(split="train", augmentation=settings.augment, seed=settings.seed)
        validation_set = data(split="validation")

        def loss(model: DualEncoder, batch: Batch) -> tuple[torch.Tensor, dict]:
            image, text, scale = model(batch.volume, batch.ids, batch.mask)
            with torch.autocast(ranks.device.type, enabled=False):
                image, text = gather_with_grad(image.float()), gather_with_grad(text.float())
                return contrastive_loss(contrastive_logits(image, text, scale)), {"logit_scale": scale.item()}

        def validate(model: DualEncoder) -> tuple[float, dict]:
            return retrieval_score(
                *embed(model, validation_set, ranks, settings.batch_size, settings.validate_samples)
            )

        model = build_dual_encoder(setup.model_config)
        if setup.text_weights is not None:
            load_strictly(model.text, setup.text_weights, args.text_model)
        if settings.calibrate and not args.resume:
            sample = plain_batch(data(split="train"), settings.calibrate)
            calibrate(model, sample.volume, sample.ids if setup.text_weights is None else None, sample.mask)
        set_grad_checkpoint(model, settings.grad_checkpoint)
        workers = args.workers if args.workers is not None else 4 if ranks.device.type == "cuda" else 0
        trainer = Trainer(
            model,
            loss,
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
        if args.resume:
            trainer.resume()
        elif ranks.main:
            setup.tokenizer.save(run.folder)
        if ranks.main:
            run.write_config(setup.to_json(args, ranks, trainer.total))
        say(
            f"{run.folder}: {args.stage}, {setup.preset}, {count_parameters(model) / 1e6:.1f} M parameters, "
            f"{len(train_set)} volumes, global batch {settings.batch_size * settings.accumulate * ranks.world}, "
            f"{settings.precision} on {ranks.world} x {ranks.device.type}, step {trainer.progress.step} of "
            f"{trainer.total}"
        )
        code = trainer.fit()
        if code == 0:
            say(f"{run.folder}: finished; best checkpoint {run.pointer('best')}")
        return code


@dataclass
class Setup:
    """All that a run is made of, whether new or resumed."""

    preset: str
    manifest: Manifest
    model_config: ClipConfig
    settings: TrainConfig
    tokenizer: WordPiece
    max_steps: int | None = None
    text_weights: dict | None = None

    def to_json(self, args: argparse.Namespace, ranks: Ranks, total: int) -> dict:
        return {
            "version": __version__,
            "stage": args.stage,
            "preset": self.preset,
            "model": to_dict(self.model_config),
            "recipe": to_dict(self.manifest.recipe),
            "train": to_dict(self.settings),
            "world": ranks.world,
            "max_steps": args.max_steps or self.max_steps,
            "total_steps": total,
            "data": str(self.manifest.folder.absolute()),
            "torch": torch.__version__,
        }


def new_setup(args: argparse.Namespace, ranks: Ranks, say) -> Setup:
    preset = args.preset or (f"{args.model}-base" if args.data else f"{args.model}-tiny")
    if preset not in PRESETS or PRESETS[preset].model != args.model:
        known = ", ".join(name for name, c in PRESETS.items() if c.model == args.model) or "none yet"
        raise InputError(f"--preset {preset}: {args.model} has {known}")
    config = PRESETS[preset]
    vision = {k: tuple(v) for k in ("size", "patch") if (v := getattr(args, k)) is not None}
    config = replace(config, vision=replace(config.vision, **vision))
    if args.logit_scale:
        config = replace(config, logit_scale=args.logit_scale)
    if args.data is None:
        say(
            f"no --data: phantom CTs of {PHANTOM} and preset {preset}; real data: preprocess.py, then --data FOLDER"
        )
        manifest = phantom_manifest(ranks, config.vision.size)
    else:
        manifest = load_manifest(args.data)
    manifest.require(replace(manifest.recipe, name=args.model, size=config.vision.size), f"preset {preset}")
    settings = train_settings(args, stage_config(args.stage, args.model, preset), ranks, manifest, say)
    torch.manual_seed(settings.seed)
    weights = None
    if args.text_model:
        folder = find_folder(
            args.text_model,
            ["config.json", "vocab.txt", "tokenizer_config.json", "*.safetensors", "pytorch_model.bin"],
        )
        tokenizer, text = load_wordpiece(folder), bert_config(folder)
        weights = bert_state(read_weights(folder))
        config = replace(config, text=text, max_text=min(config.max_text, text.positions))
    else:
        reports = sorted({entry["text"] for entry in manifest.entries("train")})
        tokenizer = train_wordpiece([clean_report(r) for r in reports], config.text.vocab)
        config = replace(config, text=replace(config.text, vocab=len(tokenizer.vocab)))
        if preset.endswith("-base"):
            say(
                "no --text-model: the text encoder starts from nothing; the published one starts from a BERT, "
                "for example --text-model google-bert/bert-base-uncased"
            )
    return Setup(preset, manifest, config, settings, tokenizer, None, weights)


def resumed_setup(args: argparse.Namespace, run: Run, ranks: Ranks) -> Setup:
    """Everything from the run's config.json; a flag that would change what is trained is refused."""
    values = run.read_config()
    for flag in (
        "preset",
        "text_model",
        "size",
        "patch",
        "logit_scale",
        "batch_size",
        "accumulate",
        "lr",
        "weight_decay",
        "warmup",
        "clip_norm",
        "no_augment",
        "seed",
    ):
        value = getattr(args, flag)
        if value is not None and value is not False:
            raise InputError(
                f"--{flag.replace('_', '-')}: with --resume a run keeps its settings ({run.folder}); "
                "leave the flag out, or start another run with --out"
            )
    config = from_dict(ClipConfig, values["model"])
    if (values["stage"], config.model) != (args.stage, args.model):
        raise InputError(
            f"{run.folder}: is a {values['stage']} run of {config.model}, not {args.stage} of {args.model}"
        )
    manifest = load_manifest(args.data or Path(values["data"]))
    manifest.require(from_dict(Recipe, values["recipe"]), str(run.folder))
    settings = from_dict(TrainConfig, values["train"])
    whole = settings.batch_size * values["world"]
    if whole % ranks.world:
        raise InputError(
            f"{run.folder}: its global batch of {whole} cannot be shared by {ranks.world} processes"
        )
    kept = {
        k: v
        for k in (
            "epochs",
            "precision",
            "grad_checkpoint",
            "validate_every",
            "validate_samples",
            "save_every",
            "keep",
        )
        if (v := getattr(args, k)) is not None
    }
    settings = replace(settings, batch_size=whole // ranks.world, **kept)
    return Setup(
        values["preset"], manifest, config, settings, load_wordpiece(run.folder), values["max_steps"]
    )


def train_settings(
    args: argparse.Namespace, config: TrainConfig, ranks: Ranks, manifest: Manifest, say
) -> TrainConfig:
    names = {f.name for f in fields(TrainConfig)}
    changes = {k: v for k, v in vars(args).items() if k in names and v is not None}
    if args.no_augment:
        changes["augment"] = NO_AUGMENTATION
    if args.precision is None and ranks.device.type == "cpu":
        changes["precision"] = "fp32"
    config = replace(config, **changes)
    rows = len(manifest.entries("train"))
    if rows < max(2, ranks.world):
        raise InputError(
            f"{manifest.folder / 'manifest.json'}: {rows} training volumes for {ranks.world} processes; "
            "a contrastive batch needs at least 2, and each process 1"
        )
    if config.batch_size * ranks.world < 2:
        raise InputError("--batch-size 1 with one process: a contrastive batch needs 2 volumes or more")
    if config.batch_size * ranks.world > rows:
        if args.batch_size is not None:
            raise InputError(
                f"--batch-size {args.batch_size}: with {ranks.world} processes a batch needs "
                f"{config.batch_size * ranks.world} volumes, there are {rows}"
            )
        say(
            f"batch size {rows // ranks.world} in place of {config.batch_size}: there are {rows} training volumes"
        )
        config = replace(config, batch_size=rows // ranks.world)
    return config


def phantom_manifest(ranks: Ranks, size: tuple[int, int, int]) -> Manifest:
    """The built-in phantom data set, made by the first rank when it is missing."""
    out = PHANTOM / "x".join(map(str, size))
    if ranks.main and not (out / "manifest.json").is_file():
        cores = len(os.sched_getaffinity(0))
        write_phantom_dataset(
            PHANTOM / "raw", PHANTOM_TRAIN, PHANTOM_VALID, PHANTOM_SEED, workers=cores, progress=True
        )
        recipe = replace(RECIPES["hsenet"], size=size)
        prepare(read_ct_rate(PHANTOM / "raw"), out, Options(recipe), workers=cores)
    distributed.barrier()
    return load_manifest(out)


def already_there(args: argparse.Namespace, run: Run, setup: Setup, say) -> int:
    """A second start: fine when the same run is finished, else a mistake."""
    values, last = run.read_config(), run.pointer("last")
    same = values["model"] == json.loads(json.dumps(to_dict(setup.model_config)))
    same &= values["train"] == json.loads(json.dumps(to_dict(setup.settings)))
    same &= values["max_steps"] == args.max_steps and values["data"] == str(setup.manifest.folder.absolute())
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
