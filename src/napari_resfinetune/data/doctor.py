"""Every problem of a data set in one report, each with its fix, before any weights are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage import measure

from napari_resfinetune.data.pairs import Pair, Pairs, Problem, check_channels, some
from napari_resfinetune.data.sources import ArraySource, read_plane, shape_yx
from napari_resfinetune.errors import DataError

SATURATED_SHARE = 0.05
LARGEST_SHARE = 0.9
# Pieces of one value: those of an intensity image are a few pixels each, those of labels are objects.
NOISE_PIECE_PX = 10
OBJECT_PIECE_PX = 20
FEW_CLASSES = 10
_EXPORT = "export the labels as integers, one id per object, 0 for background"


@dataclass(frozen=True)
class CheckReport:
    """What `check_pairs` found. Errors stop a run, warnings do not."""

    errors: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    prints: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """A hash of the pixels of each pair's image; empty where they could not be read or are all the same."""

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def to_dict(self) -> dict[str, list[dict[str, str]]]:
        """Return plain data for JSON."""
        return {
            "errors": [problem.to_dict() for problem in self.errors],
            "warnings": [problem.to_dict() for problem in self.warnings],
        }

    def raise_for_errors(self) -> None:
        """Raise a `DataError` with all errors, if there is any."""
        if self.errors:
            raise DataError(*(str(problem) for problem in self.errors))


def check_pairs(pairs: Pairs, *, patch_px: int = 512, min_object_px: int = 25) -> CheckReport:
    """Look through all images and labels, plane by plane.

    Parameters
    ----------
    pairs
        What `find_pairs` found; its problems are part of the report.
    patch_px
        Side of the training patch; smaller images are padded.
    min_object_px
        Smaller objects are not trained on, in pixels.
    """
    problems = list(pairs.problems)
    without_objects = 0
    prints: list[str] = []
    for pair in pairs.pairs:
        found, has_objects, print_ = _check_pair(pair, min_object_px)
        prints.append(print_)
        problems += found
        without_objects += not has_objects and not any(problem.level == "error" for problem in found)
    if pairs.pairs and without_objects == len(pairs.pairs):
        found_text, fix = "no labelled object in any image", "label some objects, better twenty or more"
        if any(problem.code == "small-objects" for problem in problems):
            found_text = f"no object of {min_object_px} px or more in any image"
            fix = "label larger objects, or lower data.min_object_px"
        problems.append(Problem("error", "no-objects", "labels", found_text, fix))
    if not pairs.pairs and not any(problem.level == "error" for problem in problems):
        problems.append(Problem("error", "no-pairs", "images", "no image with labels", "give at least one"))
    same = same_images([pair.image.where for pair in pairs.pairs], prints)
    problems = _together([*problems, *same.values(), *_small_images(pairs, patch_px)])
    return CheckReport(
        tuple(problem for problem in problems if problem.level == "error"),
        tuple(problem for problem in problems if problem.level == "warning"),
        tuple(prints),
    )


def same_images(names: Sequence[str], prints: Sequence[str]) -> dict[int, Problem]:
    """Return a warning for each image that has the pixels of an earlier one, by its place."""
    first: dict[str, str] = {}
    found = {}
    for number, (name, print_) in enumerate(zip(names, prints, strict=True)):
        if print_ and print_ in first:
            fix = "leave one out, or scores on held-out images may be of an image that was trained on"
            found[number] = Problem("warning", "same-image", name, f"has the same pixels as {first[print_]}", fix)
        first.setdefault(print_, name)
    return found


def _together(problems: list[Problem]) -> list[Problem]:
    """Say once what holds for several files."""
    grouped: dict[Problem, list[str]] = {}
    for problem in problems:
        grouped.setdefault(replace(problem, where=""), []).append(problem.where)
    return [replace(problem, where=some(list(dict.fromkeys(places)))) for problem, places in grouped.items()]


