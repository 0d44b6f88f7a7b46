"""Published checkpoints as runs of this project: a dual encoder, or HSENet's language model on what it stands
on.

Everything is checked before anything is given back: names, shapes, values, settings, vocabulary.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from reaf_hsenet.config import (
    RECIPES,
    ClipConfig,
    GuidedVisionConfig,
    ReafVisionConfig,
    Recipe,
    Size3,
)
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder, read_object
from reaf_hsenet.models.clip import build_dual_encoder
from reaf_hsenet.models.fusion import build_fusion
from reaf_hsenet.models.mllm_config import MllmConfig
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import has_wordpiece, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, WordPiece
from reaf_hsenet.weights.files import State, require_fit
from reaf_hsenet.weights.names import TEACHER, places, teacher_tensors
from reaf_hsenet.weights.published import Published, open_published
from reaf_hsenet.weights.shapes import OWN, bert_config, dual_config, flat_reaf, on_grid
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
