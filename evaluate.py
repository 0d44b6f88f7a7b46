"""Evaluate a trained run.

    python evaluate.py --task retrieval                                # runs/clip1-hsenet on its validation split
    python evaluate.py --task retrieval --run RUN --data FOLDER        # any run, any prepared data set
    python evaluate.py --task zeroshot --prompts organ                 # CT-RATE's classes, with another template
    python evaluate.py --task retrieval --compare RUN RUN              # evaluated runs side by side

Prints a table and writes RUN/eval/: retrieval.json, retrieval_queries.csv, embeddings.safetensors; zeroshot.json,
zeroshot_scores.csv. With --figures DIR also pictures (needs matplotlib).
"""

import argparse
import csv
from pathlib import Path

import torch
from safetensors.torch import save

from reaf_hsenet import comparison, distributed, figures, zeroshot
from reaf_hsenet.data.labels import LABEL_SETS, load_label_set, manifest_labels, read_label_table
from reaf_hsenet.data.loader import CTReportDataset, read_prepared
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.embedding import DualEncoderRun, embed, load_dual_encoder
from reaf_hsenet.errors import InputError, Parser, run_script
from reaf_hsenet.files import atomic_write, write_json
from reaf_hsenet.metrics.classification import classification_report
from reaf_hsenet.metrics.retrieval import (
    CrossRetrieval,
    cross_retrieval,
    cross_retrieval_per_scan,
    label_overlap,
)

OVERLAPS = {
    "as_published_accumulating": "label overlap, as published",
    "per_k": "label overlap, per k",
    "per_k_excluding_the_query_itself": "label overlap, without the query",
    "per_k_excluding_all_reconstructions_of_the_query_scan": "label overlap, without its scan",
}