@dataclass
class _Facts:
    """What the planes of one pair add up to."""

    ids: set[int] = field(default_factory=set)
    split: set[int] = field(default_factory=set)
    objects: int = 0
    pieces: int = 0
    most_pieces: int = 0
    small: int = 0
    largest: float = 0.0
    fractional: bool = False
    negative: bool = False
    noisy: bool = False
    pixels: int = 0
    saturated: int = 0
    not_finite: int = 0
    low: float = np.inf
    high: float = -np.inf
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))


def _check_pair(pair: Pair, min_object_px: int) -> tuple[list[Problem], bool, str]:
    """Return the problems of a pair, whether its labels hold an object that is large enough, and its image's hash."""
    problems = [*_image_axes(pair)]
    try:
        layout = [*_layout(pair)]
        if layout:
            return [*problems, *layout], True, ""
        facts = _read_facts(pair, min_object_px)
        if facts.fractional or facts.noisy:
            return [*problems, *_wrong_values(pair, facts)], True, ""
    except DataError as error:
        where, _, rest = str(error).partition(": ")
        found, _, fix = rest.rpartition("; ")
        return [*problems, Problem("error", "unusable-file", where, found, fix)], True, ""
    problems += [*_label_problems(pair.labels, facts, min_object_px), *_image_problems(pair.image, facts)]
    print_ = facts.digest.hexdigest() if facts.low < facts.high else ""
    return problems, facts.objects > facts.small or facts.negative, print_


def _image_axes(pair: Pair) -> Iterator[Problem]:
    image = pair.image
    if image.guessed_axes:
        found = f"shape {image.shape} is taken as {image.axes}: {image.plane_count} slices"
        fix = "set data.axes to CYX if they are channels, to ZYX or TYX to say that they are not"
        yield Problem("warning", "ambiguous-axes", image.where, found, fix)
    if image.path is not None and (image.path, image.key) == (pair.labels.path, pair.labels.key):
        found, fix = "is given as image and as labels", "check the two folders"
        yield Problem("error", "same-file", image.where, found, fix)


def _layout(pair: Pair) -> Iterator[Problem]:
    """Yield what makes it useless to look at values."""
    image, labels = pair.image, pair.labels
    if "C" in labels.axes:
        colours = labels.shape[labels.axes.index("C")]
        if _looks_like_labels(image):
            yield _swapped(pair)
            return
        found = f"has {colours} channels (shape {labels.shape}, {labels.axes})"
        fix = f"{_EXPORT}; set data.axes if these are slices or frames"
        yield Problem("error", "rgb-labels", labels.where, found, fix)
        return
    if labels.path and labels.path.suffix.lower() in (".jpg", ".jpeg"):
        found = "JPEG changes label ids at the borders of objects"
        yield Problem("error", "lossy-labels", labels.where, found, "export the labels as TIFF or PNG")
    if shape_yx(image) != shape_yx(labels):
        found = f"shape {shape_yx(labels)} differs from {image.where} {shape_yx(image)}"
        turned = shape_yx(labels) == shape_yx(image)[::-1]
        fix = "rotate the label image" if turned else "crop or re-export the label image"
        yield Problem("error", "shape-mismatch", labels.where, found, fix)
    elif image.plane_count != labels.plane_count:
        found = f"{labels.plane_count} plane{'s' * (labels.plane_count != 1)} (shape {labels.shape}, {labels.axes}), "
        found += f"{image.where} has {image.plane_count} (shape {image.shape}, {image.axes})"
        fix = "give labels for every slice, with 0 where nothing is labelled"
        if labels.plane_count == 1:
            fix += ", or set data.axes to CYX if the image has channels rather than slices"
        yield Problem("error", "axis-mismatch", labels.where, found, fix)
    try:
        check_channels([image], pair.channels)
    except DataError as error:
        _, _, rest = str(error).partition(": ")
        found, _, fix = rest.rpartition("; ")
        yield Problem("error", "channels", image.where, found, fix)


