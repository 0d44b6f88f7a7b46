"""The command line of evaluate.py: every flag, with the tasks that it belongs to."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from reaf_hsenet.config import KINDS, RECIPES
from reaf_hsenet.data.labels import LABEL_SETS
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate.protocols import PROTOCOLS
from reaf_hsenet.runs.trained import locate_run, results_folder
from reaf_hsenet.script import Parser
from reaf_hsenet.settings import MISSING, add_flags, flags, given, setting

ENCODER_TASKS, LANGUAGE_TASKS = ("retrieval", "zeroshot", "probe"), ("mrg", "vqa")
TASKS = (*ENCODER_TASKS, *LANGUAGE_TASKS)


_dual = partial(setting, only=ENCODER_TASKS)
_language = partial(setting, only=LANGUAGE_TASKS)
_reports = partial(setting, only=("mrg",))
_answers = partial(setting, only=("vqa",))


@dataclass(frozen=True)
class Command:
    """The run to evaluate, its data, and where the results go. given: the flags of the command line."""

    task: Literal[TASKS] = setting(MISSING, "what is measured", required=True)
    run: Path | None = setting(
        None,
        "run folder, or published weights: file, folder or hub id (default: runs/clip1-MODEL; of mrg and vqa "
        "runs/TASK-MODEL)",
        word=str,
    )
    text_model: str | None = setting(
        None, "folder or hub id with the vocabulary of a published checkpoint", metavar="NAME"
    )
    model: Literal[tuple(RECIPES)] = setting("hsenet", "whose default run folder (default: hsenet)")
    compare: tuple[Path, ...] = _dual(
        (), "evaluated runs: scores, differences from the first with their intervals", metavar="RUN"
    )
    checkpoint: str | None = setting(
        None,
        "last, best or a step, step-000100 (default: last; best where a development split chose it)",
        metavar="NAME",
    )
    data: Path | None = setting(None, "prepared data set (default: the run's own)")
    split: Literal["train", "development", "validation", "test"] = setting(
        "validation", "default: validation"
    )
    out: Path | None = setting(None, "folder of the results (default: RUN/eval)")
    batch_size: int = setting(16, "default: 16", least=1)
    workers: int = setting(0, "processes that read volumes (default: 0)", least=0)
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: a GPU where there is one)")
    figures: Path | None = _dual(None, "write curves (ROC, recall, reliability), saliency", metavar="DIR")
    figure_volumes: int = _dual(4, "saliency of the first N volumes (default: 4)", metavar="N", least=0)
    prompts: str = setting("volume", "volume, organ or a json file (default: volume)", only=("zeroshot",))
    label_set: Literal[tuple(LABEL_SETS)] = _dual(
        "ct-rate", "how label columns become classes (default: ct-rate)"
    )
    labels: tuple[Path, ...] = setting(
        (),
        "label table, or two side by side; of mrg one (default: the manifest's labels)",
        metavar="CSV",
        only=(*ENCODER_TASKS, "mrg"),
    )
    protocol: tuple[Literal[PROTOCOLS], ...] = setting(
        (), "scored volumes, docs/evaluation.md (default: all)", metavar="NAME", only=("retrieval",)
    )
    bootstrap: int = _dual(1000, "resamples of the intervals; 0: none (default: 1000)", metavar="N", least=0)
    seed: int = _dual(0, "of the bootstrap and of few volumes' draws (default: 0)", least=0)
    questions: Literal[KINDS] | None = _answers(None, "their kind (default: the one of the training)")
    templates: Path | None = _answers(None, "their wordings (default: those of the training)", metavar="FILE")
    prompt: str | None = _reports(None, "what every report is asked for with (default: the published one)")
    new_tokens: int | None = _language(None, "most tokens of a text (default: 512, 74)", metavar="N", least=1)
    limit: int | None = _language(None, "the first N texts (default: all)", metavar="N", least=1)
    precision: Literal["fp32", "bf16"] | None = _language(None, "of the decoder (default: its weights')")
    bertscore: Path | None = _language(
        None, "BERT or RoBERTa that compares texts (published: roberta-large)", metavar="FOLDER"
    )
    bertscore_layer: int | None = _language(
        None, "of that model (published: 17; default: the last)", metavar="N"
    )
    classifier: Path | None = _reports(
        None, "BERT or RoBERTa that reads 18 findings, as RadBERT", metavar="FOLDER"
    )
    places: bool = _reports(False, "score sides and lobes of real reports, read by rules")
    predictions: Path | None = _reports(
        None, "score reports made elsewhere, VLM3D's json, of the volumes of --data", metavar="FILE"
    )
    format: Literal["vlm3d"] | None = setting(
        None, "write predictions.json as that challenge takes it", only=("mrg", "zeroshot", "probe")
    )
    baselines: bool = _reports(True, "reports by the training scans' embeddings, too (default: yes)")
    decoder: str | None = _language(
        None, "of published packers and adapters: folder or hub id of their decoder", metavar="NAME"
    )
    encoders: str | None = _language(
        None, "of the same: HSENet-2E3-CLIP, a file, folder or hub id, or a clip2 run", metavar="NAME"
    )
    compile: bool = _language(False, "compile the decoder's steps, on a GPU")
    anew: bool = setting(False, "forget stored embeddings, or the answers of an interrupted evaluation")
    given: dict = field(default_factory=dict)

    @property
    def results(self) -> Path:
        """The folder to write into: --out, else the run's, or, for what no run of ours made, one here."""
        if self.out or not self.predictions:
            return self.out or results_folder(self.run)
        return Path("eval") / self.predictions.stem


