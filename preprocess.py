"""Raw CT and reports -> volumes and a manifest that train.py and evaluate.py read.

    python preprocess.py --dataset phantom --out data/phantom              # synthetic CT, nothing to download
    python preprocess.py --dataset ct-rate --root CT-RATE --out data/ct-rate --workers 16
    python preprocess.py --dataset nifti --root scans --csv scans/reports.csv --out data/mine --recipe reaf
    python preprocess.py --dataset reaf --root /data/ct_rate --out data/reaf  # REAF's .pt and reports
    python preprocess.py --dataset reaf --root /data/ct_rate --out data/as-is --as-is  # only a list of them
    python preprocess.py --dataset bimcv-r --root BIMCV-R --csv reports.csv --out data/bimcv-r
    python preprocess.py --dataset radgenome --root TABLES --out data/ct-rate  # questions about them
    python preprocess.py --slices biomedclip/open_clip_pytorch_model.bin --out data/ct-rate  # for stage 2

Run it again and it does what is missing; --slices is also a step of its own, for a folder that has volumes.
Files that cannot be used are listed with the reason in OUT/refused.csv.
"""

from reaf_hsenet.script import start_script

if __name__ == "__main__":
    start_script()  # what is imported next takes seconds

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from reaf_hsenet.config import FITS, RECIPES
from reaf_hsenet.data.header import HEADERS
from reaf_hsenet.data.phantom.dataset import write_phantom_dataset
from reaf_hsenet.data.prepare import Options, list_as_is, prepare
from reaf_hsenet.data.questions import add_questions
from reaf_hsenet.data.reading import Reading
from reaf_hsenet.data.slices import SLICE_RECIPES, SLICES, require_pillow
from reaf_hsenet.data.sources.bimcv import read_bimcv
from reaf_hsenet.data.sources.datasets import Source, read_ct_rate, read_nifti_folder
from reaf_hsenet.data.sources.radgenome import KINDS
from reaf_hsenet.data.sources.reaf_dataset import read_reaf
from reaf_hsenet.data.volume import ORIENTATIONS, RESCALES, axis_codes
from reaf_hsenet.errors import InputError
from reaf_hsenet.presets import TINY_RECIPES
from reaf_hsenet.script import Parser, run_script


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=("phantom", "ct-rate", "nifti", "reaf", "bimcv-r", "radgenome"),
        help="may be left out with --slices, for volumes that OUT holds already",
    )
    data.add_argument(
        "--root", type=Path, help="folder of the raw data (phantom: where it is written, default OUT/raw)"
    )
    data.add_argument("--out", type=Path, required=True, help="folder to write")
    data.add_argument(
        "--csv",
        type=Path,
        help="nifti: table with the columns id and text (optional: scan, split); bimcv-r: with path and "
        "Report_en",
    )
    data.add_argument(
        "--impressions", action="store_true", help="ct-rate: add the impressions to the findings"
    )
    data.add_argument(
        "--questions",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="radgenome: kinds to add (default: all)",
    )
    recipe = parser.add_argument_group("recipe (defaults are the method's own)")
    recipe.add_argument("--recipe", choices=tuple(RECIPES), help="default: hsenet; of --dataset reaf: reaf")
    recipe.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels of the result")
    recipe.add_argument("--spacing", type=float, nargs=3, metavar=("D", "H", "W"), help="mm to resample to")
    recipe.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"), help="HU")
    recipe.add_argument("--fit", choices=FITS, help="how the resampled CT meets the size")
    recipe.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    geometry = parser.add_argument_group("what the files hold")
    geometry.add_argument(
        "--rescale",
        choices=RESCALES,
        default="auto",
        help="auto: the table's slope and intercept for values that are not HU already",
    )
    geometry.add_argument(
        "--orientation",
        choices=ORIENTATIONS,
        default="header",
        help="stored: ignore the header's orientation, as the published pipelines do",
    )
    geometry.add_argument(
        "--header",
        choices=HEADERS,
        default="check",
        help="what to believe of a header that contradicts itself (default: check, refuse it; none: treat "
        "it as blank)",
    )
    geometry.add_argument(
        "--assume-orientation",
        type=axis_codes,
        metavar="CODES",
        help="axis codes of files whose header has none, for example LPS",
    )
    slices = parser.add_argument_group("slice features, for stage 2")
    slices.add_argument(
        "--slices",
        metavar="ENCODER",
        help="also encode 32 axial slices of each volume: file, folder or hub id of a 2D ViT (published: "
        "BiomedCLIP)",
    )
    slices.add_argument("--slice-batch", type=int, help="slices per forward pass (default: 64)")
    slices.add_argument(
        "--slice-recipe",
        choices=tuple(SLICE_RECIPES),
        help="how slices are taken from a CT (default: hsenet; of --dataset phantom and bimcv-r: their own)",
    )
    slices.add_argument(
        "--jpeg-slices", action="store_true", help="through JPEG files, as published (needs Pillow)"
    )
    slices.add_argument(
        "--replace-slices",
        action="store_true",
        help="remove features that OUT has of another encoder or recipe",
    )
    slices.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=1)
    run.add_argument(
        "--as-is",
        action="store_true",
        help="write a manifest of the files themselves, to be read and processed at training time",
    )
    run.add_argument(
        "--allow-refused",
        action="store_true",
        help="exit 0 even when files were refused; radgenome: leave out the rows of volumes that OUT does "
        "not hold",
    )
    phantom = parser.add_argument_group("phantom")
    phantom.add_argument("--train-size", type=int, default=2000)
    phantom.add_argument("--valid-size", type=int, default=160)
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--shape", type=int, nargs=3, default=(48, 96, 96), metavar=("D", "H", "W"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: expected 1 or more")
    if args.dataset is None and args.slices is None:
        raise InputError(
            "--dataset is missing; say which, or give --slices ENCODER for volumes that --out holds already"
        )
    features = slice_step(args)
    step = join_questions if args.dataset == "radgenome" else prepare_volumes
    refused = step(args) if args.dataset else []
    refused += features()
    return 3 if refused and not args.allow_refused else 0