def _read_facts(pair: Pair, min_object_px: int) -> _Facts:
    facts = _Facts()
    count = pair.labels.plane_count
    for plane in range(count):
        labels = read_plane(pair.labels, plane)
        annotated = bool(labels.any())
        if annotated:
            _add_labels(facts, labels, min_object_px)
        if annotated or count == 1:
            _add_image(facts, read_plane(pair.image, plane))
        if facts.fractional or facts.noisy:
            break
    return facts


def _add_labels(facts: _Facts, labels: NDArray[Any], min_object_px: int) -> None:
    if labels.dtype.kind == "f" and (not np.isfinite(labels).all() or (labels != np.floor(labels)).any()):
        facts.fractional = True
        return
    if labels.dtype.kind in "if" and labels.min() < 0:
        facts.negative = True
        labels = np.where(labels < 0, 0, labels)
    ids, compact, areas = _compact(labels)
    pieces, sizes = _pieces(compact)
    owner = np.zeros(sizes.size + 1, np.int64)
    owner[pieces.ravel()] = compact.ravel()
    facts.noisy |= sizes.size > 50 and sizes.sum() > 0.3 * labels.size and sizes.mean() < NOISE_PIECE_PX
    parts = np.bincount(owner[1:], minlength=ids.size + 1)[1:]
    decent = int((sizes >= min_object_px).sum())
    facts.ids.update(ids.tolist())
    facts.split.update(ids[parts > 1].tolist())
    facts.objects += ids.size
    facts.pieces += decent
    facts.most_pieces = max(facts.most_pieces, decent)
    facts.small += int((areas < min_object_px).sum())
    facts.largest = max(facts.largest, float(areas.max(initial=0)) / labels.size)


