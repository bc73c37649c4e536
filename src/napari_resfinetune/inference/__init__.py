"""Floor 4: segment planes and stacks with a loaded model."""

from napari_resfinetune.inference.segment import (
    MODES,
    check_decoder,
    check_mode,
    segment_plane,
    segment_source,
    write_labels,
)
from napari_resfinetune.inference.tiling import Tile, TileEmbedding, embed_plane, pad_to_patch, plan_tiles

__all__ = [
    "MODES",
    "Tile",
    "TileEmbedding",
    "check_decoder",
    "check_mode",
    "embed_plane",
    "pad_to_patch",
    "plan_tiles",
    "segment_plane",
    "segment_source",
    "write_labels",
]
