"""Raw CT and reports -> volumes and a manifest that train.py and evaluate.py read.

    python preprocess.py --dataset phantom --out data/phantom              # synthetic CT, nothing to download
    python preprocess.py --dataset ct-rate --root CT-RATE --out data/ct-rate --workers 16
    python preprocess.py --dataset ct-rate --root CT-RATE --out data/ct-rate --development 500  # patients
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
from reaf_hsenet.data.each_volume import Refused
from reaf_hsenet.data.header import HEADERS
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.data.phantom.dataset import SHAPE, write_phantom_dataset
from reaf_hsenet.data.prepare import Options, list_as_is, prepare
from reaf_hsenet.data.questions import add_questions
from reaf_hsenet.data.reading import Reading
from reaf_hsenet.data.slices import SLICE_RECIPES, SLICES, require_pillow
from reaf_hsenet.data.sources.bimcv import BIMCV_R
from reaf_hsenet.data.sources.ct_rate import CT_RATE
from reaf_hsenet.data.sources.nifti import NIFTI
from reaf_hsenet.data.sources.radgenome import KINDS
from reaf_hsenet.data.sources.reaf_dataset import REAF
from reaf_hsenet.data.volume import ORIENTATIONS, RESCALES, axis_codes
from reaf_hsenet.errors import InputError
from reaf_hsenet.presets import TINY_RECIPES
from reaf_hsenet.script import Parser, run_script

# A row is all that a data set needs here; its file below data/sources/ says the rest.
PHANTOM = replace(CT_RATE, name="phantom", recipes=TINY_RECIPES, slice_recipe="phantom")
DATASETS = {dataset.name: dataset for dataset in (PHANTOM, CT_RATE, NIFTI, REAF, BIMCV_R)}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=(*DATASETS, "radgenome"),
        help="may be left out with --slices, for volumes that OUT holds already",
    )
    data.add_argument(
        "--root", type=Path, help="folder of the raw data (phantom: where it is written, default OUT/raw)"
    )
    data.add_argument("--out", type=Path, required=True, help="folder to write")
    for name in dict.fromkeys(name for dataset in DATASETS.values() for name in dataset.flags):
        owners = {d.name: d.flags[name] for d in DATASETS.values() if name in d.flags and d is not PHANTOM}
        text = "; ".join(f"{owner}: {settings['help']}" for owner, settings in owners.items())
        data.add_argument(f"--{name}", **{**next(iter(owners.values())), "help": text})
    data.add_argument(
        "--questions",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="radgenome: kinds to add (default: all)",
    )
    data.add_argument(
        "--development",
        type=int,
        metavar="N",
        help="hold N training patients out, on which checkpoints are then chosen (default: 0)",
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
    phantom.add_argument("--train-size", type=int, default=4000)
    phantom.add_argument("--valid-size", type=int, default=160)
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("D", "H", "W"))
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: expected 1 or more")
    if args.dataset is None and args.slices is None:
        raise InputError(
            "--dataset is missing; say which, or give --slices ENCODER for volumes that --out holds already"
        )
    if args.development is not None and args.dataset in (None, "radgenome"):
        raise InputError("--development: needs the --dataset that its volumes are of")
    if (args.development or 0) < 0:
        raise InputError(f"--development {args.development}: expected 0 or more patients")
    # The slice encoder is read first: a wrong file must not show after a night of preparing volumes.
    add_features = slice_step(args)
    prepare_data = join_questions if args.dataset == "radgenome" else prepare_volumes
    refused = []
    try:
        # What was refused in one step is reported before the next, which may take as long.
        for step in (lambda: prepare_data(args) if args.dataset else [], add_features):
            found = step()
            report_refused(args.out, found)
            refused += found
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command continues where it stopped") from None
    # 3, not 0: a batch script must not go on with fewer volumes unnoticed.
    return 3 if refused and not args.allow_refused else 0


def prepare_volumes(args: argparse.Namespace) -> Refused:
    """Prepare the volumes, or list the files as they are. Returns what was refused."""
    dataset = DATASETS[args.dataset]
    changes = {k: tuple(v) for k in ("size", "spacing", "window") if (v := getattr(args, k)) is not None}
    if args.fit:
        changes["fit"] = args.fit
    # The recipe fixes what a network sees; reading, what the file's values and axes mean. Both are kept in
    # manifest.json, and train.py requires them.
    recipe = replace(dataset.recipes[args.recipe or dataset.recipe], **changes)
    reading = Reading(args.rescale, args.orientation, args.assume_orientation, args.header)
    options = Options(recipe, reading, args.dtype)
    if dataset is PHANTOM:
        args.root = args.root or args.out / "raw"
        # Phantoms are drawn as NIfTI files in CT-RATE's layout, and from there on treated like any CT.
        sizes = args.train_size, args.valid_size
        write_phantom_dataset(args.root, *sizes, args.seed, tuple(args.shape), args.workers, progress=True)
    # A source is a list of cases: a file, its report, its labels, what a table says of its values.
    source = dataset.read(required_root(args), **{name: getattr(args, name) for name in dataset.flags})
    if args.development:
        source = source.with_development(args.development)
    # Prepared once, read at every epoch; or listed only, and processed at every reading.
    if args.as_is:
        manifest, refused = list_as_is(source, args.out, options)
    else:
        manifest, refused = prepare(source, args.out, options, args.workers)
    report(manifest)
    return refused


def join_questions(args: argparse.Namespace) -> Refused:
    """Add RadGenome's questions to the volumes that --out holds. Returns what was refused."""
    kinds = tuple(args.questions)
    # Questions are joined to volumes by their names; those of volumes that OUT lacks are refused, or left
    # out.
    manifest, refused = add_questions(args.out, required_root(args), kinds, args.allow_refused)
    for kind in args.questions:
        counts = {
            split: sum(row["kind"] == kind for entry in entries for row in entry.get("qa", ()))
            for split, entries in manifest.splits.items()
        }
        listed = ", ".join(f"{n} {split}" for split, n in counts.items())
        print(f"{manifest.name}: questions of {kind}: {listed}")
    return refused


