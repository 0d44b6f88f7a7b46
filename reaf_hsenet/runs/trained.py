"""What was trained, rebuilt: runs of this project from their folders, and published weights as they are.

evaluate.py, infer.py and train.py take a file or folder of published weights wherever they take a run;
nothing is converted or written.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reaf_hsenet.config import ClipConfig, GuidedVisionConfig, Recipe
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256, find_folder, fingerprint, is_hub_id, visible
from reaf_hsenet.models.clip import DualEncoder, adapt, build_dual_encoder
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.mllm_config import MllmConfig, build_mllm, trained_state
from reaf_hsenet.models.packed import pack
from reaf_hsenet.runs.checkpoint import Choice, Run, weights_sha256
from reaf_hsenet.runs.dual import load_published_dual, open_source
from reaf_hsenet.runs.language import load_published_language
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import load_tokenizer, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, WordPiece
from reaf_hsenet.weights import load_strictly
from reaf_hsenet.weights.decoder import FILES, load_decoder, resize_vocabulary
from reaf_hsenet.weights.loading import require_fit
from reaf_hsenet.weights.reading import SUFFIXES

STAGES = ("mrg", "vqa")


@dataclass
class DualEncoderRun:
    """A trained dual encoder with what its inputs must be. origin: what its weights started from."""

    folder: Path
    stage: str
    preset: str
    model: DualEncoder
    config: ClipConfig
    recipe: Recipe
    tokenizer: WordPiece
    checkpoint: Choice
    weights: Path
    data: Path | None
    origin: dict
    slices: dict | None

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return isinstance(self.config.vision, GuidedVisionConfig)

    def sha256(self) -> str:
        """Of the checkpoint's weights, by which a run knows its teacher wherever that is moved to."""
        return weights_sha256(self.weights)


def load_dual_encoder(
    folder: Path, which: str | None = None, text_model: str | None = None
) -> DualEncoderRun:
    """Rebuild a clip1 or clip2 run's model; or that of a published checkpoint, a file or a folder.

    which: the checkpoint, as of Run.choose. text_model: where a published text encoder's vocab.txt is, when
    not beside its checkpoint. Raises InputError when the folder holds no such run or its weights do not fit.
    """
    if is_published(folder):
        run = load_published(folder, text_model)
        if not isinstance(run, DualEncoderRun):
            raise InputError(f"{folder}: is HSENet's language model; expected a dual encoder")
        return run
    if text_model is not None:
        raise InputError(
            f"--text-model: is of published weights; the run {folder} knows its own vocabulary, leave it out"
        )
    run = Run(folder)
    values = run.read_config()
    if values.get("stage") not in ("clip1", "clip2"):
        raise InputError(
            f"{folder}: is a run of stage {values.get('stage')!r}; expected a dual encoder, stage clip1 or "
            f"clip2"
        )
    source = str(run.folder / "config.json")
    config, recipe = (
        from_dict(ClipConfig, values["model"], source),
        from_dict(Recipe, values["recipe"], source),
    )
    state, checkpoint = run.load_model(which)
    with torch.device("meta"):  # sizes that the weights do not have are not built
        require_fit(state, _run_model(config).state_dict(), str(checkpoint.folder / "model.safetensors"))
    tokenizer, origin = load_wordpiece(run.folder), values.get("origin") or {}
    short = len(tokenizer.vocab) < config.text.vocab and not origin.get(
        "text_model"
    )  # a published one may have spare rows
    if short or len(tokenizer.vocab) > config.text.vocab:
        raise InputError(
            f"{run.folder / 'vocab.txt'}: has {len(tokenizer.vocab)} tokens, the run's text encoder "
            f"{config.text.vocab}; put the run's own back"
        )
    model = _run_model(config)
    model.load_state_dict(state)
    return DualEncoderRun(
        folder=Path(folder),
        stage=values["stage"],
        preset=values.get("preset", ""),
        model=model.eval(),
        config=config,
        recipe=recipe,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        weights=checkpoint.folder / "model.safetensors",
        data=Path(values["data"]) if values["data"] else None,
        origin=origin,
        slices=values.get("slices"),
    )


def _run_model(config: ClipConfig) -> DualEncoder:
    model = build_dual_encoder(config)
    if config.lora:
        adapt(model, config.lora)
    return model


def is_published(path: Path) -> bool:
    """Whether this is a file, or a folder with weights that no run of ours wrote."""
    path = Path(path)
    if Run(path).named:  # one of a run's checkpoints
        return False
    if path.is_dir() and not (path / "checkpoints").is_dir():
        return any(file.suffix in SUFFIXES for file in path.iterdir())
    return path.is_file() and path.suffix in SUFFIXES


def load_source(path: Path | str, text_model: str | None, sha256: str | None = None) -> DualEncoderRun:
    """Load a run that another run came from, or published weights, whose vocabulary lies where that run's
    did.

    sha256: hash of the weights that the other run had. The checkpoint with these is taken, whichever the path
    names now.
    """
    path = Path(path)
    if is_published(path):
        return load_dual_encoder(path, None, text_model)
    run = Run(path)
    had = run.holding(sha256) if sha256 else None
    return load_dual_encoder(run.folder, had) if had else load_dual_encoder(path)


