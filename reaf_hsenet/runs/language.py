"""A language model that sees: rebuilt from a run, or from HSENet's published packers and adapters."""

from collections.abc import Callable, Iterable
from dataclasses import replace
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
from reaf_hsenet.files import file_sha256, find_folder, fingerprint, visible
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.mllm import Mllm
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.runs.published import PublishedRun, dual_encoder, open_source
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import FORMS, load_tokenizer
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, check_fits
from reaf_hsenet.weights.adapters import CONFIG as ADAPTER_CONFIG
from reaf_hsenet.weights.adapters import adapter_parameters, adapter_settings, first_rank
from reaf_hsenet.weights.decoder import FILES, load_decoder, resize_vocabulary
from reaf_hsenet.weights.files import State, check_finite, load_strictly, require_fit
from reaf_hsenet.weights.names import PACKERS, TEACHER
from reaf_hsenet.weights.published import Published
from reaf_hsenet.weights.shapes import shape


def build_language_model(
    config: MllmConfig,
    origin: dict,
    state: State,
    encoders: Iterable[State] | None,
    source: str,
    dtype: torch.dtype | None,
) -> Mllm:
    """Build a language model. state: what was trained; encoders: dual encoders' tensors, if not among it."""
    model = build_mllm(config, None if config.full else base_decoder(config, origin, dtype))
    if encoders is not None:
        fill_encoders(model, encoders, source)
    load_strictly(model, state, source, trained_state(model))
    if dtype is not None:
        model.decoder.to(dtype)
    return model.eval()


def base_decoder(config: MllmConfig, origin: dict, dtype: torch.dtype | None = None) -> Decoder:
    """Load the published decoder below adapters or training, with rows for the added tokens."""
    known = origin["decoder"]
    kind, of = "fingerprint", fingerprint
    if kind not in known:  # earlier versions
        kind, of = "sha256", file_sha256
    if decoder_hashes(known["name"], of) != known[kind]:
        raise InputError(
            f"{known['name']}: its weights are not those that the run was trained on; fetch that revision"
        )
    decoder = load_decoder(known["name"], dtype, int8=config.int8)
    resize_vocabulary(decoder, config.decoder.vocab, known["added"])
    return decoder


def decoder_hashes(name: str, of: Callable[[Path], str]) -> dict[str, str]:
    """Return a hash of each file of a decoder folder's weights; of: file_sha256, which reads all, or
    fingerprint.
    """
    return {path.name: of(path) for path in visible(find_folder(name, FILES), "*.safetensors")}


def fill_encoders(model: Mllm, states: Iterable[State], source: str) -> None:
    """Fill the vision encoders with the vision part of dual encoders' tensors."""
    for encoder, state in zip(model.encoders, states, strict=True):
        vision = {n.removeprefix("vision."): t for n, t in state.items() if n.startswith("vision.")}
        load_strictly(encoder, vision, source)


