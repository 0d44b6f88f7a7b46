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

from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save

from reaf_hsenet import distributed
from reaf_hsenet.config import CONTRASTIVE, GENERATION, LANGUAGE
from reaf_hsenet.data.labels import load_label_set, manifest_labels, read_label_table
from reaf_hsenet.data.language_loader import LanguageDataset
from reaf_hsenet.data.loader import CTReportDataset, read_prepared
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.questions import read_templates
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import comparison, figures, language_scores, zeroshot
from reaf_hsenet.evaluate.command import Command, parse
from reaf_hsenet.evaluate.language_evaluation import asked_rows, fingerprint, generate_answers
from reaf_hsenet.evaluate.retrieval_results import print_table, write_queries
from reaf_hsenet.files import atomic_write, folder_lock, write_json
from reaf_hsenet.metrics.bertscore import load_bert
from reaf_hsenet.metrics.classification import classification_report
from reaf_hsenet.metrics.clinical import load_classifier, phantom_labels
from reaf_hsenet.metrics.retrieval import cross_retrieval, cross_retrieval_per_scan, label_overlap
from reaf_hsenet.runs.answering import check_context, usual_new_tokens
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.embedding import embed
from reaf_hsenet.runs.trained import Trained, is_published, load_trained
from reaf_hsenet.script import run_script

PRECISIONS = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str]) -> int:
    command = parse(argv, __doc__)
    if command.compare:
        results = comparison.compare(command.task, command.compare, command.bootstrap, command.seed)
        runs = [comparison.evaluated_run(folder, command.task) for folder in command.compare]
        comparison.print_comparison(results, runs)
        if command.out:
            write_json(
                command.out / f"comparison_{command.task}.json",
                {"runs": list(map(str, command.compare)), "evaluated": runs, **results},
            )
        return 0
    if command.figures:
        figures.new_figure(1, 1)  # a missing matplotlib is said now, too
    ranks = distributed.start(command.device, hours=24)
    try:
        (language if command.task in LANGUAGE else dual_encoder)(command, ranks)
    finally:
        distributed.stop()
    return 0


def results_folder(command: Command) -> Path:
    """--out; else the run's own, or for published weights one here."""
    return command.out or (
        Path("eval") / command.run.stem if is_published(command.run) else Run(command.run).folder / "eval"
    )


def say_checkpoint(command: Command, run: Trained) -> None:
    """Print the notes of published weights, and which checkpoint is evaluated."""
    print(*run.origin.get("notes", ()), sep="\n", end="\n" if run.origin.get("notes") else "")
    chosen = run.checkpoint.chosen_on == command.split
    print(
        f"{command.run}: checkpoint {run.checkpoint}"
        + ", chosen on this very split: its scores are optimistic" * chosen
    )


def find_data(command: Command, run: Trained, reports: bool) -> Manifest:
    """The data set, checked to be what the run's model takes."""
    if not (command.data or run.data):
        raise InputError(f"--data: {command.run} has no data set of its own; name a prepared one")
    manifest = load_manifest(command.data or run.data)
    manifest.require(run.recipe, str(command.run))
    if run.guided:
        manifest.require_slices(run.slices, str(command.run))
    manifest.check([command.split], slices=run.guided, reports=reports)
    return manifest


def dual_encoder(command: Command, ranks: distributed.Ranks) -> None:
    run = load_trained(command.run, command.checkpoint, CONTRASTIVE, text_model=command.text_model)
    if ranks.main:
        say_checkpoint(command, run)
    manifest = find_data(command, run, reports=command.task == "retrieval")
    dataset = CTReportDataset(
        manifest,
        command.split,
        run.tokenizer,
        run.config.max_text,
        style=run.config.model,
        slices=run.guided,
    )
    run.model.to(ranks.device)
    {"retrieval": retrieval, "zeroshot": classify}[command.task](command, run, manifest, dataset, ranks)
    if command.figures and ranks.main:
        saliency_figures(command, run, manifest, ranks.device)


def retrieval(
    command: Command,
    run: Trained,
    manifest: Manifest,
    dataset: CTReportDataset,
    ranks: distributed.Ranks,
) -> None:
    image, text = embed(run.model, dataset, ranks, command.batch_size, workers=command.workers, progress=True)
    if not ranks.main:
        return
    entries, device = manifest.entries(command.split), ranks.device
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
        "split": command.split,
        "data": str(manifest.folder),
        **run.checkpoint.record(),
        **exact.tables,
        "per_scan": per_scan.tables,
        "volume_to_volume": overlap,
    }
    out = results_folder(command)
    write_json(out / "retrieval.json", results)
    write_queries(out / "retrieval_queries.csv", entries, exact, per_scan, run.checkpoint)
    with atomic_write(out / "embeddings.safetensors", "wb") as file:
        ids = "\n".join(entry["id"] for entry in entries)
        file.write(save({"image": image, "text": text}, {"ids": ids, "model": run.sha256()}))
    print_table(results, exact, per_scan)
    print(f"written to {out}")
    if command.figures:
        figures.recall_figure(command.figures / "recall.png", exact.ranks)


