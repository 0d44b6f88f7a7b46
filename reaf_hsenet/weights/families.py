"""The families of checkpoints that are known, each recognised by the names of its tensors, never by a
file's name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reaf_hsenet.errors import InputError
from reaf_hsenet.weights.names import (
    bert_state,
    classifier_state,
    decoder_names,
    m3d_clip_state,
    reaf_names,
    slice_encoder_state,
)
from reaf_hsenet.weights.packer import language_names
from reaf_hsenet.weights.reading import SUFFIXES, State, summary

# What a checkpoint's folder may hold that is of use: weights, settings, vocabularies.
FILES = [
    *(f"*{suffix}" for suffix in SUFFIXES),
    *(
        "*.index.json",
        "*config.json",
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
]


@dataclass(frozen=True)
class Family:
    """name: as a user knows it. signs: patterns, each of which begins a tensor's name. kind: what is built of
    it.

    names: published names -> ours, without touching shapes. uses: what it is for, with the commands; FILE
    stands for the file, FOLDER for its folder.
    """

    key: str
    name: str
    signs: tuple[str, ...]
    kind: str  # dual, language, text, classifier, slices, decoder, adapter, trunk, run
    names: Callable[[State], State]
    uses: tuple[str, ...]

    def fits(self, names: list[str]) -> bool:
        return all(any(re.match(sign, name) for name in names) for sign in self.signs)


def _as_they_are(state: State) -> State:
    return state


WORDS = r"(bert\.|roberta\.|model\.)?embeddings\.word_embeddings\."
CONVERT = "python -m reaf_hsenet.weights convert FILE RUN"
EVALUATE = (
    "evaluate.py --task retrieval or zeroshot --run FILE --data DATA, or infer.py classify SCAN --run "
    "FILE; or first " + CONVERT
)
START = "train.py --stage clip1 --init FILE"
TEXT = "train.py --stage clip1 --text-model FOLDER: starts the text encoder"
SLICES = "preprocess.py --slices FILE: encodes the slices that guide HSENet's stage 2"
LANGUAGE = (
    "evaluate.py --task mrg --run FILE --decoder DECODER --encoders 2E3-CLIP --data DATA, or infer.py "
    f"report SCAN; or first {CONVERT} --decoder DECODER --encoders 2E3-CLIP"
)
INFLATE = (
    "train.py --stage clip1 --model reaf --init FILE: starts REAF's encoder, inflated to three dimensions"
)

# The first that fits is taken: what is more particular comes first.
FAMILIES = (
    Family(
        "run-language",
        "a language run of this project",
        (r"projectors\.\d+\.",),
        "run",
        _as_they_are,
        ("evaluate.py --task mrg or vqa --run RUN", "infer.py report SCAN --run RUN"),
    ),
    Family(
        "run-dual",
        "a dual-encoder run of this project",
        (r"vision\.cls_token$", r"text\.word_embed\."),
        "run",
        _as_they_are,
        ("evaluate.py --task retrieval --run RUN", "infer.py embed SCAN --run RUN", START),
    ),
    Family(
        "hsenet-2e3",
        "HSENet-2E3-CLIP",
        (r"vision_encoder\.slice_guided_attention\.", r"language_encoder\."),
        "dual",
        m3d_clip_state,
        (
            EVALUATE,
            "the two encoders of HSENet's packers: convert PACKERS RUN --decoder DECODER --encoders FILE",
        ),
    ),
    Family(
        "m3d-clip",
        "M3D-CLIP or HSENet-CLIP",
        (r"vision_encoder\.cls_token$", r"language_encoder\."),
        "dual",
        m3d_clip_state,
        (EVALUATE, START),
    ),
    Family(
        "hsenet-language",
        "HSENet's packers and adapters (HSENet-Phi-4-4B)",
        (r"(.*\.)?mm_projector\d*\.",),
        "language",
        language_names,
        (LANGUAGE,),
    ),
    Family(
        "reaf",
        "REAF",
        (r"visual\.trunk\.fusion_layer\.", r"text\.transformer\."),
        "dual",
        reaf_names,
        (EVALUATE, f"{START} --model reaf"),
    ),
    Family(
        "hlip",
        "HLIP, single scan",
        (r"visual\.trunk\.spatial_posemb$", r"text\.transformer\."),
        "dual",
        reaf_names,
        (EVALUATE, f"{START} --model reaf"),
    ),
    Family(
        "biomedclip", "BiomedCLIP", (r"visual\.trunk\.pos_embed$",), "slices", slice_encoder_state, (SLICES,)
    ),
    Family(
        "trunk",
        "the vision trunk of REAF or HLIP",
        (r"(visual\.trunk\.)?spatial_posemb$",),
        "trunk",
        reaf_names,
        (f"{START} --model reaf",),
    ),
    Family(
        "classifier",
        "a report classifier (RadBERT; CT-RATE's RadBertClassifier)",
        (WORDS, r"classifier\."),
        "classifier",
        classifier_state,
        ("evaluate.py --task mrg --run RUN --classifier FOLDER: finds the 18 findings in reports",),
    ),
    Family("cxr-bert", "CXR-BERT", (WORDS, r"cls_projection_head\."), "text", bert_state, (TEXT,)),
    Family(
        "bert",
        "a BERT or RoBERTa (bert-base-uncased, BiomedBERT, RadBERT, ...)",
        (WORDS,),
        "text",
        bert_state,
        (TEXT, "evaluate.py --task mrg --run RUN --bertscore FOLDER"),
    ),
    Family(
        "adapter",
        "a peft adapter",
        (r"base_model\.model\..*\.lora_A\.",),
        "adapter",
        language_names,
        ("reaf_hsenet.weights.adapters.load_adapter(decoder, FOLDER)",),
    ),
    Family(
        "mae",
        "a MAE ViT",
        (r"(mask_token$|decoder_)", r"pos_embed$", r"patch_embed\.proj\.weight$"),
        "slices",
        slice_encoder_state,
        (INFLATE, SLICES),
    ),
    Family(
        "vit",
        "a 2D ViT (timm, MAE's encoder)",
        (r"pos_embed$", r"patch_embed\.proj\.weight$"),
        "slices",
        slice_encoder_state,
        (INFLATE, SLICES),
    ),
    Family(
        "slice-encoder",
        "a slice encoder of this project",
        (r"pos_embed$", r"patch_embed\.weight$"),
        "slices",
        _as_they_are,
        (SLICES,),
    ),
    Family(
        "decoder",
        "a language decoder (Phi-3, Phi-4, Llama)",
        (r"model\.embed_tokens\.", r"model\.layers\.0\."),
        "decoder",
        decoder_names,
        ("train.py --stage mrg --decoder FOLDER", "reaf_hsenet.weights.decoder.load_decoder(FOLDER)"),
    ),
)


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found: what it was named, its file, its tensors without `module.`, what it is."""

    name: str
    file: Path
    state: State
    family: Family

    @property
    def folder(self) -> Path:
        """Where its settings and vocabulary are."""
        return self.file.parent


def identify(state: State, source: str) -> Family:
    """Raises InputError, with what the names look like, for an unknown family."""
    names = list(state)
    family = next((f for f in FAMILIES if f.fits(names)), None)
    if family is None:
        raise InputError(
            f"{source}: is of no known family: its {len(names)} tensors are "
            f"{summary(sorted(names))[:200] or 'none'}; see docs/weights.md for what is known"
        )
    return family
