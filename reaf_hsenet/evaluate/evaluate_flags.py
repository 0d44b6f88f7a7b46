"""The command line of evaluate.py: every flag, what it is good for, and to which tasks it belongs."""

import argparse
from pathlib import Path

from reaf_hsenet.data.labels import LABEL_SETS
from reaf_hsenet.data.sources.radgenome import KINDS
from reaf_hsenet.errors import InputError
from reaf_hsenet.runs.trained import locate_run
from reaf_hsenet.script import Parser

CONTRASTIVE, LANGUAGE = ("retrieval", "zeroshot"), ("mrg", "vqa")
TASKS = (*CONTRASTIVE, *LANGUAGE)

ANY_TASK = {
    "--run": dict(
        help="run folder of train.py, or published weights: file, folder or hub id (default: "
        "runs/clip1-MODEL; runs/mrg-MODEL, runs/vqa-MODEL)"
    ),
    "--model": dict(
        choices=("hsenet", "reaf"), default="hsenet", help="whose default run folder (default: hsenet)"
    ),
    "--checkpoint": dict(
        metavar="NAME",
        help="last (default, as published), best (chosen by the validation) or a step, step-000100",
    ),
    "--text-model": dict(
        metavar="NAME", help="folder or hub id with the vocabulary of a published checkpoint"
    ),
    "--data": dict(type=Path, help="prepared data set (default: the run's own)"),
    "--split": dict(
        choices=("train", "validation", "test"), default="validation", help="default: validation"
    ),
    "--out": dict(type=Path, help="folder of the results (default: RUN/eval)"),
    "--batch-size": dict(type=int, default=16, help="default: 16"),
    "--workers": dict(type=int, default=0, help="processes that read volumes (default: 0)"),
    "--device": dict(help="cpu, cuda or cuda:N (default: a GPU where there is one)"),
}
COMPARISON = {
    "--compare": dict(
        type=Path,
        nargs="+",
        metavar="RUN",
        help="two or more evaluated runs: their scores, and differences from the first with bootstrap "
        "intervals",
    )
}
PICTURES = {
    "--figures": dict(type=Path, metavar="DIR", help="write ROC or recall curves and saliency there"),
    "--figure-volumes": dict(
        type=int, default=4, metavar="N", help="saliency of the first N volumes (default: 4)"
    ),
}
ZEROSHOT = {
    "--prompts": dict(default="volume", help="volume, organ or a json file (default: volume)"),
    "--label-set": dict(
        choices=LABEL_SETS, default="ct-rate", help="how label columns become classes (default: ct-rate)"
    ),
    "--labels": dict(type=Path, metavar="CSV", help="label table (default: the manifest's labels)"),
    "--bootstrap": dict(
        type=int, default=1000, metavar="N", help="resamples of the intervals; 0: none (default: 1000)"
    ),
    "--seed": dict(type=int, default=0, help="of the bootstrap (default: 0)"),
}
GENERATION = {
    "--new-tokens": dict(
        type=int, metavar="N", help="most tokens of a report or an answer (default: 512, 74)"
    ),
    "--limit": dict(type=int, metavar="N", help="the first N reports or questions (default: all)"),
    "--precision": dict(choices=("fp32", "bf16"), help="of the decoder (default: that of its weights)"),
    "--bertscore": dict(
        type=Path, metavar="FOLDER", help="BERT or RoBERTa that compares texts (published: roberta-large)"
    ),
    "--bertscore-layer": dict(type=int, metavar="N", help="of that model (published: 17; default: the last)"),
    "--decoder": dict(
        metavar="NAME",
        help="of published packers and adapters: folder or hub id of the decoder they stand on",
    ),
    "--encoders": dict(
        metavar="NAME", help="of the same: HSENet-2E3-CLIP, a file, folder or hub id, or a clip2 run"
    ),
    "--compile": dict(action="store_true", help="compile the decoder's steps, on a GPU"),
    "--anew": dict(action="store_true", help="forget the answers of an interrupted evaluation"),
}
REPORTS = {
    "--prompt": dict(help="what every report is asked for with (default: the published one)"),
    "--classifier": dict(
        type=Path, metavar="FOLDER", help="BERT or RoBERTa that reads 18 findings, as RadBERT"
    ),
}
ANSWERS = {
    "--questions": dict(
        choices=KINDS, help="kind of questions (default: the kind that the run was trained on)"
    ),
    "--templates": dict(
        type=Path,
        metavar="FILE",
        help="the questions' wordings (default: those that the run was trained on)",
    ),
}
GROUPS = (
    (None, TASKS, ANY_TASK),
    ("comparison of evaluated runs (retrieval, zeroshot)", CONTRASTIVE, COMPARISON),
    ("pictures (retrieval, zeroshot)", CONTRASTIVE, PICTURES),
    ("zero-shot classification (zeroshot)", ("zeroshot",), ZEROSHOT),
    ("reports and answers (mrg, vqa)", LANGUAGE, GENERATION),
    ("report generation (mrg)", ("mrg",), REPORTS),
    ("question answering (vqa)", ("vqa",), ANSWERS),
)
WITH_COMPARE = ("--compare", "--out", "--bootstrap", "--seed")  # the others are of one run's evaluation
LEAST = {
    **{"batch_size": 1, "workers": 0, "figure_volumes": 0, "bootstrap": 0, "seed": 0},
    **{"new_tokens": 1, "limit": 1},
}


def parse(argv: list[str], description: str) -> argparse.Namespace:
    """Raises InputError for an unknown flag, a flag of another task, and a value out of range."""
    parser, tasks_of = Parser(description), {}
    parser.add_argument("--task", choices=TASKS, required=True)
    for title, tasks, flags in GROUPS:
        group = parser.add_argument_group(title) if title else parser
        for flag, settings in flags.items():
            group.add_argument(flag, **settings)
            tasks_of[flag] = tasks
    args = parser.parse_args(argv)
    for flag in (argument.split("=")[0] for argument in argv):
        tasks = tasks_of.get(flag, TASKS)
        if args.compare and args.task in CONTRASTIVE:
            if flag in tasks_of and flag not in WITH_COMPARE:
                raise InputError(f"{flag}: belongs to the evaluation of one run, not to --compare")
        elif args.task not in tasks:
            raise InputError(f"{flag}: belongs to --task {' and '.join(tasks)}, not {args.task}")
    check_values(args)
    default = f"runs/{args.task if args.task in LANGUAGE else 'clip1'}-{args.model}"
    args.run = locate_run(args.run or default)
    return args


def check_values(args: argparse.Namespace) -> None:
    if args.compare and len(args.compare) < 2:
        raise InputError("--compare: expected two or more runs")
    if args.bertscore_layer is not None and args.bertscore is None:
        raise InputError("--bertscore-layer: is of the model that --bertscore names; give both")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    for name in ("bertscore", "classifier"):
        folder = getattr(args, name)
        if folder and not folder.is_dir():
            raise InputError(
                f"--{name} {folder}: no such folder; expected one with config.json, tokenizer and weights"
            )
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt: is empty; expected what a report is asked for with")
    for name in ("out", "figures"):  # said now, not after hours
        folder = getattr(args, name)
        nearest = next((p for p in (folder, *folder.parents) if p.exists()), None) if folder else None
        if nearest and not nearest.is_dir():
            raise InputError(f"--{name} {nearest}: is a file; expected a folder to write into")
