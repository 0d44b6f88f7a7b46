"""A trained run at work on single scans: report, answer, classes, embedding, neighbours, picture.

    from reaf_hsenet import load
    model = load("runs/mrg-hsenet")
    model.report("scan.nii.gz")

A scan is read by the run's own recipe. What a call can find wrong with its input is found before weights are
read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reaf_hsenet import distributed
from reaf_hsenet.config import (
    CONTRASTIVE,
    GENERATION,
    LANGUAGE,
    ClipConfig,
    GuidedVisionConfig,
    ReafVisionConfig,
    Recipe,
)
from reaf_hsenet.data.labels import LabelTable, load_label_set
from reaf_hsenet.data.language import said_places
from reaf_hsenet.data.phantom.labeler import FINDING_WORDS
from reaf_hsenet.data.reading import Reading
from reaf_hsenet.data.slice_features import slices_wanted
from reaf_hsenet.data.text import clean_report, plain_report, shorten_report
from reaf_hsenet.data.volume import TableRow
from reaf_hsenet.errors import InputError
from reaf_hsenet.evaluate import figures, probe, zeroshot
from reaf_hsenet.evaluate.scan import Scan, find_slice_encoder, read_scan, slice_features
from reaf_hsenet.evaluate.search_index import SearchIndex, read_index
from reaf_hsenet.metrics.places import rule_places
from reaf_hsenet.models.build import build_mllm
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.answering import answer_length, image_features, stream_answer
from reaf_hsenet.runs.checkpoint import Choice, Run
from reaf_hsenet.runs.generation import PRECISIONS, Sampling
from reaf_hsenet.runs.trained import Trained, check_compiled, is_published, load_trained, results_folder
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer
from reaf_hsenet.tokenizer.tokenizer import Tokenizer

EMPTY_TEXT = '--text: is empty; expected words of a report, such as "bilateral pleural effusion"'


def load(folder: Path | str, **settings) -> "ScanModel":
    """Read a run folder's model, or published weights' file or folder. settings: as ScanModel takes them."""
    model = ScanModel(folder, **settings)
    _ = model.run  # reads the weights
    return model


@dataclass(frozen=True)
class Settings:
    """A run's settings, known before its weights are read. load: reads them.

    tokenizer: of a language model. slices: what made the slice features that the encoder was trained with.
    """

    folder: Path
    stage: str
    config: ClipConfig | MllmConfig
    recipe: Recipe
    tokenizer: Tokenizer | None
    checkpoint: Choice
    data: Path | None
    slices: dict | None
    load: Callable[[], Trained]


def read_settings(folder: Path, which: str | None, precision: str | None, names: dict) -> Settings:
    """Read a run's settings; those of published weights come with the weights.

    names: of published weights, what they stand on.
    """
    dtype = PRECISIONS.get(precision)
    if is_published(folder):
        run = load_trained(folder, dtype=dtype, **names)
        known = {name: getattr(run, name) for name in Settings.__annotations__ if name != "load"}
        return Settings(**known, load=lambda: run)
    run = Run(folder)
    values, source = run.read_config(), str(run.folder / "config.json")
    checkpoint, stage = run.choose(which), values["stage"]
    for name in [name for name, value in names.items() if value is not None]:
        flag = name.replace("_", "-")
        raise InputError(f"--{flag}: is of published weights; the run {folder} knows its own, leave it out")
    if stage not in (*CONTRASTIVE, *LANGUAGE):
        raise InputError(f"{folder}: is a run of stage {stage!r}; expected one of clip1, clip2, mrg and vqa")
    language = stage in LANGUAGE
    return Settings(
        folder=run.folder,
        stage=stage,
        config=from_dict(MllmConfig if language else ClipConfig, values["model"], source),
        recipe=from_dict(Recipe, values["recipe"], source),
        tokenizer=load_tokenizer(run.folder) if language else None,
        checkpoint=checkpoint,
        data=Path(values["data"]) if values["data"] else None,
        slices=values.get("slices"),
        load=lambda: load_trained(run.folder, checkpoint.name, dtype=dtype),
    )


class ScanModel:
    """A run's model and how it reads scans. Weights are read when the first result needs them.

    checkpoint: `last`, `best` or `step-000123`; see Run.choose. device: cpu, cuda or cuda:N; by default a GPU
    where there is one. reading, table: what scans are taken for; see data/volume.py. slice_encoder: file,
    folder or hub id; see find_slice_encoder.
    precision: of the decoder, one of PRECISIONS; by default that of its files. text_model, decoder, encoders:
    of published weights, see runs/trained.py. compiled: run the decoder's steps as one compiled graph, on a
    GPU. say: takes a line about every scan that is read.

    Every method raises InputError, a line that names the file or setting, for what cannot be done.
    """

    def __init__(
        self,
        folder: Path | str,
        checkpoint: str | None = None,
        device: str | None = None,
        reading: Reading | None = None,
        table: TableRow | None = None,
        slice_encoder: str | None = None,
        precision: str | None = None,
        text_model: str | None = None,
        decoder: str | None = None,
        encoders: str | None = None,
        compiled: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.reading, self.table = reading or Reading(), table or TableRow()
        self.slice_encoder, self.compiled, self.say = slice_encoder, compiled, say
        self.device = distributed.start(device).device
        check_compiled(compiled, self.device)
        names = {"text_model": text_model, "decoder": decoder, "encoders": encoders}
        self.settings = known = read_settings(Path(folder), checkpoint, precision, names)
        self.folder, self.stage, self.checkpoint = known.folder, known.stage, known.checkpoint
        self.config, self.recipe = known.config, known.recipe
        self.has_decoder = self.stage in LANGUAGE
        self.encoders = self.config.encoders if self.has_decoder else (self.config.vision,)
        self.guided = self.config.guided
        if precision is not None and (precision not in PRECISIONS or not self.has_decoder):
            raise InputError(
                f"--precision {precision}: expected one of {', '.join(PRECISIONS)}, and a run with a decoder"
            )
        if slice_encoder is not None and not self.guided:
            raise InputError(f"--slice-encoder: {folder} takes no slice features; leave the flag out")
        if is_published(self.folder):
            for note in self.run.origin["notes"]:
                say(note)

    @cached_property
    def run(self) -> Trained:
        """The run with its weights, on the device."""
        run = self.settings.load()
        run.place(self.device, self.compiled)
        return run

    @cached_property
    def sha256(self) -> str:
        """Hash of the checkpoint's weights, by which an index knows the model that made it."""
        return self.run.sha256()

    def report(self, scan: Path | str, prompt: str | None = None, **settings) -> str:
        """Return the findings as text. settings: new_tokens and sampling, as of `stream`."""
        return "".join(self.stream(scan, prompt, **settings))

    def ask(self, scan: Path | str, question: str, **settings) -> str:
        """Return an answer as text. settings: new_tokens and sampling, as of `stream`."""
        return "".join(self.stream(scan, question, "vqa", **settings))

    def stream(
        self,
        scan: Path | str,
        question: str | None = None,
        task: str = "mrg",
        new_tokens: int | None = None,
        sampling: Sampling | None = None,
        cues: Callable[[list[dict]], None] = lambda found: None,
    ) -> Iterator[str]:
        """Yield a report or an answer in pieces, as it is made; without a question, the prompt for a report.

        new_tokens: at most; by default the task's (`mrg` or `vqa`), or what the decoder's context leaves.
        sampling: by default the likeliest token is taken. cues: called before the first piece, of a run with
        --cues, with what its head has found: {name, probability, threshold, present, places} of each label.
        """
        if not self.has_decoder:
            raise InputError(
                f"{self.folder}: is a run of stage {self.stage}, which has no decoder; name a run of stage "
                f"mrg or vqa"
            )
        question = GENERATION["mrg"]["prompt"] if question is None else question
        if not question.strip():
            raise InputError('the question is empty; ask something, such as "Is there pleural effusion?"')
        with torch.device("meta"):  # its sizes, without weights that may take minutes to read
            sizes = build_mllm(self.config)
        most = answer_length(sizes, self.settings.tokenizer, [question], task, new_tokens)
        volume, slices, _ = self.read(scan)
        features = image_features(self.run.model, volume, slices)
        if self.config.findings and self.config.cue_dropout < 1:
            cues(self._cues(features))
        yield from stream_answer(
            self.run.model,
            self.run.tokenizer,
            question,
            features,
            slices,
            new_tokens=most,
            sampling=sampling,
            compiled=self.compiled,
        )

    @torch.inference_mode()
    def _cues(self, features: list[Tensor]) -> list[dict]:
        head = self.run.model.findings
        logits = head(features)
        told, probability = head.predicted(logits)[0], head.probabilities(logits)[0].double()
        found: dict[str, dict] = {}
        for j, (label, place) in enumerate(self.config.findings):
            if place:
                found[label]["places"] += [place] * bool(told[j])
            else:
                numbers = {"probability": float(probability[j]), "threshold": float(head.thresholds[j])}
                found[label] = {"name": label, **numbers, "present": bool(told[j]), "places": []}
        rows = [row | {"places": said_places(row["places"])} for row in found.values()]
        return sorted(rows, key=lambda row: -row["probability"])

    def classify(
        self, scan: Path | str, prompts: str | None = None, label_set: str | None = None
    ) -> dict[str, float]:
        """Return the probability of each class, highest first; see `findings`."""
        found = self.findings(scan, prompts, label_set)
        return {name: probability for name, (probability, _) in found.items()}

    def findings(
        self, scan: Path | str, prompts: str | None = None, label_set: str | None = None
    ) -> dict[str, tuple[float, float | None]]:
        """Return (probability, threshold) of each class, highest first; above its threshold it is present.

        prompts: `volume` (default), `organ` or a json file, and label_set (default: `ct-rate`) are for
        zero-shot classification, which has no thresholds; see zeroshot.py. Without both, the probe is used
        that evaluate.py has stored with the run, if any; which of them was used goes to `say`.
        """
        self.require_towers()
        path = results_folder(self.folder) / probe.FILE
        if prompts is None and label_set is None and path.is_file():
            self.say(f"classes by the probe {path}")
            image = self.embed(scan)
            return probe.read_probe(path, self.sha256, len(image)).classify(image)
        task = class_task(prompts or "volume", label_set or "ct-rate")
        self.say(f"classes by prompts: {prompts or 'volume'}")
        image = self.embed(scan)[None]
        scores = zeroshot.score(self.run, image, task)[0].tolist()
        ordered = sorted(zip(task.names, scores, strict=True), key=lambda pair: -pair[1])
        return {name: (probability, None) for name, probability in ordered}

    @torch.inference_mode()
    def embed(self, scan: Path | str) -> Tensor:
        """Return the scan's unit vector, (C,) float32 on the CPU."""
        self.require_towers()
        volume, slices, _ = self.read(scan)
        return self.finite(self.run.model.encode_image(volume, slices))

    @torch.inference_mode()
    def embed_text(self, text: str) -> Tensor:
        """Return a report's unit vector, (C,) float32 on the CPU; the text is cleaned as in training."""
        self.require_towers()
        if not text.strip():
            raise InputError(EMPTY_TEXT)
        tokenizer, limit = self.run.tokenizer, self.run.config.max_text
        if self.run.config.model == "reaf":
            text = plain_report(text)
        else:
            rng = np.random.default_rng(0)
            text = shorten_report(clean_report(text), limit, lambda t: len(tokenizer.encode(t)), rng)
        ids, mask = (t.to(self.device) for t in tokenizer.batch([tokenizer.encode(text, limit)]))
        return self.finite(self.run.model.encode_text(ids, mask))

    def search(
        self,
        index: SearchIndex | Path | str,
        text: str | None = None,
        scan: Path | str | None = None,
        top: int = 5,
    ) -> list[tuple[str, float]]:
        """(id, cosine) of an index's `top` scans nearest to a text or a scan, best first."""
        self.require_towers()
        if (text is None) == (scan is None) or top < 1:
            raise InputError("search: expected either a text or a scan to search for, and 1 or more to find")
        path, index = (None, index) if isinstance(index, SearchIndex) else (index, read_index(Path(index)))
        if index.model != self.sha256:
            raise InputError(
                f"{path or 'the index'}: was made by the model of sha256 {index.model[:12]}, "
                f"{self.checkpoint.folder} has {self.sha256[:12]}; name that model's run, or make the index "
                "again"
            )
        return index.nearest(self.embed_text(text) if scan is None else self.embed(scan), top)

    @torch.inference_mode()
    def explain(self, scan: Path | str, picture: Path | str) -> dict:
        """Draw where the encoder looks: the regions that REAF finds salient, or the scores of 2E3's patches.

        Returns what was drawn: `shows`, and for each of `maps` its grid of patches and its strongest patch,
        counted along `axes`.
        """
        found = [i for i, encoder in enumerate(self.encoders) if _has_map(encoder)]
        if not found:
            raise InputError(
                f"{self.folder}: its encoder weighs no patches; stage clip2 of hsenet and clip1 of reaf do, "
                "and the language runs on their encoders"
            )
        figures.new_figure(1, 1, "explain")  # a missing matplotlib is said now
        volume, slices, read = self.read(scan)
        model = self.run.model
        encoder = model.encoders[found[0]] if self.has_decoder else model.vision
        if isinstance(self.encoders[found[0]], ReafVisionConfig):
            shows, draw, centre = "salient regions", figures.saliency_figure, figures.strongest
            maps = {name: regions[0].cpu() for name, regions in encoder.salient_regions(volume).items()}
        else:
            shows, draw, centre = "patch scores", figures.score_figure, figures.highest
            scores = encoder.patch_scores(encoder.embed(volume), slices)[0]
            maps = {"2E3": scores.unflatten(0, self.encoders[found[0]].grid).cpu()}
        spacing = self.recipe.spacing if self.recipe.fit == "crop" else None
        draw(Path(picture), read.volume[0, 0], maps, read.path.name, self.recipe.axes, spacing)
        return {
            "shows": shows,
            "axes": self.recipe.axes,
            "maps": {name: {"grid": list(m.shape), "strongest": centre(m)} for name, m in maps.items()},
        }

    def read(self, path: Path | str) -> tuple[Tensor, Tensor | None, Scan]:
        """Read the scan once by the run's recipe.

        Returns its volume (1, 1, D, H, W), its slice features (1, S, C) where the run's encoder takes them,
        both on the device, and the scan.
        """
        wanted = slices_wanted(self._slice_encoder[1], self._slice_encoder[0].size) if self.guided else None
        scan = read_scan(Path(path), self.recipe, self.reading, self.table, wanted)
        self.say(scan.account())
        slices = slice_features(scan, *self._slice_encoder, self.device) if self.guided else None
        return scan.volume.to(self.device), slices, scan

    @cached_property
    def _slice_encoder(self):
        known = self.settings
        return find_slice_encoder(known.folder, known.data, known.slices, self.slice_encoder)

    def require_towers(self) -> None:
        """Raises InputError unless this is a dual encoder."""
        if self.has_decoder:
            raise InputError(
                f"{self.folder}: is a run of stage {self.stage}, a language model; name a dual encoder's, "
                f"stage clip1 or clip2"
            )

    def finite(self, vectors: Tensor) -> Tensor:
        """(1, C) -> (C,) on the CPU. Raises InputError for NaN or infinity."""
        if not vectors.isfinite().all():
            raise InputError(
                f"{self.checkpoint.folder}: gives embeddings with NaN or infinity; choose another checkpoint"
            )
        return vectors[0].float().cpu()


