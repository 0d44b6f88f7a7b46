"""What a language model is asked: prompts for a report, and a manifest's questions, listed, put into words,
added.

An entry's `qa` is a list of {"kind": one of KINDS, "anatomy", "abnormality", "answer"}, with "size" and
"question" where the table has them. Templates are data: prompts/report.json and prompts/questions.json.
"""

import ast
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from reaf_hsenet.data.each_volume import Refused, write_refused
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.data.sources.radgenome import KINDS, SPLITS, find_tables, read_questions, refusal
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import folder_lock, named, read_json

PROMPTS = Path(__file__).parent / "prompts"
REFUSED = "questions: "  # begins the reasons of refused.csv that are of question tables
SLOTS = "{abnormality}", "{anatomy}"  # of a template
# How a question calls an anatomy that has no name of its own.
SPOKEN = {"": "whole scan", "others": "other regions"}


@cache
def report_prompts() -> tuple[str, ...]:
    """The published prompts for a report; one stands there twice."""
    return tuple(read_json(PROMPTS / "report.json")["prompts"])


@cache
def templates(kind: str) -> tuple[str, ...]:
    """Questions of a kind, with the slots {abnormality} and {anatomy}."""
    return tuple(read_json(PROMPTS / "questions.json")[checked_kind(kind)])


def read_templates(path: Path, kind: str) -> tuple[str, ...]:
    """Questions of a kind from a file of the user: JSON as prompts/questions.json is, or HSENet's
    prompt_templates.py.

    Of a Python file nothing is run: the dictionary that has a list of texts under the kind is read as a
    literal. Raises InputError, naming the file, for one that has no such list, and for a question without a
    slot.
    """
    values = _literals(path) if path.suffix == ".py" else [read_json(path)]
    lists = [value.get(kind) for value in values if isinstance(value, dict)]
    found = next((held for held in lists if held and isinstance(held, list)), None)
    if found is None:
        raise InputError(
            f'--templates {path}: has no list of questions of this kind; expected {{"{kind}": ["Where is '
            f'the {{abnormality}}?", ...]}}'
        )
    for text in found:
        if not isinstance(text, str) or not any(slot in text for slot in SLOTS):
            raise InputError(
                f"--templates {path}: {text!r:.80} is no question with {' or '.join(SLOTS)} in it"
            )
    return tuple(found)


def _literals(path: Path) -> list:
    """Return the dictionaries of a Python file that are literals, of which nothing has to be run."""
    found = []
    with named(path, "cannot be read"):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
                with suppress(ValueError, TypeError):
                    found.append(ast.literal_eval(statement.value))
    return found


def checked_kind(kind: str) -> str:
    """The kind. Raises InputError unless it is one of KINDS."""
    if kind not in KINDS:
        raise InputError(f"questions of kind {kind!r}: expected one of {', '.join(KINDS)}")
    return kind


def report_prompt(rng: np.random.Generator) -> str:
    """Draw a prompt for a report, uniformly."""
    return _draw(report_prompts(), rng)


def question_answer(
    row: dict, rng: np.random.Generator, own: tuple[str, ...] | None = None
) -> tuple[str, str]:
    """The question of a qa row and its answer. The question is the row's, or else a template drawn uniformly.

    own: templates of the user, which take the place of both.
    """
    question = None if own else row.get("question")
    return question or question_text(row["kind"], row["abnormality"], row["anatomy"], rng, own), row["answer"]


def question_text(
    kind: str, abnormality: str, anatomy: str, rng: np.random.Generator, own: tuple[str, ...] | None = None
) -> str:
    """Fill a template of the kind, or one of `own`, with the abnormality and the last part of the anatomy."""
    anatomy = anatomy.split("/")[-1].strip()
    words = abnormality, SPOKEN.get(anatomy.lower(), anatomy)
    text = _draw(own or templates(kind), rng)
    for slot, word in zip(SLOTS, words, strict=True):
        text = text.replace(slot, word)
    return text


def questions(manifest: Manifest, split: str, kind: str) -> list[tuple[int, dict]]:
    """(row of the split, qa row) of every question of a kind, in the manifest's order.

    Raises InputError when there are none.
    """
    checked_kind(kind)
    rows = ((i, row) for i, entry in enumerate(manifest.entries(split)) for row in entry.get("qa", ()))
    found = [(i, row) for i, row in rows if row["kind"] == kind]
    if not found:
        table = "train" if split == "development" else split
        raise InputError(
            f"{manifest.name}: its {split} split has no questions of kind {kind}; add those of "
            f"{table}_vqa_{kind}.csv with preprocess.py --dataset radgenome --root TABLES --out "
            f"{manifest.folder} (of phantoms, TABLES is their raw folder)"
        )
    return found


def add_questions(
    folder: Path, root: Path, kinds: tuple[str, ...] = KINDS, allow_refused: bool = False
) -> tuple[Manifest, Refused]:
    """Give the volumes of a prepared folder the questions of RadGenome's tables at `root`, in place of any
    they had.

    Returns the manifest, written anew, and the refused (table, reason) pairs, which refused.csv has too.
    Raises InputError, and changes nothing, when there are any, unless they are allowed, and when no question
    is left.
    """
    folder, tables = Path(folder), find_tables(root)
    if not (folder / "manifest.json").is_file():
        raise InputError(
            f"{folder / 'manifest.json'}: no such file; prepare CT-RATE's volumes first, with --dataset "
            f"ct-rate"
        )
    with folder_lock(folder):
        manifest = load_manifest(folder)
        refused = []
        for split in dict.fromkeys((*SPLITS, *(s for s in manifest.splits if s != "development"))):
            # The development split is a part of what the tables call train.
            parts = (split, "development") if split == "train" else (split,)
            entries = [entry for part in parts for entry in manifest.splits.get(part, [])]
            found, bad = read_questions(tables, split, [e["id"] for e in entries], kinds)
            refused += bad
            for entry in entries:
                entry.pop("qa", None)
                if entry["id"] in found:
                    entry["qa"] = found[entry["id"]]
        if refused and not allow_refused:
            raise refusal(
                refused,
                "prepare these volumes, correct the table, or leave its rows out with --allow-refused",
            )
        if not any("qa" in entry for entry in manifest.all_entries()):
            raise InputError(
                f"{tables}: no row of its tables of {', '.join(kinds)} is of a volume of {folder}; "
                f"expected some"
            )
        lines = [(str(table), f"{REFUSED}{volume} {reason}") for table, volume, reason in refused]
        write_refused(folder, lines, REFUSED)
        manifest.save()
    return manifest, lines


def _draw(texts: tuple[str, ...], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