# Defaults: of the flags of one run's evaluation, of those that only zero-shot classification has, and --compare too.
ONE_RUN = {
    **{"run": None, "model": "hsenet", "checkpoint": "best", "data": None, "split": "validation"},
    **{"batch_size": 16, "workers": 0, "device": None, "figures": None, "figure_volumes": 4},
}
ZEROSHOT = {"prompts": "volume", "label_set": "ct-rate", "labels": None}
BOOTSTRAP = {"bootstrap": 1000, "seed": 0}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--task", choices=("retrieval", "zeroshot"), required=True)
    parser.add_argument("--run", type=Path, help="run folder of train.py (default: runs/clip1-MODEL)")
    parser.add_argument("--model", choices=("hsenet", "reaf"), help="whose default run folder (default: hsenet)")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="two or more evaluated runs: their scores, and differences from the first with bootstrap intervals",
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: best")
    parser.add_argument("--data", type=Path, help="prepared data set (default: the run's own)")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="default: validation")
    parser.add_argument("--out", type=Path, help="folder of the results (default: RUN/eval)")
    parser.add_argument("--batch-size", type=int, help="default: 16")
    parser.add_argument("--workers", type=int, help="processes that read volumes (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    group = parser.add_argument_group("pictures")
    group.add_argument("--figures", type=Path, metavar="DIR", help="write ROC or recall curves and saliency there")
    group.add_argument("--figure-volumes", type=int, metavar="N", help="saliency of the first N volumes (default: 4)")
    group = parser.add_argument_group("zero-shot classification")
    group.add_argument("--prompts", help="volume, organ or a json file (default: volume)")
    group.add_argument("--label-set", choices=LABEL_SETS, help="how label columns become classes (default: ct-rate)")
    group.add_argument("--labels", type=Path, metavar="CSV", help="label table (default: the manifest's labels)")
    group.add_argument("--bootstrap", type=int, metavar="N", help="resamples of the intervals; 0: none (default: 1000)")
    group.add_argument("--seed", type=int, help="of the bootstrap (default: 0)")
    args = parser.parse_args(argv)
    if args.compare:
        foreign, where = ONE_RUN | ZEROSHOT, "the evaluation of one run, not to --compare"
    else:
        foreign = {} if args.task == "zeroshot" else ZEROSHOT | BOOTSTRAP
        where = f"--task zeroshot, not {args.task}"
    if given := [name for name in foreign if getattr(args, name) is not None]:
        raise InputError(f"--{given[0].replace('_', '-')}: belongs to {where}")
    for name, value in (ONE_RUN | ZEROSHOT | BOOTSTRAP).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.run = args.run or Path(f"runs/clip1-{args.model}")
    if args.compare and len(args.compare) < 2:
        raise InputError("--compare: expected two or more runs")
    for name, least in (("batch_size", 1), ("workers", 0), ("figure_volumes", 0), ("bootstrap", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    for name in ("out", "figures"):  # said now, not after hours
        folder = getattr(args, name)
        nearest = next((p for p in (folder, *folder.parents) if p.exists()), None) if folder else None
        if nearest and not nearest.is_dir():
            raise InputError(f"--{name} {nearest}: is a file; expected a folder to write into")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.compare:
        results = comparison.compare(args.task, args.compare, args.bootstrap, args.seed)
        comparison.print_comparison(results, args.compare)
        if args.out:
            write_json(args.out / f"comparison_{args.task}.json", {"runs": list(map(str, args.compare)), **results})
        return 0
    if args.figures:
        figures.new_figure(1, 1)  # a missing matplotlib is said now, too
    ranks = distributed.start(args.device)
    try:
        run = load_dual_encoder(args.run, args.checkpoint)
        manifest = load_manifest(args.data or run.data)
        manifest.require(run.recipe, str(args.run))
        if run.guided:
            manifest.require_slices(run.slices, str(args.run))
        manifest.check([args.split], slices=run.guided, reports=args.task == "retrieval")
        dataset = CTReportDataset(
            manifest,
            args.split,
            run.tokenizer,
            run.config.max_text,
            style=run.config.model,
            slices=run.guided,
        )
        run.model.to(ranks.device)
        {"retrieval": retrieval, "zeroshot": classify}[args.task](args, run, manifest, dataset, ranks)
        if args.figures and ranks.main:
            saliency_figures(args, run, manifest, ranks.device)
    finally:
        distributed.stop()
    return 0


def retrieval(
    args: argparse.Namespace,
    run: DualEncoderRun,
    manifest: Manifest,
    dataset: CTReportDataset,
    ranks: distributed.Ranks,
) -> None:
    image, text = embed(run.model, dataset, ranks, args.batch_size, workers=args.workers, progress=True)
    if not ranks.main:
        return
    entries, device = manifest.entries(args.split), ranks.device
    names = sorted({entry["scan"] for entry in entries})
    number = {name: i for i, name in enumerate(names)}
    scans = torch.tensor([number[entry["scan"]] for entry in entries], device=device)
    on_device = image.to(device), text.to(device)
    exact = cross_retrieval(*on_device)
    per_scan = cross_retrieval_per_scan(*on_device, scans)
    overlap = None
    if all(entry["labels"] is not None for entry in entries):
        labels = torch.tensor([entry["labels"] for entry in entries], device=device)
        overlap = label_overlap(on_device[0], labels, scans)
    results = {
        "n": len(entries),
        "scans": len(names),
        "reports_sha256": comparison.fingerprint(entries),
        "split": args.split,
        "data": str(manifest.folder),
        "checkpoint": str(run.checkpoint),
        **exact.tables,
        "per_scan": per_scan.tables,
        "volume_to_volume": overlap,
    }
    out = args.out or args.run / "eval"
    write_json(out / "retrieval.json", results)
    write_queries(out / "retrieval_queries.csv", entries, exact, per_scan)
    with atomic_write(out / "embeddings.safetensors", "wb") as file:
        file.write(save({"image": image, "text": text}, {"ids": "\n".join(entry["id"] for entry in entries)}))
    print_table(results, exact, per_scan)
    print(f"written to {out}")
    if args.figures:
        figures.recall_figure(args.figures / "recall.png", exact.ranks)


def classify(
    args: argparse.Namespace,
    run: DualEncoderRun,
    manifest: Manifest,
    dataset: CTReportDataset,
    ranks: distributed.Ranks,
) -> None:
    entries = manifest.entries(args.split)
    ids = [entry["id"] for entry in entries]
    table = read_label_table(args.labels) if args.labels else manifest_labels(manifest, args.split)
    label_set = load_label_set(args.label_set)
    task = zeroshot.define_task(zeroshot.load_prompts(args.prompts), label_set, table, ids)
    image, _ = embed(
        run.model, dataset, ranks, args.batch_size, workers=args.workers, progress=True, reports=False
    )
    if not ranks.main:
        return
    scores = zeroshot.score(run, image, task)
    report = classification_report(task.labels, scores, task.names, task.means, args.bootstrap, args.seed)
    results = {
        "n": len(ids),
        "reports_sha256": comparison.fingerprint(entries),
        "split": args.split,
        "data": str(manifest.folder),
        "checkpoint": str(run.checkpoint),
        "labels": {"table": str(table.source), "set": args.label_set},
        "prompts": {"source": args.prompts, "texts": task.texts},
        "bootstrap": {"resamples": args.bootstrap, "seed": args.seed},
        **report,
        "notes": task.notes,
    }
    out = args.out or args.run / "eval"
    write_json(out / "zeroshot.json", results)
    zeroshot.write_scores(out / "zeroshot_scores.csv", ids, task, scores)
    zeroshot.print_table(results)
    print(f"written to {out}")
    if args.figures:
        figures.roc_figure(args.figures / "roc.png", task.labels, scores, task.names)


@torch.inference_mode()
def saliency_figures(
    args: argparse.Namespace, run: DualEncoderRun, manifest: Manifest, device: torch.device
) -> None:
    vision, recipe = run.model.vision, manifest.recipe
    entries = manifest.entries(args.split)[: args.figure_volumes]
    for entry in entries:
        volume = read_prepared(manifest, entry)
        found = vision.salient_regions(volume[None].to(device)) if hasattr(vision, "salient_regions") else {}
        if not found:
            print("saliency: this encoder chooses no regions, so there are no pictures of them")
            break
        regions = {name: r[0] for name, r in found.items()}
        figures.saliency_figure(
            args.figures / f"saliency_{entry['id']}.png",
            volume[0],
            regions,
            entry["id"],
            recipe.axes,
            recipe.spacing if recipe.fit == "crop" else None,
        )
    print(f"pictures in {args.figures}")


def write_queries(path: Path, entries: list[dict], exact: CrossRetrieval, per_scan: CrossRetrieval) -> None:
    """One row a volume: the rank of its report's volume, of its own report, and the same among scans."""
    columns = {
        f"{direction}{suffix}": dict(
            zip(table.query_rows[direction].tolist(), table.ranks[direction].tolist(), strict=True)
        )
        for suffix, table in (("_rank", exact), ("_rank_per_scan", per_scan))
        for direction in table.ranks
    }
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(["id", "scan", *columns])
        # Per scan there is one report query a scan: the other reconstructions' cells are empty.
        writer.writerows(
            [e["id"], e["scan"], *(c.get(i, "") for c in columns.values())] for i, e in enumerate(entries)
        )


def print_table(results: dict, exact: CrossRetrieval, per_scan: CrossRetrieval) -> None:
    n, scans = results["n"], results["scans"]
    print(f"{n} volumes of {scans} scans; by chance R@5 is {min(1, 5 / n):.3f}")
    keys = list(exact.tables["report_to_volume"])
    print(f"{'retrieval':<34}" + "".join(f"{k:>12}" for k in keys))
    kinds = [("", exact)] + ([(", per scan", per_scan)] if scans < n else [])
    for suffix, found in kinds:
        for direction, table in found.tables.items():
            cells = "".join(f"{v:>12.3f}" if k.startswith("R@") else f"{v:>12.1f}" for k, v in table.items())
            print(f"{direction.replace('_', ' ') + suffix:<34}{cells}")
    overlap = results["volume_to_volume"]
    if overlap is None:
        print("volume to volume: left out, some volumes have no labels")
        return
    ks = list(overlap["per_k"])
    print(f"{'volume to volume':<34}" + "".join(f"{'k=' + k:>12}" for k in ks))
    for key, name in OVERLAPS.items():
        print(
            f"{name:<34}"
            + "".join(f"{'-' if v is None else format(v, '.3f'):>12}" for v in overlap[key].values())
        )


if __name__ == "__main__":
    run_script(main)