def locate_run(name: str) -> Path:
    """A path as it is; a hub id, fetched."""
    if Path(name).exists() or not is_hub_id(name):
        return Path(name)
    return find_folder(name, [*(f"*{suffix}" for suffix in SUFFIXES), "*.json", "vocab.txt"])


@dataclass
class MllmRun:
    """A trained language model that sees, with what its inputs must be.

    origin: what it started from. compiled: whether steps of generation run as one compiled graph.
    """

    folder: Path
    stage: str
    preset: str
    model: Mllm
    config: MllmConfig
    recipe: Recipe
    tokenizer: Tokenizer
    checkpoint: Choice
    weights: Path
    data: Path | None
    origin: dict
    slices: dict | None
    train: dict
    compiled: bool = False

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return any(isinstance(encoder, GuidedVisionConfig) for encoder in self.config.encoders)

    def sha256(self) -> str:
        """Of the checkpoint's weights."""
        return weights_sha256(self.weights)

    def place(self, device: torch.device, compiled: bool = False) -> None:
        """Put the model on its device for inference: on a processor its decoder's weights are packed for its
        kernels.

        compiled: run the steps of generation as one compiled graph, on a GPU.
        """
        check_compiled(compiled, device)
        self.compiled = compiled
        self.model.to(device)
        if device.type == "cpu":
            pack(self.model.decoder)

    def base_sha256(self) -> dict:
        """Of the weights that the checkpoint's stand on: encoders, and the decoder's files."""
        encoders, decoder = (self.origin.get(part) or {} for part in ("encoders", "decoder"))
        known = decoder.get("sha256") or decoder.get("fingerprint")
        return {"encoders": [encoder["sha256"] for encoder in encoders], "decoder": known}


def check_compiled(compiled: bool, device: torch.device) -> None:
    if compiled and device.type != "cuda":
        raise InputError(
            "--compile: is for a GPU; a processor's decoder is packed for its kernels anyway, leave the "
            "flag out"
        )


def load_mllm(
    folder: Path | str,
    which: str | None = None,
    dtype: torch.dtype | None = None,
    decoder: str | None = None,
    encoders: str | None = None,
    text_model: str | None = None,
) -> MllmRun:
    """Rebuild an mrg or vqa run's model: what it trained from its checkpoint, the rest from where its
    config.json points.

    which: the checkpoint, as of Run.choose. dtype: of the decoder; None keeps that of its files. decoder,
    encoders,
    text_model: of HSENet's published packers and adapters, a file or folder in place of a run, what they
    stand on. Raises InputError when the folder holds no such run, or when something does not fit, is absent
    or has changed since.
    """
    if is_published(Path(folder)):
        run = load_published(folder, text_model, decoder, encoders, dtype)
        if not isinstance(run, MllmRun):
            raise InputError(
                f"{folder}: is a dual encoder, which has no decoder; expected HSENet's packers and adapters"
            )
        return run
    for name, value in (("decoder", decoder), ("encoders", encoders), ("text-model", text_model)):
        if value is not None:
            raise InputError(
                f"--{name}: is of published weights; the run {folder} knows its own, leave it out"
            )
    run = Run(folder)
    values = run.read_config()
    if values.get("stage") not in STAGES:
        raise InputError(
            f"{folder}: is a run of stage {values.get('stage')!r}, which has no decoder; expected one of "
            f"stage mrg or vqa"
        )
    config = from_dict(MllmConfig, values["model"], str(run.folder / "config.json"))
    origin, tokenizer = values.get("origin") or {}, load_tokenizer(run.folder)
    frozen = [
        name for name, trained in (("decoder", config.full), ("encoders", config.train_vision)) if not trained
    ]
    if absent := [name for name in frozen if not origin.get(name)]:
        raise InputError(
            f"{run.folder / 'config.json'}: origin does not say where the {absent[0]} lies; restore the file"
        )
    states = None if config.train_vision else encoder_states(origin["encoders"])
    state, checkpoint = run.load_model(which)
    model = build_run_model(
        config, origin, state, states, str(checkpoint.folder / "model.safetensors"), dtype
    )
    return MllmRun(
        folder=Path(folder),
        stage=values["stage"],
        preset=values.get("preset", ""),
        model=model,
        config=config,
        recipe=from_dict(Recipe, values["recipe"], str(run.folder / "config.json")),
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        weights=checkpoint.folder / "model.safetensors",
        data=Path(values["data"]) if values["data"] else None,
        origin=origin,
        slices=values.get("slices"),
        train=values.get("train") or {},
    )


