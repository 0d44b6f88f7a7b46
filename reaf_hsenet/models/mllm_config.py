"""Settings of a language model that sees, and how it is built from them."""

from dataclasses import MISSING, dataclass
from typing import Literal

import torch

from reaf_hsenet.config import (
    D_H_W,
    DECODER_LORA,
    LANGUAGE,
    LARGEST,
    GuidedVisionConfig,
    Size3,
    VisionConfig,
)
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.clip import build_vision
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig, RopeConfig
from reaf_hsenet.models.lora import add_lora
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.projectors import PROJECTORS, build_projector
from reaf_hsenet.settings import check_ranges, setting
from reaf_hsenet.tokenizer.tokenizer import Tokenizer

# The encoders whose patch tokens the decoder sees.
VISION = {"dual": ("stage1", "2e3"), "stage1": ("stage1",), "2e3": ("2e3",), "reaf": ("reaf",)}
TINY_KERNEL = (1, 2, 2)  # the tiny presets' grid is 4 x 4 x 4


def tiny_decoder(tokenizer: Tokenizer) -> DecoderConfig:
    """A decoder that two cores train from nothing."""
    return DecoderConfig(
        family="llama",
        vocab=len(tokenizer),
        width=128,
        layers=3,
        heads=4,
        kv_heads=4,
        head_dim=32,
        mlp=384,
        context=1024,
        rope=RopeConfig(dims=32),
        tied=True,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
    )


def _language(default, help: str, **how):
    """Return the field of a setting with a flag of the language stages."""
    return setting(default, help, stages=LANGUAGE, **how)


@dataclass(frozen=True)
class MllmConfig:
    """vision: one of VISION; encoders: theirs, in that order. kernel: tokens that the projector packs into
    one.

    shared: one projector for both encoders. full: the whole decoder is trained; otherwise adapters of rank r,
    with alpha and dropout (published: 16, 32, 0.05), on a frozen decoder, which int8 may hold in eight bits.
    train_vision: the encoders are trained too (published: frozen).
    """

    vision: Literal[tuple(VISION)] = _language(
        MISSING, "encoders the decoder sees: stage 1's and 2E3, or one (default: dual, reaf)"
    )
    encoders: tuple[VisionConfig, ...]
    decoder: DecoderConfig
    projector: Literal[tuple(PROJECTORS)] = _language(
        "spatial_packer", "from patch tokens to visual tokens (default: spatial_packer)"
    )
    kernel: Size3 = _language(
        (1, 4, 4),
        "patch tokens that become one visual token (default: 1 4 4; tiny presets: 1 2 2)",
        metavar=D_H_W,
        above=0,
        most=LARGEST,
    )
    shared: bool = _language(False, "one projector for both encoders", flag="shared_projector")
    full: bool = _language(False, "train the whole decoder, not adapters")
    train_vision: bool = _language(False, "train the encoders too (default: with a new decoder)")
    int8: bool = _language(False, "hold the frozen decoder's weights in eight bits")
    r: int = _language(DECODER_LORA["r"], "rank", flag="lora_r", above=0, most=LARGEST)
    alpha: float = _language(DECODER_LORA["alpha"], "scale", flag="lora_alpha", above=0, most=1e30)
    dropout: float = _language(DECODER_LORA["dropout"], "rate", flag="lora_dropout", least=0, most=0.99)
    max_text: int = setting(800, above=0, most=LARGEST)

    def __post_init__(self):
        check_ranges(self)
        if self.vision not in VISION or len(self.encoders) != len(VISION[self.vision]):
            raise InputError(
                f"--vision {self.vision}: expected one of {', '.join(VISION)}, with its encoders"
            )
        if len({encoder.grid for encoder in self.encoders}) > 1 and self.shared:
            raise InputError(
                "--shared-projector: the two encoders have other token grids; leave the flag out"
            )

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return any(isinstance(encoder, GuidedVisionConfig) for encoder in self.encoders)


def visual_tokens(config: MllmConfig) -> int:
    """Return the number of tokens that the decoder sees of a volume."""
    with torch.device("meta"):
        return build_mllm(config).visual_tokens


def new_decoder(config: DecoderConfig) -> Decoder:
    """To be trained from nothing: of every product the outputs are as large as the inputs, whatever the
    width.
    """
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return decoder


def build_mllm(config: MllmConfig, decoder: Decoder | None = None) -> Mllm:
    """decoder: with its weights and the rows of the image tokens; without one a new decoder is made."""
    decoder = new_decoder(config.decoder) if decoder is None else decoder
    encoders = [build_vision(encoder) for encoder in config.encoders]
    projectors = []
    for encoder in config.encoders[: 1 if config.shared else None]:
        options = {}
        if config.projector == "text_guided":
            guided = next((e for e in config.encoders if hasattr(e, "slice_width")), None)
            if guided is None:
                raise InputError("--projector text_guided: needs slice features; choose --vision dual or 2e3")
            options = {"slices": guided.slices, "slice_width": guided.slice_width}
        try:
            made = build_projector(
                config.projector, encoder.width, config.decoder.width, encoder.grid, config.kernel, **options
            )
        except ValueError as error:
            raise InputError(f"--projector {config.projector}, --kernel {config.kernel}: {error}") from error
        projectors.append(made)
    model = Mllm(encoders, projectors, decoder)
    model.encoders.requires_grad_(config.train_vision)
    if not config.full:
        decoder.requires_grad_(False)
        adapt_decoder(decoder, config)
    return model


def adapt_decoder(decoder: Decoder, config: MllmConfig) -> None:
    """Adapters for every linear layer of the blocks, as published: of fused matrices one adapter for Phi,
    one for each part for Llama, whose files have the parts separately.
    """
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    targets = [
        name
        for whole, parts in fused.items()
        for name in (parts if config.decoder.family == "llama" else (whole,))
    ]
    add_lora(decoder.layers, (*targets, "o_proj", "down_proj"), config.r, config.alpha, config.dropout)


def trained_state(model: Mllm) -> dict[str, torch.Tensor]:
    """What a checkpoint of this model holds: what is trained. The rest is in the files that the run
    points to.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in model.named_parameters()} - trained
    state = model.state_dict()
    return {
        n: t for n, t in state.items() if n not in frozen and not n.startswith("encoders.") or n in trained
    }
