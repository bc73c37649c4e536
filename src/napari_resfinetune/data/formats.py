"""One pair of functions per file format: what a file holds, and a part of it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import imagecodecs
import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image

from napari_resfinetune.errors import DataError

Index = tuple[slice | int, ...]
Kind = Literal["tiff", "picture", "npy", "hdf5", "zarr", "array"]

SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".tif", ".tiff", ".btf", ".tf2", ".tf8"), "tiff"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp"), "picture"),
    **dict.fromkeys((".h5", ".hdf5", ".hdf"), "hdf5"),
    ".npy": "npy",
    ".zarr": "zarr",
}
_AXIS_NAMES = {"time": "T", "channel": "C", "c": "C", "t": "T", "z": "Z", "y": "Y", "x": "X"}


class Stored(NamedTuple):
    """What a file holds: shape, dtype, a letter per axis ("?" where nothing says which), and the key it lies at."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    letters: str
    key: str | None = None


def inspect(path: Path, kind: Kind, key: str | None = None, indexed: bool = False) -> Stored:
    """Say what a file holds, without reading more of it than needed."""
    if kind == "tiff":
        return _inspect_tiff(path)
    if kind == "hdf5":
        return _inspect_hdf5(path, key)
    if kind == "zarr":
        return _inspect_zarr(path, key)
    if kind == "picture":
        picture = read_picture(path, indexed)
        return Stored(picture.shape, picture.dtype, "YXC"[: picture.ndim])
    array = np.load(path, mmap_mode="r")
    return Stored(array.shape, array.dtype, "?" * array.ndim)


def read(path: Path, kind: Kind, key: str | None, index: Index, *, indexed: bool, stack: bool) -> Any:
    """Read a part of a file; `index` has one entry per stored dimension, `stack` says that more reads will follow."""
    if kind == "tiff":
        if stack:
            stamp = path.stat()
            owner = (os.getpid(), threading.get_ident())
            return _open_stack(path, (stamp.st_mtime_ns, stamp.st_size), owner).array[index]
        with tifffile.TiffFile(path) as tiff:
            # Plain pixels are mapped: through zarr, a window of an image in one strip would read all of it.
            mapped = _mapped(tiff)
            return np.array(mapped[index]) if mapped is not None else _tiff_array(tiff)[index]
    if kind == "hdf5":
        with h5py.File(path, "r") as file:
            return file[key][index]
    if kind == "zarr":
        opened: Any = zarr.open(str(path), mode="r")
        return (opened[key] if key else opened)[index]
    return (read_picture(path, indexed) if kind == "picture" else np.load(path, mmap_mode="r"))[index]


def file_kind(path: Path) -> Kind | None:
    """Return how a file or zarr folder is read, or `None` for anything else."""
    if path.is_dir():
        # An array inside a zarr folder has no suffix of its own.
        marked = any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))
        return "zarr" if marked or path.suffix.lower() == ".zarr" else None
    kind = SUFFIXES.get(path.suffix.lower())
    return None if kind == "zarr" and path.exists() else kind


def clean_stem(path: Path) -> str:
    """Return the file name without suffixes; "a.ome.tif" gives "a"."""
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return stem[:-4] if stem.lower().endswith(".ome") and len(stem) > 4 else stem


def problem(where: object, found: str, fix: str) -> DataError:
    """Return an error in the form that all messages have."""
    return DataError(f"{where}: {found}; {fix}")


@contextmanager
def readable(where: object) -> Iterator[None]:
    """Turn whatever a reader raises into a `DataError` with its reason."""
    # Damaged files make the readers raise nearly anything, so that only the widest net holds them all.
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, LookupError):  # its text is about the reader's own lists
            reason = "damaged, or not what its name says"
        fix = "check that it opens elsewhere, or export it again"
        raise problem(where, f"cannot be read ({reason})", fix) from error


def axis_letters(names: Any, ndim: int) -> str:
    """Return the letters of named dimensions, all "?" when there are no names."""
    if not names or len(names) != ndim:
        return "?" * ndim
    return "".join(_AXIS_NAMES.get(str(name).lower(), "?") for name in names)


def read_picture(path: Path, indexed: bool) -> NDArray[Any]:
    """Decode a PNG, JPEG or BMP as "YX" or "YXC", without alpha channel."""
    with open(path, "rb") as file:
        head = file.read(26)
    # Pillow cuts colour PNGs of 16 bit to 8 bit.
    if head.startswith(b"\x89PNG") and len(head) == 26 and head[24] == 16 and head[25] in (2, 4, 6):
        array: NDArray[Any] = imagecodecs.png_decode(path.read_bytes())
        array = array[..., :-1] if head[25] in (4, 6) else array
    else:
        with Image.open(path) as image:
            if image.mode == "P" and indexed:
                return np.asarray(image)
            plain = {"LA": "L", "La": "L"}.get(image.mode, "RGB")
            keep = image.mode in ("1", "L", "F", "I", "RGB") or image.mode.startswith("I;16")
            array = np.asarray(image if keep else image.convert(plain))
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array