def contradictions(cues: list[dict], report: str) -> list[str]:
    """Return a line for each of CT-RATE's findings, and its sides, that cues and report say otherwise of.

    The report is read by rules, which know no others; sides are compared where both tell some.
    """
    named = rule_places(clean_report(report))
    lines = []
    for row in cues:
        name, written = row["name"], named.get(row["name"])
        if name not in FINDING_WORDS:
            continue
        if row["present"] != (written is not None):
            told, said = ("present", "not named") if row["present"] else ("absent", "named")
            lines.append(f"{name}: {told} by its probability, {said} in the report")
        elif written:
            sides = {word for place in row["places"] for word in place.split()} & {"right", "left"}
            if sides and written[0] and sides != written[0]:
                told, said = (" and ".join(sorted(found)) for found in (sides, written[0]))
                lines.append(f"{name}: {told} by its probability, {said} in the report")
    return lines


def class_task(prompts: str, label_set: str) -> zeroshot.Task:
    """Zero-shot classification without labels: all classes of the label set, else of the prompts."""
    texts, known = zeroshot.load_prompts(prompts), load_label_set(label_set)
    names = list(known.columns or texts.texts)
    nothing = LabelTable(Path(label_set), names, {"scan": dict.fromkeys(names, 0)})
    return zeroshot.define_task(texts, known, nothing, ["scan"])


def _has_map(encoder) -> bool:
    regions = isinstance(encoder, ReafVisionConfig) and encoder.fusion is not None and encoder.regions > 0
    return regions or isinstance(encoder, GuidedVisionConfig)
