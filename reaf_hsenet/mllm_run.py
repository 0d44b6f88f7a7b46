"""Runs of the language stages at work: rebuild one from its folder, the parts it points to included."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reaf_hsenet.checkpoint import Run
from reaf_hsenet.config import GuidedVisionConfig, Recipe, from_dict
from reaf_hsenet.embedding import load_dual_encoder
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import file_sha256
from reaf_hsenet.mllm_config import MllmConfig, build_mllm, trained_state
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.lora import merged_state
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.pretrained import find_folder, load_strictly
from reaf_hsenet.pretrained_decoder import FILES, load_decoder, resize_vocabulary
from reaf_hsenet.tokenizer import Tokenizer, load_tokenizer

STAGES = ("mrg", "vqa")


@dataclass
class MllmRun:
    """A trained language model that sees, with what its inputs must be. origin: what it started from."""

    folder: Path
    stage: str
    preset: str
    model: Mllm
    config: MllmConfig
    recipe: Recipe
    tokenizer: Tokenizer
    checkpoint: Path
    data: Path | None
    origin: dict
    slices: dict | None
    train: dict

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return any(isinstance(encoder, GuidedVisionConfig) for encoder in self.config.encoders)

    def sha256(self) -> str:
        """Of the checkpoint's weights."""
        return file_sha256(self.checkpoint / "model.safetensors")


def load_mllm(folder: Path | str, which: str = "best", dtype: torch.dtype | None = None) -> MllmRun:
    """Rebuild an mrg or vqa run's model: what it trained from its checkpoint, the rest from where its config.json points.

    dtype: of the decoder; None keeps that of its files. Raises InputError when the folder holds no such run, or when
    something does not fit, is absent or has changed since.
    """
    run = Run(folder)
    values = run.read_config()
    if values.get("stage") not in STAGES:
        raise InputError(
            f"{folder}: is a run of stage {values.get('stage')!r}, which has no decoder; expected one of stage mrg or vqa"
        )
    config, origin, tokenizer = MllmConfig.from_dict(values["model"]), values["origin"], load_tokenizer(run.folder)
    model = build_mllm(config, None if config.full else base_decoder(config, origin, dtype))
    if not config.train_vision:
        fill_encoders(model, origin["encoders"])
    state, checkpoint = run.load_model(which)
    load_strictly(model, state, str(checkpoint / "model.safetensors"), trained_state(model))
    if dtype is not None:
        model.decoder.to(dtype)
    return MllmRun(
        folder=Path(folder),
        stage=values["stage"],
        preset=values["preset"],
        model=model.eval(),
        config=config,
        recipe=from_dict(Recipe, values["recipe"]),
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        data=Path(values["data"]) if values["data"] else None,
        origin=origin,
        slices=values["slices"],
        train=values["train"],
    )


def base_decoder(config: MllmConfig, origin: dict, dtype: torch.dtype | None = None) -> Decoder:
    """The published decoder that training starts from, or adapters stand on, with rows for the added tokens."""
    known = origin["decoder"]
    decoder = load_decoder(known["name"], dtype, int8=config.int8)
    resize_vocabulary(decoder, config.decoder.vocab, known["added"])
    if decoder_sha256(known["name"]) != known["sha256"]:
        raise InputError(f"{known['name']}: its weights are not those that the run was trained on; fetch that revision")
    return decoder


def decoder_sha256(name: str) -> dict[str, str]:
    """Hashes of a decoder folder's weights by file name."""
    return {path.name: file_sha256(path) for path in sorted(find_folder(name, FILES).glob("*.safetensors"))}


def fill_encoders(model: Mllm, sources: list[dict]) -> None:
    """Vision encoders from the dual-encoder runs they come from, by what origin["encoders"] says of each."""
    for encoder, source in zip(model.encoders, sources, strict=True):
        run = load_dual_encoder(source["run"], source.get("checkpoint", "best"))
        if run.sha256() != source["sha256"]:
            raise InputError(
                f"{run.folder}: its best checkpoint is not the encoder that the run was trained on; put that one back"
            )
        load_strictly(encoder, encoder_state(merged_state(run.model)), str(run.checkpoint))


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vision encoder's part of a dual encoder's tensors."""
    return {name.removeprefix("vision."): t for name, t in state.items() if name.startswith("vision.")}
