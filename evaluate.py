"""Evaluate a trained run.

    python evaluate.py --task retrieval                            # runs/clip1-hsenet on its validation split
    python evaluate.py --task retrieval --run RUN --data FOLDER    # any run, any prepared data set
    python evaluate.py --task retrieval --protocol first_nohead    # among fewer volumes, docs/evaluation.md
    python evaluate.py --task zeroshot --prompts organ             # CT-RATE's classes, with another template
    python evaluate.py --task probe                                # classes, by a probe of the frozen encoder
    python evaluate.py --task retrieval --compare RUN RUN          # evaluated runs side by side
    python evaluate.py --task mrg                                  # reports of runs/mrg-hsenet
    python evaluate.py --task mrg --predictions FILE --data FOLDER # reports made elsewhere, no run
    python evaluate.py --task vqa --questions location             # answers of runs/vqa-hsenet

Prints a table and writes RUN/eval/: retrieval.json, retrieval_queries.csv; zeroshot.json,
zeroshot_scores.csv; probe.json, probe_scores.csv, probe.safetensors; mrg.json, mrg.csv; vqa.json, vqa.csv.
Vectors are computed once and kept there: embeddings_SPLIT.safetensors, scan_vectors_SPLIT.safetensors. An
interrupted mrg or vqa goes on where it was when started again, with any number of processes. With --figures
DIR also pictures (needs matplotlib).
"""

from reaf_hsenet.script import start_script

if __name__ == "__main__":
    start_script()  # what is imported next takes seconds

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from reaf_hsenet import distributed
from reaf_hsenet.config import CONTRASTIVE, GENERATION, LANGUAGE
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import read_prepared
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.questions import read_templates
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import comparison, figures, language_scores, probe, retrieval, zeroshot
from reaf_hsenet.evaluate.command import Command, parse
from reaf_hsenet.evaluate.embeddings import split_embeddings
from reaf_hsenet.evaluate.language_evaluation import (
    AnsweredRows,
    Asked,
    asked_rows,
    fingerprint,
    generate_answers,
    report_rows,
)
from reaf_hsenet.evaluate.language_scores import Readers, load_readers
from reaf_hsenet.evaluate.predictions import read_predictions, write_vlm3d
from reaf_hsenet.evaluate.report_baselines import baseline_reports, baseline_splits
from reaf_hsenet.evaluate.show import write_rows
from reaf_hsenet.files import folder_lock, write_json
from reaf_hsenet.runs.answering import answer_length
from reaf_hsenet.runs.checkpoint import Choice
from reaf_hsenet.runs.generation import PRECISIONS
from reaf_hsenet.runs.trained import Trained, load_trained
from reaf_hsenet.script import run_script

TASKS = {"retrieval": retrieval, "zeroshot": zeroshot, "probe": probe}  # of a dual encoder


def main(argv: list[str]) -> int:
    command = parse(argv, __doc__)
    if command.compare:
        compare(command)
        return 0
    if command.figures:
        figures.new_figure(1, 1)  # a missing matplotlib is said now, too
    ranks = distributed.start(command.device, hours=24)
    try:
        if command.task in TASKS:
            evaluate_dual_encoder(command, ranks)
        elif command.predictions:
            evaluate_predictions(command, ranks)
        else:
            evaluate_language(command, ranks)
    finally:
        distributed.stop()
    return 0


def compare(command: Command) -> None:
    results = comparison.compare(command.task, command.compare, command.bootstrap, command.seed)
    runs = [comparison.evaluated_run(folder, command.task) for folder in command.compare]
    comparison.print_comparison(results, runs)
    if command.out:
        compared = {"runs": list(map(str, command.compare)), "evaluated": runs}
        write_json(command.out / f"comparison_{command.task}.json", {**compared, **results})


