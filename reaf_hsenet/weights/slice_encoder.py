"""The frozen 2D encoder of slices: read, saved, and described by its hash and settings."""

import hashlib
import math
import re
from pathlib import Path

from reaf_hsenet.data.slices import SLICES
from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_json, write_json
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.weights.files import State, load_strictly, read_checkpoint, write_weights
from reaf_hsenet.weights.names import import_state
from reaf_hsenet.weights.published import recognise

SETTINGS = ("size", "patch", "width", "depth", "heads", "mlp")


def describe(encoder: SliceEncoder, name: str, jpeg: bool = False, recipe: str = "hsenet") -> dict:
    """Return the provenance of features: `name` of the encoder, the hash of its weights, its settings, how
    slices are taken.
    """
    digest = hashlib.sha256()
    for _, tensor in sorted(encoder.state_dict().items()):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "encoder": name,
        "sha256": digest.hexdigest(),
        **_settings(encoder),
        "slices": SLICES,
        "jpeg": jpeg,
        "recipe": recipe,
    }


def _settings(encoder: SliceEncoder) -> dict[str, int]:
    block = encoder.blocks[0]
    patch, mlp = encoder.patch_embed.kernel_size[0], block.mlp.fc1.out_features
    values = (encoder.size, patch, encoder.width, len(encoder.blocks), block.attn.heads, mlp)
    return dict(zip(SETTINGS, values, strict=True))


def save_slice_encoder(folder: Path, encoder: SliceEncoder) -> None:
    """Write slice_encoder.json and model.safetensors, which `--slices FOLDER` reads."""
    write_json(Path(folder) / "slice_encoder.json", _settings(encoder))
    write_weights(Path(folder) / "model.safetensors", encoder.state_dict())


def load_slice_encoder(name: str, jpeg: bool = False, recipe: str = "hsenet") -> tuple[SliceEncoder, dict]:
    """Return the slice encoder of a file, folder or hub id, and its provenance.

    name: what save_slice_encoder wrote, BiomedCLIP or a 2D ViT. Raises InputError for anything else.
    """
    own = Path(name) / "slice_encoder.json"
    state = read_checkpoint(name)
    if own.is_file():
        settings, source = read_json(own), own
        if not isinstance(settings, dict) or set(settings) != set(SETTINGS):
            raise InputError(f"{own}: expected {', '.join(SETTINGS)}")
    else:
        family = recognise(state)
        if family is None or family.kind != "slices":
            raise InputError(
                f"{name}: is not a 2D ViT such as BiomedCLIP's visual.trunk, nor a folder with "
                "slice_encoder.json"
            )
        state = import_state(family.table, state)
        settings, source = _published_settings(state, name), name
    if not all(isinstance(v, int) and v > 0 for v in settings.values()):
        raise InputError(f"{source}: {settings}; expected whole numbers above 0")
    if settings["width"] % settings["heads"] or settings["size"] % settings["patch"]:
        raise InputError(f"{source}: {settings}; expected a width of whole heads and a size of whole patches")
    encoder = SliceEncoder(**settings)
    load_strictly(encoder, state, name)
    return encoder.eval(), describe(encoder, name, jpeg, recipe)


def _published_settings(state: State, name: str) -> dict[str, int]:
    """Return the settings that the shapes tell; published ViTs have heads of 64 channels."""
    try:
        width, _, patch, _ = state["patch_embed.weight"].shape
        mlp = state["blocks.0.mlp.fc1.weight"].shape[0]
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{name}: is not a 2D ViT whose shapes are known; fetch it again") from error
    depth = 1 + max(int(m.group(1)) for n in state if (m := re.match(r"blocks\.(\d+)\.", n)))
    return dict(zip(SETTINGS, (side * patch, patch, width, depth, max(1, width // 64), mlp), strict=True))
