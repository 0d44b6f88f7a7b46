"""Published checkpoints as runs of this project: a dual encoder, or HSENet's language model on what it stands
on.

Everything is checked before anything is given back: names, shapes, values, settings, vocabulary.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from reaf_hsenet.config import (
    DECODER_LORA,
    PUBLISHED_VISUAL_TOKENS,
    RECIPES,
    TEXT_LENGTH,
    ClipConfig,
    GuidedVisionConfig,
    ReafVisionConfig,
    Recipe,
    Size3,
)
from reaf_hsenet.data.language import add_image_tokens
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder, fingerprint, read_object, visible
from reaf_hsenet.models.build import build_mllm, trained_state
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.models.decoder import Decoder
from reaf_hsenet.models.decoder_config import DecoderConfig
from reaf_hsenet.models.fusion import build_fusion
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import FORMS, has_wordpiece, load_tokenizer, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, WordPiece, check_fits
from reaf_hsenet.weights import decoder as decoder_files
from reaf_hsenet.weights.adapters import CONFIG as ADAPTER_CONFIG
from reaf_hsenet.weights.adapters import adapter_parameters, adapter_settings, first_rank
from reaf_hsenet.weights.files import State, check_finite, require_fit
from reaf_hsenet.weights.names import PACKERS, TEACHER, places, teacher_tensors
from reaf_hsenet.weights.published import Published, open_published
from reaf_hsenet.weights.shapes import OWN, bert_config, dual_config, flat_reaf, on_grid, shape
from reaf_hsenet.weights.slice_encoder import load_slice_encoder

TEXT_FILES = [
    "config.json",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
]


@dataclass(frozen=True)
class PublishedRun:
    """A published checkpoint with all that a run has.

    state: what a run's checkpoint holds, under our names. slices: what is known of the slice features it
    takes. not_used: tensors without a place here, under their published names. beneath: what it stands on,
    published models or runs; of a 2E3 encoder the stage-1 model, of packers both encoders. decoder: where a
    language model's is, with hashes. notes: what was assumed or changed, a sentence each.
    """

    source: Published
    stage: str
    config: ClipConfig | MllmConfig
    state: State
    recipe: Recipe
    tokenizer: Tokenizer | WordPiece
    slices: dict | None
    notes: tuple[str, ...]
    not_used: State = field(default_factory=dict)
    beneath: tuple = ()
    decoder: dict | None = None


def open_source(name: str) -> Published:
    """Read and recognise a file, a folder, a hub id, or the checkpoint of a run. Raises InputError."""
    run = Run(name)
    is_run = run.named or run.pointer("last")
    return open_published(name, run.choose().folder / "model.safetensors" if is_run else None)


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
    return language_model(source, decoder, encoders, stage or "mrg", text_model, slice_encoder)


def dual_encoder(
    source: Published, text_model: str | None, size: Size3 | None, slice_encoder: str | None
) -> PublishedRun:
    """Complete M3D-CLIP, HSENet-CLIP, HSENet-2E3-CLIP, HLIP or REAF; see `published_run`."""
    words = find_folder(text_model, TEXT_FILES) if text_model else source.folder
    # A dual encoder's folder may be named for its vocabulary: its config.json is no BERT's.
    settings = words / "config.json"
    has_text = text_model and settings.is_file() and "num_hidden_layers" in read_object(settings)
    own = config = dual_config(source, bert_config(words) if has_text else None)
    if size is not None and tuple(size) != own.vision.size:
        config = replace(own, vision=replace(own.vision, size=tuple(size)))
        source.notes.append(
            f"vision: size {tuple(size)} in place of {own.vision.size}: the position table is resampled from "
            f"the grid {own.vision.grid} to {config.vision.grid}"
        )
    if isinstance(config.vision, ReafVisionConfig):
        state = flat_reaf(source.state, config.vision.grid) | fusion_constants(config.vision)
    else:
        state = on_grid(source.state, own.vision.grid, config.vision.grid)
    require_fit(state, expected_state(config), source.name)
    tokenizer = vocabulary(words, config.text.vocab, bool(text_model))
    recipe, guided = RECIPES[config.model], isinstance(config.vision, GuidedVisionConfig)
    if "recipe" in source.beside.get(OWN, {}):
        recipe = from_dict(Recipe, source.beside[OWN]["recipe"], f"{source.settings}: {OWN}")
    slices = slice_provenance(config.vision, source, slice_encoder) if guided else None
    if slice_encoder and not guided:
        raise InputError(f"--slice-encoder: {source.name} takes no slice features; leave it out")
    used = {name for names in places(source.family.table, source.tensors).values() for name in names}
    not_used = {n: t for n, t in source.tensors.items() if n not in used and not n.startswith(TEACHER)}
    inner = teacher_tensors(source.tensors)
    teacher = Published(source.name, source.file, inner, source.family)
    return PublishedRun(
        source=source,
        stage="clip2" if guided else "clip1",
        config=config,
        state=state,
        recipe=replace(recipe, size=config.vision.size),
        tokenizer=tokenizer,
        slices=slices,
        notes=tuple(dict.fromkeys(source.notes)),
        not_used=not_used,
        beneath=(dual_encoder(teacher, text_model, size, None),) if inner else (),
    )


def fusion_constants(vision: ReafVisionConfig) -> State:
    """Return the weights of a layer fusion: constants of its method, which no published checkpoint has."""
    counts = {"scan": len(vision.scan_layers), "slice": vision.depth - len(vision.scan_layers)}
    parts = {
        kind: build_fusion(vision.fusion, layers, vision.fusion_seed)
        for kind, layers in counts.items()
        if vision.fusion and layers
    }
    return {f"vision.fusion.{name}": t for name, t in nn.ModuleDict(parts).state_dict().items()}


def expected_state(config: ClipConfig) -> State:
    """Return names and shapes of a dual encoder's tensors, without data."""
    with torch.device("meta"):
        return build_dual_encoder(config).state_dict()


