"""Evaluate a trained run.

    python evaluate.py --task retrieval                            # runs/clip1-hsenet on its validation split
    python evaluate.py --task retrieval --run RUN --data FOLDER    # any run, any prepared data set
    python evaluate.py --task zeroshot --prompts organ             # CT-RATE's classes, with another template
    python evaluate.py --task retrieval --compare RUN RUN          # evaluated runs side by side
    python evaluate.py --task mrg                                  # reports of runs/mrg-hsenet
    python evaluate.py --task vqa --questions location             # answers of runs/vqa-hsenet

Prints a table and writes RUN/eval/: retrieval.json, retrieval_queries.csv, embeddings.safetensors;
zeroshot.json, zeroshot_scores.csv; mrg.json, mrg.csv; vqa.json, vqa.csv. An interrupted mrg or vqa goes on
where it was when started again, with any number of processes. With --figures DIR also pictures (needs
matplotlib).
"""

from reaf_hsenet.script import start_script

if __name__ == "__main__":
    start_script()  # what is imported next takes seconds

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save

from reaf_hsenet import distributed
from reaf_hsenet.config import GENERATION
from reaf_hsenet.data.labels import load_label_set, manifest_labels, read_label_table
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import CTReportDataset, read_prepared
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.questions import read_templates
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import comparison, figures, language_scores, retrieval, zeroshot
from reaf_hsenet.evaluate.evaluate_flags import LANGUAGE, parse
from reaf_hsenet.evaluate.language_evaluation import AnsweredRows, asked_rows, fingerprint, generate_answers
from reaf_hsenet.files import atomic_write, folder_lock, write_json
from reaf_hsenet.metrics.bertscore import load_bert
from reaf_hsenet.metrics.classification import classification_report
from reaf_hsenet.metrics.clinical import load_classifier, phantom_labels
from reaf_hsenet.runs.answering import answer_length
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.embedding import embed
from reaf_hsenet.runs.generation import PRECISIONS
from reaf_hsenet.runs.trained import DualEncoderRun, MllmRun, is_published, load_dual_encoder, load_mllm
from reaf_hsenet.script import run_script


def main(argv: list[str]) -> int:
    args = parse(argv, __doc__)
    if args.compare:
        compare(args)
        return 0
    if args.figures:
        figures.new_figure(1, 1)  # a missing matplotlib is said now, too
    ranks = distributed.start(args.device, hours=24)
    try:
        (evaluate_language if args.task in LANGUAGE else evaluate_dual_encoder)(args, ranks)
    finally:
        distributed.stop()
    return 0


def compare(args: argparse.Namespace) -> None:
    results = comparison.compare(args.task, args.compare, args.bootstrap, args.seed)
    runs = [comparison.evaluated_run(folder, args.task) for folder in args.compare]
    comparison.print_comparison(results, runs)
    if args.out:
        compared = {"runs": list(map(str, args.compare)), "evaluated": runs}
        write_json(args.out / f"comparison_{args.task}.json", {**compared, **results})


