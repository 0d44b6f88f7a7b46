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

import torch

from reaf_hsenet import distributed
from reaf_hsenet.config import CONTRASTIVE, GENERATION, LANGUAGE
from reaf_hsenet.data.labels import label_tables, load_label_set
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import read_prepared
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.questions import read_templates
from reaf_hsenet.data.text import clean_report
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
)
from reaf_hsenet.evaluate.predictions import read_predictions, write_vlm3d
from reaf_hsenet.evaluate.protocols import choose_protocols
from reaf_hsenet.evaluate.report_baselines import baseline_reports, scan_vectors
from reaf_hsenet.files import folder_lock, write_json
from reaf_hsenet.metrics.bertscore import load_bert
from reaf_hsenet.metrics.classification import classification_report
from reaf_hsenet.metrics.clinical import load_classifier, phantom_labels
from reaf_hsenet.runs.answering import answer_length
from reaf_hsenet.runs.generation import PRECISIONS
from reaf_hsenet.runs.trained import Trained, load_trained
from reaf_hsenet.script import run_script


def main(argv: list[str]) -> int:
    command = parse(argv, __doc__)
    if command.compare:
        compare(command)
        return 0
    if command.figures:
        figures.new_figure(1, 1)  # a missing matplotlib is said now, too
    ranks = distributed.start(command.device, hours=24)
    try:
        if command.predictions:
            evaluate_predictions(command, ranks)
        else:
            (evaluate_language if command.task in LANGUAGE else evaluate_dual_encoder)(command, ranks)
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
    # Load the run, and the data set that it takes.
    run = load_trained(command.run, command.checkpoint, CONTRASTIVE, text_model=command.text_model)
    say_checkpoint(command, run, ranks)
    splits = [command.split, "train"] if command.task == "probe" else [command.split]
    manifest = find_data(command, run, splits, reports=command.task == "retrieval")
    task = {"retrieval": retrieval_task, "zeroshot": zeroshot_tasks, "probe": probe_tasks}[command.task](
        command, manifest
    )
    run.model.to(ranks.device)

    # Embed the splits on all ranks, or take what an earlier evaluation has stored; score on the first.
    found = {
        split: split_embeddings(
            run,
            manifest,
            split,
            ranks,
            folder=command.results,
            batch_size=command.batch_size,
            workers=command.workers,
            anew=command.anew,
        )
        for split in splits
    }
    if not ranks.main:
        return
    vectors = found[command.split]
    if command.task == "retrieval":
        write_retrieval(command, run, manifest, (vectors["image"], vectors["text"]), task, ranks.device)
    elif command.task == "zeroshot":
        write_zeroshot(command, run, manifest, vectors["image"], task)
    else:
        write_probe(command, run, manifest, vectors["image"], found["train"]["image"], task)
    if command.figures:
        saliency_figures(command, run, manifest, ranks.device)


def retrieval_task(command: Command, manifest: Manifest) -> tuple[dict, dict, retrieval.Labels]:
    """Return the rows of each protocol, why others are left out, and the labels that volumes may share."""
    labels = retrieval.read_labels(command.labels, manifest, command.split, command.label_set)
    return *choose_protocols(command.protocol, manifest, command.split), labels


def write_retrieval(
    command: Command,
    run: Trained,
    manifest: Manifest,
    pair: tuple[torch.Tensor, torch.Tensor],
    task: tuple[dict, dict, retrieval.Labels],
    device: torch.device,
) -> None:
    entries, out = manifest.entries(command.split), command.results
    (image, text), (protocols, left_out, labels) = pair, task
    drawn = {"resamples": command.bootstrap, "seed": command.seed}
    scores, exact, per_scan = retrieval.score(
        image.to(device), text.to(device), entries, protocols, labels, **drawn
    )
    results = {**evaluated(command, run, manifest), "bootstrap": drawn, **scores}
    results["protocols_left_out"] = left_out
    write_json(out / "retrieval.json", results)
    retrieval.write_queries(out / "retrieval_queries.csv", entries, exact, per_scan, run.checkpoint)
    retrieval.print_scores(results)
    print(f"written to {out}")
    if command.figures:
        figures.recall_figure(command.figures / "recall.png", exact.ranks)