def slice_step(args: argparse.Namespace) -> Callable[[], Refused]:
    """Return the step that adds slice features, for when there are volumes. Its encoder is read here."""
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
    # Slices are cut from the source files, not from prepared volumes, and in a recipe of their own.
    usual = DATASETS[args.dataset].slice_recipe if args.dataset in DATASETS else "hsenet"
    encoder, provenance = load_slice_encoder(args.slices, args.jpeg_slices, args.slice_recipe or usual)

    def step() -> Refused:
        refused = add_slice_features(
            args.out, encoder, provenance, args.workers, device, batch=batch, replace=args.replace_slices
        )
        made = f"({SLICES}, {encoder.width}) slice features of {args.slices}"
        print(f"{args.out / 'manifest.json'}: {made}, sha256 {provenance['sha256'][:12]}")
        return refused

    return step


def required_root(args: argparse.Namespace) -> Path:
    if args.root is None:
        raise InputError(f"--dataset {args.dataset} needs --root, the folder of the raw data")
    return args.root


def report(manifest: Manifest) -> None:
    counts = ", ".join(f"{len(entries)} {split}" for split, entries in manifest.splits.items())
    size, name = manifest.recipe.size, manifest.recipe.name
    print(f"{manifest.folder / 'manifest.json'}: {counts} volumes of {size}, {name}")
    # The published numbers count these volumes, so they stay, and whoever wants leaves them out by the mark.
    if heads := sum(not entry.get("chest", True) for entry in manifest.all_entries()):
        print(
            f"{heads} volumes are no chests by the data set's own metadata/no_chest_*.txt: kept, as "
            "published, and marked in the manifest",
            file=sys.stderr,
        )
    # Whether values were HU already is the decision that spoils most when it is wrong: it is shown with its
    # counts.
    decided = [e["source"].get("rescale", "decided when read") for e in manifest.all_entries()]
    for decision, count in Counter(text.split(" (")[0] for text in decided).most_common():
        print(f"  rescale, {count} volumes: {decision}")


def report_refused(folder: Path, refused: Refused) -> None:
    for path, reason in refused[:10]:
        print(f"refused: {path}: {reason}", file=sys.stderr)
    if refused:
        print(f"{len(refused)} files refused, see {folder / 'refused.csv'}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
