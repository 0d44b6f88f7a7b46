"""Evaluate a trained run.

    python evaluate.py --task retrieval                                # runs/clip1-hsenet on its validation split
    python evaluate.py --task retrieval --run RUN --data FOLDER        # any run, any prepared data set

Prints a table and writes RUN/eval/: retrieval.json, retrieval_queries.csv, embeddings.safetensors.
"""

import argparse
import csv
from pathlib import Path

import torch
from safetensors.torch import save

from reaf_hsenet import distributed
from reaf_hsenet.data.loader import CTReportDataset
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.embedding import DualEncoderRun, embed, load_dual_encoder
from reaf_hsenet.errors import InputError, Parser, run_script
from reaf_hsenet.files import atomic_write, write_json
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


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--task", choices=("retrieval",), required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/clip1-hsenet"), help="run folder of train.py")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--data", type=Path, help="prepared data set (default: the run's own)")
    parser.add_argument("--split", default="validation", choices=("train", "validation"))
    parser.add_argument("--out", type=Path, help="folder of the results (default: RUN/eval)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.batch_size < 1 or args.workers < 0:
        raise InputError("--batch-size: expected 1 or more, --workers: 0 or more")
    ranks = distributed.start(args.device)
    try:
        run = load_dual_encoder(args.run, args.checkpoint)
        manifest = load_manifest(args.data or run.data)
        manifest.require(run.recipe, str(args.run))
        manifest.check([args.split])
        dataset = CTReportDataset(manifest, args.split, run.tokenizer, run.config.max_text)
        run.model.to(ranks.device)
        image, text = embed(run.model, dataset, ranks, args.batch_size, workers=args.workers, progress=True)
        if ranks.main:
            retrieval(args, run, manifest, image, text, ranks.device)
    finally:
        distributed.stop()
    return 0


def retrieval(
    args: argparse.Namespace,
    run: DualEncoderRun,
    manifest: Manifest,
    image: torch.Tensor,
    text: torch.Tensor,
    device: torch.device,
) -> None:
    entries = manifest.entries(args.split)
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
