"""One scan, one trained run: a report, an answer, classes, an embedding, neighbours, a picture.

    python infer.py report scan.nii.gz                            # runs/mrg-hsenet
    python infer.py ask scan.nii.gz "Is there pleural effusion?"  # runs/vqa-hsenet
    python infer.py classify scan.nii.gz                          # runs/clip2-hsenet, or runs/clip1-hsenet
    python infer.py embed a.nii.gz b.nii.gz --out index.safetensors
    python infer.py search index.safetensors --text "bilateral pleural effusion"
    python infer.py explain scan.nii.gz --out picture.png         # where the encoder looks

A scan is .nii or .nii.gz in any orientation and spacing, or a .pt volume of REAF; the run's own recipe is
applied. Results go to stdout, with --json as JSON; which run was used and how the scan was read is said on
stderr.
"""

from reaf_hsenet.script import start_script

if __name__ == "__main__":
    start_script()  # what is imported next takes seconds

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from reaf_hsenet.config import GENERATION
from reaf_hsenet.data.header import HEADERS
from reaf_hsenet.data.labels import LABEL_SETS
from reaf_hsenet.data.reading import Reading, stem
from reaf_hsenet.data.volume import ORIENTATIONS, RESCALES, TableRow, axis_codes
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.scan import check_scan
from reaf_hsenet.evaluate.scan_model import EMPTY_TEXT, ScanModel, contradictions
from reaf_hsenet.evaluate.search_index import SearchIndex
from reaf_hsenet.runs.generation import PRECISIONS, Sampling
from reaf_hsenet.runs.trained import locate_run
from reaf_hsenet.script import Command, Parser, run_script

COMMANDS = {
    "report": "findings as text",
    "ask": "an answer to a question",
    "classify": "probabilities of classes, by the run's probe or by prompts",
    "embed": "unit vectors, to print or to search",
    "search": "scans of an index that are nearest to a text or a scan",
    "explain": "a picture of where the encoder looks",
}


def main(argv: list[str]) -> int:
    # Check the command line, before anything is loaded.
    args = parse(argv)
    check(args)

    # Read the run's settings; its weights follow when the scan is found to be one.
    # The run's settings say all that a scan must be made to: recipe, sizes, vocabulary.
    folder = locate_run(args.run) if args.run else default_run(args.command, args.model)
    model = ScanModel(
        folder,
        checkpoint=args.checkpoint,
        device=args.device,
        reading=Reading(args.rescale, args.orientation, args.assume_orientation, args.header),
        table=TableRow(tuple(args.spacing) if args.spacing else None, args.slope, args.intercept),
        slice_encoder=args.slice_encoder,
        precision=args.precision,
        text_model=args.text_model,
        decoder=args.decoder,
        encoders=args.encoders,
        compiled=args.compile,
        say=say,
    )
    say(f"run: {folder}, stage {model.stage}, checkpoint {model.checkpoint}")

    # Compute and print the result: as text while it is made, or as JSON.
    result = RESULTS[args.command](args, model, (lambda *text, **how: None) if args.json else print)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def default_run(command: str, model: str | None) -> Path:
    """Return the run that answers when none is named: the first of these that exists, else the last."""
    model = model or "hsenet"
    stages = ("clip2", "clip1") if model == "hsenet" else ("clip1",)
    stages = {"report": ("mrg",), "ask": ("vqa", "mrg")}.get(command, stages)
    runs = [Path(f"runs/{stage}-{model}") for stage in stages]
    return next((run for run in runs if (run / "config.json").is_file()), runs[-1])


def made_by(model: ScanModel) -> dict:
    return {"run": str(model.folder), "checkpoint": str(model.checkpoint)}


