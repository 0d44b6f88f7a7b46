"""Runs of the language stages at work: rebuild one from its folder, the parts it points to included."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reaf_hsenet.checkpoint import Choice, Run, weights_sha256
from reaf_hsenet.config import GuidedVisionConfig, Recipe
from reaf_hsenet.embedding import is_published, load_source
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256, fingerprint, visible
from reaf_hsenet.mllm_config import MllmConfig, build_mllm, trained_state
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.packed import pack
from reaf_hsenet.pretrained import find_folder, load_strictly
from reaf_hsenet.pretrained_decoder import FILES, load_decoder, resize_vocabulary
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer import Tokenizer, load_tokenizer

STAGES = ("mrg", "vqa")


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
        """Put the model on its device for inference: on a processor its decoder's weights are packed for its kernels.

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
        raise InputError("--compile: is for a GPU; a processor's decoder is packed for its kernels anyway, leave the flag out")


def load_mllm(
    folder: Path | str,
    which: str | None = None,
    dtype: torch.dtype | None = None,
    decoder: str | None = None,
    encoders: str | None = None,
    text_model: str | None = None,
) -> MllmRun:
    """Rebuild an mrg or vqa run's model: what it trained from its checkpoint, the rest from where its config.json points.

    which: the checkpoint, as of Run.choose. dtype: of the decoder; None keeps that of its files. decoder, encoders,
    text_model: of HSENet's published packers and adapters, a file or folder in place of a run, what they stand on. Raises InputError when the folder holds no such
    run, or when something does not fit, is absent or has changed since.
    """
    if is_published(Path(folder)):
        from reaf_hsenet.published_run import load_published  # which takes all of the package with it

        run = load_published(folder, text_model, decoder, encoders, dtype)
        if not isinstance(run, MllmRun):
            raise InputError(f"{folder}: is a dual encoder, which has no decoder; expected HSENet's packers and adapters")
        return run
    for name, value in (("decoder", decoder), ("encoders", encoders), ("text-model", text_model)):
        if value is not None:
            raise InputError(f"--{name}: is of published weights; the run {folder} knows its own, leave it out")
    run = Run(folder)
    values = run.read_config()
    if values.get("stage") not in STAGES:
        raise InputError(
            f"{folder}: is a run of stage {values.get('stage')!r}, which has no decoder; expected one of stage mrg or vqa"
        )
    config = from_dict(MllmConfig, values["model"], str(run.folder / "config.json"))
    origin, tokenizer = values.get("origin") or {}, load_tokenizer(run.folder)
    frozen = [name for name, trained in (("decoder", config.full), ("encoders", config.train_vision)) if not trained]
    if absent := [name for name in frozen if not origin.get(name)]:
        raise InputError(f"{run.folder / 'config.json'}: origin does not say where the {absent[0]} lies; restore the file")
    states = None if config.train_vision else encoder_states(origin["encoders"])
    state, checkpoint = run.load_model(which)
    model = build_run_model(config, origin, state, states, str(checkpoint.folder / "model.safetensors"), dtype)
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
    config: MllmConfig, origin: dict, state: dict, encoders: Iterable[dict] | None, source: str, dtype: torch.dtype | None
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
    """The published decoder that training starts from, or adapters stand on, with rows for the added tokens."""
    known = origin["decoder"]
    kind, of = ("fingerprint", fingerprint) if "fingerprint" in known else ("sha256", file_sha256)  # of earlier versions
    if decoder_hashes(known["name"], of) != known[kind]:
        raise InputError(f"{known['name']}: its weights are not those that the run was trained on; fetch that revision")
    decoder = load_decoder(known["name"], dtype, int8=config.int8)
    resize_vocabulary(decoder, config.decoder.vocab, known["added"])
    return decoder


def decoder_hashes(name: str, of: Callable[[Path], str]) -> dict[str, str]:
    """Return a hash of each file of a decoder folder's weights; of: file_sha256, which reads all of it, or fingerprint."""
    return {path.name: of(path) for path in visible(find_folder(name, FILES), "*.safetensors")}


def fill_encoders(model: Mllm, states: Iterable[dict[str, Tensor]], source: str) -> None:
    """Vision encoders from the tensors of their dual encoders."""
    for encoder, state in zip(model.encoders, states, strict=True):
        load_strictly(encoder, encoder_state(state), source)


def encoder_states(sources: list[dict]) -> Iterator[dict[str, Tensor]]:
    """Tensors of the dual-encoder runs that the vision encoders come from, by what origin["encoders"] says of each."""
    for source in sources:
        run = load_source(source["run"], source.get("text_model"), source["sha256"])
        if run.sha256() != source["sha256"]:
            raise InputError(
                f"{run.folder}: none of its checkpoints is the encoder that the run was trained on; put that one back"
            )
        yield merged_state(run.model)


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision encoder's part of a dual encoder's tensors."""
    return {name.removeprefix("vision."): t for name, t in state.items() if name.startswith("vision.")}