def classify(
    command: Command,
    run: Trained,
    manifest: Manifest,
    dataset: CTReportDataset,
    ranks: distributed.Ranks,
) -> None:
    entries = manifest.entries(command.split)
    ids = [entry["id"] for entry in entries]
    known = [entry["id"] for entries in manifest.splits.values() for entry in entries]
    if command.labels:
        table = read_label_table(command.labels, known)
    else:
        table = manifest_labels(manifest, command.split)
    label_set = load_label_set(command.label_set)
    task = zeroshot.define_task(zeroshot.load_prompts(command.prompts), label_set, table, ids)
    image, _ = embed(
        run.model, dataset, ranks, command.batch_size, workers=command.workers, progress=True, reports=False
    )
    if not ranks.main:
        return
    scores = zeroshot.score(run, image, task)
    report = classification_report(
        task.labels, scores, task.names, task.means, command.bootstrap, command.seed
    )
    results = {
        "n": len(ids),
        "reports_sha256": comparison.fingerprint(entries),
        "split": command.split,
        "data": str(manifest.folder),
        **run.checkpoint.record(),
        "labels": {"table": str(table.source), "set": command.label_set},
        "prompts": {"source": command.prompts, "texts": task.texts},
        "bootstrap": {"resamples": command.bootstrap, "seed": command.seed},
        **report,
        "notes": task.notes,
    }
    out = results_folder(command)
    write_json(out / "zeroshot.json", results)
    zeroshot.write_scores(out / "zeroshot_scores.csv", ids, task, scores, run.checkpoint)
    zeroshot.print_table(results)
    print(f"written to {out}")
    if command.figures:
        figures.roc_figure(command.figures / "roc.png", task.labels, scores, task.names)


def language(command: Command, ranks: distributed.Ranks) -> None:
    run = load_trained(
        command.run,
        command.checkpoint,
        LANGUAGE,
        dtype=PRECISIONS[command.precision],
        text_model=command.text_model,
        decoder=command.decoder,
        encoders=command.encoders,
    )
    if ranks.main:
        say_checkpoint(command, run)
    reports = command.task == "mrg"
    manifest = find_data(command, run, reports)
    kind = "mrg" if reports else command.questions or run.train.get("questions") or "location"
    prompt = (command.prompt or GENERATION["mrg"]["prompt"]) if reports else None
    image_tokens, most = run.model.visual_tokens, run.config.max_text
    own = run.train.get("templates") if kind == run.train.get("questions") else None
    templates = read_templates(command.templates, kind) if command.templates else own and tuple(own)
    data = LanguageDataset(
        manifest,
        command.split,
        kind,
        run.tokenizer,
        image_tokens,
        most,
        slices=run.guided,
        prompt=prompt,
        templates=templates,
    )
    everything = asked_rows(data)
    rows = everything[: command.limit]
    asked = sorted({row.question for row in rows})
    new_tokens = command.new_tokens or usual_new_tokens(run.model, run.tokenizer, asked, command.task)
    check_context(run.model, run.tokenizer, asked, new_tokens)
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
    bert = labeler = None
    if ranks.main:  # the other ranks score nothing
        if command.bertscore:
            bert = load_bert(command.bertscore, command.bertscore_layer, ranks.device)
        if command.classifier:
            labeler = load_classifier(command.classifier, ranks.device)
    run.place(ranks.device, command.compile)
    out = results_folder(command)
    with folder_lock(out) if ranks.main else nullcontext():
        texts, kept = generate_answers(
            run,
            data,
            rows,
            new_tokens,
            batch=command.batch_size,
            ranks=ranks,
            folder=out,
            task=command.task,
            head=head,
            anew=command.anew,
            workers=command.workers,
        )
        if not ranks.main:
            return
        if reports:
            phantoms = language_scores.are_phantoms(manifest)
            truth = language_scores.true_labels(manifest, [data.entries[row.entry] for row in rows])
            named = str(command.classifier) if labeler else None
            if phantoms and labeler is None:
                labeler, named = phantom_labels, "phantoms"
            scores, table = language_scores.report_scores(texts, rows, truth, labeler, phantoms, bert)
            scores["labeler"] = named
        else:
            scores, table = language_scores.answer_scores(texts, rows, bert)
        where = {"data": str(manifest.folder), **run.checkpoint.record()}
        write_json(out / f"{command.task}.json", {"n": len(rows), **head, **where, **scores})
        language_scores.write_rows(out / f"{command.task}.csv", table, run.checkpoint)
        kept.finish(len(rows))
    (language_scores.print_reports if reports else language_scores.print_answers)(scores)
    print(f"written to {out}")


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
        regions = {name: r[0] for name, r in found.items()}
        figures.saliency_figure(
            command.figures / f"saliency_{entry['id']}.png",
            volume[0],
            regions,
            entry["id"],
            recipe.axes,
            recipe.spacing if recipe.fit == "crop" else None,
        )
    print(f"pictures in {command.figures}")


if __name__ == "__main__":
    run_script(main)
