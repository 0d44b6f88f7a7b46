"""What was trained, rebuilt: runs of this project from their folders, and published weights as they are.

evaluate.py, infer.py and train.py take a file or folder of published weights wherever they take a run;
nothing is converted or written.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from reaf_hsenet.config import CONTRASTIVE, LANGUAGE, ClipConfig, Recipe, Size3
from reaf_hsenet.data.language import cue_ids
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256, find_folder, is_hub_id
from reaf_hsenet.models.clip import DualEncoder, adapt, build_dual_encoder
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.checkpoint import Choice, Run, weights_sha256
from reaf_hsenet.runs.published import PublishedRun, dual_encoder, open_source
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, WordPiece
from reaf_hsenet.weights.files import SUFFIXES, State, check_finite, require_fit
from reaf_hsenet.weights.published import Published


@dataclass
class Trained:
    """A trained model with what its inputs must be.

    model: of the stages clip1 and clip2 a dual encoder, else a language model that sees. weights: the file
    that identifies it. origin: what its weights started from. training_sha256: of the names of the training
    volumes, where that is known. compiled: whether steps of generation run as one compiled graph.
    """

    folder: Path
    stage: str
    preset: str
    model: nn.Module
    config: ClipConfig | MllmConfig
    recipe: Recipe
    tokenizer: Tokenizer | WordPiece
    checkpoint: Choice
    weights: Path
    data: Path | None
    origin: dict
    slices: dict | None
    train: dict = field(default_factory=dict)
    training_sha256: str | None = None
    compiled: bool = False

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return self.config.guided

    def sha256(self) -> str:
        """Return the hash of the weights, by which a run knows its teacher wherever that is moved to."""
        return weights_sha256(self.weights)

    def base_sha256(self) -> dict:
        """Return hashes of the weights that a language model stands on: encoders, and the decoder's files."""
        encoders, decoder = (self.origin.get(part) or {} for part in ("encoders", "decoder"))
        known = decoder.get("sha256") or decoder.get("fingerprint")
        return {"encoders": [encoder["sha256"] for encoder in encoders], "decoder": known}

    def place(self, device: torch.device, compiled: bool = False) -> None:
        """Put the model on its device for inference; on a processor its decoder is packed for its kernels.

        compiled: run the steps of generation as one compiled graph, on a GPU.
        """
        check_compiled(compiled, device)
        self.compiled = compiled
        self.model.to(device)
        if device.type == "cpu" and self.stage in LANGUAGE:
            from reaf_hsenet.models.packed import pack

            pack(self.model.decoder)


def check_compiled(compiled: bool, device: torch.device) -> None:
    if compiled and device.type != "cuda":
        raise InputError(
            "--compile: is for a GPU; a processor's decoder is packed for its kernels anyway, leave the "
            "flag out"
        )


def load_trained(
    name: Path | str,
    which: str | None = None,
    stages: tuple[str, ...] = (*CONTRASTIVE, *LANGUAGE),
    dtype: torch.dtype | None = None,
    text_model: str | None = None,
    decoder: str | None = None,
    encoders: str | None = None,
) -> Trained:
    """Rebuild the model of a run, or of published weights: a file or a folder.

    Of a language model, what was trained is in the checkpoint, the rest where config.json points. which: the
    checkpoint, see Run.choose. stages: those expected, CONTRASTIVE or LANGUAGE. dtype: of a decoder; None
    keeps that of its files. text_model, decoder, encoders: of published weights, see `published_run`. Raises
    InputError when there is no such model, or when something does not fit, is absent or has changed since.
    """
    named = {"text_model": text_model, "decoder": decoder, "encoders": encoders}
    if is_published(Path(name)):
        return _load_published(name, stages, dtype, named)
    for flag, value in named.items():
        if value is not None:
            raise InputError(
                f"--{flag.replace('_', '-')}: is of published weights; the run {name} knows its own, leave "
                f"it out"
            )
    run = Run(name)
    values, source = run.read_config(), str(run.folder / "config.json")
    stage, origin = values.get("stage"), values.get("origin") or {}
    if stage not in stages or stage not in (*CONTRASTIVE, *LANGUAGE):
        raise InputError(f"{name}: is a run of stage {stage!r}{_expected(stages)}")
    language = stage in LANGUAGE
    config = from_dict(MllmConfig if language else ClipConfig, values["model"], source)
    tokenizer = load_tokenizer(run.folder) if language else _own_vocabulary(run.folder, config, origin)
    states = None
    if language:
        for part, trained in (("decoder", config.full), ("encoders", config.train_vision)):
            if not trained and not origin.get(part):
                raise InputError(f"{source}: origin does not say where the {part} lies; restore the file")
        states = None if config.train_vision else encoder_states(origin["encoders"])
    state, checkpoint = run.load_model(which)
    weights = checkpoint.folder / "model.safetensors"
    if language:
        from reaf_hsenet.runs.language import build_language_model  # with the decoder

        model = build_language_model(config, origin, state, encoders=states, source=str(weights), dtype=dtype)
        model.cue_ids = partial(cue_ids, tokenizer, config.findings)
    else:
        model = build_encoders(config, state, str(weights))
    return Trained(
        folder=Path(name),
        stage=stage,
        preset=values.get("preset", ""),
        model=model,
        config=config,
        recipe=from_dict(Recipe, values["recipe"], source),
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        weights=weights,
        data=Path(values["data"]) if values["data"] else None,
        origin=origin,
        slices=values.get("slices"),
        train=values.get("train") or {},
        training_sha256=values.get("training_sha256"),
    )


