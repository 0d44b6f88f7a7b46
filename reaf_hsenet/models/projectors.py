"""The projectors by name."""

from reaf_hsenet.models.packer import (
    AveragePool,
    M3DPool,
    Projector,
    SequencePool,
    Size3,
    SpatialPacker,
)
from reaf_hsenet.models.qformer import QFormer
from reaf_hsenet.models.text_guided import TextGuidedProjector

PROJECTORS: dict[str, type[Projector]] = {
    "spatial_packer": SpatialPacker,
    "average_pool": AveragePool,
    "sequence_pool": SequencePool,
    "m3d_pool": M3DPool,
    "qformer": QFormer,
    "text_guided": TextGuidedProjector,
}


def build_projector(
    name: str, width: int, out_width: int, grid: Size3, kernel: Size3 | None = None, **options
) -> Projector:
    """A projector by name, C -> C_out. options: of its class. Raises ValueError for another name."""
    if name not in PROJECTORS:
        raise ValueError(f"projector {name!r}, expected one of {', '.join(PROJECTORS)}")
    return PROJECTORS[name](width, out_width, grid, kernel, **options)
