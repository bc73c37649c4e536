"""Arrays in files or in memory, opened lazily: only the part that is asked for is read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from napari_resfinetune.data import formats
from napari_resfinetune.data.formats import (
    SUFFIXES,
    Index,
    Kind,
    axis_letters,
    clean_stem,
    file_kind,
    problem,
    readable,
)

_PLANES = ("YX", "YXC", "CYX")
SUPPORTED_AXES = _PLANES + tuple(
    axes for stack in "ZT" for axes in (f"{stack}YX", f"{stack}YXC", f"{stack}CYX", f"C{stack}YX")
)
_EXPECTED = "expected YX, YXC, CYX, ZYX or TYX, each stack with or without channels"


@dataclass(frozen=True)
class ArraySource:
    """An array that is read in parts. It holds no open file, so that it can be sent to other processes.

    Attributes
    ----------
    name
        File stem, or the name of an array in memory.
    path
        The file or zarr folder; `None` in memory.
    shape, dtype
        Of the array as it is read.
    axes
        One letter of "TZCYX" per dimension, one of `SUPPORTED_AXES`.
    key
        Path of the array inside an HDF5 or zarr file.
    guessed_axes
        Whether a short first axis could be channels just as well as slices, and nothing in the file says which.
    """

    name: str
    path: Path | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: str
    key: str | None = None
    guessed_axes: bool = False
    kind: Kind = "array"
    squeezed: tuple[int, ...] = ()
    indexed: bool = False
    data: Any = field(default=None, repr=False, compare=False)

    @property
    def where(self) -> str:
        """The last two parts of the path, or the name, for messages."""
        return "/".join(self.path.parts[-2:]) if self.path else self.name

    @property
    def plane_count(self) -> int:
        """Number of slices or frames; 1 for a single plane."""
        return next((size for axis, size in zip(self.axes, self.shape, strict=True) if axis in "ZT"), 1)

    def read(self, index: Index | None = None) -> NDArray[Any]:
        """Read a part of the array.

        Parameters
        ----------
        index
            One slice (positive step) or number per dimension, as for NumPy; missing ones mean everything.

        Raises
        ------
        DataError
            When the file cannot be read any more, or its data are damaged.
        """
        given = tuple(index or ())
        if len(given) > len(self.shape):
            raise IndexError(f"{self.where}: {len(given)} indices for {len(self.shape)} dimensions")
        given += (slice(None),) * (len(self.shape) - len(given))
        wanted: list[slice | int] = [_bounded(item, size) for item, size in zip(given, self.shape, strict=True)]
        for position in self.squeezed:
            wanted.insert(position, 0)
        with readable(self.path or self.where):
            result = np.asarray(self._read_stored(tuple(wanted)))
        return result.astype(self.dtype, copy=False)

    def _read_stored(self, index: Index) -> Any:
        # A dataset whose file was closed is false; its file can be opened again.
        if self.data is not None and (self.path is None or bool(self.data)):
            return self.data[index]
        if self.path is None:
            raise problem(self.name, "is not there any more", "open it again")
        stack = self.plane_count > 1
        return formats.read(self.path, self.kind, self.key, index, indexed=self.indexed, stack=stack)

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the file itself; handles such as h5py's cannot travel.
        return {**self.__dict__, "data": None} if self.path else dict(self.__dict__)


def open_array(
    location: Any, key: str | None = None, axes: str | None = None, name: str | None = None, *, indexed: bool = False
) -> ArraySource:
    """Open an image or label image without reading it all.

    Axes come from `axes`, else from the file (ImageJ, OME, zarr dimension names), else from the shape: 2D is "YX", a
    last dimension of 3 or 4 that is the smallest one is "YXC", any other 3D array is "ZYX" (`guessed_axes` is set when
    its first axis has 2 to 4 entries). The alpha channel of RGBA and gray-alpha files is dropped, and so is that of
    uint8 arrays with a last dimension of 4 when `axes` is not given. OME-Zarr is read at full resolution.

    Parameters
    ----------
    location
        Path of a TIFF, PNG, JPEG, BMP, HDF5, npy or zarr file, or an array in memory (NumPy, zarr, h5py, dask).
    key
        Path of the array inside an HDF5 or zarr file; needed when it holds more than one.
    axes
        One letter per dimension.
    name
        Name of an array in memory.
    indexed
        Keep the indices of palette images rather than their colours, as label images need.

    Raises
    ------
    DataError
        When it cannot be read, holds no numbers, or has dimensions that cannot be used.
    """
    if not isinstance(location, str | os.PathLike):
        return _open_memory(location, axes, name or "array 1")
    path = Path(location)
    kind = file_kind(path)
    if not path.exists():
        raise problem(path, "does not exist", "check the path")
    if kind is None:
        raise problem(path, "is not an image file that can be read", f"use one of {', '.join(SUFFIXES)}")
    if path.is_file() and path.stat().st_size == 0:
        raise problem(path, "is empty (0 bytes)", "export it again")
    with readable(path):
        stored = formats.inspect(path, kind, key, indexed)
    source = ArraySource(
        name or clean_stem(path), path, stored.shape, stored.dtype, "", stored.key, kind=kind, indexed=indexed
    )
    return _finish(source, stored.letters, axes)


def shape_yx(source: ArraySource) -> tuple[int, int]:
    """Return height and width in pixels."""
    return source.shape[source.axes.index("Y")], source.shape[source.axes.index("X")]


def read_plane(
    source: ArraySource, plane: int | None = None, window: tuple[slice, slice] | None = None
) -> NDArray[Any]:
    """Read one plane, or a window of it.

    Parameters
    ----------
    plane
        Index along Z or T; `None` for an image with one plane.
    window
        Rows and columns.

    Returns
    -------
    array
        "YX", or "YXC" when the source has channels.

    Raises
    ------
    DataError
        When it cannot be read, or a stack is asked for no plane or one that it lacks.
    """
    if plane is None and source.plane_count > 1:
        raise problem(source.where, f"has {source.plane_count} planes", "choose one of them")
    if plane is not None and not 0 <= plane < source.plane_count:
        raise problem(source.where, f"plane {plane} asked for, {source.plane_count} there", "choose one of them")
    y, x = window or (slice(None), slice(None))
    by_axis: dict[str, slice | int] = {"Y": y, "X": x, "C": slice(None), "Z": plane or 0, "T": plane or 0}
    array = source.read(tuple(by_axis[axis] for axis in source.axes))
    left = [axis for axis in source.axes if axis in "CYX"]
    return np.moveaxis(array, left.index("C"), -1) if "C" in left else array


def _bounded(item: slice | int, size: int) -> slice | int:
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        if step < 1:
            raise IndexError(f"slice step {step}; expected a positive one")
        return slice(start, max(start, stop), step)
    if not -size <= item < size:
        raise IndexError(f"index {item} is outside 0 to {size - 1}")
    return int(item) % size


def _finish(source: ArraySource, letters: str, given: str | None) -> ArraySource:
    """Check the dtype, settle the axes, and drop axes of length 1 that mean nothing."""
    where, shape = source.path or source.where, source.shape
    unknown = set(letters) == {"?"}
    if source.dtype.kind not in "biuf":
        raise problem(where, f"holds {source.dtype}, not numbers", "export it as integers or real numbers")
    if 0 in shape or not shape:
        raise problem(where, f"shape {shape} has no pixels", "export it again")
    if given is not None:
        letters, squeezed = _given_axes(source, given.upper())
        guessed = False
    else:
        letters, squeezed, guessed = _find_axes(shape, letters)
        if letters not in SUPPORTED_AXES:
            at = f" with axes {letters}" if "?" not in letters else ""
            fix = "export one image per file, or set data.axes"
            raise problem(where, f"{len(shape)}D array of shape {shape}{at}; {_EXPECTED}", fix)
    visible = tuple(size for position, size in enumerate(shape) if position not in squeezed)
    if unknown and given is None and letters.endswith("YXC") and visible[-1] == 4 and source.dtype == np.uint8:
        visible = (*visible[:-1], 3)
    dtype = source.dtype.newbyteorder("=")
    return replace(source, shape=visible, axes=letters, dtype=dtype, squeezed=squeezed, guessed_axes=guessed)


def _given_axes(source: ArraySource, given: str) -> tuple[str, tuple[int, ...]]:
    where, shape = source.path or source.where, source.shape
    if given not in SUPPORTED_AXES:
        raise problem(where, f"data.axes is {given!r}", f"choose one of {', '.join(SUPPORTED_AXES)}")
    if len(given) == len(shape):
        return given, ()
    squeezed = tuple(position for position, size in enumerate(shape) if size == 1)
    if len(given) == len(shape) - len(squeezed):
        return given, squeezed
    raise problem(where, f"shape {shape} does not have the axes {given!r}", f"set data.axes to {len(shape)} letters")


def _find_axes(shape: tuple[int, ...], letters: str) -> tuple[str, tuple[int, ...], bool]:
    """Return axes, positions of the dropped axes, and whether the first axis is a guess."""
    if len(shape) >= 2 and set(letters) == {"?"}:
        colours = len(shape) in (3, 4) and shape[-1] in (1, 3, 4) and min(shape[-3:-1]) > shape[-1]
        letters = "?" * (len(shape) - 3) + "YXC" if colours else "?" * (len(shape) - 2) + "YX"
    squeezed = tuple(
        position
        for position, (axis, size) in enumerate(zip(letters, shape, strict=True))
        if size == 1 and (axis == "C" or (axis not in "YX" and len(shape) > 3))
    )
    left = "".join(axis for position, axis in enumerate(letters) if position not in squeezed)
    if left.count("?") != 1 or "Z" in left or "T" in left:
        return left, squeezed, False
    size = next(size for position, size in enumerate(shape) if letters[position] == "?" and position not in squeezed)
    return left.replace("?", "Z"), squeezed, left == "?YX" and 1 < size <= 4


def _open_memory(data: Any, axes: str | None, name: str) -> ArraySource:
    try:
        shape, dtype = tuple(int(size) for size in data.shape), np.dtype(data.dtype)
        data.__getitem__  # noqa: B018
    except (AttributeError, TypeError):
        found = f"found {type(data).__name__}"
        raise problem(name, found, "give a path, or an array of numbers (NumPy, zarr, h5py, dask)") from None
    letters = "?" * len(shape)
    source = ArraySource(name, None, shape, dtype, "", data=data)
    if isinstance(data, zarr.Array):
        letters = axis_letters(getattr(data.metadata, "dimension_names", None), len(shape))
    elif isinstance(data, h5py.Dataset) and Path(data.file.filename).is_file():
        source = replace(source, path=Path(data.file.filename), key=data.name, kind="hdf5")
    elif isinstance(data, h5py.Dataset):
        source = replace(source, data=data[()])
    return _finish(source, letters, axes)