def zeroshot_tasks(command: Command, manifest: Manifest) -> list[zeroshot.Task]:
    """Match the prompts with the labels of --labels, one or two tables, or of the manifest."""
    prompts, label_set = zeroshot.load_prompts(command.prompts), load_label_set(command.label_set)
    ids = [entry["id"] for entry in manifest.entries(command.split)]
    tables = label_tables(command.labels, manifest, command.split)
    return [zeroshot.define_task(prompts, label_set, table, ids) for table in tables]


def write_zeroshot(
    command: Command,
    run: Trained,
    manifest: Manifest,
    image: torch.Tensor,
    tasks: list[zeroshot.Task],
) -> None:
    ids = [entry["id"] for entry in manifest.entries(command.split)]
    out = command.results
    scored = [zeroshot.score(run, image, task) for task in tasks]
    by_table = [
        {
            "labels": {"table": str(task.source), "set": command.label_set},
            **classification_report(
                task.labels, found, task.names, task.means, command.bootstrap, command.seed
            ),
            "notes": task.notes,
        }
        for task, found in zip(tasks, scored, strict=True)
    ]
    task, scores = tasks[0], scored[0]
    results = {
        **evaluated(command, run, manifest),
        "prompts": {"source": command.prompts, "texts": task.texts},
        "bootstrap": {"resamples": command.bootstrap, "seed": command.seed},
        **by_table[0],
        **({"second_labels": by_table[1]} if by_table[1:] else {}),
    }
    write_json(out / "zeroshot.json", results)
    zeroshot.write_scores(out / "zeroshot_scores.csv", ids, task.names, task.labels, scores, run.checkpoint)
    zeroshot.print_scores(results)
    print(f"written to {out}")
    if command.figures:
        figures.roc_figure(command.figures / "roc.png", task.labels, scores, task.names)


def probe_tasks(command: Command, manifest: Manifest) -> list[probe.Task]:
    """Match the training volumes and those to score with the labels of --labels, or of the manifest."""
    label_set = load_label_set(command.label_set)
    train, scored = (label_tables(command.labels, manifest, split) for split in ("train", command.split))
    pairs = zip(train, scored, strict=True)
    return [probe.define_task(*pair, label_set, manifest, command.split) for pair in pairs]


def write_probe(
    command: Command,
    run: Trained,
    manifest: Manifest,
    image: torch.Tensor,
    train_image: torch.Tensor,
    tasks: list[probe.Task],
) -> None:
    ids = [entry["id"] for entry in manifest.entries(command.split)]
    out = command.results
    scored = [probe.score(task, train_image, image, command.bootstrap, command.seed) for task in tasks]
    by_table = [
        {"labels": {"table": str(task.source), "set": command.label_set}, **found, "notes": task.notes}
        for task, (_, _, found) in zip(tasks, scored, strict=True)
    ]
    results = {
        **evaluated(command, run, manifest),
        "bootstrap": {"resamples": command.bootstrap, "seed": command.seed},
        **by_table[0],
        **({"second_labels": by_table[1]} if by_table[1:] else {}),
    }

    # The probe of the first table is stored, for infer.py classify.
    task, (fitted, scores, _) = tasks[0], scored[0]
    probe.StoredProbe(fitted, task.names, run.sha256()).write(out / probe.FILE)
    write_json(out / "probe.json", results)
    zeroshot.write_scores(out / "probe_scores.csv", ids, task.names, task.labels, scores, run.checkpoint)
    probe.print_scores(results)
    print(f"written to {out}")
    if command.figures:
        before = fitted.logits(image).double().sigmoid().numpy()
        curves = {"before calibration": before, "after": scores}
        figures.reliability_figure(command.figures / "reliability.png", task.labels, curves)
        figures.roc_figure(command.figures / "roc.png", task.labels, scores, task.names)


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
        run.tokenizer,
        run.model.visual_tokens,
        run.config.max_text,
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
    readers = load_readers(command, manifest, ranks) if ranks.main else {}  # the other ranks score nothing
    compared = baseline_splits(command, run, manifest, ranks)
    run.place(ranks.device, command.compile)

    # Generate on all ranks, score and write on the first.
    out = command.results
    with folder_lock(out) if ranks.main else nullcontext():
        kept = AnsweredRows(out, command.task, head, ranks, command.anew)
        texts = generate_answers(
            run, data, rows, kept, new_tokens, batch=command.batch_size, ranks=ranks, workers=command.workers
        )
        vectors = [
            scan_vectors(run, manifest, split, ranks, out, command.batch_size, command.workers)
            for split in compared
        ]
        if not ranks.main:
            return
        if reports:
            others = baseline_reports(manifest, *vectors, readers["labeler"]) if vectors else None
            scores, table = score_reports(command, manifest, texts, rows, readers, baselines=others)
        else:
            scores, table = language_scores.answer_scores(texts, rows, readers["bert"])
        where = {"data": str(manifest.folder), **run.checkpoint.record()}
        write_json(out / f"{command.task}.json", {"n": len(rows), **head, **where, **scores})
        language_scores.write_rows(out / f"{command.task}.csv", table, run.checkpoint)
        kept.finish(len(rows))
    (language_scores.print_reports if reports else language_scores.print_answers)(scores)
    print(f"written to {out}")


