"""Label images on disk: TIFF and OME-Zarr, each with a note of what made it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import tifffile
import zarr
from numpy.typing import NDArray

from napari_resfinetune.errors import DataError
from napari_resfinetune.models.weights import replace_folder

Format = Literal["tiff", "zarr"]
SUFFIX_OF: Mapping[str, str] = {"tiff": ".tif", "zarr": ".ome.zarr"}
CHUNK_PX = 1024
_TILE_PX = 512
_TILED_FROM_PX = 4096**2
_SMALLEST_LEVEL_PX = 512
_NOTE = "resfinetune"
_FIX = "choose a folder that exists and that you may write to"


def write_labels(
    labels: Any, path: str | Path, made_by: Mapping[str, Any] | None = None, *, axes: str | None = None
) -> None:
    """Write a label image as a compressed TIFF; a file of that name is replaced.

    Parameters
    ----------
    labels
        Unsigned integers "YX", "ZYX" or "TYX", NumPy or zarr; what is large is read and written tile by tile.
    path
        The file.
    made_by
        Plain data for `read_made_by`.
    axes
        By default "YX" or "ZYX".

    Raises
    ------
    DataError
        When it cannot be written.
    """
    path = Path(path)
    partial = _partial(path)
    options: dict[str, Any] = {
        "compression": "zlib",
        "photometric": "minisblack",
        "metadata": {"axes": axes or "ZYX"[-labels.ndim :], **({_NOTE: dict(made_by)} if made_by else {})},
        "bigtiff": math.prod(labels.shape) * 4 > 2**31,
    }
    try:
        if math.prod(labels.shape[-2:]) > _TILED_FROM_PX:
            options |= {"shape": labels.shape, "dtype": np.uint32, "tile": (_TILE_PX, _TILE_PX)}
            tifffile.imwrite(partial, _tiles(labels), **options)
        else:
            tifffile.imwrite(partial, np.asarray(labels[...], np.uint32), **options)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); {_FIX}") from None
    finally:
        partial.unlink(missing_ok=True)


def own_suffix() -> str:
    """Return how names end of what this process makes and removes again."""
    return f".{socket.gethostname()}-{os.getpid()}.partial"


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}{own_suffix()}")


def remove_abandoned(folder: Path) -> None:
    """Remove what processes of this computer that were killed have left half-made in a folder."""
    for path in folder.glob(".*.partial"):
        name, _, process = path.name.removesuffix(".partial").rpartition("-")
        if name.endswith(f".{socket.gethostname()}") and process.isdigit() and not psutil.pid_exists(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_ome_zarr(
    path: Path, shape: tuple[int, ...], made_by: Mapping[str, Any] | None = None, *, axes: str | None = None
) -> Iterator[Any]:
    """Hand out the array of an OME-Zarr label image to fill; its pyramid follows, then it is put at `path`.

    The metadata are those of NGFF 0.5 (https://ngff.openmicroscopy.org/0.5). A pyramid halves Y and X and keeps every
    second pixel, since ids cannot be averaged.

    Parameters
    ----------
    path
        The folder; one that is there is replaced.
    shape
        Of the image.
    made_by, axes
        As for `write_labels`.

    Raises
    ------
    DataError
        When it cannot be written.
    """
    partial = _partial(path)
    axes = axes or "ZYX"[-len(shape) :]
    try:
        group = zarr.create_group(partial, zarr_format=3, overwrite=True)
        full = _level(group, 0, shape, axes)
        yield full
        levels = 1
        while max(shape[-2:]) > _SMALLEST_LEVEL_PX:
            shape = (*shape[:-2], *(-(-size // 2) for size in shape[-2:]))
            _halve(group[str(levels - 1)], _level(group, levels, shape, axes))
            levels += 1
        group.attrs.update(_ome_metadata(path.name, axes, levels) | ({_NOTE: dict(made_by)} if made_by else {}))
        replace_folder(path, partial)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); {_FIX}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_made_by(path: Path) -> Mapping[str, Any] | None:
    """Return what a label image was written with; `None` when it is not there, or not one of ours."""
    try:
        if path.is_dir():
            note = zarr.open_group(path, mode="r").attrs.get(_NOTE)
        else:
            with tifffile.TiffFile(path) as tiff:
                note = json.loads(tiff.pages.first.description).get(_NOTE)
    except Exception:  # whatever is not ours may be damaged in any way
        return None
    return note if isinstance(note, dict) else None


def count_objects(labels: Any) -> int:
    """Count the ids of a label image, plane by plane and block by block."""
    ids: NDArray[Any] = np.zeros(0, np.uint32)
    for part in _parts(labels.shape, CHUNK_PX * 2):
        ids = np.union1d(ids, np.unique(np.asarray(labels[part])))
    return int(np.count_nonzero(ids))


def _level(group: Any, number: int, shape: tuple[int, ...], axes: str) -> Any:
    chunks = (*[1] * (len(shape) - 2), *(min(CHUNK_PX, size) for size in shape[-2:]))
    names = list(axes.lower())
    return group.create_array(str(number), shape=shape, chunks=chunks, dtype=np.uint32, dimension_names=names)


def _halve(large: Any, small: Any) -> None:
    for part in _parts(small.shape, CHUNK_PX):
        rows, columns = (slice(2 * side.start, 2 * side.stop) for side in part[-2:])
        small[part] = np.asarray(large[(*part[:-2], rows, columns)])[..., ::2, ::2]


def _ome_metadata(name: str, axes: str, levels: int) -> dict[str, Any]:
    # Every second pixel is kept, from the first on: levels differ in scale, and not in where they begin.
    scales = [[1.0] * (len(axes) - 2) + [float(2**level)] * 2 for level in range(levels)]
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        for level, scale in enumerate(scales)
    ]
    kinds = [{"name": axis, "type": "time" if axis == "t" else "space"} for axis in axes.lower()]
    multiscale = {"name": name, "axes": kinds, "datasets": datasets, "type": "nearest"}
    return {"ome": {"version": "0.5", "multiscales": [multiscale], "image-label": {}}}


def _parts(shape: tuple[int, ...], side_px: int) -> Iterator[tuple[Any, ...]]:
    """Cover an array with indices of blocks within planes."""
    for plane in range(shape[0]) if len(shape) == 3 else [None]:
        for y in range(0, shape[-2], side_px):
            for x in range(0, shape[-1], side_px):
                block = (slice(y, min(y + side_px, shape[-2])), slice(x, min(x + side_px, shape[-1])))
                yield block if plane is None else (plane, *block)


def _tiles(labels: Any) -> Iterator[NDArray[np.uint32]]:
    for part in _parts(labels.shape, _TILE_PX):
        tile = np.zeros((_TILE_PX, _TILE_PX), np.uint32)
        pixels = np.asarray(labels[part])
        tile[: pixels.shape[0], : pixels.shape[1]] = pixels
        yield tile