class _OpenStack:
    """A TIFF stack kept open, since finding its pages again for every slice takes long."""

    def __init__(self, path: Path) -> None:
        self.tiff = tifffile.TiffFile(path)
        self.array = _tiff_array(self.tiff)

    def __del__(self) -> None:
        if hasattr(self, "tiff"):
            self.tiff.close()


@lru_cache(maxsize=4)
def _open_stack(path: Path, stamp: tuple[int, int], owner: tuple[int, int]) -> _OpenStack:
    # `owner` (process and thread) keeps a file position from being shared; `stamp` notices a changed file.
    return _OpenStack(path)


def _mapped(tiff: tifffile.TiffFile) -> Any:
    """Map the pixels of a file without compression whose pixels lie in one piece; `None` for any other."""
    series = tiff.series[0]
    level = series.levels[0]
    if level.dataoffset is None or level.dtype is None:
        return None
    order = tiff.byteorder
    return np.memmap(tiff.filehandle.path, level.dtype.newbyteorder(order), "r", level.dataoffset, tuple(level.shape))


def _tiff_array(tiff: tifffile.TiffFile) -> Any:
    return zarr.open_array(tiff.series[0].aszarr(level=0), mode="r")


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.lines.append(record.getMessage())


def _inspect_tiff(path: Path) -> Stored:
    # Missing pages are only logged by tifffile: a damaged stack would silently become a shorter one.
    records, logger = _Records(), logging.getLogger("tifffile")
    logger.addHandler(records)
    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            size = path.stat().st_size
            pages = [page for page in series.pages if page is not None]
            ends = (o + n for page in pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=False))
            cut = max(ends, default=0) > size
            same = sum(other.shape == series.shape for other in tiff.series)
            shape, dtype, axes = tuple(series.shape), series.dtype, series.axes
            rgb = series.keyframe.photometric == tifffile.PHOTOMETRIC.RGB
    finally:
        logger.removeHandler(records)
    if cut or any("invalid page offset" in line for line in records.lines):
        raise problem(path, "is cut off: it ends before its last pixel", "copy or export it again")
    if same > 1:
        raise problem(path, f"holds {same} images of the same size", "export one image per file")
    letters = "".join("C" if axis == "S" else axis if axis in "TZCYX" else "?" for axis in axes)
    if rgb and axes.endswith("S") and shape[-1] == 4:
        shape = (*shape[:-1], 3)
    return Stored(shape, np.dtype(dtype), letters)


def _inspect_hdf5(path: Path, key: str | None) -> Stored:
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        key = key or _only(path, names)
        array = file.get(key)
        if not isinstance(array, h5py.Dataset):
            raise _no_key(path, key, names)
        return Stored(array.shape or (), array.dtype, "?" * array.ndim, key)


def _inspect_zarr(path: Path, key: str | None) -> Stored:
    root: Any = zarr.open(str(path), mode="r")
    node, axes = root, None
    if key:
        if not isinstance(root, zarr.Group) or key not in root:
            raise _no_key(path, key, _zarr_arrays(root) if isinstance(root, zarr.Group) else [])
        node = root[key]
    if isinstance(node, zarr.Group) and not _multiscales(node):
        inner = _only(path, _zarr_arrays(node, f"{key}/" if key else ""))
        key, node = inner, root[inner]
    if isinstance(node, zarr.Group):
        level, axes = _multiscales(node) or ("", None)
        key, node = f"{key}/{level}" if key else level, node[level]
    if axes is None:
        axes = getattr(node.metadata, "dimension_names", None) or node.attrs.get("_ARRAY_DIMENSIONS")
    return Stored(tuple(node.shape), np.dtype(node.dtype), axis_letters(axes, node.ndim), key)


def _multiscales(group: Any) -> tuple[str, list[str]] | None:
    """Return the path of the full-resolution array of an OME-Zarr group (0.4 or 0.5), and its axes."""
    attributes = group.attrs.asdict()
    found = attributes.get("ome", attributes).get("multiscales")
    if not found:
        return None
    axes = [axis["name"] if isinstance(axis, dict) else str(axis) for axis in found[0].get("axes", "tczyx")]
    return str(found[0]["datasets"][0]["path"]), axes


def _zarr_arrays(group: Any, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, member in group.members():
        if isinstance(member, zarr.Array) or _multiscales(member):
            names.append(prefix + name)
        else:
            names += _zarr_arrays(member, f"{prefix}{name}/")
    return sorted(names)


def _only(path: Path, names: list[str]) -> str:
    if len(names) != 1:
        raise _no_key(path, None, names)
    return names[0]


def _no_key(path: Path, key: str | None, names: list[str]) -> DataError:
    found = f"no array {key!r}" if key else f"{len(names)} arrays" if names else "no array"
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    fix = f"set data.image_key or data.label_key to one of {shown}" if names else "check how it was written"
    return problem(path, f"holds {found}", fix)