def answer(args: argparse.Namespace, model: ScanModel, show: Callable) -> dict:
    """Show a report, or an answer, as it is made; before it the findings that its prompt told, if any."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed or 0)
    task, text, cues = "mrg" if args.command == "report" else "vqa", "", []

    def told(found: list[dict]) -> None:
        cues.extend(found)
        show("findings that the prompt tells:")
        for row in found:
            where = f" ({', '.join(row['places'])})" if row["places"] else ""
            if row["present"]:
                show(f"  {row['name']}{where}  {row['probability']:.3f}, threshold {row['threshold']:.3f}")
        show()

    for piece in model.stream(args.scan, args.question, task, args.new_tokens, sampling, cues=told):
        text += piece
        show(piece, end="", flush=True)
    show()
    said = {"report": text} if task == "mrg" else {"question": args.question, "answer": text}
    if cues:
        said["findings"] = cues
    if cues and task == "mrg":
        said["contradictions"] = contradictions(cues, text)
        for line in said["contradictions"]:
            show(f"contradiction: {line}")
    return {"path": str(args.scan), **said, **made_by(model)}


def classify(args: argparse.Namespace, model: ScanModel, show: Callable) -> dict:
    # A probe's probability is calibrated and has a threshold. Zero-shot it is the softmax over two prompts,
    # that the class is there and that it is not: no class was ever trained.
    found = model.findings(args.scan, args.prompts, args.label_set)
    width, classes = max(map(len, found)), []
    for name, (probability, cut) in found.items():
        present = "present" if cut is not None and probability > cut else "absent"
        decided = "" if cut is None else f"  {present}, threshold {cut:.3f}"
        show(f"{name:<{width}}  {probability:.3f}{decided}")
        known = {} if cut is None else {"threshold": cut}
        classes.append({"name": name, "probability": probability, **known})
    by = "prompts" if cut is None else "probe"
    return {"path": str(args.scan), "classes": classes, "by": by, **made_by(model)}


def embed(args: argparse.Namespace, model: ScanModel, show: Callable) -> list[dict]:
    vectors = []
    for scan in args.scan:
        vectors.append(model.embed(scan))
        if not args.out:
            first = ", ".join(f"{x:.4f}" for x in vectors[-1][:4].tolist())
            show(f"{scan}: {len(vectors[-1])} numbers, norm {vectors[-1].norm():.4f}: {first}, ...")
    names = list(map(str, args.scan))
    if args.out:
        # With the weights' hash: another model's vectors would be compared without meaning.
        SearchIndex(torch.stack(vectors), names, model.sha256).write(args.out)
        show(f"{args.out}: {len(vectors)} embeddings")
    return [{"path": name, "embedding": v.tolist()} for name, v in zip(names, vectors, strict=True)]


def search(args: argparse.Namespace, model: ScanModel, show: Callable) -> list[dict]:
    # Unit vectors: the dot product with the index is the cosine.
    found = model.search(args.index, args.text, args.scan, args.top)
    for name, score in found:
        show(f"{score:.4f}  {name}")
    return [{"id": name, "score": score} for name, score in found]


def explain(args: argparse.Namespace, model: ScanModel, show: Callable) -> dict:
    # REAF: the map that pools its tokens. 2E3: the sigmoid by which slices weight each patch.
    found = model.explain(args.scan, args.out)
    show(f"{args.out}: {found['shows']} of {', '.join(found['maps'])}")
    return {"path": str(args.scan), "picture": str(args.out), **found, **made_by(model)}


RESULTS = {
    "report": answer,
    "ask": answer,
    "classify": classify,
    "embed": embed,
    "search": search,
    "explain": explain,
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    for name, meaning in COMMANDS.items():
        command = commands.add_parser(name, description=meaning, help=meaning)
        command.set_defaults(precision=None, decoder=None, encoders=None, compile=False, out=None)
        add_inputs(command, name)
        if name in ("report", "ask"):
            add_generation(command, name)
        add_model(command, name)
        add_scan(command)
    return parser.parse_args(argv)


def add_inputs(command: Parser, name: str) -> None:
    add = command.add_argument
    if name == "search":
        add("index", type=Path, help="file of `embed --out`, or RUN/eval/embeddings_SPLIT.safetensors")
        query = command.add_mutually_exclusive_group(required=True)
        query.add_argument("--text", help="find scans that show this")
        query.add_argument(
            "--volume", dest="scan", type=Path, metavar="SCAN", help="find scans like this one"
        )
        add("--top", type=int, default=5, metavar="N", help="how many (default: 5)")
    else:
        add("scan", type=Path, nargs="+" if name == "embed" else None)
    if name == "embed":
        add("--out", type=Path, metavar="FILE.safetensors", help="write an index, which search reads")
    if name == "explain":
        add("--out", type=Path, metavar="FILE.png", help="default: SCAN_explained.png, here")
    if name == "classify":
        usual = "the run's probe, of evaluate.py --task probe, else volume"
        add("--prompts", help=f"zero-shot: volume, organ or a json file (default: {usual})")
        add("--label-set", choices=LABEL_SETS, help="zero-shot: whose classes (default: ct-rate)")
    if name == "ask":
        add("question")
    if name == "report":
        usual = GENERATION["mrg"]["prompt"]
        add("--prompt", dest="question", default=usual, help="default: %(default)s")


def add_generation(command: Parser, name: str) -> None:
    usual = GENERATION["mrg" if name == "report" else "vqa"]["new_tokens"]
    add = command.add_argument_group("generation").add_argument
    add(
        "--new-tokens",
        type=int,
        metavar="N",
        help=f"at most (default: {usual}, as far as the context allows)",
    )
    add("--temperature", type=float, default=0.0, help="0: the likeliest token, always (default)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that add up to P")
    add("--seed", type=int, help="of the draws (default: 0)")
    add("--precision", choices=PRECISIONS, help="of the decoder (default: that of its files)")
    add("--compile", action="store_true", help="compile the decoder's steps, on a GPU")


def add_model(command: Parser, name: str) -> None:
    add = command.add_argument_group("model").add_argument
    add(
        "--run",
        help="run folder of train.py, or published weights: file, "
        "folder or hub id (default: the last stage's that can do it, in runs/)",
    )
    add("--text-model", metavar="NAME", help="folder or hub id with the vocabulary of a published checkpoint")
    if name in ("report", "ask"):
        decoder = "of published packers and adapters: what they stand on, folder or hub id"
        add("--decoder", metavar="NAME", help=decoder)
        encoders = "of the same: HSENet-2E3-CLIP, file, folder or hub id, or a clip2 run"
        add("--encoders", metavar="NAME", help=encoders)
    add("--model", choices=("hsenet", "reaf"), help="whose default run folder (default: hsenet)")
    add("--checkpoint", metavar="NAME", help="last (default), best or a step, step-000100")
    add("--slice-encoder", metavar="NAME", help="of a guided encoder's slices: file, folder or hub id")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add("--json", action="store_true", help="JSON, and nothing else, on stdout")


def add_scan(command: Parser) -> None:
    add = command.add_argument_group("what the scan holds").add_argument
    add(
        "--rescale",
        choices=RESCALES,
        default="auto",
        help="auto: --slope and --intercept for values that are not HU already",
    )
    add("--slope", type=float, help="of raw values to HU")
    add("--intercept", type=float, help="of raw values to HU")
    stored = "stored: ignore the header's orientation"
    add("--orientation", choices=ORIENTATIONS, default="header", help=stored)
    add(
        "--header",
        choices=HEADERS,
        default="check",
        help="what to believe of a header that contradicts itself (default: "
        "check, refuse it; none: treat it as blank)",
    )
    codes = "axis codes where the header has none, such as LPS"
    add("--assume-orientation", type=axis_codes, metavar="CODES", help=codes)
    add(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("X", "Y", "Z"),
        help="mm along the stored axes where the header has no orientation (default: the header's)",
    )


def check(args: argparse.Namespace) -> None:
    """Raise InputError for what is wrong with the flags and files, before anything is loaded."""
    # What two flags say to each other argparse does not know.
    if args.run and args.model:
        raise InputError("--model: chooses a default run; leave it out, or --run")
    for name, value, wrong in ("slope", args.slope, 0), ("intercept", args.intercept, None):
        if value is not None and (value == wrong or not math.isfinite(value)):
            raise InputError(f"--{name} {value:g}: expected a finite number, and a slope other than 0")
    if args.spacing and not all(0 < x < math.inf for x in args.spacing):
        raise InputError(f"--spacing {args.spacing}: expected three positive distances in mm")
    if args.command in ("report", "ask"):
        if not args.question.strip():
            what = "the question" if args.command == "ask" else "--prompt"
            raise InputError(f'{what} is empty; expected some words, such as "Is there pleural effusion?"')
        if args.new_tokens is not None and args.new_tokens < 1:
            raise InputError(f"--new-tokens {args.new_tokens}: expected 1 or more")
        for flag, value in ("--top-k", args.top_k), ("--top-p", args.top_p), ("--seed", args.seed):
            if value is not None and args.temperature == 0:
                raise InputError(f"{flag}: nothing is drawn at --temperature 0; give one above 0")
    if args.command == "search":
        if args.top < 1:
            raise InputError(f"--top {args.top}: expected 1 or more")
        if args.text is not None and not args.text.strip():
            raise InputError(EMPTY_TEXT)
    # A path that is no scan is said before any weights are read.
    scans = args.scan if args.command == "embed" else filter(None, [args.scan])
    for scan in scans:
        check_scan(scan)
    if args.command == "explain" and args.out is None:
        args.out = Path(f"{stem(args.scan.name)}_explained.png")
    if out := args.out:
        suffix = ".png" if args.command == "explain" else ".safetensors"
        nearest = next(p for p in (out.parent, *out.parent.parents) if p.exists())
        if out.suffix != suffix or out.is_dir() or not nearest.is_dir():
            raise InputError(f"--out {out}: expected a file to write that ends in {suffix}, in a folder")


if __name__ == "__main__":
    run_script(main, result=True)