def language_model(
    source: Published,
    decoder: str,
    encoders: str,
    stage: str,
    text_model: str | None,
    slice_encoder: str | None,
) -> PublishedRun:
    """Complete HSENet's packers and adapters (HSENet-Phi-4-4B).

    decoder: folder or hub id of the language model that they stand on. encoders: a published HSENet-2E3-CLIP
    with its stage-1 model inside, or a clip2 run. stage: mrg or vqa, which the tensors do not tell.
    """
    notes = source.notes
    beneath, visions, recipe, slices = _encoders(encoders, text_model, slice_encoder, notes)
    tokenizer, own, known = _decoder(decoder, notes)
    for i, packer in enumerate(PACKERS):
        if not any(name.startswith(f"projectors.{i}.") for name in source.state):
            raise InputError(
                f"{source.name}: has no {packer}; expected {' and '.join(PACKERS)}, one for each encoder"
            )
    r, alpha = _adapter_size(source)
    config = MllmConfig("dual", visions, own, r=r, alpha=alpha, dropout=DECODER_LORA["dropout"])
    notes.append(f"packers: kernel {config.kernel} as published; no shape tells it")
    inputs = shape(source, "projectors.0.cell_attn.query.weight", 2)[1]
    width = shape(source, "projectors.0.head.fc2.weight", 2)[0]
    if (inputs, width) != (visions[0].width, own.width):
        raise InputError(
            f"{source.name}: its packers lead from {inputs} to {width} channels; the encoders have "
            f"{visions[0].width}, the decoder {own.width}: choose those that they were trained with"
        )
    with torch.device("meta"):
        base, model = Decoder(own), build_mllm(config, Decoder(own))
    adapters = {name: tensor for name, tensor in source.tensors.items() if "lora_" in name}
    state = {name: tensor for name, tensor in source.state.items() if "lora_" not in name}
    state |= {f"decoder.{n}": t for n, t in adapter_parameters(base, adapters, source.name).items()}
    require_fit(state, trained_state(model), source.name)
    length = model.visual_tokens + TEXT_LENGTH[stage] - PUBLISHED_VISUAL_TOKENS
    return PublishedRun(
        source=source,
        stage=stage,
        config=replace(config, max_text=min(length, own.context)),
        state=state,
        recipe=recipe,
        tokenizer=tokenizer,
        slices=slices,
        notes=tuple(notes),
        beneath=beneath,
        decoder=known,
    )


def _adapter_size(source: Published) -> tuple[int, float]:
    """Return rank and alpha of the adapters, the latter by adapter_config.json or as published."""
    rank = first_rank(source.tensors)
    if not rank:
        raise InputError(
            f"{source.name}: has no adapters (lora_A); expected packers and adapters in one file"
        )
    settings = source.folder / ADAPTER_CONFIG
    if settings.is_file():
        r, alpha, *_ = adapter_settings(settings)
        if r != rank:
            raise InputError(f"{settings}: r is {r}, the adapters have rank {rank}; fetch both again")
        return r, alpha
    source.notes.append(
        f"adapters: rank {rank}, alpha {2 * rank}, twice the rank as published; no shape tells it"
    )
    return rank, 2 * rank


def _encoders(name: str, text_model: str | None, slice_encoder: str | None, notes: list[str]):
    """Return the two encoders (published, or paths of runs), their settings, recipe and slices."""
    if not (Run(name).exists and "stage" in (values := Run(name).read_config())):
        source = open_source(name)
        if source.family.kind != "dual" or not any(n.startswith(TEACHER) for n in source.tensors):
            raise InputError(
                f"--encoders {name}: is {source.family.name} without a stage-1 model; expected "
                f"HSENet-2E3-CLIP with it"
            )
        check_finite(source.tensors, source.name)
        published = dual_encoder(source, text_model, None, slice_encoder)
        notes += published.notes
        both = (*published.beneath, published)
        return both, tuple(run.config.vision for run in both), published.recipe, published.slices
    origin = values.get("origin") or {}
    teacher = origin.get("teacher")
    if values["stage"] != "clip2" or not teacher or not Run(teacher).exists:
        raise InputError(
            f"--encoders {name}: is a {values['stage']} run, or its teacher is not there; expected a clip2 "
            f"run with it"
        )
    visions = tuple(
        from_dict(ClipConfig, Run(f).read_config()["model"], str(Run(f).config)).vision
        for f in (teacher, name)
    )
    if not isinstance(visions[1], GuidedVisionConfig):
        raise InputError(f"--encoders {name}: takes no slices; expected the run of a 2E3 encoder")
    had = Run(teacher).holding(origin.get("teacher_sha256"))  # what the 2E3 encoder learned from
    both = Run(teacher).checkpoints / had if had else Path(teacher), Path(name)
    return both, visions, from_dict(Recipe, values["recipe"], str(Run(name).config)), values["slices"]


def _decoder(name: str, notes: list[str]) -> tuple[Tokenizer, DecoderConfig, dict]:
    """Return the tokenizer with the image tokens, settings with rows for them, and where the weights are.

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
