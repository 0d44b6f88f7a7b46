"""Published checkpoints: what they are, into runs of this project, and back.

    python -m reaf_hsenet.weights convert FILE --dry-run     # what it is, its configuration, what it is for
    python -m reaf_hsenet.weights convert FILE RUN --text-model google-bert/bert-base-uncased
    python -m reaf_hsenet.weights convert mm_projector_and_lora.bin RUN --decoder FOLDER --encoders FILE
    python -m reaf_hsenet.weights export RUN OUT --format m3d-clip

FILE is a file, a folder or a hub id (ORGANISATION/NAME or ORGANISATION/NAME@REVISION, which is downloaded).
RUN is then read by evaluate.py --run, infer.py --run and train.py --init.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from reaf_hsenet.errors import InputError
from reaf_hsenet.runs.conversion import FORMATS, export, write_run
from reaf_hsenet.runs.published import open_source
from reaf_hsenet.runs.trained import published_run
from reaf_hsenet.script import Command, Parser, run_script
from reaf_hsenet.weights.files import summary

PROGRAM = "python -m reaf_hsenet.weights"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.prog = PROGRAM
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Command)
    command = commands.add_parser("convert", help="a published checkpoint into a run folder")
    command.add_argument("file", help="file, folder or hub id")
    command.add_argument("out", type=Path, metavar="RUN", nargs="?", help="folder to write")
    command.add_argument(
        "--dry-run", action="store_true", help="say what FILE is and whether it fits, write nothing"
    )
    command.add_argument(
        "--text-model", metavar="NAME", help="folder or hub id of the text encoder, for its vocab.txt"
    )
    command.add_argument(
        "--size", type=int, nargs=3, metavar=("D", "H", "W"), help="another input size, in voxels"
    )
    command.add_argument(
        "--slice-encoder", metavar="NAME", help="of a 2E3 encoder's slice features: file, folder or hub id"
    )
    group = command.add_argument_group("packers and adapters (mm_projector_and_lora.bin)")
    group.add_argument(
        "--decoder", metavar="NAME", help="folder or hub id, for example microsoft/Phi-4-mini-instruct"
    )
    group.add_argument("--encoders", metavar="NAME", help="HSENet-2E3-CLIP, or the run it was converted into")
    group.add_argument(
        "--stage", choices=("mrg", "vqa"), help="what it was trained for: reports (default) or answers"
    )
    command = commands.add_parser("export", help="a run's weights under published names")
    command.add_argument("run", type=Path)
    command.add_argument("out", type=Path, help="folder to write")
    command.add_argument("--format", choices=FORMATS, required=True)
    command.add_argument("--checkpoint", metavar="NAME", help="last (default), best or a step, step-000100")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    notes = (
        convert(args)
        if args.command == "convert"
        else export(args.run, args.out, args.format, args.checkpoint)
    )
    for note in notes:
        print(f"note: {note}")
    if args.out:
        print(f"written to {args.out}")
    return 0


def convert(args: argparse.Namespace) -> list[str]:
    """Write a published checkpoint as a run, or with --dry-run say what it is. Returns the notes."""
    if (args.out is None) != args.dry_run:
        raise InputError(
            f"{'RUN' if args.dry_run else '--dry-run'}: expected either a folder to write or --dry-run; "
            f"see {PROGRAM} --help"
        )
    source = open_source(args.file)
    if args.dry_run:
        # First what needs nothing but the file: what it lacks is an error of what follows.
        print(f"{source.name}: {source.family.name}\nfile: {source.file}, {len(source.tensors)} tensors")
        for use in source.family.uses:
            print("for: " + use.replace("FILE", source.name).replace("FOLDER", str(source.folder)))
        if source.family.kind not in ("dual", "language"):
            return []
    made = published_run(
        source,
        text_model=args.text_model,
        size=args.size,
        slice_encoder=args.slice_encoder,
        decoder=args.decoder,
        encoders=args.encoders,
        stage=args.stage,
    )
    if args.dry_run:
        print(f"stage {made.stage}")
        for key, value in settings(asdict(made.config)):
            print(f"  {key} {value}")
        if made.not_used:
            print(f"known, not used here: {summary(sorted(made.not_used))}")
    else:
        write_run(made, args.out)
        print(f"{args.file}: {source.family.name}, stage {made.stage}")
    return list(made.notes)


def settings(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted name, value) of nested settings."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    run_script(main, result=True)
