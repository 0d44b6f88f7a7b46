"""HSENet's published language model (HSENet-Phi-4-4B): packers and adapters, on a decoder and two
encoders of their own.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reaf_hsenet.config import (
    DECODER_LORA,
    PUBLISHED_VISUAL_TOKENS,
    TEXT_LENGTH,
    ClipConfig,
    GuidedVisionConfig,
    Recipe,
)
from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder, fingerprint, visible
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.mllm_config import MllmConfig, build_mllm, trained_state
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.dual import PublishedDual, load_published_dual, open_source
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import FORMS, load_tokenizer
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, check_fits
from reaf_hsenet.weights.adapters import CONFIG as ADAPTER_CONFIG
from reaf_hsenet.weights.adapters import adapter_parameters, adapter_settings
from reaf_hsenet.weights.decoder import FILES
from reaf_hsenet.weights.families import Source
from reaf_hsenet.weights.loading import require_fit
from reaf_hsenet.weights.packer import PACKERS
from reaf_hsenet.weights.reading import State, check_finite
from reaf_hsenet.weights.shapes import Reader


@dataclass(frozen=True)
class PublishedLanguage:
    """state: what a run's checkpoint holds, the packers and the adapters. decoder: where the rest of it is,
    with hashes.

    encoder_runs: the runs of stage 1 and 2 that the encoders come from; without them `encoder` is what
    becomes them.
    """

    source: Source
    stage: str
    config: MllmConfig
    state: State
    recipe: Recipe
    tokenizer: Tokenizer
    decoder: dict
    slices: dict | None
    notes: tuple[str, ...]
    encoder: PublishedDual | None
    encoder_runs: tuple[Path, ...]


def load_published_language(
    name: str | Source,
    decoder: str,
    encoders: str,
    stage: str = "mrg",
    text_model: str | None = None,
    slice_encoder: str | None = None,
) -> PublishedLanguage:
    """Packers and adapters of a file or folder. decoder: folder or hub id of the language model that they
    stand on.

    encoders: a published HSENet-2E3-CLIP with its stage-1 model inside, or a clip2 run. stage: mrg or vqa,
    which the tensors do not tell. Raises InputError for all that does not fit.
    """
    source = name if isinstance(name, Source) else open_source(name)
    if source.family.kind != "language":
        raise InputError(f"{source.name}: is {source.family.name}; expected HSENet's packers and adapters")
    check_finite(source.state, source.name)
    notes: list[str] = []
    encoder, runs, visions, recipe, slices = _encoders(encoders, text_model, slice_encoder, notes)
    tokenizer, own, known = _decoder(decoder, notes)
    names = source.family.names(source.state)
    reader = Reader(names, source.name)
    absent = [
        packer for i, packer in enumerate(PACKERS) if not any(n.startswith(f"projectors.{i}.") for n in names)
    ]
    if absent:
        raise InputError(
            f"{source.name}: has no {absent[0]}; expected {' and '.join(PACKERS)}, one for each encoder"
        )
    settings = source.folder / ADAPTER_CONFIG
    ranks = [t.shape[0] for n, t in names.items() if n.endswith(".lora_a") and t.ndim == 2]
    if not ranks:
        raise InputError(
            f"{source.name}: has no adapters (lora_A); expected packers and adapters in one file"
        )
    if settings.is_file():
        r, alpha, *_ = adapter_settings(settings)
        if r != ranks[0]:
            raise InputError(f"{settings}: r is {r}, the adapters have rank {ranks[0]}; fetch both again")
    else:
        alpha = 2 * ranks[0]
        notes.append(
            f"adapters: rank {ranks[0]}, alpha {alpha}, twice the rank as published; no shape tells it"
        )
    config = MllmConfig("dual", visions, own, r=ranks[0], alpha=alpha, dropout=DECODER_LORA["dropout"])
    notes.append(f"packers: kernel {config.kernel} as published; no shape tells it")
    inputs, width = (
        reader.shape("projectors.0.cell_attn.query.weight", 2)[1],
        reader.shape("projectors.0.head.fc2.weight", 2)[0],
    )
    if (inputs, width) != (visions[0].width, own.width):
        raise InputError(
            f"{source.name}: its packers lead from {inputs} to {width} channels; the encoders have "
            f"{visions[0].width}, the decoder {own.width}: choose those that they were trained with"
        )
    with torch.device("meta"):
        base = Decoder(own)
        model = build_mllm(config, Decoder(own))
    adapters = {n: t for n, t in source.state.items() if "lora_" in n}
    state = {n: t for n, t in names.items() if ".lora_" not in n}
    state |= {f"decoder.{n}": t for n, t in adapter_parameters(base, adapters, source.name).items()}
    require_fit(state, trained_state(model), source.name)
    length = model.visual_tokens + TEXT_LENGTH[stage] - PUBLISHED_VISUAL_TOKENS
    config = replace(config, max_text=min(length, own.context))
    return PublishedLanguage(
        source, stage, config, state, recipe, tokenizer, known, slices, tuple(notes), encoder, runs
    )


def _encoders(name: str, text_model, slice_encoder, notes: list[str]):
    """(published model, its runs, vision settings, recipe, slices) of --encoders: of the first two, one
    is empty.
    """
    if Run(name).exists and "stage" in (values := Run(name).read_config()):
        teacher = (values.get("origin") or {}).get("teacher")
        if values["stage"] != "clip2" or not teacher or not Run(teacher).exists:
            raise InputError(
                f"--encoders {name}: is a {values['stage']} run, or its teacher is not there; expected a "
                f"clip2 run with it"
            )
        first, second = (
            from_dict(ClipConfig, Run(f).read_config()["model"], str(Run(f).config)).vision
            for f in (teacher, name)
        )
        if not isinstance(second, GuidedVisionConfig):
            raise InputError(f"--encoders {name}: takes no slices; expected the run of a 2E3 encoder")
        had = Run(teacher).holding(
            values["origin"].get("teacher_sha256")
        )  # what the 2E3 encoder learned from
        runs = Run(teacher).checkpoints / had if had else Path(teacher), Path(name)
        return (
            None,
            runs,
            (first, second),
            from_dict(Recipe, values["recipe"], str(Run(name).config)),
            values["slices"],
        )
    published = load_published_dual(name, text_model, slice_encoder=slice_encoder)
    if published.teacher is None:
        found = published.source.family.name
        raise InputError(
            f"--encoders {name}: is {found} without a stage-1 model; expected HSENet-2E3-CLIP with it"
        )
    notes += published.notes
    visions = published.teacher.config.vision, published.config.vision
    return published, (), visions, published.recipe, published.slices


def _decoder(name: str, notes: list[str]) -> tuple[Tokenizer, DecoderConfig, dict]:
    """Tokenizer with the image tokens, settings with rows for them, and where the weights are.

    HSENet splits text as GPT-2 does, which is not how a Phi-4 folder's tokenizer.json does.
    """
    folder = find_folder(name, FILES)
    form = "gpt2" if all((folder / file).is_file() for file in FORMS["gpt2"]) else None
    tokenizer, config = load_tokenizer(folder, form), DecoderConfig.from_folder(folder)
    if form:
        notes.append(
            "tokenizer: GPT-2's split of vocab.json and merges.txt, as published, whatever tokenizer.json "
            "says"
        )
    special = {"bos": config.bos_id, "eos": list(config.eos_ids), "pad": config.pad_id}
    check_fits(tokenizer, config.vocab, special, str(folder / "config.json"))
    own = len(tokenizer)
    add_image_tokens(tokenizer)
    hashes = {path.name: fingerprint(path) for path in visible(folder, "*.safetensors")}
    if not hashes:
        raise InputError(
            f"--decoder {folder}: has no safetensors; expected a folder as transformers writes it"
        )
    located = str(Path(name).resolve()) if Path(name).exists() else name
    known = {"name": located, "fingerprint": hashes, "added": len(tokenizer) - own}
    return tokenizer, replace(config, vocab=len(tokenizer)), known