FLAGS = flags(Command)
COMPARED = {"task", "compare", "out", "bootstrap", "seed"}  # flags that --compare goes with
SCORED = {"task", "predictions", "data", "split", "out", "device", "bertscore", "bertscore_layer"}
SCORED |= {"classifier", "places", "format", "labels"}  # flags that --predictions goes with


def parse(argv: list[str], description: str) -> Command:
    """Raises InputError for an unknown flag, a value out of range, and a flag of another task."""
    parser = Parser(description)
    add_flags(parser, FLAGS)
    values = given(parser.parse_args(argv), FLAGS, "task")
    command = Command(**values, given=values)
    check(command)
    run = f"runs/{command.task if command.task in LANGUAGE_TASKS else 'clip1'}-{command.model}"
    return replace(command, run=locate_run(values["run"]) if "run" in values else Path(run))


def check(command: Command) -> None:
    """Raise InputError for flags that do not go together, and for a folder that is not what it should be."""
    if "compare" in command.given:
        if foreign := sorted(command.given.keys() - COMPARED):
            raise InputError(
                f"--{foreign[0].replace('_', '-')}: belongs to the evaluation of one run, not to --compare"
            )
        if len(command.compare) < 2:
            raise InputError("--compare: expected two or more runs")
    elif command.task == "probe" and command.split == "train":
        raise InputError("--split train: is what a probe is fitted on; score it on another split")
    if len(command.labels) > (most := 1 if command.task == "mrg" else 2):
        expected = "one table" if most == 1 else "one or two tables"
        raise InputError(f"--labels: expected {expected}, found {len(command.labels)}")
    if command.predictions:
        if foreign := sorted(command.given.keys() - SCORED):
            raise InputError(f"--{foreign[0].replace('_', '-')}: is of a run, and --predictions has none")
        if not command.data:
            raise InputError(
                "--predictions: needs the data set whose volumes they are of; name it with --data"
            )
    if command.bertscore_layer is not None and command.bertscore is None:
        raise InputError("--bertscore-layer: is of the model that --bertscore names; give both")
    for name in ("bertscore", "classifier"):
        folder = getattr(command, name)
        if folder and not folder.is_dir():
            raise InputError(
                f"--{name} {folder}: no such folder; expected one with config.json, tokenizer and weights"
            )
    if command.prompt is not None and not command.prompt.strip():
        raise InputError("--prompt: is empty; expected what a report is asked for with")
    for name in ("out", "figures"):  # said now, not after hours
        folder = getattr(command, name)
        nearest = next((p for p in (folder, *folder.parents) if p.exists()), None) if folder else None
        if nearest and not nearest.is_dir():
            raise InputError(f"--{name} {nearest}: is a file; expected a folder to write into")
