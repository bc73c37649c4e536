"""Planes that do not fit into memory: the same segmentation as in one piece, block by block, through a scratch folder.

For AIS the decoder's maps are written to zarr window by window. Seeds are then found in blocks that share a line of
pixels with their neighbours, and what meets there is joined (union-find), which gives exactly the seeds of the whole
plane. The watershed floods each block with a halo; since seeds have their final numbers before, an object cut by the
rim of a block has the same number on both sides. AMG and APG join the masks of their windows in a file on disk.

elf.parallel has both steps too, but labels in 4-connectivity only, where micro-sam's own one-piece function takes
diagonal neighbours, and leaves a hole where an object reaches further than the halo.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bioimage_cpp as bic
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from napari_resfinetune.errors import ResourceError
from napari_resfinetune.inference.segment import (
    MIN_SIZE_PX,
    check_image,
    decode_window,
    evaluating,
    merge_windows,
    segment_window,
)
from napari_resfinetune.inference.tiling import Tile, TileEmbedding, embed_window, plan_tiles
from napari_resfinetune.models import SamModel, upstream

Window = tuple[slice, slice]
ReadWindow = Callable[[Window], NDArray[np.float32]]
BLOCK_PX = 2048
# Up to here a plane is segmented in one piece; the largest takes about 1.5 GB beside the model.
WHOLE_UP_TO_PX = 4096**2
# How large the part of a plane may become that is flooded at once, for an object that reaches beyond its halo.
FLOOD_UP_TO_PX = 6144**2
_CHUNK_PX = 512
_SCRATCH_BYTES_PER_PX = 20  # three maps and the seeds, as they are in the worst case: not compressible


@dataclass(frozen=True)
class _Plane:
    """A plane to segment, with everything that its windows need."""

    model: SamModel
    read: ReadWindow
    shape: tuple[int, int]
    tiles: tuple[Tile, ...]
    folder: Path
    mode: str
    settings: Mapping[str, Any]
    precision: torch.dtype | None
    on_window: Callable[[], None]

    def embeddings(self) -> Iterator[TileEmbedding]:
        for tile in self.tiles:
            pixels = self.read(tile.window)
            check_image(pixels)
            yield embed_window(self.model, pixels, tile, self.precision)
            self.on_window()


@dataclass(frozen=True)
class _Maps:
    """Foreground, distances to centre and to boundary as float32 "CYX" on disk, and how they become objects."""

    stored: Any
    settings: Mapping[str, Any]
    shape: tuple[int, int]

    def foreground(self, window: Window) -> NDArray[np.bool_]:
        smooth = self._smooth(0, window, self.settings["foreground_smoothing"])
        mask: NDArray[np.bool_] = smooth > self.settings["foreground_threshold"]
        return mask

    def boundary(self, window: Window) -> NDArray[np.float32]:
        return self._smooth(2, window, self.settings["distance_smoothing"])

    def seeds(self, window: Window) -> NDArray[np.uint64]:
        near_centre = self._smooth(1, window, self.settings["distance_smoothing"])
        inside = near_centre < self.settings["center_distance_threshold"]
        inside &= self.boundary(window) < self.settings["boundary_distance_threshold"]
        labels: NDArray[np.uint64] = bic.segmentation.label(inside & self.foreground(window))
        return labels

    def _smooth(self, channel: int, window: Window, sigma: float) -> NDArray[np.float32]:
        if sigma <= 0:
            return np.asarray(self.stored[(channel, *window)])
        margin = int(np.ceil(4 * sigma)) + 1  # the filter ends at three sigma
        wide = _grow(window, margin, self.shape)
        smooth = bic.filters.gaussian_smoothing(np.asarray(self.stored[(channel, *wide)]), sigma)
        inner: NDArray[np.float32] = smooth[_inside(window, wide)]
        return inner


@torch.no_grad()
def segment_blockwise(
    model: SamModel,
    read: ReadWindow,
    shape: tuple[int, int],
    out: Any,
    scratch: Path,
    *,
    mode: str = "ais",
    patch_px: int = 512,
    halo_px: int | None = None,
    precision: torch.dtype | None = None,
    parameters: Mapping[str, Any] | None = None,
    first_id: int = 1,
    block_px: int = BLOCK_PX,
    on_window: Callable[[], None] = lambda: None,
) -> int:
    """Segment one plane of any size in little memory.

    Parameters
    ----------
    model
        A loaded model.
    read
        Gives the pixels of a window as float32 "YXC" with 3 channels from 0 to 255.
    shape
        Height and width of the plane, in pixels; its longer side is at least `patch_px`.
    out
        Array "YX" of unsigned integers to write to: NumPy, or zarr with chunks that divide `block_px`.
    scratch
        An existing folder for intermediate files, removed again.
    mode, patch_px, halo_px, precision, parameters
        As for `segment_plane`.
    first_id
        The smallest id to give.
    block_px
        Side of the blocks, in pixels.
    on_window
        Called after each window (see `plan_tiles`).

    Returns
    -------
    int
        Number of objects; their ids are consecutive.

    Raises
    ------
    ConfigError, DataError, ModelError
        As `segment_plane`.
    ResourceError
        When the disk of `scratch` has no room.
    """
    settings = {**_defaults(mode), "min_size": MIN_SIZE_PX, **(parameters or {})}
    folder = scratch / "segment"
    plane = _Plane(
        model, read, shape, plan_tiles(shape, patch_px, halo_px), folder, mode, settings, precision, on_window
    )
    _check_disk(scratch, shape)
    blocks = list(_blocks(shape, block_px))
    try:
        folder.mkdir()
        with evaluating(model):
            if mode == "ais":
                reach = min(max(patch_px // 2, 64), block_px)
                areas = _grow_objects(_predict_maps(plane), blocks, reach, out, folder)
            else:
                areas = _merge_prompted(plane, blocks, out)
        kept = areas >= max(1, settings["min_size"])
        kept[0] = False
        numbers = np.where(kept, np.cumsum(kept) + (first_id - 1), 0).astype(out.dtype)
        for block in blocks:
            out[block] = numbers[np.asarray(out[block])]
        return int(kept.sum())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _predict_maps(plane: _Plane) -> _Maps:
    stored = _scratch_array(plane.folder / "maps", (3, *plane.shape), np.float32)
    for embedding in plane.embeddings():
        predicted = decode_window(plane.model, embedding, plane.precision)
        stored[(slice(None), *embedding.tile.core)] = predicted[(slice(None), *embedding.tile.core_in_window)]
    return _Maps(stored, plane.settings, plane.shape)


def _grow_objects(maps: _Maps, blocks: list[Window], reach: int, out: Any, folder: Path) -> NDArray[np.int64]:
    """Write the watershed to `out`; return the area of each id, in pixels."""
    seeds = _scratch_array(folder / "seeds", maps.shape, np.uint64)
    numbers = _find_seeds(maps, blocks, seeds)
    areas = np.zeros(int(numbers.max(initial=0)) + 1, np.int64)
    for block in blocks:
        labels = _flood(maps, seeds, numbers, block, reach)
        out[block] = labels
        ids, counts = np.unique(labels, return_counts=True)
        areas[ids] += counts
    return areas


def _find_seeds(maps: _Maps, blocks: list[Window], seeds: Any) -> NDArray[np.uint64]:
    """Write a number for each piece of a seed; return the seed that each number belongs to."""
    count = 0
    shared: list[tuple[Window, NDArray[np.uint64]]] = []
    for block in blocks:
        wide = tuple(slice(side.start, min(side.stop + 1, size)) for side, size in zip(block, maps.shape, strict=True))
        found = maps.seeds((wide[0], wide[1]))
        found[found > 0] += np.uint64(count)
        count = max(count, int(found.max(initial=0)))
        height, width = (side.stop - side.start for side in block)
        seeds[block] = found[:height, :width]
        # The line after the block is labelled here and there: what meets in a pixel is one seed.
        for extra in ((slice(height, None), slice(None)), (slice(None), slice(width, None))):
            if found[extra].size and found[extra].any():
                rows, columns = (
                    slice(side.start + (cut.start or 0), end.stop)
                    for side, cut, end in zip(block, extra, wide, strict=True)
                )
                shared.append(((rows, columns), found[extra].copy()))
    joined = bic.utils.UnionFind(count + 1)
    for window, here in shared:
        there = np.asarray(seeds[window])
        meets = (here > 0) & (there > 0)
        if meets.any():
            joined.merge(np.unique(np.stack([here[meets], there[meets]], 1), axis=0))
    roots = joined.find(np.arange(count + 1, dtype=np.uint64))
    _, numbers = np.unique(roots, return_inverse=True)
    # The background is a root of its own, and the smallest.
    return numbers.astype(np.uint64)


def _flood(maps: _Maps, seeds: Any, numbers: NDArray[np.uint64], block: Window, reach: int) -> NDArray[np.uint32]:
    """Flood a block with a halo of `reach`, or a larger one when its foreground is not reached from seeds inside."""
    if not maps.foreground(block).any():
        return np.zeros([side.stop - side.start for side in block], np.uint32)
    while True:
        wide = _grow(block, reach, maps.shape)
        mask = maps.foreground(wide)
        flooded = bic.segmentation.watershed(maps.boundary(wide), numbers[np.asarray(seeds[wide])], mask=mask)
        inner = _inside(block, wide)
        whole = all(side.start == 0 and side.stop == size for side, size in zip(wide, maps.shape, strict=True))
        larger = _grow(block, 2 * reach, maps.shape)
        area = int(np.prod([side.stop - side.start for side in larger]))
        if whole or area > FLOOD_UP_TO_PX or not _cut_off(mask & (flooded == 0), inner, wide, maps.shape):
            return np.ascontiguousarray(flooded[inner], np.uint32)
        reach *= 2


def _cut_off(dry: NDArray[np.bool_], inner: Window, wide: Window, shape: tuple[int, int]) -> bool:
    """Whether foreground that no seed reached lies in the block and goes on beyond the halo."""
    if not dry[inner].any():
        return False
    pieces = bic.segmentation.label(dry)
    rims = []
    for axis, (side, size) in enumerate(zip(wide, shape, strict=True)):
        rims += [pieces.take(0, axis)] if side.start > 0 else []
        rims += [pieces.take(-1, axis)] if side.stop < size else []
    at_rim = np.unique(np.concatenate(rims)) if rims else np.zeros(0, pieces.dtype)
    return bool(np.isin(pieces[inner], at_rim[at_rim > 0]).any())


def _merge_prompted(plane: _Plane, blocks: list[Window], out: Any) -> NDArray[np.int64]:
    how = (plane.shape, plane.mode, plane.precision, plane.settings)
    pieces = ((embedding.tile, segment_window(plane.model, embedding, *how)) for embedding in plane.embeddings())
    merged = np.lib.format.open_memmap(plane.folder / "merged.npy", "w+", np.uint32, plane.shape)
    merge_windows(plane.shape, pieces, merged)
    areas = np.zeros(1, np.int64)
    for block in blocks:
        part = merged[block]
        counts = np.bincount(part.ravel(), minlength=len(areas))
        areas = np.pad(areas, (0, len(counts) - len(areas))) + counts
        out[block] = part
    return areas


def _defaults(mode: str) -> dict[str, Any]:
    """What micro-sam's own one-piece function takes when nothing is said."""
    if mode != "ais":
        return {}
    known = inspect.signature(upstream.InstanceSegmentationWithDecoder.generate).parameters
    return {name: known[name].default for name in known if name.endswith(("_threshold", "_smoothing"))}


