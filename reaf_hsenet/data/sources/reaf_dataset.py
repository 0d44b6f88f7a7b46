"""REAF's published layout: ROOT/{train,val,test}/volumes/**/*.pt (.pt.gz, .nii.gz, .nii) and
.../reports/*.json.

A reports json is a list of {"image": file name or path below volumes/, "conversations": [{"from": "human" or
"gpt", "value": text}, ...]}. A volume's text is the answer to its report question: of several, the one whose
question holds <report_generation>.
"""

import glob
import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath

from reaf_hsenet.data.reading import ENDINGS, ending, stem
from reaf_hsenet.data.sources.datasets import Case, DataSet, Source, label_row
from reaf_hsenet.data.sources.tables import Volumes, given, read_csv
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_json, visible

SPLITS = {"train": ("train",), "validation": ("val", "valid"), "test": ("test",)}
CT_RATE_NAME = re.compile(r"(.*/)?[a-z]+_\d+_[a-z]+_\d+")


@dataclass
class Answers:
    """Answers about one image in the reports files, those to a report question apart."""

    file: Path
    image: str
    report: set[str] = field(default_factory=set)
    other: set[str] = field(default_factory=set)

    def text(self) -> str:
        """The report. Raises InputError when it is not clear which answer that is."""
        found = self.report or self.other
        if len(found) == 1:
            return next(iter(found))
        marked = "" if self.report else ", none to a question marked <report_generation>"
        raise InputError(
            f"{self.file}: image {self.image} has {len(found) or 'no'} answers{marked}; expected one report"
        )


def is_reaf_layout(root: Path) -> bool:
    return any((root / name / "volumes").is_dir() for names in SPLITS.values() for name in names)


def read_reaf(root: Path) -> Source:
    """REAF's layout below `root`. A volume without report, a report without volume, is a case with that
    problem.

    Labels, as CT-RATE's tables (VolumeName, then columns of 0 and 1), are optional: labels.csv in a split's
    folder or *labels*.csv in `root`.
    """
    root = Path(root)
    found: dict[str, Path] = {}
    label_names: dict[tuple[str, ...], Path] = {}
    for split, names in SPLITS.items():
        parts = [root / name for name in names]
        folders = [p for p in parts if (p / "volumes").is_dir() or (p / "reports").is_dir()]
        if len(folders) > 1:
            raise InputError(f"{root}: has both {' and '.join(names)} with volumes or reports; keep one")
        if folders:
            found[split] = folders[0]
    on_disk = {folder: _volumes(folder / "volumes") for folder in found.values()}
    splits = {
        split: _read_split(folder, on_disk[folder], _read_labels(root, folder, on_disk, label_names))
        for split, folder in found.items()
    }
    if not splits:
        raise InputError(f"{root}: no REAF data set; expected train/volumes and train/reports below it")
    if len(label_names) > 1:
        one, two = list(label_names.values())[:2]
        raise InputError(f"{two}: its columns differ from those of {one}; give all tables of labels the same")
    return Source("reaf", splits, next(iter(label_names), ()), text="report")


def _volumes(folder: Path) -> dict[str, Path]:
    """Return the volumes below a folder by their path without ending; of several formats the fastest."""
    on_disk: dict[str, Path] = {}
    # glob follows links to folders, which Path.rglob does not, and leaves hidden files out.
    found = [n for n in glob.glob("**/*", root_dir=folder, recursive=True) if ending(n)]
    for name in sorted(found, key=lambda n: (stem(n), ENDINGS.index(ending(n)))):
        on_disk.setdefault(stem(name), folder / name)
    return on_disk


def _read_split(folder: Path, on_disk: dict[str, Path], labels: dict[str, tuple[int, ...]]) -> list[Case]:
    volumes, reports = folder / "volumes", folder / "reports"
    answers = _read_reports(reports, on_disk)
    cases = []
    for name in [*answers, *(n for n in on_disk if n not in answers)]:
        path = on_disk.get(name)
        text, problem = "", f"has no report in {reports}"
        if name in answers:
            text = given(answers[name].text())
            problem = None if text else f"has an empty report in {answers[name].file.name}"
            if path is None:
                problem = f"is listed in {answers[name].file.name} but absent"
        scan = name.rpartition("_")[0] if CT_RATE_NAME.fullmatch(name) else name
        image = path or volumes / answers[name].image
        cases.append(Case(name, scan, image, text, labels.get(name), problem=problem))
    return cases


def _read_reports(folder: Path, on_disk: dict[str, Path]) -> dict[str, Answers]:
    """Return the answers by the id of their volume, or the name of an image that is absent."""
    files = visible(folder, "*.json")
    if not files:
        raise InputError(f"{folder}: has no .json file; expected REAF's reports, image and conversations")
    volumes = Volumes(on_disk)
    answers: dict[str, Answers] = {}
    for file in files:
        values = read_json(file)
        if not isinstance(values, list):
            raise InputError(f"{file}: holds no list; expected a list of image and conversations")
        for number, entry in enumerate(values):
            image, pairs = _entry(entry, f"{file}: entry {number}")
            name = volumes.find(stem(image), f"{file}: image {image}") or stem(image)
            said = answers.setdefault(name, Answers(file, image))
            for is_report, answer in pairs:
                (said.report if is_report else said.other).add(answer)
    return answers


def _entry(entry, where: str) -> tuple[str, list[tuple[bool, str]]]:
    """The image, and per answer whether its question asks for the report."""
    if not isinstance(entry, dict) or not isinstance(image := entry.get("image"), str) or not image:
        raise InputError(f"{where}: has no image; expected the name of a volume")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and t.get("from") in ("human", "gpt") and isinstance(t.get("value"), str)
        for t in turns
    ):
        raise InputError(f"{where} ({image}): its conversations are no list of from (human or gpt) and value")
    pairs, marked = [], False
    for turn in turns:
        if turn["from"] == "human":
            kinds = (entry.get("type"), turn.get("type"))
            marked = "<report_generation>" in turn["value"] or "report_generation" in kinds
        else:
            pairs.append((marked, turn["value"]))
    return image, pairs


def _read_labels(
    root: Path, split: Path, on_disk: dict[Path, dict[str, Path]], names: dict[tuple[str, ...], Path]
) -> dict[str, tuple[int, ...]]:
    """Return labels by the volume's path without ending; `names` gains the columns and their file.

    on_disk: the volumes of every split's folder. In a table of all splits a name must mean one volume of them
    all.
    """
    own = split / "labels.csv"
    tables = [own] if own.is_file() else visible(root, "*labels*.csv")
    everywhere = dict.fromkeys(volume for held in on_disk.values() for volume in held)
    volumes = Volumes(on_disk[split] if own.is_file() else everywhere)
    others = {folder.name for folder in on_disk} - {split.name}
    labels: dict[str, tuple[int, ...]] = {}
    for path in tables:
        table = read_csv(path, ("VolumeName",), "VolumeName", names_volume=lambda cell: stem(cell) in volumes)
        for name, row in table.items():
            columns = tuple(c for c in row if c != "VolumeName")
            names.setdefault(columns, path)
            label, parts = label_row(table, name, columns, path), PurePosixPath(name).parts
            if any(part in others and after == "volumes" for part, after in pairwise(parts)):
                continue  # the path of another split's volume
            volume = volumes.find(stem(name), f"{path}: the row of {name}")
            if volume is not None and labels.setdefault(volume, label) != label:
                raise InputError(f"{path}: another row than {name} says otherwise of {volume}; keep one")
    return labels


REAF = DataSet("reaf", read_reaf, recipe="reaf")