def _expected(stages: tuple[str, ...]) -> str:
    if stages == CONTRASTIVE:
        return "; expected a dual encoder, stage clip1 or clip2"
    return f"{', which has no decoder' if stages == LANGUAGE else ''}; expected one of {', '.join(stages)}"


def _own_vocabulary(folder: Path, config: ClipConfig, origin: dict) -> WordPiece:
    tokenizer = load_wordpiece(folder)
    spare = config.text.vocab - len(tokenizer.vocab)  # rows that a published text encoder may have
    if spare < 0 or spare and not origin.get("text_model"):
        raise InputError(
            f"{folder / 'vocab.txt'}: has {len(tokenizer.vocab)} tokens, the run's text encoder "
            f"{config.text.vocab}; put the run's own back"
        )
    return tokenizer


def _load_published(
    name: Path | str, stages: tuple[str, ...], dtype: torch.dtype | None, named: dict
) -> Trained:
    """Rebuild M3D-CLIP, HSENet's two stages, HLIP, REAF, or HSENet's language model."""
    source = open_source(str(name))
    language = source.family.kind == "language"
    if source.family.kind in ("dual", "language") and ("mrg" if language else "clip1") not in stages:
        raise InputError(f"{name}: is {source.family.name}{_expected(stages)}")
    published = published_run(source, **named)
    origin = {"published": source.family.key, "notes": list(published.notes)}
    if language:
        hashes, states = _encoders_beneath(published)
        origin |= {"decoder": published.decoder, "encoders": [{"sha256": sha256} for sha256 in hashes]}
        from reaf_hsenet.runs.language import build_language_model

        model = build_language_model(
            published.config, origin, published.state, encoders=states, source=source.name, dtype=dtype
        )
    else:
        text_model = named["text_model"]
        there = text_model and Path(text_model).exists()
        origin["text_model"] = str(Path(text_model).resolve()) if there else text_model
        model = build_encoders(published.config, published.state, source.name)
    return Trained(
        folder=Path(name),
        stage=published.stage,
        preset=f"{source.family.starts or 'hsenet'}-base",
        model=model,
        config=published.config,
        recipe=published.recipe,
        tokenizer=published.tokenizer,
        checkpoint=Choice(source.file),
        weights=source.file,
        data=None,
        origin=origin,
        slices=published.slices,
    )