def build_run_model(
    config: MllmConfig,
    origin: dict,
    state: dict,
    encoders: Iterable[dict] | None,
    source: str,
    dtype: torch.dtype | None,
) -> Mllm:
    """state: what was trained; encoders: dual encoders' tensors, where the encoders are not among it."""
    model = build_mllm(config, None if config.full else base_decoder(config, origin, dtype))
    if encoders is not None:
        fill_encoders(model, encoders, source)
    load_strictly(model, state, source, trained_state(model))
    if dtype is not None:
        model.decoder.to(dtype)
    return model.eval()


def base_decoder(config: MllmConfig, origin: dict, dtype: torch.dtype | None = None) -> Decoder:
    """The published decoder that training starts from, or adapters stand on, with rows for the added
    tokens.
    """
    known = origin["decoder"]
    kind, of = (
        ("fingerprint", fingerprint) if "fingerprint" in known else ("sha256", file_sha256)
    )  # of earlier versions
    if decoder_hashes(known["name"], of) != known[kind]:
        raise InputError(
            f"{known['name']}: its weights are not those that the run was trained on; fetch that revision"
        )
    decoder = load_decoder(known["name"], dtype, int8=config.int8)
    resize_vocabulary(decoder, config.decoder.vocab, known["added"])
    return decoder


def decoder_hashes(name: str, of: Callable[[Path], str]) -> dict[str, str]:
    """Return a hash of each file of a decoder folder's weights; of: file_sha256, which reads all of it,
    or fingerprint.
    """
    return {path.name: of(path) for path in visible(find_folder(name, FILES), "*.safetensors")}


def fill_encoders(model: Mllm, states: Iterable[dict[str, Tensor]], source: str) -> None:
    """Vision encoders from the tensors of their dual encoders."""
    for encoder, state in zip(model.encoders, states, strict=True):
        load_strictly(encoder, encoder_state(state), source)


def encoder_states(sources: list[dict]) -> Iterator[dict[str, Tensor]]:
    """Tensors of the dual-encoder runs that the vision encoders come from, by what origin["encoders"]
    says of each.
    """
    for source in sources:
        run = load_source(source["run"], source.get("text_model"), source["sha256"])
        if run.sha256() != source["sha256"]:
            raise InputError(
                f"{run.folder}: none of its checkpoints is the encoder that the run was trained on; put "
                f"that one back"
            )
        yield merged_state(run.model)


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision encoder's part of a dual encoder's tensors."""
    return {name.removeprefix("vision."): t for name, t in state.items() if name.startswith("vision.")}


def load_published(
    path: Path | str,
    text_model: str | None = None,
    decoder: str | None = None,
    encoders: str | None = None,
    dtype: torch.dtype | None = None,
) -> DualEncoderRun | MllmRun:
    """M3D-CLIP, HSENet's two stages, HLIP, REAF, or HSENet's language model, under their published names.

    text_model: where the text encoder's vocab.txt is, when not beside its weights. decoder, encoders: what
    packers and adapters stand on, Phi-4-mini and HSENet-2E3-CLIP. dtype: of the decoder; None keeps that of
    its files.
    Raises InputError for all that does not fit.
    """
    source = open_source(str(path))
    if source.family.kind == "language":
        if decoder is None or encoders is None:
            raise InputError(
                f"{path}: holds packers and adapters only; name what they stand on: --decoder "
                "microsoft/Phi-4-mini-instruct --encoders HSENET-2E3-CLIP"
            )
        published = load_published_language(source, decoder, encoders, text_model=text_model)
        if published.encoder is not None:
            states = [published.encoder.teacher.state, published.encoder.state]
            hashes = [file_sha256(published.encoder.source.file)]
        else:
            runs = [load_dual_encoder(run) for run in published.encoder_runs]
            states, hashes = [merged_state(run.model) for run in runs], [run.sha256() for run in runs]
        origin = {
            "published": source.family.key,
            "notes": list(published.notes),
            "decoder": published.decoder,
        }
        origin["encoders"] = [{"sha256": sha256} for sha256 in hashes]
        model = build_run_model(published.config, origin, published.state, states, source.name, dtype)
        known = {"stage": published.stage, "origin": origin, "train": {}}
    else:
        for name, value in (("decoder", decoder), ("encoders", encoders)):
            if value is not None:
                raise InputError(
                    f"--{name}: is of HSENet's packers and adapters; {path} is {source.family.name}, leave "
                    f"it out"
                )
        published = load_published_dual(source, text_model)
        where = str(Path(text_model).resolve()) if text_model and Path(text_model).exists() else text_model
        origin = {"published": source.family.key, "notes": list(published.notes), "text_model": where}
        model, known = published.model(), {"stage": published.stage, "origin": origin}
    return (MllmRun if source.family.kind == "language" else DualEncoderRun)(
        folder=Path(path),
        preset=f"{'reaf' if source.family.key in ('reaf', 'hlip') else 'hsenet'}-base",
        model=model,
        config=published.config,
        recipe=published.recipe,
        tokenizer=published.tokenizer,
        checkpoint=Choice(source.file),
        weights=source.file,
        data=None,
        slices=published.slices,
        **known,
    )