def prepare_volumes(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The volumes, or a list of the files as they are. Returns what was refused."""
    name = args.recipe or ("reaf" if args.dataset == "reaf" else "hsenet")
    changes = {k: tuple(v) for k in ("size", "spacing", "window") if (v := getattr(args, k)) is not None}
    if args.dataset == "bimcv-r" and name == "hsenet":
        changes.setdefault("spacing", None)  # published: BIMCV-R keeps its own grid
    if args.fit:
        changes["fit"] = args.fit
    recipe = replace((TINY_RECIPES if args.dataset == "phantom" else RECIPES)[name], **changes)
    reading = Reading(args.rescale, args.orientation, args.assume_orientation, args.header)
    options = Options(recipe, reading, args.dtype)
    try:
        source = read_source(args)
        if args.as_is:
            manifest, refused = list_as_is(source, args.out, options)
        else:
            manifest, refused = prepare(source, args.out, options, args.workers)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command continues where it stopped") from None
    report(manifest, refused)
    return refused


def join_questions(args: argparse.Namespace) -> list[tuple[str, str]]:
    """RadGenome's questions for the volumes that --out holds. Returns what was refused."""
    manifest, refused = add_questions(
        args.out, required_root(args), tuple(args.questions), args.allow_refused
    )
    for kind in args.questions:
        counts = {
            split: sum(row["kind"] == kind for entry in entries for row in entry.get("qa", ()))
            for split, entries in manifest.splits.items()
        }
        print(
            f"{manifest.name}: questions of {kind}: "
            f"{', '.join(f'{n} {split}' for split, n in counts.items())}"
        )
    report_refused(args.out, refused)
    return refused


def slice_step(args: argparse.Namespace) -> Callable[[], list[tuple[str, str]]]:
    """The step that adds slice features, to be called when there are volumes; its encoder is read here
    already.
    """
    if args.slices is None:
        for name in ("slice_batch", "slice_recipe", "jpeg_slices", "replace_slices", "device"):
            if getattr(args, name) not in (None, False):
                raise InputError(f"--{name.replace('_', '-')}: needs --slices ENCODER")
        return list
    batch = 64 if args.slice_batch is None else args.slice_batch
    if batch < 1:
        raise InputError(f"--slice-batch {batch}: expected 1 or more")
    if args.jpeg_slices:
        require_pillow()
    # Here, not above: the workers that prepare volumes start faster without torch.
    from reaf_hsenet import distributed
    from reaf_hsenet.data.slice_features import add_slice_features
    from reaf_hsenet.weights.slice_encoder import load_slice_encoder

    device = distributed.start(args.device).device
    recipe = args.slice_recipe or {"phantom": "phantom", "bimcv-r": "bimcv"}.get(args.dataset, "hsenet")
    encoder, provenance = load_slice_encoder(args.slices, args.jpeg_slices, recipe)

    def step() -> list[tuple[str, str]]:
        try:
            refused = add_slice_features(
                args.out, encoder, provenance, args.workers, device, batch=batch, replace=args.replace_slices
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; the same command continues where it stopped") from None
        made = f"({SLICES}, {encoder.width}) slice features of {args.slices}"
        print(f"{args.out / 'manifest.json'}: {made}, sha256 {provenance['sha256'][:12]}")
        report_refused(args.out, refused)
        return refused

    return step


def read_source(args: argparse.Namespace) -> Source:
    if args.dataset == "phantom":
        root = args.root or args.out / "raw"
        write_phantom_dataset(
            root, args.train_size, args.valid_size, args.seed, tuple(args.shape), args.workers, progress=True
        )
        return read_ct_rate(root, args.impressions)
    root = required_root(args)
    if args.dataset == "ct-rate":
        return read_ct_rate(root, args.impressions)
    if args.dataset == "reaf":
        return read_reaf(root)
    return (read_bimcv if args.dataset == "bimcv-r" else read_nifti_folder)(root, args.csv)


def required_root(args: argparse.Namespace) -> Path:
    if args.root is None:
        raise InputError(f"--dataset {args.dataset} needs --root, the folder of the raw data")
    return args.root


def report(manifest, refused) -> None:
    counts = ", ".join(f"{len(entries)} {split}" for split, entries in manifest.splits.items())
    print(
        f"{manifest.folder / 'manifest.json'}: {counts} volumes of {manifest.recipe.size}, "
        f"{manifest.recipe.name}"
    )
    heads = sum(not entry.get("chest", True) for entries in manifest.splits.values() for entry in entries)
    if heads:
        print(
            f"{heads} volumes are no chests by the data set's own metadata/no_chest_*.txt: kept, as "
            "published, and marked in the manifest",
            file=sys.stderr,
        )
    decisions = Counter(
        entry["source"].get("rescale", "decided when read").split(" (")[0]
        for split in manifest.splits.values()
        for entry in split
    )
    for decision, count in decisions.most_common():
        print(f"  rescale, {count} volumes: {decision}")
    report_refused(manifest.folder, refused)


def report_refused(folder: Path, refused: list[tuple[str, str]]) -> None:
    for path, reason in refused[:10]:
        print(f"refused: {path}: {reason}", file=sys.stderr)
    if refused:
        print(f"{len(refused)} files refused, see {folder / 'refused.csv'}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