def evaluate_dual_encoder(command: Command, ranks: distributed.Ranks) -> None:
    # Load the run, the data set that it takes, and what is scored, by which labels.
    run = load_trained(command.run, command.checkpoint, CONTRASTIVE, text_model=command.text_model)
    say_checkpoint(command, run, ranks)
    splits = [command.split, "train"] if command.task == "probe" else [command.split]
    manifest = find_data(command, run, splits, reports=command.task == "retrieval")
    task = TASKS[command.task]
    wanted = task.define(command, manifest)
    run.model.to(ranks.device)

    # Embed the splits on all ranks, or take what an earlier evaluation has stored.
    out = command.results
    how = {"folder": out, "batch": command.batch_size, "workers": command.workers, "anew": command.anew}
    vectors = {split: split_embeddings(run, manifest, split, ranks, **how) for split in splits}

    # Score, write and print on the first rank.
    if not ranks.main:
        return
    found = task.measure(command, run, manifest, wanted, vectors)
    entries = manifest.entries(command.split)
    results = {
        "n": len(entries),
        "reports_sha256": comparison.fingerprint(entries),
        "split": command.split,
        "data": str(manifest.folder),
        **run.checkpoint.record(),
        "bootstrap": {"resamples": command.bootstrap, "seed": command.seed},
        **found.json(),
    }
    write_json(out / f"{command.task}.json", results)
    write_rows(out / comparison.FILES[command.task], found.rows, run.checkpoint)
    for name, write in found.files.items():
        write(out / name)
    task.print_scores(results)
    print(f"written to {out}")
    if command.figures:
        for name, draw in found.pictures.items():
            draw(command.figures / name)
        saliency_figures(command, run, manifest, ranks.device)


def evaluate_language(command: Command, ranks: distributed.Ranks) -> None:
    # Load the run, the data set that it takes, and what is asked about its volumes.
    names = {"decoder": command.decoder, "encoders": command.encoders, "text_model": command.text_model}
    run = load_trained(command.run, command.checkpoint, LANGUAGE, PRECISIONS.get(command.precision), **names)
    say_checkpoint(command, run, ranks)
    reports = command.task == "mrg"
    manifest = find_data(command, run, [command.split], reports)
    trained_on = run.train.get("questions")
    kind = "mrg" if reports else command.questions or trained_on or "location"
    prompt = (command.prompt or GENERATION["mrg"]["prompt"]) if reports else None
    templates = read_templates(command.templates, kind) if command.templates else None
    if templates is None and kind == trained_on and run.train.get("templates"):
        templates = tuple(run.train["templates"])
    data = LanguageDataset(
        manifest,
        command.split,
        kind,
        tokenizer=run.tokenizer,
        image_tokens=run.model.visual_tokens,
        max_text=run.config.max_text,
        slices=run.guided,
        prompt=prompt,
        templates=templates,
    )
    everything = asked_rows(data)
    rows = everything[: command.limit]
    asked = sorted({row.question for row in rows})
    new_tokens = answer_length(run.model, run.tokenizer, asked, command.task, command.new_tokens)
    head = {
        "checkpoint_sha256": run.sha256(),
        "base_sha256": run.base_sha256(),
        "split": command.split,
        "questions": kind,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "precision": str(run.model.decoder.embed_tokens.weight.dtype),
        "rows_sha256": fingerprint(everything, data.entries),
    }
    readers = load_readers(command, manifest, ranks)
    compared = baseline_splits(command, run, manifest, ranks)
    run.place(ranks.device, command.compile)

    # Generate, and see the training scans for the baselines, on all ranks.
    out, how = command.results, {"batch": command.batch_size, "workers": command.workers}
    with folder_lock(out) if ranks.main else nullcontext():
        kept = AnsweredRows(out, command.task, head, ranks, command.anew)
        texts = generate_answers(run, data, rows, kept, new_tokens, ranks=ranks, **how)
        vectors = [split_embeddings(run, manifest, split, ranks, folder=out, **how) for split in compared]

        # Score, write and print on the first rank.
        if not ranks.main:
            return
        images = [found["image"] for found in vectors]
        others = baseline_reports(manifest, *images, readers.labeler) if images else {}
        head |= {"data": str(manifest.folder), **run.checkpoint.record()}
        write_language(
            command,
            manifest,
            rows,
            texts,
            readers=readers,
            head=head,
            source=run.checkpoint,
            baselines=others,
        )
        kept.finish(len(rows))