def _pieces(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the connected areas of one value each, numbered from 1, and their sizes in pixels."""
    pieces: NDArray[np.int64] = measure.label(labels, background=0, connectivity=2)
    return pieces, np.bincount(pieces.ravel())[1:]


def _compact(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids, the labels renumbered from 1, and the area of each in pixels."""
    values = labels.astype(np.int64)
    if values.min() >= 0 and values.max() <= 4 * values.size:
        counts = np.bincount(values.ravel())
        counts[0] = 0
        ids = np.flatnonzero(counts)
        numbers = np.zeros(counts.size, np.int64)
        numbers[ids] = np.arange(1, ids.size + 1)
        return ids, numbers[values], counts[ids]
    ids, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(values.shape)
    if 0 not in ids:
        return ids, inverse + 1, counts
    zero = int(np.searchsorted(ids, 0))
    # 0 is background; only uint64 ids beyond int64 come out below it.
    compact = np.where(inverse == zero, 0, np.where(inverse < zero, inverse + 1, inverse))
    return np.delete(ids, zero), compact, np.delete(counts, zero)


def _add_image(facts: _Facts, image: NDArray[Any]) -> None:
    facts.pixels += image.shape[0] * image.shape[1]
    facts.digest.update(f"{image.dtype} {image.shape}".encode())
    facts.digest.update(np.ascontiguousarray(image).data)
    if image.dtype.kind == "f":
        finite = np.isfinite(image)
        facts.not_finite += int(finite.size - finite.sum())
        image = image[finite]
    elif image.dtype.kind == "u":
        full = image == np.iinfo(image.dtype).max
        facts.saturated += int((full.all(axis=-1) if image.ndim == 3 else full).sum())
    if image.size:
        facts.low = min(facts.low, float(image.min()))
        facts.high = max(facts.high, float(image.max()))


def _looks_like_labels(source: ArraySource) -> bool:
    """Whether the values of an image form a few areas of one value each."""
    if "C" in source.axes or source.dtype.kind not in "iu":
        return False
    plane = read_plane(source, source.plane_count // 2)
    _, sizes = _pieces(plane)
    return bool(sizes.size and sizes.size < plane.size and sizes.mean() >= OBJECT_PIECE_PX and plane.min() == 0)


def _swapped(pair: Pair) -> Problem:
    found = "images and labels look swapped: this label image holds intensities, and its image ids"
    return Problem("error", "swapped", pair.labels.where, found, "exchange the two folders")


def _wrong_values(pair: Pair, facts: _Facts) -> Iterator[Problem]:
    labels = pair.labels
    if _looks_like_labels(pair.image):
        yield _swapped(pair)
    elif facts.fractional:
        yield Problem("error", "float-labels", labels.where, f"{labels.dtype} labels with fractions or NaN", _EXPORT)
    else:
        found = f"looks like an intensity image: {len(facts.ids)} values, in areas of a few pixels"
        yield Problem("error", "intensity-labels", labels.where, found, "give the label image instead")


def _label_problems(labels: ArraySource, facts: _Facts, min_object_px: int) -> Iterator[Problem]:
    where = labels.where
    if facts.negative:
        yield Problem("error", "negative-labels", where, "negative label ids", _EXPORT)
    if labels.dtype.kind == "f":
        found = f"{labels.dtype} labels, used as integers"
        yield Problem("warning", "float-labels", where, found, "export them as integers to be sure")
    if not facts.ids and not facts.negative:
        yield Problem("warning", "empty-labels", where, "no labelled object", "label it, or leave it out")
    stack = "Z" in labels.axes
    if len(facts.ids) == 1 and facts.most_pieces >= 3:
        found = f"one id covers {facts.most_pieces} separate objects: it looks like a foreground mask"
        fix = "run connected components on it, so that each object has its own id"
        yield Problem("error", "foreground-mask", where, found, fix)
    elif len(facts.ids) <= FEW_CLASSES and facts.pieces >= 5 * max(facts.objects, 1):
        found = f"{len(facts.ids)} ids cover {facts.pieces} separate objects: they look like classes"
        fix = "run connected components on it, so that each object has its own id"
        yield Problem("error", "semantic-labels", where, found, fix)
    elif facts.split and not stack:
        # A slice may well cut a 3D object twice.
        many = len(facts.split)
        found = f"{many} id{' is' if many == 1 else 's are'} in several pieces"
        yield Problem("warning", "split-objects", where, found, "remove stray pixels, or give each piece its own id")
    if facts.small:
        found = f"{facts.small} object{'s' * (facts.small != 1)} below {min_object_px} px, not trained on"
        yield Problem("warning", "small-objects", where, found, "remove them, or lower data.min_object_px")
    if facts.largest > LARGEST_SHARE:
        found = f"one object covers {facts.largest:.0%} of the image"
        yield Problem("warning", "huge-object", where, found, "use 0 for background, not an id")


def _image_problems(image: ArraySource, facts: _Facts) -> Iterator[Problem]:
    where = image.where
    if facts.not_finite and facts.low <= facts.high:
        found = f"{facts.not_finite} values are NaN or infinite, used as 0"
        yield Problem("warning", "not-finite", where, found, "replace them if they matter")
    if facts.low > facts.high:
        yield Problem("error", "constant-image", where, "no finite value", "check the export, or leave it out")
    elif facts.low == facts.high:
        yield Problem("warning", "constant-image", where, "constant image", "check the export, or leave it out")
    elif facts.saturated > SATURATED_SHARE * facts.pixels:
        found = f"{facts.saturated / facts.pixels:.0%} of the pixels are saturated"
        yield Problem("warning", "saturated", where, found, "check the exposure or the export")


def _small_images(pairs: Pairs, patch_px: int) -> Iterator[Problem]:
    small = [pair.image for pair in pairs.pairs if min(shape_yx(pair.image)) < patch_px]
    if small:
        height, width = shape_yx(small[0])
        others = f" and {len(small) - 1} more" if len(small) > 1 else ""
        found = f"{height} x {width} px, smaller than the patch of {patch_px} px, padded"
        fix = "nothing to do, or lower data.patch_px"
        yield Problem("warning", "small-image", small[0].where + others, found, fix)
