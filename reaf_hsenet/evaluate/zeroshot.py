"""Zero-shot classification: a volume shows a class when it is nearer to the class's positive prompt.

score = softmax(scale * image . [negative, positive])[1], a probability for each volume and class. Prompts are
data: data/prompts/{volume,organ}.json, or a file of the user in the same form. Source: the evaluation on
CT-RATE that REAF, HLIP (commit 70ef68d) and fVLM publish.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet.data.labels import LabelSet, LabelTable, label_tables, load_label_set
from reaf_hsenet.data.manifest import Manifest
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.command import Command
from reaf_hsenet.evaluate.embeddings import Vectors
from reaf_hsenet.evaluate.results import ClassTask, Results, class_results, print_classes
from reaf_hsenet.files import read_json
from reaf_hsenet.metrics.classification import AT_A_CUT, both_values, classification_report
from reaf_hsenet.runs.trained import Trained

PROMPTS = ("volume", "organ")


@dataclass(frozen=True)
class Prompts:
    """texts: {class: (negative, positive)} with the template filled in. source: `volume`, `organ`, a file."""

    source: str
    texts: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Task(ClassTask):
    """Classes with the prompts that score them. texts: as of Prompts. scored_from: {class: its prompts}."""

    texts: dict[str, tuple[str, str]]
    scored_from: dict[str, list[str]]


def load_prompts(name: str) -> Prompts:
    """`volume`, `organ` or a json file: {"template": "The volume shows: {}.", "classes": {class: {"positive":
    text, "negative": text}}}, or one template an organ, {"lung": ...}, and then an "organ" in every class.

    Raises InputError, naming the file and the class, for anything else.
    """
    path = Path(__file__).parents[1] / "data/prompts" / f"{name}.json" if name in PROMPTS else Path(name)
    if not path.is_file():
        raise InputError(f"--prompts {name}: no such file; expected {', '.join(PROMPTS)} or a json file")
    values = read_json(path)
    _only(values, {"template", "classes"}, {"about"}, f"{path}")
    template, classes = values["template"], values["classes"]
    by_organ = isinstance(template, dict)
    for place, text in template.items() if by_organ else [("", template)]:
        if not isinstance(text, str) or text.count("{}") != 1:
            where = f"the template of {place}" if by_organ else "template"
            raise InputError(
                f"{path}: {where} is {text!r}; expected a text with one {{}} where the prompt goes"
            )
    if not isinstance(classes, dict) or not classes:
        raise InputError(
            f"{path}: classes is {type(classes).__name__}; expected at least one class and its prompts"
        )
    texts = {}
    for label, prompt in classes.items():
        keys = {"positive", "negative"} | ({"organ"} if by_organ else set())
        _only(prompt, keys, set(), f"{path}: class {label}")
        wrong = next((k for k, text in prompt.items() if not isinstance(text, str) or not text.strip()), None)
        if wrong:
            raise InputError(f"{path}: class {label}: {wrong} is {prompt[wrong]!r}; expected a text")
        if by_organ and prompt["organ"] not in template:
            known = ", ".join(template)
            raise InputError(
                f"{path}: class {label}: no template of organ {prompt['organ']!r}; there are {known}"
            )
        frame = template[prompt["organ"]] if by_organ else template
        texts[label] = tuple(frame.replace("{}", prompt[kind]) for kind in ("negative", "positive"))
    return Prompts(name, texts)


def _only(values, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(values, dict) or not required <= set(values) <= required | optional:
        found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{where}: expected the keys {', '.join(sorted(required))}; found {found or 'none'}")


def define(command: Command, manifest: Manifest) -> list[Task]:
    """Match the prompts with the labels of --labels, one or two tables, or of the manifest."""
    prompts, label_set = load_prompts(command.prompts), load_label_set(command.label_set)
    tables, ids = label_tables(command.labels, manifest, command.split), manifest.ids(command.split)
    return [define_task(prompts, label_set, table, ids) for table in tables]


def define_task(prompts: Prompts, label_set: LabelSet, table: LabelTable, ids: list[str]) -> Task:
    """Match prompts and labels; classes are in the prompts' order.

    A class of the user's prompts that the labels do not have is an InputError; of the built-in prompts, a
    note.
    """
    known, parents = table.classes(label_set), {}
    for label, parts in label_set.scored_from.items():
        if label in known and label not in prompts.texts:
            parents |= {part: label for part in parts if part not in known}
    scored_from: dict[str, list[str]] = {}
    absent = []
    for prompt in prompts.texts:
        label = parents.get(prompt, prompt)
        if label in known:
            scored_from.setdefault(label, []).append(prompt)
        else:
            absent.append(prompt)
    if absent and (prompts.source not in PROMPTS or not scored_from):
        offered = table.known_classes(label_set)
        raise InputError(
            f"--prompts {prompts.source}: the labels of {table.source} have no class {absent[0]} "
            f"(--label-set {label_set.name}); they have {', '.join([*offered, *parents])}"
        )
    for label, parts in scored_from.items():
        whole = label_set.scored_from.get(label, ())
        missing = [part for part in whole if part not in parts and label not in prompts.texts]
        if missing:
            raise InputError(
                f"--prompts {prompts.source}: {label} is scored from {' and '.join(whole)}; add "
                f"{', '.join(missing)}, or prompts of {label} itself"
            )
    labels = table.values(ids, [known[label] for label in scored_from])
    notes = [f"{table.source} has no labels of {', '.join(absent)}: left out"] if absent else []
    usable = both_values(labels)
    for label, count in zip(scored_from, labels.sum(0), strict=True):
        if count in (0, len(ids)):
            what = "lacks" if count else "has"
            notes.append(
                f"{label}: none of the {len(ids)} volumes {what} it, so AUROC is undefined; the mean is over "
                f"{usable.sum()} of {len(scored_from)} classes"
            )
    means = {"mean": []}
    means |= {name: out for name, out in label_set.means.items() if set(out) & set(scored_from)}
    texts = {prompt: prompts.texts[prompt] for parts in scored_from.values() for prompt in parts}
    return Task(table.source, list(scored_from), labels, means, notes, texts, scored_from)


def measure(
    command: Command, run: Trained, manifest: Manifest, tasks: list[Task], vectors: Vectors
) -> Results:
    """Score the volumes' embeddings."""
    scores = [score(run, vectors[command.split]["image"], task) for task in tasks]
    how = {"resamples": command.bootstrap, "seed": command.seed, "scans": manifest.scans(command.split)}
    reports = [
        classification_report(task.labels, found, task.names, task.means, **how)
        for task, found in zip(tasks, scores, strict=True)
    ]
    results = class_results(command, manifest.ids(command.split), tasks, scores, reports)
    results.values["prompts"] = {"source": command.prompts, "texts": tasks[0].texts}
    return results