def evaluate_dual_encoder(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    # Load the run, and the data set that it takes.
    run = load_dual_encoder(args.run, args.checkpoint, args.text_model)
    say_checkpoint(args, run, ranks)
    reports = args.task == "retrieval"
    manifest = find_data(args, run, reports)
    dataset = CTReportDataset(
        manifest,
        args.split,
        run.tokenizer,
        run.config.max_text,
        style=run.config.model,
        slices=run.guided,
    )
    task = None if reports else zeroshot_task(args, manifest)
    run.model.to(ranks.device)

    # Embed the split on all ranks, score it on the first.
    image, text = embed(
        run.model, dataset, ranks, args.batch_size, workers=args.workers, progress=True, reports=reports
    )
    if not ranks.main:
        return
    if reports:
        write_retrieval(args, run, manifest, image, text, ranks.device)
    else:
        write_zeroshot(args, run, manifest, image, task)
    if args.figures:
        saliency_figures(args, run, manifest, ranks.device)


def write_retrieval(
    args: argparse.Namespace,
    run: DualEncoderRun,
    manifest: Manifest,
    image: torch.Tensor,
    text: torch.Tensor,
    device: torch.device,
) -> None:
    entries, out = manifest.entries(args.split), results_folder(args)
    scores, exact, per_scan = retrieval.score(image.to(device), text.to(device), entries)
    results = {"n": len(entries), "scans": scores["scans"], **evaluated(args, run, manifest), **scores}
    write_json(out / "retrieval.json", results)
    retrieval.write_queries(out / "retrieval_queries.csv", entries, exact, per_scan, run.checkpoint)
    with atomic_write(out / "embeddings.safetensors", "wb") as file:
        ids = "\n".join(entry["id"] for entry in entries)
        file.write(save({"image": image, "text": text}, {"ids": ids, "model": run.sha256()}))
    retrieval.print_scores(results)
    print(f"written to {out}")
    if args.figures:
        figures.recall_figure(args.figures / "recall.png", exact.ranks)


def zeroshot_task(args: argparse.Namespace, manifest: Manifest) -> zeroshot.Task:
    """Match the prompts with the labels of --labels, or of the manifest."""
    known = [entry["id"] for entries in manifest.splits.values() for entry in entries]
    table = read_label_table(args.labels, known) if args.labels else manifest_labels(manifest, args.split)
    prompts, label_set = zeroshot.load_prompts(args.prompts), load_label_set(args.label_set)
    ids = [entry["id"] for entry in manifest.entries(args.split)]
    return zeroshot.define_task(prompts, label_set, table, ids)


def write_zeroshot(
    args: argparse.Namespace,
    run: DualEncoderRun,
    manifest: Manifest,
    image: torch.Tensor,
    task: zeroshot.Task,
) -> None:
    ids, out = [entry["id"] for entry in manifest.entries(args.split)], results_folder(args)
    scores = zeroshot.score(run, image, task)
    report = classification_report(task.labels, scores, task.names, task.means, args.bootstrap, args.seed)
    results = {
        **evaluated(args, run, manifest),
        "labels": {"table": str(task.source), "set": args.label_set},
        "prompts": {"source": args.prompts, "texts": task.texts},
        "bootstrap": {"resamples": args.bootstrap, "seed": args.seed},
        **report,
        "notes": task.notes,
    }
    write_json(out / "zeroshot.json", results)
    zeroshot.write_scores(out / "zeroshot_scores.csv", ids, task, scores, run.checkpoint)
    zeroshot.print_scores(results)
    print(f"written to {out}")
    if args.figures:
        figures.roc_figure(args.figures / "roc.png", task.labels, scores, task.names)


def evaluate_language(args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    # Load the run, the data set that it takes, and what is asked about its volumes.
    names = {"decoder": args.decoder, "encoders": args.encoders, "text_model": args.text_model}
    run = load_mllm(args.run, args.checkpoint, PRECISIONS.get(args.precision), **names)
    say_checkpoint(args, run, ranks)
    reports = args.task == "mrg"
    manifest = find_data(args, run, reports)
    trained_on = run.train.get("questions")
    kind = "mrg" if reports else args.questions or trained_on or "location"
    prompt = (args.prompt or GENERATION["mrg"]["prompt"]) if reports else None
    templates = read_templates(args.templates, kind) if args.templates else None
    if templates is None and kind == trained_on and run.train.get("templates"):
        templates = tuple(run.train["templates"])
    data = LanguageDataset(
        manifest,
        args.split,
        kind,
        run.tokenizer,
        run.model.visual_tokens,
        run.config.max_text,
        slices=run.guided,
        prompt=prompt,
        templates=templates,
    )
    everything = asked_rows(data)
    rows = everything[: args.limit]
    asked = sorted({row.question for row in rows})
    new_tokens = answer_length(run.model, run.tokenizer, asked, args.task, args.new_tokens)
    head = {
        "checkpoint_sha256": run.sha256(),
        "base_sha256": run.base_sha256(),
        "split": args.split,
        "questions": kind,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "precision": str(run.model.decoder.embed_tokens.weight.dtype),
        "rows_sha256": fingerprint(everything, data.entries),
    }
    bert = labeler = None
    if ranks.main:  # the other ranks score nothing
        bert = load_bert(args.bertscore, args.bertscore_layer, ranks.device) if args.bertscore else None
        labeler = load_classifier(args.classifier, ranks.device) if args.classifier else None
    run.place(ranks.device, args.compile)

    # Generate on all ranks, score and write on the first.
    out = results_folder(args)
    with folder_lock(out) if ranks.main else nullcontext():
        kept = AnsweredRows(out, args.task, head, ranks, args.anew)
        texts = generate_answers(
            run, data, rows, kept, new_tokens, batch=args.batch_size, ranks=ranks, workers=args.workers
        )
        if not ranks.main:
            return
        if reports:
            phantoms = language_scores.are_phantoms(manifest)
            truth = language_scores.true_labels(manifest, [data.entries[row.entry] for row in rows])
            labeler = labeler or (phantom_labels if phantoms else None)
            scores, table = language_scores.report_scores(texts, rows, truth, labeler, phantoms, bert)
            scores["labeler"] = str(args.classifier) if args.classifier else "phantoms" if phantoms else None
        else:
            scores, table = language_scores.answer_scores(texts, rows, bert)
        where = {"data": str(manifest.folder), **run.checkpoint.record()}
        write_json(out / f"{args.task}.json", {"n": len(rows), **head, **where, **scores})
        language_scores.write_rows(out / f"{args.task}.csv", table, run.checkpoint)
        kept.finish(len(rows))
    (language_scores.print_reports if reports else language_scores.print_answers)(scores)
    print(f"written to {out}")


def say_checkpoint(args: argparse.Namespace, run: DualEncoderRun | MllmRun, ranks: distributed.Ranks) -> None:
    """Print the notes of published weights, and which checkpoint is evaluated."""
    if not ranks.main:
        return
    for note in run.origin.get("notes", ()):
        print(note)
    chosen = run.checkpoint.chosen_on == args.split
    warning = ", chosen on this very split: its scores are optimistic" if chosen else ""
    print(f"{args.run}: checkpoint {run.checkpoint}{warning}")


def find_data(args: argparse.Namespace, run: DualEncoderRun | MllmRun, reports: bool) -> Manifest:
    """Load the data set, checked to be what the run's model takes."""
    if not (args.data or run.data):
        raise InputError(f"--data: {args.run} has no data set of its own; name a prepared one")
    manifest = load_manifest(args.data or run.data)
    manifest.require(run.recipe, str(args.run))
    if run.guided:
        manifest.require_slices(run.slices, str(args.run))
    manifest.check([args.split], slices=run.guided, reports=reports)
    return manifest


def results_folder(args: argparse.Namespace) -> Path:
    """Return --out; else the run's own folder, or for published weights one here."""
    if args.out:
        return args.out
    return Path("eval") / args.run.stem if is_published(args.run) else Run(args.run).folder / "eval"


def evaluated(args: argparse.Namespace, run: DualEncoderRun, manifest: Manifest) -> dict:
    """Return the entries of a results file that say what was evaluated."""
    entries = manifest.entries(args.split)
    return {
        "n": len(entries),
        "reports_sha256": comparison.fingerprint(entries),
        "split": args.split,
        "data": str(manifest.folder),
        **run.checkpoint.record(),
    }


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
        regions, name = {name: r[0] for name, r in found.items()}, entry["id"]
        spacing = recipe.spacing if recipe.fit == "crop" else None
        path = args.figures / f"saliency_{name}.png"
        figures.saliency_figure(path, volume[0], regions, name, recipe.axes, spacing)
    print(f"pictures in {args.figures}")


if __name__ == "__main__":
    run_script(main)
