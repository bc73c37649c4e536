"""Images, stacks and time series of any size, from the array as it lies on disk to labels."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from napari_resfinetune.data.pairs import to_channels
from napari_resfinetune.data.scaling import apply_scaling, measure_scaling
from napari_resfinetune.data.sources import ArraySource, read_plane, shape_yx
from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.inference.blockwise import WHOLE_UP_TO_PX, segment_blockwise
from napari_resfinetune.inference.files import own_suffix
from napari_resfinetune.inference.segment import Labels, check_decoder, check_mode, consecutive, segment_plane
from napari_resfinetune.inference.tiling import plan_tiles
from napari_resfinetune.models import SamModel, upstream

OnProgress = Callable[[int, int], None]
_LINK_BYTES_PER_PX = 32


def segment_source(
    model: SamModel,
    source: ArraySource,
    *,
    channels: Sequence[int] | None = None,
    percentiles: tuple[float, float] = (0.1, 99.9),
    mode: str = "ais",
    patch_px: int = 512,
    halo_px: int | None = None,
    precision: torch.dtype | None = None,
    parameters: Mapping[str, Any] | None = None,
    link: bool | None = None,
    gap_closing: int | None = None,
    min_z_extent: int | None = None,
    out: Any = None,
    scratch: Path | None = None,
    whole_up_to_px: int = WHOLE_UP_TO_PX,
    on_progress: OnProgress = lambda done, total: None,
) -> Any:
    """Segment an image, a stack or a time series.

    Each plane is segmented by itself. Objects of a stack are then linked over its slices (`link_slices`); the frames
    of a time series are linked only on request.

    Parameters
    ----------
    model
        A loaded model.
    source
        What `open_array` gave.
    channels
        Which 1 to 3 channels are shown to the model.
    percentiles
        Intensity percentiles of the whole source that become 0 and 255.
    mode, patch_px, halo_px, precision, parameters
        As for `segment_plane`.
    link
        Whether an object keeps its id from plane to plane; by default in stacks ("Z") and not in time series ("T").
    gap_closing, min_z_extent
        As for `link_slices`.
    out
        Array of unsigned integers in the result's shape to write to, as zarr; made in memory if not given.
    scratch
        Folder for intermediate files of large planes; by default the system's.
    whole_up_to_px
        Planes of more pixels are segmented block by block.
    on_progress
        Called with windows done and windows in all.

    Returns
    -------
    array
        `out`, or a uint32 array: "YX" for a plane; "ZYX" for a stack or time series. Ids are distinct over planes.

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError
        As `segment_plane`, when the source cannot be read, or when it is too large to be linked.
    """
    check_mode(mode, parameters)
    check_decoder(model, mode)
    chosen = None if channels is None else tuple(channels)
    shape = shape_yx(source)
    is_stack = any(axis in "ZT" for axis in source.axes)
    link = check_link(source, link, gap_closing, min_z_extent)
    full_shape = (source.plane_count, *shape) if is_stack else shape
    if link:
        _check_memory(full_shape)
    labels = np.zeros(full_shape, np.uint32) if out is None else out
    scaling = measure_scaling(source, chosen, percentiles)
    if scaling.low == scaling.high:  # one value everywhere, or none that is a number: a model sees things in that
        return labels

    def read(plane: int | None, window: tuple[slice, slice] | None = None) -> Any:
        return apply_scaling(to_channels(read_plane(source, plane, window), chosen), scaling)

    how: dict[str, Any] = {
        "mode": mode,
        "patch_px": patch_px,
        "halo_px": halo_px,
        "precision": precision,
        "parameters": parameters,
    }
    windows = len(plan_tiles(shape, patch_px, halo_px))
    last_id = 0
    for number, plane in enumerate(range(source.plane_count) if is_stack else [None]):
        count = itertools.count(number * windows + 1)

        def on_window(count: Iterator[int] = count) -> None:
            on_progress(next(count), source.plane_count * windows)

        target = _Plane(labels, plane)
        if math.prod(shape) > whole_up_to_px and max(shape) >= patch_px:
            read_window = functools.partial(read, plane)
            with tempfile.TemporaryDirectory(prefix=".maps-", suffix=own_suffix(), dir=scratch) as folder:
                last_id += segment_blockwise(
                    model, read_window, shape, target, Path(folder), first_id=last_id + 1, on_window=on_window, **how
                )
            continue
        found = segment_plane(model, read(plane), **how)
        found[found > 0] += np.uint32(last_id)
        last_id = max(last_id, int(found.max(initial=0)))
        target[...] = found
        on_progress((number + 1) * windows, source.plane_count * windows)
    if link:
        labels[...] = link_slices(np.asarray(labels[...]), gap_closing=gap_closing, min_z_extent=min_z_extent)
    return labels


def link_slices(
    labels: Labels, *, gap_closing: int | None = None, min_z_extent: int | None = None, beta: float = 0.5
) -> Labels:
    """Give objects that overlap from slice to slice one id, with micro-sam's own function.

    It solves a multicut over the overlaps (Archit et al. 2025, doi 10.1038/s41592-024-02580-4).

    Parameters
    ----------
    labels
        uint32 "ZYX", ids consecutive and distinct over the slices.
    gap_closing
        Slices over which a missing piece of an object is filled in.
    min_z_extent
        Objects in fewer slices are dropped.
    beta
        From 0 to 1; a higher one separates more.

    Returns
    -------
    uint32 array "ZYX"
        Consecutive ids.
    """
    if len(labels) < 2 or not labels.any():
        return labels
    linked = upstream.merge_instance_segmentation_3d(
        labels, beta=beta, gap_closing=gap_closing, min_z_extent=min_z_extent, verbose=False
    )
    return consecutive(linked, 0)


def check_link(
    source: ArraySource, link: bool | None, gap_closing: int | None = None, min_z_extent: int | None = None
) -> bool:
    """Return whether the planes of a source are linked, after a look at the options.

    Raises
    ------
    ConfigError
        For a negative number, or numbers for something that is not linked.
    """
    wanted = "Z" in source.axes if link is None else link
    links = wanted and source.plane_count > 1
    problems = []
    for name, value in (("gap_closing", gap_closing), ("min_z_extent", min_z_extent)):
        if value is not None and value < 0:
            problems.append(f"{name}: found {value}; expected a number of slices, 0 or more")
        elif value and not links:
            problems.append(f"{name}: given, but objects are not linked over slices; leave it out, or link them")
    if problems:
        raise ConfigError(*problems)
    return links


class _Plane:
    """One plane of an array, or the array itself: indexed as "YX", and written to where it lies."""

    def __init__(self, array: Any, plane: int | None) -> None:
        self.dtype = array.dtype
        self._array, self._first = array, () if plane is None else (plane,)

    def __getitem__(self, index: Any) -> Any:
        return self._array[(*self._first, *(index if isinstance(index, tuple) else (index,)))]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._array[(*self._first, *(index if isinstance(index, tuple) else (index,)))] = value


def _check_memory(shape: tuple[int, ...]) -> None:
    needed, free = math.prod(shape) * _LINK_BYTES_PER_PX, psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"linking objects over {shape[0]} planes of {shape[1]} x {shape[2]} px takes about {needed / 1e9:.1f} GB "
            f"of memory, {free / 1e9:.1f} GB are free; segment without linking (link=False, --no-link), or a part of it"
        )
