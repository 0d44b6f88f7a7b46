"""Settings of a language model that sees."""

from dataclasses import MISSING, dataclass
from typing import Literal

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
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.settings import check_ranges, setting

# The encoders whose patch tokens the decoder sees.
VISION = {"dual": ("stage1", "2e3"), "stage1": ("stage1",), "2e3": ("2e3",), "reaf": ("reaf",)}
CUES = ("none", "labels", "places")
PROJECTORS = ("spatial_packer", "average_pool", "sequence_pool", "m3d_pool", "qformer", "text_guided")
TINY_KERNEL = (1, 2, 2)  # the tiny presets' grid is 4 x 4 x 4


def _language(default, help: str, **how):
    """Return the field of a setting with a flag of the language stages."""
    return setting(default, help, only=LANGUAGE, **how)


@dataclass(frozen=True)
class MllmConfig:
    """Encoders, projectors and decoder of a model, and what of it is trained.

    vision: one of VISION; encoders: theirs, in that order. kernel: tokens that the projector packs into one.
    full: the whole decoder is trained; otherwise adapters of rank r, with alpha and dropout (published: 16,
    32,
    0.05), on a frozen decoder. train_vision: the encoders are trained too (published: frozen).
    """

    vision: Literal[tuple(VISION)] = _language(
        MISSING, "encoders the decoder sees: stage 1's and 2E3, or one (default: dual, reaf)"
    )
    encoders: tuple[VisionConfig, ...]
    decoder: DecoderConfig
    projector: Literal[PROJECTORS] = _language(
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
    cues: Literal[CUES] = _language(
        "none",
        "findings that a head predicts, as words of the prompt (default: none; with a new decoder places)",
    )
    findings: tuple[tuple[str, str], ...] = ()  # (label, place): what the head predicts
    cue_dropout: float = _language(0.1, "share of training rows without cues (default: 0.1)", least=0, most=1)
    dropout: float = _language(DECODER_LORA["dropout"], "rate", flag="lora_dropout", least=0, most=0.99)
    max_text: int = setting(800, above=0, most=LARGEST)

    def __post_init__(self):
        check_ranges(self)
        if self.vision not in VISION or len(self.encoders) != len(VISION[self.vision]):
            raise InputError(
                f"--vision {self.vision}: expected one of {', '.join(VISION)}, with its encoders"
            )
        if self.projector not in PROJECTORS:
            raise InputError(f"--projector {self.projector}: expected one of {', '.join(PROJECTORS)}")
        labels = [label for label, place in self.findings if not place]
        places = {label for label, place in self.findings if place}
        if not places <= set(labels) or len(set(self.findings)) < len(self.findings):
            raise InputError("findings: expected every label once, and places of these labels")
        if (self.cues == "none") != (not self.findings):
            raise InputError(
                f"cues are {self.cues!r} with {len(self.findings)} findings; expected both or none"
            )
        if len({encoder.grid for encoder in self.encoders}) > 1 and self.shared:
            raise InputError(
                "--shared-projector: the two encoders have other token grids; leave the flag out"
            )

    @property
    def guided(self) -> bool:
        """Whether volumes come with slice features."""
        return any(isinstance(encoder, GuidedVisionConfig) for encoder in self.encoders)