def vocabulary(folder: Path, rows: int, named: bool) -> WordPiece:
    """Read vocab.txt of a folder.

    Raises InputError when there is none, or one of another number of tokens.
    """
    if not has_wordpiece(folder):
        other = "another" if named else "the text encoder's folder or hub id"
        raise InputError(
            f"{folder}: has no vocab.txt, by which the text encoder reads reports; name {other} with "
            "--text-model, or put it there"
        )
    tokenizer = load_wordpiece(folder)
    if len(tokenizer) != rows:
        raise InputError(
            f"{folder / 'vocab.txt'}: has {len(tokenizer)} tokens, the text encoder {rows}; name that "
            "encoder's own folder with --text-model"
        )
    return tokenizer


def slice_provenance(vision: GuidedVisionConfig, source: Published, name: str | None) -> dict:
    """Return what is known of the slice features that a 2E3 encoder takes.

    name: the encoder that made them; without it their shape is known alone. Raises InputError for a wrong
    one.
    """
    if name is None:
        if known := source.beside.get(OWN, {}).get("slices"):
            return known
        source.notes.append(
            "slices: the checkpoint does not say which encoder made its slice features, so only their shape "
            "is compared; name BiomedCLIP with --slice-encoder to have it compared"
        )
        return {"slices": vision.slices, "width": vision.slice_width}
    encoder, provenance = load_slice_encoder(name)
    if (encoder.width, provenance["slices"]) != (vision.slice_width, vision.slices):
        raise InputError(
            f"--slice-encoder {name}: gives {provenance['slices']} features of {encoder.width} channels; "
            f"this encoder takes {vision.slices} of {vision.slice_width}"
        )
    return provenance


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
        published = published_run(source, text_model, slice_encoder=slice_encoder)
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
    folder = find_folder(name, decoder_files.FILES)
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
