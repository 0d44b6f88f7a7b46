"""The phantom data set that a run without --data makes for itself, and its slice features."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from reaf_hsenet import distributed
from reaf_hsenet.data.manifest import Manifest, load_manifest
from reaf_hsenet.distributed import Ranks
from reaf_hsenet.presets import TINY_RECIPES

PHANTOM = Path("data/phantom")
PHANTOM_TRAIN, PHANTOM_VALID, PHANTOM_SEED = 4000, 160, 0
SLICE_ENCODER = {"size": 64, "patch": 16, "width": 128, "depth": 2, "heads": 4, "mlp": 512}


def phantom_folder(model: str, size: tuple[int, int, int]) -> Path:
    """Return the folder of phantoms in a method's recipe and size."""
    shape = "x".join(map(str, size))
    return PHANTOM / (shape if model == "hsenet" else f"{model}-{shape}")


def phantom_manifest(ranks: Ranks, model: str, size: tuple[int, int, int]) -> Manifest:
    """Return the built-in phantom data set in a method's recipe; rank 0 makes it when it is missing."""
    recipe, out = TINY_RECIPES[model], phantom_folder(model, size)
    if recipe.fit == "crop":  # another size shows the same part of the chest
        spacing = tuple(s * n / m for s, n, m in zip(recipe.spacing, recipe.size, size, strict=True))
        recipe = replace(recipe, spacing=spacing)
    if ranks.main and not (out / "manifest.json").is_file():
        # What makes phantoms is loaded when they are made.
        from reaf_hsenet.data.phantom.dataset import write_phantom_dataset
        from reaf_hsenet.data.prepare import Options, prepare
        from reaf_hsenet.data.sources.ct_rate import read_ct_rate

        cores = len(os.sched_getaffinity(0))
        write_phantom_dataset(
            PHANTOM / "raw",
            PHANTOM_TRAIN,
            PHANTOM_VALID,
            PHANTOM_SEED,
            workers=cores,
            progress=True,
        )
        prepare(read_ct_rate(PHANTOM / "raw"), out, Options(replace(recipe, size=size)), workers=cores)
    # The other ranks read what rank 0 has written.
    distributed.barrier()
    return load_manifest(out)


def add_phantom_slices(folder: Path, device: torch.device, say) -> None:
    """Store slice features of phantoms, by a small encoder as it was initialised.

    Stage 2 so runs with nothing downloaded. A trained encoder's features are worth no more there
    (docs/results.md); real data have BiomedCLIP's.
    """
    from reaf_hsenet.data.slice_features import add_slice_features
    from reaf_hsenet.models.slice_encoder import SliceEncoder
    from reaf_hsenet.weights.slice_encoder import describe, load_slice_encoder, save_slice_encoder

    saved = folder / "slice_encoder"
    if not (saved / "model.safetensors").is_file():  # else of a start that was interrupted
        say(f"{folder}: has no slice features; making them with a small slice encoder that is not trained")
        torch.manual_seed(PHANTOM_SEED)
        save_slice_encoder(saved, SliceEncoder(**SLICE_ENCODER))
    # Read back, so that features are of the file whose hash goes into the manifest.
    encoder, _ = load_slice_encoder(str(saved))
    # Features carry the encoder's hash: a run that learned from one encoder's features refuses another's.
    provenance = describe(encoder, "phantoms", recipe="phantom")
    add_slice_features(folder, encoder, provenance, len(os.sched_getaffinity(0)), device, batch=1024)
