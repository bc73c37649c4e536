"""Which labels belong to which image."""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.data.formats import SUFFIXES, clean_stem, file_kind
from napari_resfinetune.data.sources import ArraySource, open_array, read_plane
from napari_resfinetune.errors import DataError

_LABEL_SUFFIX = re.compile(r"[_\-. ](labels?|masks?|seg)$", re.IGNORECASE)
_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data, and what to do about it.

    Attributes
    ----------
    level
        Errors stop a run, warnings do not.
    code
        Short name of the kind of problem, such as "shape-mismatch".
    """

    level: Literal["error", "warning"]
    code: str
    where: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}; {self.fix}"

    def to_dict(self) -> dict[str, str]:
        """Return plain data, with the whole sentence as "message"."""
        return {**asdict(self), "message": str(self)}


@dataclass(frozen=True)
class Pair:
    """An image and its labels; `channels` are those of the image that the model is shown."""

    name: str
    image: ArraySource
    labels: ArraySource
    channels: tuple[int, ...] | None = None

    @cached_property
    def planes(self) -> tuple[int | None, ...]:
        """Slices or frames whose labels hold an object; `(None,)` for a single plane, `()` when there is no object.

        Raises
        ------
        DataError
            When the labels cannot be read.
        """
        if "Z" not in self.labels.axes and "T" not in self.labels.axes:
            return (None,) if read_plane(self.labels, None).any() else ()
        return tuple(plane for plane in range(self.labels.plane_count) if read_plane(self.labels, plane).any())


@dataclass(frozen=True)
class Pairs:
    """Images with their labels, and what was wrong with the rest."""

    pairs: tuple[Pair, ...]
    problems: tuple[Problem, ...] = ()


def find_pairs(
    images: Any,
    labels: Any,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    axes: str | None = None,
    channels: Sequence[int] | None = None,
) -> Pairs:
    """Find images and the labels that belong to them.

    Files are paired by stem; labels may also be called "x_label", "x_labels", "x_mask", "x_masks" or "x_seg" for an
    image "x". Two single files, and anything with an array in memory, are paired by position.

    Parameters
    ----------
    images, labels
        Each a folder, a glob, a path, an array, or a list of paths or arrays.
    image_key, label_key
        Path of the array inside HDF5 or zarr files.
    axes
        Axes of the images, found if unset; labels have the same ones without channels, or "YX".
    channels
        Which 1 to 3 channels the model is shown.

    Raises
    ------
    DataError
        When a folder is missing or empty, a glob matches nothing, or lists that are paired by position differ in
        length. Everything else that is wrong is listed in `Pairs.problems`.
    """
    image_items, label_items = _locate_both(images, labels)
    by_position = not all(isinstance(item, Path) for item in image_items + label_items)
    if by_position or (_is_single(images) and _is_single(labels)):
        if len(image_items) != len(label_items):
            counts = f"{len(image_items)} images and {len(label_items)} label images"
            raise DataError(f"images and labels: found {counts}; give one label image per image, in the same order")
        matched = list(zip(image_items, label_items, strict=True))
        problems: list[Problem] = []
    else:
        matched, problems = _match(image_items, label_items)
    pairs = []
    chosen = tuple(channels) if channels is not None else None
    for number, (image, label) in enumerate(matched, start=1):
        opened = []
        names = (f"image array {number}", f"label array {number}") if by_position else (None, None)
        for open_one, item, key, name in (
            (open_array, image, image_key, names[0]),
            (_open_labels, label, label_key, names[1]),
        ):
            try:
                opened.append(open_one(item, key, axes, None if isinstance(item, Path) else name))
            except DataError as error:
                problems.append(_unreadable(error))
        if len(opened) == 2:
            name = opened[0].name if isinstance(image, Path) else f"array {number}"
            pairs.append(Pair(name, opened[0], opened[1], chosen))
    return Pairs(tuple(pairs), tuple(problems))


def join_held_out(training: Pairs, held_out: Pairs) -> Pairs:
    """Put images to train on and held-out images together; one that is among both is a problem."""
    paths = {pair.image.path.resolve() for pair in training.pairs if pair.image.path is not None}
    shared = [p.image.path for p in held_out.pairs if p.image.path is not None and p.image.path.resolve() in paths]
    problems = training.problems + held_out.problems
    if shared:
        found = (
            "is both a training and a held-out image" if len(shared) == 1 else "are both training and held-out images"
        )
        problems += (Problem("error", "held-out-twice", _places(shared), found, "remove them from one of the two"),)
    return Pairs(training.pairs + held_out.pairs, problems)


def find_images(images: Any, *, image_key: str | None = None, axes: str | None = None) -> tuple[ArraySource, ...]:
    """Open images that have no labels.

    Parameters
    ----------
    images, image_key, axes
        As for `find_pairs`.

    Raises
    ------
    DataError
        When there is none, or some cannot be read (all are listed), or two have the same stem.
    """
    sources: list[ArraySource] = []
    problems: list[str] = []
    items = _locate(images, "images")
    problems += [str(problem) for problem in _by_stem([i for i in items if isinstance(i, Path)], "images")[1]]
    for number, item in enumerate(items, start=1):
        try:
            sources.append(open_array(item, image_key, axes, None if isinstance(item, Path) else f"array {number}"))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return tuple(sources)


def to_channels(array: NDArray[Any], channels: tuple[int, ...] | None = None) -> NDArray[np.float32]:
    """Turn a plane into the three channels that SAM sees.

    Gray, or one chosen channel, is shown three times; three channels are taken as red, green and blue. Two become the
    first, the second, and the mean of both, so that no channel is empty.

    Parameters
    ----------
    array
        "YX" or "YXC".
    channels
        The 1 to 3 channels to take, in this order.

    Returns
    -------
    array
        float32 "YXC" with 3 channels, in the image's own intensities.

    Raises
    ------
    DataError
        When the image has more than 3 channels and none are chosen, or a chosen one does not exist.
    """
    planes = array[..., np.newaxis] if array.ndim == 2 else array
    count = planes.shape[-1]
    if channels is None:
        if count > 3:
            raise DataError(
                f"image: {count} channels, SAM takes 3; set data.channels to the 1 to 3 that show the cells, "
                "or data.axes if they are slices or frames"
            )
        channels = tuple(range(count))
    if not 1 <= len(channels) <= 3 or not all(0 <= channel < count for channel in channels):
        raise DataError(
            f"image: data.channels is {list(channels)}, the image has {count} channel{'s' * (count != 1)}; "
            + (f"choose 1 to 3 numbers from 0 to {count - 1}" if count > 1 else "leave it out")
        )
    first = planes[..., channels[0]].astype(np.float32)
    if len(channels) == 1:
        return np.stack([first] * 3, axis=-1)
    second = planes[..., channels[1]].astype(np.float32)
    third = (first + second) / 2 if len(channels) == 2 else planes[..., channels[2]].astype(np.float32)
    return np.stack([first, second, third], axis=-1)


def check_channels(sources: Sequence[ArraySource], channels: tuple[int, ...] | None) -> None:
    """Check that `to_channels` can take the channels from images, without reading them.

    Raises
    ------
    DataError
        With all images where it cannot.
    """
    problems = []
    for source in sources:
        count = source.shape[source.axes.index("C")] if "C" in source.axes else 1
        try:
            to_channels(np.zeros((1, 1, count), np.float32), channels)
        except DataError as error:
            problems.append(f"{source.where}: {str(error).removeprefix('image: ')}")
    if problems:
        raise DataError(*problems)


def _locate_both(images: Any, labels: Any) -> tuple[list[Any], list[Any]]:
    errors: list[str] = []
    found: list[list[Any]] = []
    for what, location in (("images", images), ("labels", labels)):
        try:
            found.append(_locate(location, what))
        except DataError as error:
            errors += error.problems
    if errors:
        raise DataError(*errors)
    return found[0], found[1]


def _open_labels(location: Any, key: str | None, axes: str | None, name: str | None) -> ArraySource:
    # Axes are said for the images; they hold for labels where the number of dimensions fits.
    without = axes.upper().replace("C", "") if axes else None
    source = open_array(location, key, None, name, indexed=True)
    if without and len(without) == len(source.shape) and source.axes != without:
        return open_array(location, key, without, name, indexed=True)
    return source


def _is_single(location: Any) -> bool:
    if isinstance(location, str | os.PathLike):
        return file_kind(Path(location)) is not None
    return not isinstance(location, list | tuple)


def _locate(location: Any, what: str) -> list[Any]:
    """Return the paths or arrays that a folder, glob, path, array or list stands for."""
    if isinstance(location, list | tuple):
        if not location:
            raise DataError(f"{what}: the list is empty; give at least one path or array")
        return [Path(item) if isinstance(item, str | os.PathLike) else item for item in location]
    if not isinstance(location, str | os.PathLike):
        if location is None:
            raise DataError(f"{what}: none given; give a folder, a glob, or a list of files or arrays")
        return [location]
    path = Path(location).expanduser()
    try:
        there = path.exists()
    except OSError as error:
        raise DataError(f"{what}: {location} cannot be opened ({error.strerror}); give a folder or a glob") from None
    if there:
        return _list_folder(path, what) if path.is_dir() and file_kind(path) is None else [path]
    if glob.has_magic(str(location)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        usable = [match for match in matches if file_kind(match) and not match.name.startswith(".")]
        if not usable:
            found = f"matches {len(matches)} files, none of them an image" if matches else "matches no file"
            raise DataError(f"{what}: the glob {location} {found}; expected a pattern such as 'images/*.tif'")
        return usable
    raise DataError(f"{what}: {location} does not exist; give a folder, a glob or a list of image files")


def _list_folder(folder: Path, what: str) -> list[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{what}: {folder} cannot be read ({error.strerror}); check its permissions") from None
    usable = [entry for entry in entries if file_kind(entry)]
    if not usable:
        suffixes = sorted({entry.suffix.lower() or "(none)" for entry in entries if entry.is_file()})
        folders = [entry.name for entry in entries if entry.is_dir()]
        found = "is empty"
        if suffixes:
            found = f"holds no image, only files ending in {', '.join(suffixes)}"
        elif folders:
            found = f"holds no image, only folders ({some(folders)})"
        raise DataError(f"{what}: {folder} {found}; expected {', '.join(SUFFIXES)} files")
    return usable


def _match(images: list[Path], labels: list[Path]) -> tuple[list[tuple[Any, Any]], list[Problem]]:
    by_image, problems = _by_stem(images, "images")
    by_label, more = _by_stem(labels, "labels")
    problems += more
    # "cell_mask.tif" belongs to "cell.tif", unless an image is itself called "cell_mask".
    renamed = {stem: stem if stem in by_image else _LABEL_SUFFIX.sub("", stem) for stem in by_label}
    by_image_stem: dict[str, list[str]] = defaultdict(list)
    for stem, image_stem in renamed.items():
        by_image_stem[image_stem].append(stem)
    pairs = []
    for image_stem, path in by_image.items():
        candidates = by_image_stem.get(image_stem, [])
        if len(candidates) > 1:
            names = " and ".join(by_label[stem].name for stem in candidates)
            problems.append(
                Problem("error", "duplicate-stem", _place(path), f"has two label images, {names}", "keep one")
            )
        elif candidates:
            pairs.append((path, by_label[candidates[0]]))
    lonely_images = [path for stem, path in by_image.items() if not by_image_stem.get(stem)]
    lonely_labels = [by_label[stem] for stem, image_stem in renamed.items() if image_stem not in by_image]
    if lonely_images:
        # Some images without labels are usual; together with labels that fit none, names differ by mistake.
        unsure = not pairs or bool(lonely_labels)
        problems.append(
            Problem(
                "error" if unsure else "warning",
                "image-without-labels",
                _places(lonely_images),
                "no label image of that name" if unsure else "no label image, left out",
                "give image and label image the same file name" if unsure else "label it to use it",
            )
        )
    if lonely_labels:
        fix = "give image and label image the same file name"
        problems.append(Problem("error", "labels-without-image", _places(lonely_labels), "no image of that name", fix))
    return pairs, problems


def _by_stem(paths: list[Path], what: str) -> tuple[dict[str, Path], list[Problem]]:
    grouped: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        grouped[clean_stem(path)].append(path)
    problems = [
        Problem(
            "error",
            "duplicate-stem",
            what,
            f"{len(group)} files have the stem '{stem}' ({some([_place(path) for path in group])})",
            "rename them or keep one",
        )
        for stem, group in grouped.items()
        if len(group) > 1
    ]
    return {stem: group[0] for stem, group in grouped.items()}, problems


def _unreadable(error: DataError) -> Problem:
    where, _, rest = str(error).partition(": ")
    found, _, fix = rest.rpartition("; ")
    return Problem("error", "unusable-file", where, found, fix)


def _place(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _places(paths: list[Path]) -> str:
    return some([_place(path) for path in paths])


def some(names: list[str]) -> str:
    """Join names for a message; only the first few are said."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