def evaluate_predictions(command: Command, ranks: distributed.Ranks) -> None:
    """Score reports that were made elsewhere; of the data set only texts and labels are read."""
    if not ranks.main:
        return
    manifest, source = load_manifest(command.data), command.predictions
    manifest.check_reports(command.split)
    rows = report_rows(manifest, command.split)
    texts, labels = read_predictions(source, [row.id for row in rows])
    readers = load_readers(command, manifest, ranks)
    head = {"predictions": str(source), "split": command.split, "data": str(manifest.folder)}
    write_language(command, manifest, rows, texts, readers=readers, head=head, source=source, labels=labels)
    print("the baselines by a run's embeddings need a run")


def write_language(
    command: Command,
    manifest: Manifest,
    rows: list[Asked],
    texts: list[str],
    readers: Readers,
    head: dict,
    source: Choice | Path,
    labels: np.ndarray | None = None,
    baselines: dict[str, list[str]] | None = None,
) -> None:
    """Score texts, write and print. head: of the json. source: the checkpoint or file that made the texts.

    labels, baselines: of reports, as of report_scores.
    """
    out, reports = command.results, command.task == "mrg"
    if reports:
        truth = language_scores.wanted_labels(command, manifest, rows)
        if labels is None and readers.labeler:
            labels = readers.labeler(texts)
        usual = language_scores.usual_report(manifest)
        scores, table = language_scores.report_scores(
            texts, rows, readers, truth=truth, labels=labels, baselines=baselines, usual=usual
        )
    else:
        scores, table = language_scores.answer_scores(texts, rows, readers.bert)
    write_json(out / f"{command.task}.json", {"n": len(rows), **head, **scores})
    write_rows(out / f"{command.task}.csv", table, source)
    if command.format:
        write_vlm3d(out / "predictions.json", [row.id for row in rows], texts, labels)
    (language_scores.print_reports if reports else language_scores.print_answers)(scores)
    print(f"written to {out}")


def say_checkpoint(command: Command, run: Trained, ranks: distributed.Ranks) -> None:
    """Print the notes of published weights, and which checkpoint is evaluated."""
    if not ranks.main:
        return
    for note in run.origin.get("notes", ()):
        print(note)
    chosen = run.checkpoint.chosen_on == command.split
    warning = ", chosen on this very split: its scores are optimistic" if chosen else ""
    print(f"{command.run}: checkpoint {run.checkpoint}{warning}")


def find_data(command: Command, run: Trained, splits: list[str], reports: bool) -> Manifest:
    """Load the data set, checked to be what the run's model takes."""
    if not (command.data or run.data):
        raise InputError(f"--data: {command.run} has no data set of its own; name a prepared one")
    manifest = load_manifest(command.data or run.data)
    manifest.require(run.recipe, str(command.run))
    if run.guided:
        manifest.require_slices(run.slices, str(command.run))
    manifest.check(splits, slices=run.guided, reports=reports)
    if command.split == "development" and run.training_sha256 != manifest.training_sha256():
        print(
            f"{command.run}: was trained on other volumes than this training split, perhaps on some of these"
        )
    return manifest


@torch.inference_mode()
def saliency_figures(command: Command, run: Trained, manifest: Manifest, device: torch.device) -> None:
    vision, recipe = run.model.vision, manifest.recipe
    entries = manifest.entries(command.split)[: command.figure_volumes]
    for entry in entries:
        volume = read_prepared(manifest, entry)
        found = vision.salient_regions(volume[None].to(device)) if hasattr(vision, "salient_regions") else {}
        if not found:
            print("saliency: this encoder chooses no regions, so there are no pictures of them")
            break
        regions, name = {name: r[0] for name, r in found.items()}, entry["id"]
        spacing = recipe.spacing if recipe.fit == "crop" else None
        path = command.figures / f"saliency_{name}.png"
        figures.saliency_figure(path, volume[0], regions, name, recipe.axes, spacing)
    print(f"pictures in {command.figures}")


if __name__ == "__main__":
    run_script(main)
