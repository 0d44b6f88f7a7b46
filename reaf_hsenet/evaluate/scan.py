"""One CT file -> what a trained network takes: a volume by the run's recipe, and slice features.

Training reads float16 from a prepared folder; a scan is rounded to it, so that both give the same result.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reaf_hsenet.config import Recipe
from reaf_hsenet.data.manifest import different_slices
from reaf_hsenet.data.reading import ENDINGS, Reading, SlicesWanted, ending, read_source
from reaf_hsenet.data.slice_features import normalise
from reaf_hsenet.data.volume import TableRow
from reaf_hsenet.errors import InputError
from reaf_hsenet.models.slice_encoder import SliceEncoder
from reaf_hsenet.weights.slice_encoder import load_slice_encoder


@dataclass
class Scan:
    """A scan that was read. record: what the file held and how it was read.

    volume: (1, 1, D, H, W) float32 on the CPU. images: (32, size, size) uint8 slices, where they were wanted.
    """

    path: Path
    volume: Tensor
    images: Tensor | None
    record: dict

    def account(self) -> str:
        """Say in a line what was decided about the scan."""
        known = self.record
        parts = ["x".join(map(str, known["shape"])) + " voxels"]
        if "spacing" in known:
            parts.append(" x ".join(f"{s:.3g}" for s in known["spacing"]) + " mm")
            parts.append(f"axes to {known['orientation']}")
        return f"{self.path}: {', '.join(parts)}; rescale {known['rescale']}"


def check_scan(path: Path) -> None:
    """Raise InputError unless there is a file whose name is a scan's; it is not opened."""
    missing = "" if path.is_file() else "no such file; "
    if missing or ending(path.name) is None:
        raise InputError(f"{path}: {missing}expected a scan that ends in {', '.join(ENDINGS)}")


def read_scan(
    path: Path, recipe: Recipe, reading: Reading, table: TableRow, slices: SlicesWanted | None = None
) -> Scan:
    """Read a scan once, for the volume and for the slices that are wanted.

    Raises InputError, naming the file, for anything that is not a readable CT.
    """
    path = Path(path)
    check_scan(path)
    try:
        voxels, images, record = read_source(path, recipe, slices, reading, table)
    except InputError as error:
        if str(error).endswith("with --rescale"):  # there is no table here to take them from
            raise InputError(f"{error}, or give the --slope and --intercept that make them HU") from error
        raise
    volume = torch.from_numpy(voxels).half().float()[None]
    return Scan(path, volume, None if images is None else torch.from_numpy(images), record)


@torch.inference_mode()
def slice_features(scan: Scan, encoder: SliceEncoder, provenance: dict, device: torch.device) -> Tensor:
    """Return (1, S, C) float32 features of the scan's slices. encoder, provenance: of find_slice_encoder."""
    features = encoder.to(device)(normalise(scan.images.to(device))).half().float()
    if not features.isfinite().all():
        raise InputError(f"{provenance['encoder']}: gives {scan.path} NaN, or values beyond float16's")
    return features[None]


def find_slice_encoder(
    run: Path, data: Path | None, wanted: dict, named: str | None = None
) -> tuple[SliceEncoder, dict]:
    """Load the encoder that made the slice features a run was trained on; return it with its provenance.

    wanted: provenance of the run's features. The encoder is `named` (file, folder or hub id), else the one in
    the run's folder, in its data set, or where it lay in training. Raises InputError when there is none, and
    for another encoder.
    """
    known = wanted.get("encoder", "")
    places = [folder / "slice_encoder" for folder in (run, data) if folder] + [Path(known)] * bool(known)
    name = named or next((str(place) for place in places if place.exists()), None)
    made = (
        f"{known}, sha256 {wanted['sha256'][:12]}"
        if "sha256" in wanted
        else f"{known} of {wanted.get('width')} channels"
    )
    if name is None:
        raise InputError(f"{run}: takes slice features of {made}; name that encoder with --slice-encoder")
    encoder, provenance = load_slice_encoder(name, wanted.get("jpeg", False), wanted.get("recipe", "hsenet"))
    if different_slices(provenance, wanted):
        raise InputError(
            f"--slice-encoder {name}: has sha256 {provenance['sha256'][:12]} and {encoder.width} channels; "
            f"{run} takes slice features of {made}"
        )
    return encoder, provenance
