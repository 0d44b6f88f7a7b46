"""The command line of train.py: every flag, what it is good for, and to which stages it belongs."""

import argparse
from pathlib import Path

from reaf_hsenet.config import FUSIONS, RECIPES, LoraConfig, ReafVisionConfig, TrainConfig
from reaf_hsenet.data.questions import read_templates
from reaf_hsenet.data.sources.radgenome import KINDS
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.mllm_config import VISION, MllmConfig
from reaf_hsenet.models.projectors import PROJECTORS
from reaf_hsenet.presets import PRESETS
from reaf_hsenet.script import Parser
from reaf_hsenet.settings import Range, ranges

CONTRASTIVE, LANGUAGE = ("clip1", "clip2"), ("mrg", "vqa")
STAGES = (*CONTRASTIVE, *LANGUAGE)
# Flags that have a meaning in some stages only.
ENCODER_FLAGS = (
    *("text_model", "size", "patch", "logit_scale", "unfreeze_text", "lora", "lora_targets"),
    *(
        "fusion",
        "fusion_seed",
        "regions",
        "region_size",
        "suppression",
        "class_score",
        "remainder",
        "slice_class",
    ),
    *("scan_layers", "drop_path", "grad_cache"),
)
GUIDED_FLAGS = ("relation", "relation_steps", "no_guidance")
DECODER_FLAGS = (
    *("vision", "projector", "kernel", "shared_projector", "decoder", "full", "train_vision", "int8"),
    *("cache_features", "max_text", "shard", "frozen_dropout"),
)
ONLY = {
    **dict.fromkeys(ENCODER_FLAGS, CONTRASTIVE),
    **dict.fromkeys(GUIDED_FLAGS, ("clip2",)),
    **dict.fromkeys(("teacher", "slices_stay"), ("clip2", *LANGUAGE)),
    **dict.fromkeys(DECODER_FLAGS, LANGUAGE),
    **dict.fromkeys(("questions", "templates"), ("vqa",)),
}
# A flag has the range of its setting; those that are no settings have one of their own.
RANGES = ranges(TrainConfig) | ranges(ReafVisionConfig) | ranges(MllmConfig)
RANGES |= {f"lora_{name}": held for name, held in ranges(LoraConfig).items()}
RANGES |= dict.fromkeys(("max_steps", "log_every"), Range(above=0)) | {"workers": Range(least=0, most=10_000)}
TWO_WAY = ("train_vision", "shard")  # with --no-: False is an answer, not the flag's absence
SIZE3 = {"type": int, "nargs": 3, "metavar": ("D", "H", "W")}