@torch.inference_mode()
def score(run: Trained, image: Tensor, task: Task) -> np.ndarray:
    """image: (N, C) unit vectors. Returns the (N, classes) float32 probabilities of the task's classes."""
    if not image.isfinite().all():
        raise InputError(
            f"{run.checkpoint.folder}: gives embeddings with NaN or infinity; choose another checkpoint"
        )
    rows = [run.tokenizer.encode(text, run.config.max_text) for pair in task.texts.values() for text in pair]
    device = run.model.logit_scale.device
    ids, mask = (t.to(device) for t in run.tokenizer.batch(rows))
    text = run.model.encode_text(ids, mask).float()  # (2 P, C): negative, positive, negative, ...
    logits = run.model.scale().float() * image.to(device) @ text.T
    found = logits.unflatten(1, (-1, 2)).softmax(-1)[..., 1].cpu()  # (N, P)
    column = {prompt: j for j, prompt in enumerate(task.texts)}
    return np.stack(
        [combine(found[:, [column[p] for p in prompts]]).numpy() for prompts in task.scored_from.values()],
        axis=1,
    )


def combine(scores: Tensor) -> Tensor:
    """(N, P) scores of the prompts of one class -> (N,): the largest if any is above 0.5, else the smallest.

    The published rule for RAD-ChestCT's calcification, which has no prompts of its own; one prompt is itself.
    """
    return torch.where((scores > 0.5).any(1), scores.amax(1), scores.amin(1))


def print_scores(results: dict) -> None:
    """Print a line for each class and mean: ranking metrics, those at argmax and those at the threshold."""

    def cells(name: str, row: dict) -> list:
        argmax, thresholded = ([row[cut][m] for m in AT_A_CUT[:5]] for cut in ("argmax", "thresholded"))
        return [*argmax, row.get("threshold"), *thresholded]

    at_cut = [(name, 6) for name in ("b.acc", "acc", "F1", "rec", "prec")]  # the first of AT_A_CUT
    print_classes(results, [*at_cut, ("thr", 7), *at_cut], cells)
    print("n: positives. F1: weighted. Before thr: at argmax; after it: at the threshold.")
    print("Thresholds are found on this data itself, as published.")
