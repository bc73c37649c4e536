"""Floor 4: segment planes, stacks and folders of images of any size with a loaded model."""

from napari_resfinetune.inference.batch import SegmentedFile, label_paths, segment_files
from napari_resfinetune.inference.blockwise import segment_blockwise
from napari_resfinetune.inference.files import new_ome_zarr, read_made_by, write_labels
from napari_resfinetune.inference.segment import MODES, check_decoder, check_mode, segment_plane
from napari_resfinetune.inference.stacks import link_slices, segment_source
from napari_resfinetune.inference.tiling import Tile, TileEmbedding, embed_plane, pad_to_field, plan_tiles

__all__ = [
    "MODES",
    "SegmentedFile",
    "Tile",
    "TileEmbedding",
    "check_decoder",
    "check_mode",
    "embed_plane",
    "label_paths",
    "link_slices",
    "new_ome_zarr",
    "pad_to_field",
    "plan_tiles",
    "read_made_by",
    "segment_blockwise",
    "segment_files",
    "segment_plane",
    "segment_source",
    "write_labels",
]