def parse(argv: list[str], description: str) -> argparse.Namespace:
    """Raises InputError for an unknown flag, a value out of range, and a flag of another stage."""
    parser = Parser(description)
    add = parser.add_argument
    add("--stage", choices=STAGES, required=True)
    add("--model", choices=tuple(RECIPES), default="hsenet")

    add = parser.add_argument_group("model and data").add_argument
    add("--data", type=Path, help="folder written by preprocess.py (default: phantoms, made if missing)")
    add("--preset", help=f"{', '.join(PRESETS)} (default: tiny on phantoms, base with --data)")
    add(
        "--init",
        help="what to start from. clip1, clip2: a run, or M3D-CLIP, HSENet, HLIP, REAF or MAE ViT-B/16 as "
        "file, folder or hub id. mrg, vqa: the run whose encoder the decoder sees (default: "
        "runs/clip2-hsenet, runs/clip1-reaf)",
    )
    add("--text-model", help="BERT folder or hub id to start the text encoder from (default: new)")
    add("--size", **SIZE3, help="input size, when not the preset's")
    add("--patch", **SIZE3, help="patch size, when not the preset's")
    add("--logit-scale", choices=("raw", "exp"), help="raw: as HSENet publishes; exp: as CLIP")
    add(
        "--unfreeze-text",
        type=blocks,
        metavar="N|all",
        help="last blocks of the text encoder to train (reaf: 0; LayerNorms always are)",
    )
    add(
        "--lora",
        nargs="+",
        choices=("vision", "text"),
        help="towers of a dual encoder to train by adapters only",
    )
    add("--lora-r", type=int, help="rank (default: 8; the decoder's: 16)")
    add("--lora-alpha", type=float, help="scale, times 1 / rank (default: 8; the decoder's: 32)")
    add("--lora-dropout", type=float, help="default: 0; the decoder's: 0.05")
    add("--lora-targets", nargs="+", help="layers: query, key, value, proj, fc1, fc2 (default: query value)")

    add = parser.add_argument_group("REAF's encoder (defaults are the published ones)").add_argument
    add("--fusion", choices=(*FUSIONS, "last", "none"), help="over layers; none: HLIP's encoder")
    add("--fusion-seed", type=int, help="of random_weighted_mean")
    add("--regions", type=int, help="salient regions that are kept; 0: no regions")
    add("--region-size", **SIZE3, help="patches")
    add("--suppression", type=float, help="factor outside the regions")
    add("--class-score", choices=("first_patch", "class_token"))
    add("--remainder", choices=("suppressed", "regions"), help="patches that fill no whole region")
    add("--slice-class", choices=("first", "mean"), help="class token of the slice branch")
    add("--scan-layers", type=int, nargs="+", metavar="I", help="blocks that see the whole scan")
    add("--drop-path", type=float)

    add = parser.add_argument_group("stage clip2 (defaults are the published ones)").add_argument
    add(
        "--teacher",
        help="run of stage clip1, or published file of stage 1 (default: --init or its teacher, else "
        "runs/clip1-hsenet)",
    )
    add("--relation", type=float, help="weight of the relation loss at the first step")
    add("--relation-steps", type=int, help="steps until it is 0")
    add("--no-guidance", action="store_true", help="a plain 3D ViT, without slices")
    add("--slices-stay", action="store_true", help="slice features do not follow a flip, as published")

    add = parser.add_argument_group("stages mrg and vqa (defaults are the published ones)").add_argument
    add(
        "--vision",
        choices=tuple(VISION),
        help="encoders the decoder sees: stage 1's and 2E3, or one (default: dual, reaf)",
    )
    add(
        "--projector",
        choices=tuple(PROJECTORS),
        help="from patch tokens to visual tokens (default: spatial_packer)",
    )
    add(
        "--kernel",
        **SIZE3,
        help="patch tokens that become one visual token (default: 1 4 4; tiny presets: 1 2 2)",
    )
    add("--shared-projector", action="store_true", help="one projector for both encoders")
    add(
        "--decoder",
        help="folder or hub id of a Phi-4, Phi-3 or Llama (default on phantoms: a small one, from nothing)",
    )
    add("--full", action="store_true", help="train the whole decoder, not adapters")
    add(
        "--train-vision",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train the encoders too (default: with a new decoder)",
    )
    add("--int8", action="store_true", help="hold the frozen decoder's weights in eight bits")
    add(
        "--shard",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="with --full: every GPU holds a part of the weights and the optimizer's states (FSDP)",
    )
    add(
        "--frozen-dropout",
        action="store_true",
        default=None,
        help="frozen encoders keep their dropout, as published",
    )
    add(
        "--cache-features",
        nargs="?",
        const=True,
        metavar="DIR",
        help="store the frozen encoders' tokens (default: DATA/features); needs --no-augment",
    )
    add("--max-text", type=int, help="tokens of prompt and answer (default: mrg 544, vqa 74)")
    add("--questions", choices=KINDS, help="kind of questions of stage vqa (default: location)")
    add(
        "--templates",
        type=Path,
        metavar="FILE",
        help="all questions' wordings: HSENet's prompt_templates.py, or json",
    )

    add = parser.add_argument_group("recipe (defaults are the stage's own, see config.py)").add_argument
    add("--epochs", type=int)
    add("--max-steps", type=int, help="number of optimizer steps, in place of epochs")
    add("--batch-size", type=int, help="per process")
    add("--accumulate", type=int, help="batches per optimizer step")
    add("--lr", type=float)
    add("--weight-decay", type=float)
    add("--warmup", type=float, help="share of all steps")
    add("--clip-norm", type=float)
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: the recipe's on a GPU, else fp32")
    add("--grad-checkpoint", action="store_true", default=None, help="less memory, a third more time")
    add(
        "--grad-cache", type=int, metavar="CHUNK", help="the whole batch's gradients, CHUNK volumes at a time"
    )
    add("--no-augment", action="store_true")
    add("--seed", type=int)

    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="run folder (default: runs/STAGE-MODEL)")
    add(
        "--resume",
        nargs="?",
        const=True,
        choices=("auto",),
        metavar="auto",
        help="continue the run in --out; auto: or start it, when there is none to continue",
    )
    add("--validate-every", type=float, help="share of all steps between validations")
    add("--validate-samples", type=int, help="first N of the validation split")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--keep", type=int, help="checkpoints to keep, beside the best and the last good one (default: 2)")
    add(
        "--best-by",
        metavar="NAME",
        help="number of the validation that chooses the best (default: mean R@5, or the loss)",
    )
    add(
        "--max-skipped",
        type=int,
        metavar="N",
        help="steps to skip as their loss or gradients are not finite, before the run stops (default: 10)",
    )
    add("--log", choices=("tensorboard", "wandb"), help="also log there, when it is installed")
    add("--log-every", type=int, default=10, help="steps between lines of log.jsonl")
    add("--profile", action="store_true", help="write a trace of steps 5 to 10 into the run folder")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--workers", type=int, help="loader processes (default: 4 with a GPU, else 0)")
    add(
        "--max-bad",
        type=int,
        metavar="N",
        help="volumes that may be left out, each by name, because they cannot be read (default: 0, the run "
        "stops)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    check(args)
    return args


def blocks(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of blocks nor all")
    return text if text == "all" else int(text)


def flag(name: str) -> str:
    """`--max-steps` of `max_steps`."""
    return "--" + name.replace("_", "-")


def given(args: argparse.Namespace, names) -> dict:
    """Those of the flags that the command line has, with their values."""
    values = ((name, getattr(args, name)) for name in names)
    return {
        name: value for name, value in values if value is not None and (value is not False or name in TWO_WAY)
    }


def check(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if expected := RANGES.get(name, Range()).expected(value):
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{flag(name)} {shown}: expected {expected}")
    for name in given(args, ONLY):
        if args.stage not in ONLY[name]:
            raise InputError(
                f"{flag(name)}: is an option of --stage {' and '.join(ONLY[name])}; leave it out"
            )
    if args.templates:
        args.templates = read_templates(args.templates, args.questions or TrainConfig.questions)
    if args.no_guidance and args.slices_stay:
        raise InputError("--slices-stay: with --no-guidance there are no slice features; leave one out")
