"""A language model that sees, built from its settings."""

import torch

from reaf_hsenet.errors import InputError
from reaf_hsenet.models.clip import build_vision
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.findings import FindingsHead
from reaf_hsenet.models.lora import add_lora
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.models.packer import (
    AveragePool,
    M3DPool,
    Projector,
    SequencePool,
    Size3,
    SpatialPacker,
)
from reaf_hsenet.models.qformer import QFormer
from reaf_hsenet.models.text_guided import TextGuidedProjector

PROJECTORS: dict[str, type[Projector]] = {
    "spatial_packer": SpatialPacker,
    "average_pool": AveragePool,
    "sequence_pool": SequencePool,
    "m3d_pool": M3DPool,
    "qformer": QFormer,
    "text_guided": TextGuidedProjector,
}


def build_projector(
    name: str, width: int, out_width: int, grid: Size3, kernel: Size3 | None = None, **options
) -> Projector:
    """Build a projector by name, C -> C_out. options: of its class. Raises ValueError for another name."""
    if name not in PROJECTORS:
        raise ValueError(f"projector {name!r}, expected one of {', '.join(PROJECTORS)}")
    return PROJECTORS[name](width, out_width, grid, kernel, **options)


def visual_tokens(config: MllmConfig) -> int:
    """Return the number of tokens that the decoder sees of a volume."""
    with torch.device("meta"):
        return build_mllm(config).visual_tokens


def new_decoder(config: DecoderConfig) -> Decoder:
    """Build a decoder to train from scratch. A product's outputs are as large as its inputs, at any width."""
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return decoder


def build_mllm(config: MllmConfig, decoder: Decoder | None = None) -> Mllm:
    """Build the model. decoder: with its weights and the rows of the image tokens; None makes a new one."""
    decoder = new_decoder(config.decoder) if decoder is None else decoder
    encoders = [build_vision(encoder) for encoder in config.encoders]
    projectors = []
    for encoder in config.encoders[: 1 if config.shared else None]:
        options = {}
        if "slices" in PROJECTORS[config.projector].needs:
            guided = next((e for e in config.encoders if hasattr(e, "slice_width")), None)
            if guided is None:
                raise InputError(
                    f"--projector {config.projector}: needs slice features; choose --vision dual or 2e3"
                )
            options = {"slices": guided.slices, "slice_width": guided.slice_width}
        try:
            made = build_projector(
                config.projector, encoder.width, config.decoder.width, encoder.grid, config.kernel, **options
            )
        except ValueError as error:
            raise InputError(f"--projector {config.projector}, --kernel {config.kernel}: {error}") from error
        projectors.append(made)
    head = None
    if config.cues != "none":
        widths = [encoder.width for encoder in config.encoders]
        head = FindingsHead(widths, config.findings, config.cue_dropout)
    model = Mllm(encoders, projectors, decoder, head)
    model.encoders.requires_grad_(config.train_vision)
    if not config.full:
        decoder.requires_grad_(False)
        adapt_decoder(decoder, config)
    return model


def adapt_decoder(decoder: Decoder, config: MllmConfig) -> None:
    """Adapt every linear layer of the blocks, as published.

    Fused matrices get one adapter for Phi, and one for each part for Llama, whose files have the parts
    separately.
    """
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    targets = [
        name
        for whole, parts in fused.items()
        for name in (parts if config.decoder.family == "llama" else (whole,))
    ]
    add_lora(decoder.layers, (*targets, "o_proj", "down_proj"), config.r, config.alpha, config.dropout)


def trained_state(model: Mllm) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint holds, those that are trained. The run points to the others."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    state = model.state_dict()
    return {
        n: t for n, t in state.items() if n not in frozen and not n.startswith("encoders.") or n in trained
    }
