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
# The flags with their defaults, by the tasks that have them. All but those of the bootstrap are of one run's
# evaluation.
ONE_RUN = {
    TASKS: {
        **{"run": None, "model": "hsenet", "checkpoint": None, "data": None, "split": "validation"},
        **{"batch_size": 16, "workers": 0, "device": None, "text_model": None},
    },
    CONTRASTIVE: {"figures": None, "figure_volumes": 4},
    ("zeroshot",): {"prompts": "volume", "label_set": "ct-rate", "labels": None},
    LANGUAGE: {
        **{"new_tokens": None, "limit": None, "precision": None, "bertscore": None, "bertscore_layer": None},
        **{"anew": False, "decoder": None, "encoders": None, "compile": False},
    },
    ("mrg",): {"prompt": None, "classifier": None},
    ("vqa",): {"questions": None, "templates": None},
}
BOOTSTRAP = {"bootstrap": 1000, "seed": 0}
LEAST = {
    "batch_size": 1,
    "workers": 0,
    "figure_volumes": 0,
    "bootstrap": 0,
    "seed": 0,
    "new_tokens": 1,
    "limit": 1,
}


def parse(argv: list[str], description: str) -> argparse.Namespace:
    """Raises InputError for an unknown flag, a value out of range, and a flag of another task."""
    parser = Parser(description)
    add = parser.add_argument
    add("--task", choices=TASKS, required=True)
    add(
        "--run",
        help="run folder of train.py, or published weights: file, folder or hub id (default: "
        "runs/clip1-MODEL; runs/mrg-MODEL, runs/vqa-MODEL)",
    )
    add("--text-model", metavar="NAME", help="folder or hub id with the vocabulary of a published checkpoint")
    add("--model", choices=("hsenet", "reaf"), help="whose default run folder (default: hsenet)")
    add(
        "--compare",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="two or more evaluated runs: their scores, and differences from the first with bootstrap "
        "intervals",
    )
    add(
        "--checkpoint",
        metavar="NAME",
        help="last (default, as published), best (chosen by the validation) or a step, step-000100",
    )
    add("--data", type=Path, help="prepared data set (default: the run's own)")
    add("--split", choices=("train", "validation", "test"), help="default: validation")
    add("--out", type=Path, help="folder of the results (default: RUN/eval)")
    add("--batch-size", type=int, help="default: 16")
    add("--workers", type=int, help="processes that read volumes (default: 0)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add = parser.add_argument_group("pictures").add_argument
    add("--figures", type=Path, metavar="DIR", help="write ROC or recall curves and saliency there")
    add("--figure-volumes", type=int, metavar="N", help="saliency of the first N volumes (default: 4)")
    add = parser.add_argument_group("zero-shot classification").add_argument
    add("--prompts", help="volume, organ or a json file (default: volume)")
    add("--label-set", choices=LABEL_SETS, help="how label columns become classes (default: ct-rate)")
    add("--labels", type=Path, metavar="CSV", help="label table (default: the manifest's labels)")
    add("--bootstrap", type=int, metavar="N", help="resamples of the intervals; 0: none (default: 1000)")
    add("--seed", type=int, help="of the bootstrap (default: 0)")
    add = parser.add_argument_group("report generation (mrg) and question answering (vqa)").add_argument
    add("--questions", choices=KINDS, help="of vqa (default: the kind that the run was trained on)")
    add(
        "--templates",
        type=Path,
        metavar="FILE",
        help="of vqa: the questions' wordings (default: those that the run was trained on)",
    )
    add("--prompt", help="of mrg: what every report is asked for with (default: the published one)")
    add("--new-tokens", type=int, metavar="N", help="most tokens of a report or an answer (default: 512, 74)")
    add("--limit", type=int, metavar="N", help="the first N reports or questions (default: all)")
    add("--precision", choices=("fp32", "bf16"), help="of the decoder (default: that of its weights)")
    add(
        "--bertscore",
        type=Path,
        metavar="FOLDER",
        help="BERT or RoBERTa that compares texts (published: roberta-large)",
    )
    add("--bertscore-layer", type=int, metavar="N", help="of that model (published: 17; default: the last)")
    add(
        "--classifier",
        type=Path,
        metavar="FOLDER",
        help="of mrg: BERT or RoBERTa that reads 18 findings, as RadBERT",
    )
    add(
        "--decoder",
        metavar="NAME",
        help="of published packers and adapters: folder or hub id of the decoder they stand on",
    )
    add(
        "--encoders",
        metavar="NAME",
        help="of the same: HSENet-2E3-CLIP, a file, folder or hub id, or a clip2 run",
    )
    add("--compile", action="store_true", default=None, help="compile the decoder's steps, on a GPU")
    add("--anew", action="store_true", default=None, help="forget the answers of an interrupted evaluation")
    args = parser.parse_args(argv)
    check_tasks(args)
    for flags in (*ONE_RUN.values(), BOOTSTRAP):
        for name, value in flags.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    args.run = (
        locate_run(args.run)
        if args.run
        else Path(f"runs/{args.task if args.task in LANGUAGE else 'clip1'}-{args.model}")
    )
    check_values(args)
    return args


def check_tasks(args: argparse.Namespace) -> None:
    """Refuse what belongs to another task, by name."""
    tasks_of = {name: tasks for tasks, flags in ONE_RUN.items() for name in flags} | dict.fromkeys(
        BOOTSTRAP, ("zeroshot",)
    )
    given = [name for name in tasks_of if getattr(args, name) is not None]
    if args.compare:
        if args.task in LANGUAGE:
            raise InputError(f"--compare: belongs to --task {' and '.join(CONTRASTIVE)}, not {args.task}")
        if foreign := [name for name in given if name not in BOOTSTRAP]:
            raise InputError(f"{_flag(foreign[0])}: belongs to the evaluation of one run, not to --compare")
        if len(args.compare) < 2:
            raise InputError("--compare: expected two or more runs")
    elif foreign := [name for name in given if args.task not in tasks_of[name]]:
        raise InputError(
            f"{_flag(foreign[0])}: belongs to --task {' and '.join(tasks_of[foreign[0]])}, not {args.task}"
        )
    if args.bertscore_layer is not None and args.bertscore is None:
        raise InputError("--bertscore-layer: is of the model that --bertscore names; give both")


def check_values(args: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"{_flag(name)} {value}: expected {least} or more")
    for name in ("bertscore", "classifier"):
        folder = getattr(args, name)
        if folder and not folder.is_dir():
            raise InputError(
                f"{_flag(name)} {folder}: no such folder; expected one with config.json, tokenizer and "
                f"weights"
            )
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt: is empty; expected what a report is asked for with")
    for name in ("out", "figures"):  # said now, not after hours
        folder = getattr(args, name)
        nearest = next((p for p in (folder, *folder.parents) if p.exists()), None) if folder else None
        if nearest and not nearest.is_dir():
            raise InputError(f"--{name} {nearest}: is a file; expected a folder to write into")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