def _scratch_array(path: Path, shape: tuple[int, ...], dtype: Any) -> Any:
    chunks = (*[1] * (len(shape) - 2), *[min(_CHUNK_PX, size) for size in shape[-2:]])
    codec = BloscCodec(cname="lz4", clevel=3, shuffle="bitshuffle")
    return zarr.create_array(path, shape=shape, chunks=chunks, dtype=dtype, compressors=codec)


def _check_disk(scratch: Path, shape: tuple[int, int]) -> None:
    needed, free = shape[0] * shape[1] * _SCRATCH_BYTES_PER_PX, shutil.disk_usage(scratch).free
    if needed > free:
        raise ResourceError(
            f"{scratch}: {free / 1e9:.1f} GB free; a plane of {shape[0]} x {shape[1]} px takes up to "
            f"{needed / 1e9:.1f} GB of disk while it is segmented; free some, or write to another disk"
        )


def _blocks(shape: tuple[int, int], block_px: int) -> Iterator[Window]:
    for y in range(0, shape[0], block_px):
        for x in range(0, shape[1], block_px):
            yield slice(y, min(y + block_px, shape[0])), slice(x, min(x + block_px, shape[1]))


def _grow(window: Window, by: int, shape: tuple[int, int]) -> Window:
    rows, columns = (
        slice(max(0, side.start - by), min(size, side.stop + by)) for side, size in zip(window, shape, strict=True)
    )
    return rows, columns


def _inside(window: Window, wide: Window) -> Window:
    rows, columns = (
        slice(side.start - outer.start, side.stop - outer.start) for side, outer in zip(window, wide, strict=True)
    )
    return rows, columns
