"""A published dual encoder (M3D-CLIP, HSENet-CLIP, HSENet-2E3-CLIP, HLIP, REAF) as this project takes it.

Everything is checked before anything is given back: names, shapes, values, settings, vocabulary.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from reaf_hsenet.config import RECIPES, ClipConfig, GuidedVisionConfig, ReafVisionConfig, Recipe, Size3
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import find_folder
from reaf_hsenet.models.clip import DualEncoder, build_dual_encoder
from reaf_hsenet.models.fusion import build_fusion
from reaf_hsenet.models.positions import resample_3d
from reaf_hsenet.runs.checkpoint import Run
from reaf_hsenet.settings import from_dict
from reaf_hsenet.tokenizer.loading import has_wordpiece, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import WordPiece
from reaf_hsenet.weights import bert_config
from reaf_hsenet.weights.families import FILES, Family, Source, identify
from reaf_hsenet.weights.loading import load_strictly, require_fit
from reaf_hsenet.weights.names import TEACHER, reaf_state, rename, sources
from reaf_hsenet.weights.reading import State, check_finite, read_weights_file, weights_file
from reaf_hsenet.weights.shapes import OWN, Reader, dual_config, read_beside
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
class PublishedDual:
    """state: complete, under DualEncoder's names. not_used: tensors without a place here, under their
    published names.

    stage: clip1, or clip2 for a 2E3 encoder; teacher: the stage-1 model that such a checkpoint carries.
    slices: what is known of the features it takes. notes: what was assumed or changed, a sentence each.
    """

    source: Source
    stage: str
    config: ClipConfig
    state: State
    recipe: Recipe
    tokenizer: WordPiece
    slices: dict | None = None
    not_used: State = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    teacher: "PublishedDual | None" = None

    def model(self) -> DualEncoder:
        model = build_dual_encoder(self.config)
        load_strictly(model, self.state, self.source.name)
        return model.eval()


def open_source(name: str) -> Source:
    """A file, a folder (a run of this project too) or a hub id. Raises InputError when there is nothing
    to be read.
    """
    path, run = Path(name), Run(name)
    if run.named or run.pointer("last"):
        path = run.choose().folder / "model.safetensors"
    elif not path.is_file():
        path = weights_file(find_folder(name, FILES))
    state = read_weights_file(path)
    plain = rename(state, ((r"^module\.", ""),))
    return Source(name, path, plain, identify(plain, name))


def load_published_dual(
    name: str | Source,
    text_model: str | None = None,
    size: Size3 | None = None,
    slice_encoder: str | None = None,
) -> PublishedDual:
    """The dual encoder of a file, folder or hub id.

    text_model: folder or hub id with the text encoder's vocab.txt, by default the checkpoint's own folder.
    size: of the input, in place of its own; position tables are resampled. slice_encoder: file, folder or hub
    id of what makes the slice features of a 2E3 encoder. Raises InputError for all that does not fit.
    """
    source = name if isinstance(name, Source) else open_source(name)
    if source.family.kind != "dual":
        raise InputError(
            f"{source.name}: is {source.family.name}, which is not converted; use it with: "
            f"{source.family.uses[0]}"
        )
    check_finite(source.state, source.name)
    path, beside = read_beside(source.folder)
    return _load(source, source.state, path, beside, text_model, size, slice_encoder)


def _load(
    source: Source, published: State, path, beside: dict, text_model, size, slice_encoder
) -> PublishedDual:
    family = source.family
    reader = Reader(family.names(published), source.name, path, beside)
    words = find_folder(text_model, TEXT_FILES) if text_model else source.folder
    # A dual encoder's folder may be named for its vocabulary: its config.json is no BERT's.
    has_text_config = text_model and "num_hidden_layers" in read_beside(words)[1]
    own = dual_config(published, reader, bert_config(words) if has_text_config else None)
    config, notes = own, reader.notes
    if size is not None and tuple(size) != own.vision.size:
        config = replace(own, vision=replace(own.vision, size=tuple(size)))
        notes.append(
            f"vision: size {tuple(size)} in place of {own.vision.size}: the position table is resampled from "
            f"the grid {own.vision.grid} to {config.vision.grid}"
        )
    state = _fitted(published, family, own, config)
    require_fit(state, expected_state(config), source.name)
    tokenizer = vocabulary(words, config.text.vocab, bool(text_model))
    recipe = RECIPES[config.model]
    if OWN in beside and "recipe" in beside[OWN]:
        recipe = from_dict(Recipe, beside[OWN]["recipe"], f"{path}: {OWN}")
    guided = isinstance(config.vision, GuidedVisionConfig)
    used = {n for names in sources(published, family.names).values() for n in names}
    inner = {n.removeprefix(TEACHER): t for n, t in published.items() if n.startswith(TEACHER)}
    return PublishedDual(
        source,
        "clip2" if guided else "clip1",
        config,
        state,
        replace(recipe, size=config.vision.size),
        tokenizer,
        slice_provenance(config.vision, beside, slice_encoder, notes) if guided else None,
        {n: t for n, t in published.items() if n not in used and not n.startswith(TEACHER)},
        tuple(dict.fromkeys(notes)),
        _load(source, inner, path, beside, text_model, size, None) if inner else None,
    )


def _fitted(published: State, family: Family, own: ClipConfig, config: ClipConfig) -> State:
    """Under our names and in our shapes, the position table on the grid of `config`, the fusion's
    constants added.
    """
    if isinstance(config.vision, ReafVisionConfig):
        return reaf_state(published, config.vision.grid) | fusion_constants(config.vision)
    state = family.names(published)
    table = state.get("vision.pos_embed")
    if table is not None and own.vision.grid != config.vision.grid:
        state["vision.pos_embed"] = resample_3d(
            table.unflatten(1, own.vision.grid), config.vision.grid
        ).flatten(1, 3)
    return state


def fusion_constants(vision: ReafVisionConfig) -> State:
    """The weights of a layer fusion: constants of its method, which no published checkpoint has."""
    counts = {"scan": len(vision.scan_layers), "slice": vision.depth - len(vision.scan_layers)}
    parts = {
        k: build_fusion(vision.fusion, n, vision.fusion_seed)
        for k, n in counts.items()
        if vision.fusion and n
    }
    return {f"vision.fusion.{n}": t for n, t in nn.ModuleDict(parts).state_dict().items()}


def expected_state(config: ClipConfig) -> State:
    """Names and shapes of a dual encoder's tensors, without data."""
    with torch.device("meta"):
        return build_dual_encoder(config).state_dict()


def vocabulary(folder: Path, rows: int, named: bool) -> WordPiece:
    """vocab.txt of a folder. Raises InputError when there is none, or one of another number of tokens."""
    if not has_wordpiece(folder):
        where = (
            "name another with --text-model"
            if named
            else "name the text encoder's folder or hub id with --text-model"
        )
        raise InputError(
            f"{folder}: has no vocab.txt, by which the text encoder reads reports; {where}, or put it there"
        )
    tokenizer = load_wordpiece(folder)
    if len(tokenizer) != rows:
        raise InputError(
            f"{folder / 'vocab.txt'}: has {len(tokenizer)} tokens, the text encoder {rows}; name that "
            "encoder's own folder with --text-model"
        )
    return tokenizer


def slice_provenance(vision: GuidedVisionConfig, beside: dict, name: str | None, notes: list[str]) -> dict:
    """What is known of the slice features that a 2E3 encoder takes: all of a named encoder, else their
    shape alone.
    """
    if name is None:
        if beside.get(OWN, {}).get("slices"):
            return beside[OWN]["slices"]
        notes.append(
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