def published_run(
    source: Published,
    text_model: str | None = None,
    size: Size3 | None = None,
    slice_encoder: str | None = None,
    decoder: str | None = None,
    encoders: str | None = None,
    stage: str | None = None,
) -> PublishedRun:
    """Complete a published checkpoint.

    text_model: folder or hub id with the text encoder's vocab.txt, by default the checkpoint's own folder.
    size: of the input, in place of its own; position tables are resampled. slice_encoder: file, folder or hub
    id of what makes the slice features of a 2E3 encoder. decoder, encoders, stage: of packers and adapters
    only; what they stand on, see `language_model`. Raises InputError for all that does not fit.
    """
    own = {"decoder": decoder, "encoders": encoders, "stage": stage}
    if source.family.kind == "language":
        if decoder is None or encoders is None:
            raise InputError(
                f"{source.name}: holds packers and adapters only; name what they stand on: --decoder "
                "microsoft/Phi-4-mini-instruct --encoders HSENET-2E3-CLIP"
            )
        if size:
            raise InputError("--size: packers are made for one grid of patches; leave it out")
    else:
        for flag, value in own.items():
            if value is not None:
                raise InputError(
                    f"--{flag}: is of HSENet's packers and adapters; {source.name} is {source.family.name}, "
                    f"leave it out"
                )
        if source.family.kind != "dual":
            raise InputError(
                f"{source.name}: is {source.family.name}, which is not converted; use it with: "
                f"{source.family.uses[0]}"
            )
    check_finite(source.tensors, source.name)
    if source.family.kind == "dual":
        return dual_encoder(source, text_model, size, slice_encoder)
    from reaf_hsenet.runs.language import language_model

    return language_model(
        source, decoder, encoders, stage=stage or "mrg", text_model=text_model, slice_encoder=slice_encoder
    )


def _encoders_beneath(published: PublishedRun) -> tuple[list[str], list[State]]:
    """Return hashes and tensors of the dual encoders that published packers stand on."""
    if isinstance(published.beneath[-1], PublishedRun):  # one file has both
        return [file_sha256(published.beneath[-1].source.file)], [run.state for run in published.beneath]
    runs = [load_trained(path, stages=CONTRASTIVE) for path in published.beneath]
    return [run.sha256() for run in runs], [merged_state(run.model) for run in runs]


def is_published(path: Path) -> bool:
    """Return whether this is a file, or a folder with weights that no run of ours wrote."""
    path = Path(path)
    if Run(path).named:  # one of a run's checkpoints
        return False
    if path.is_dir() and not (path / "checkpoints").is_dir():
        return any(file.suffix in SUFFIXES for file in path.iterdir())
    return path.is_file() and path.suffix in SUFFIXES


def results_folder(name: Path | str) -> Path:
    """Return where the results of a run lie: in its folder, or, for published weights, in one here."""
    return Path("eval") / Path(name).stem if is_published(Path(name)) else Run(name).folder / "eval"


def load_source(path: Path | str, text_model: str | None, sha256: str | None = None) -> Trained:
    """Load the dual encoder that another run came from.

    text_model: where its vocabulary lay, of published weights. sha256: hash of the weights that the other run
    had; the checkpoint with these is taken, whichever the path names now.
    """
    if is_published(Path(path)):
        return load_trained(path, stages=CONTRASTIVE, text_model=text_model)
    run = Run(path)
    had = run.holding(sha256) if sha256 else None
    return load_trained(run.folder if had else path, had, CONTRASTIVE)


def locate_run(name: str) -> Path:
    """Return a path as it is; of a hub id, the folder that it was fetched into."""
    if Path(name).exists() or not is_hub_id(name):
        return Path(name)
    return find_folder(name, [*(f"*{suffix}" for suffix in SUFFIXES), "*.json", "vocab.txt"])


def build_encoders(config: ClipConfig, state: State, source: str) -> DualEncoder:
    """Build a dual encoder with these weights. Raises InputError when they do not fit."""

    def build() -> DualEncoder:
        model = build_dual_encoder(config)
        if config.lora:
            adapt(model, config.lora)
        return model

    with torch.device("meta"):  # sizes that the weights do not have are not built
        require_fit(state, build().state_dict(), source)
    model = build()
    model.load_state_dict(state)
    return model.eval()


def encoder_states(sources: list[dict]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of the dual-encoder runs that the vision encoders come from.

    sources: origin["encoders"] of the run.
    """
    for source in sources:
        run = load_source(source["run"], source.get("text_model"), source["sha256"])
        if run.sha256() != source["sha256"]:
            raise InputError(
                f"{run.folder}: none of its checkpoints is the encoder that the run was trained on; put "
                f"that one back"
            )
        yield merged_state(run.model)