def evaluate_predictions(command: Command, ranks: distributed.Ranks) -> None:
    """Score reports that were made elsewhere; of the data set only texts and labels are read."""
    if not ranks.main:
        return
    manifest = load_manifest(command.data)
    manifest.check_reports(command.split)
    entries = manifest.entries(command.split)
    rows = [Asked(entry["id"], i, "", clean_report(entry["text"])) for i, entry in enumerate(entries)]
    texts, labels = read_predictions(command.predictions, [row.id for row in rows])
    readers, out = load_readers(command, manifest, ranks), command.results
    scores, table = score_reports(command, manifest, texts, rows, readers, labels=labels)
    head = {"n": len(rows), "predictions": str(command.predictions), "split": command.split}
    write_json(out / "mrg.json", {**head, "data": str(manifest.folder), **scores})
    language_scores.write_rows(out / "mrg.csv", table, command.predictions)
    language_scores.print_reports(scores)
    print(f"written to {out}; the baselines by a run's embeddings need a run")


def load_readers(command: Command, manifest: Manifest, ranks: distributed.Ranks) -> dict:
    """Return what reads texts to score them, by the names of report_scores."""
    bert, phantoms = None, command.task == "mrg" and language_scores.are_phantoms(manifest)
    labeler = phantom_labels if phantoms else None
    if command.bertscore:
        bert = load_bert(command.bertscore, command.bertscore_layer, ranks.device)
    if command.classifier:
        labeler = load_classifier(command.classifier, ranks.device)
    return {"bert": bert, "labeler": labeler, "phantoms": phantoms}


def baseline_splits(
    command: Command, run: Trained, manifest: Manifest, ranks: distributed.Ranks
) -> tuple[str, ...]:
    """Return the splits whose scans the baselines by embeddings look at; none where these are left out."""
    if command.task != "mrg":
        return ()
    reasons = {
        "--no-baselines": not command.baselines,
        "--limit": command.limit is not None,
        "the training split is what is evaluated": command.split == "train",
        "there is no training split": not manifest.splits.get("train"),
    }
    if why := next((reason for reason, holds in reasons.items() if holds), None):
        if ranks.main:
            print(f"the baselines by the run's embeddings are left out: {why}")
        return ()
    try:
        manifest.check(["train"], slices=run.guided)
    except InputError as error:
        raise InputError(f"{error}; or do without training scans: --no-baselines") from error
    return "train", command.split


def score_reports(
    command: Command, manifest: Manifest, texts: list[str], rows: list[Asked], readers: dict, **more
) -> tuple[dict, list[dict]]:
    """Score reports and write them as --format says. more: of report_scores."""
    entries, labeler = manifest.entries(command.split), readers["labeler"]
    truth = language_scores.true_labels(manifest, [entries[row.entry] for row in rows])
    if labeler and more.get("labels") is None:
        more["labels"] = labeler(texts)
    scores, table = language_scores.report_scores(
        texts, rows, truth, places=command.places, **readers, **more
    )
    scores["labeler"] = str(command.classifier or "phantoms") if labeler else None
    if command.format:
        path = command.results / "predictions.json"
        write_vlm3d(path, [row.id for row in rows], texts, more.get("labels"))
    return scores, table


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


def evaluated(command: Command, run: Trained, manifest: Manifest) -> dict:
    """Return the entries of a results file that say what was evaluated."""
    entries = manifest.entries(command.split)
    return {
        "n": len(entries),
        "reports_sha256": comparison.fingerprint(entries),
        "split": command.split,
        "data": str(manifest.folder),
        **run.checkpoint.record(),
    }


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
