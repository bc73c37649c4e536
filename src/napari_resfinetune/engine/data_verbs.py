"""What the window asks about images and labels; no model, no torch."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage import measure

from napari_resfinetune.config import DataConfig
from napari_resfinetune.data.doctor import check_pairs, same_images
from napari_resfinetune.data.pairs import Pair, Problem, find_pairs
from napari_resfinetune.data.sources import open_array, read_plane
from napari_resfinetune.data.split import split_pairs
from napari_resfinetune.engine.process import Request, Say
from napari_resfinetune.errors import DataError
from napari_resfinetune.events import StopToken

THUMBNAIL_PX = 32
# What kind, how many, the seed, and their shape.
SAMPLES = ("fluorescence_nuclei", 3, 11, (256, 256))
KEPT_CHECKS = 500
# What a single pair is told that matters only when all pairs have it, and what nothing needs to be done about.
_OF_THE_WHOLE = ("no-objects", "no-pairs")
_HARMLESS = ("small-image",)
_WHERE = ("image_key", "label_key", "axes", "channels")


@dataclass(frozen=True)
class _Checked:
    pair: Pair | None
    problems: tuple[Problem, ...]
    facts: Mapping[str, Any]
    print: str = ""


_checked: OrderedDict[tuple[Any, ...], _Checked] = OrderedDict()


def open_folders(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Pair the files of two folders: ``images`` and ``labels``; ``pairs`` and ``problems`` come back."""
    found = find_pairs(request["images"], request["labels"])
    pairs = [
        {"name": pair.name, "image": str(pair.image.path), "labels": str(pair.labels.path)} for pair in found.pairs
    ]
    return {"pairs": pairs, "problems": [problem.to_dict() for problem in found.problems]}


def check(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Check pairs one by one and say how they are split.

    ``pairs`` holds ``image``, ``labels`` and ``held_out`` (`None` leaves it to the split) of each, ``data`` the section
    of the configuration, ``seed`` the training's. ``pairs`` comes back with shape, objects, problems, part and
    thumbnail of each; ``problems`` with those of the whole; ``note`` with the split in words.
    """
    data = DataConfig.model_validate(request["data"])
    checked = []
    for number, item in enumerate(request["pairs"]):
        if stop.stopped:
            break
        checked.append(_check_one(item["image"], item["labels"], data))
        say({"done": number + 1, "total": len(request["pairs"])})
    with_objects = any(each.facts["objects"] for each in checked)
    same = same_images(
        [Path(item["image"]).stem for item in request["pairs"][: len(checked)]], [c.print for c in checked]
    )
    rows = []
    for number, each in enumerate(checked):
        problems = [p for p in each.problems if p.code not in (*_HARMLESS, *(_OF_THE_WHOLE if with_objects else ()))]
        problems += [same[number]] if number in same else []
        rows.append({**each.facts, "problems": [problem.to_dict() for problem in problems], "part": None})
    answer: dict[str, Any] = {"pairs": rows, "problems": [], "note": "", "held_out_regions": 2}
    if rows and all(problem["level"] != "error" for row in rows for problem in row["problems"]):
        try:
            _add_split(answer, [each.pair for each in checked if each.pair], request, data)
        except DataError as error:
            answer["problems"] = [{"level": "error", "code": "split", "message": text} for text in error.problems]
    return answer


def _check_one(image: str, labels: str, data: DataConfig) -> _Checked:
    stamps = [_stamp(path) for path in (image, labels)]
    key = (image, labels, *stamps, data.patch_px, data.min_object_px, data.channels, data.axes)
    if key not in _checked:
        _checked[key] = _look_at(image, labels, data)
        while len(_checked) > KEPT_CHECKS:
            _checked.popitem(last=False)
    _checked.move_to_end(key)
    return _checked[key]


def _look_at(image: str, labels: str, data: DataConfig) -> _Checked:
    facts: dict[str, Any] = {"shape": [], "axes": "", "objects": 0, "thumbnail": None}
    try:
        pairs = find_pairs(image, labels, **data.model_dump(include=set(_WHERE)))
        report = check_pairs(pairs, patch_px=data.patch_px, min_object_px=data.min_object_px)
    except DataError as error:
        problems = tuple(Problem("error", "unusable-file", Path(image).name, text, "") for text in error.problems)
        return _Checked(None, problems, facts)
    problems = report.errors + report.warnings
    if not pairs.pairs:
        return _Checked(None, problems, facts)
    (pair,) = pairs.pairs
    facts = {**facts, "shape": list(pair.image.shape), "axes": pair.image.axes, "thumbnail": _thumbnail(pair.image)}
    if report.ok:
        facts["objects"] = sum(_count(read_plane(pair.labels, plane)) for plane in pair.planes)
    return _Checked(pair, problems, facts, report.prints[0])


def _add_split(answer: dict[str, Any], pairs: list[Pair], request: Request, data: DataConfig) -> None:
    chosen = [item["held_out"] for item in request["pairs"]]
    if any(held_out is not None for held_out in chosen):
        parts = ["held out" if held_out else "train" for held_out in chosen]
        counts = [parts.count(part) for part in ("train", "held out")]
        if 0 in counts:
            raise DataError("split: every image is on one side; leave at least one to train on and one held out")
        answer["note"] = f"{counts[0]} to train on, {counts[1]} held out, as you chose"
        regions = sum(len(pair.planes) for pair, part in zip(pairs, parts, strict=True) if part == "held out")
    else:
        split = split_pairs(
            pairs,
            validation_fraction=data.validation_fraction,
            max_images=data.max_images,
            seed=request.get("seed", 0),
        )
        train, held_out = ({region.pair for region in part} for part in (split.train, split.validation))
        both = train & held_out
        parts = [
            "both" if number in both else "train" if number in train else "held out" if number in held_out else "unused"
            for number in range(len(pairs))
        ]
        answer["note"] = split.note
        regions = len(split.validation)
    for row, part in zip(answer["pairs"], parts, strict=True):
        row["part"] = part
    answer["held_out_regions"] = regions


def mend(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Write mended copies of a pair for the problem ``code``; the user's own arrays are never changed.

    ``image`` and ``labels`` are files, ``output`` is a folder. The paths that are new come back as ``image`` and
    ``labels``, with a word on what was done as ``note``.
    """
    image, labels = (_whole(request[name]) for name in ("image", "labels"))
    code = request["code"]
    new: dict[str, NDArray[Any]] = {}
    if code in ("foreground-mask", "semantic-labels", "split-objects"):
        new["labels"] = _separate(labels)
        note = f"each connected piece is an object of its own now: {len(np.unique(new['labels'])) - 1}"
    elif code == "small-objects":
        smallest = int(request.get("min_object_px", 25))
        ids, counts = np.unique(labels, return_counts=True)
        new["labels"] = np.where(np.isin(labels, ids[counts < smallest]), 0, labels)
        note = f"objects below {smallest} px are gone"
    elif code == "shape-mismatch":
        height, width = (min(a, b) for a, b in zip(_plane_shape(image), labels.shape[-2:], strict=True))
        new["labels"] = labels[..., :height, :width]
        new["image"] = image[:height, :width] if _is_colour(image) else image[..., :height, :width]
        note = f"both are cropped to {height} x {width} px, from the upper left corner"
    else:
        raise DataError(f"{code}: there is no safe way to mend this automatically; mend it by hand")
    answer = {"note": note}
    for name, array in new.items():
        answer[name] = put_array(array, Path(request["output"]), f"mended-{name}-{request['id']}")
    return answer


def samples(request: Request, say: Say, stop: StopToken) -> dict[str, Any]:
    """Draw images of cells with labels into the folder ``output``; their files come back as ``samples``."""
    # Not at the top: who has images of their own need not wait for what draws some.
    from napari_resfinetune.data.synthetic import make_samples

    folder, made = Path(request["output"]), []
    for number, sample in enumerate(make_samples(*SAMPLES, field_px=512)):
        arrays = {"image": sample.image, "labels": sample.labels}
        made.append({part: put_array(array, folder, f"sample-{part}-{number}") for part, array in arrays.items()})
    return {"samples": made}


def put_array(array: NDArray[Any], folder: Path, name: str) -> str:
    """Write an array as ``.npy``, whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    partial, path = folder / f".{name}.partial.npy", folder / f"{name}.npy"
    np.save(partial, array, allow_pickle=False)
    os.replace(partial, path)
    return str(path)


def _separate(labels: NDArray[Any]) -> NDArray[np.uint32]:
    planes = labels if labels.ndim == 3 else labels[np.newaxis]
    result, count = np.zeros(planes.shape, np.uint32), 0
    for plane, out in zip(planes, result, strict=True):
        pieces = measure.label(plane, background=0, connectivity=2)
        out[pieces > 0] = pieces[pieces > 0] + count
        count += int(pieces.max(initial=0))
    return result.reshape(labels.shape)


def _whole(path: str) -> NDArray[Any]:
    return np.asarray(open_array(Path(path)).read())


def _is_colour(image: NDArray[Any]) -> bool:
    return image.ndim >= 3 and image.shape[-1] in (3, 4)


def _plane_shape(image: NDArray[Any]) -> tuple[int, int]:
    return (image.shape[-3], image.shape[-2]) if _is_colour(image) else (image.shape[-2], image.shape[-1])


def _count(labels: NDArray[Any]) -> int:
    ids = np.unique(labels)
    return int(ids.size) - int(0 in ids)


def _thumbnail(source: Any) -> list[list[int]] | None:
    """Return a small picture, "YX" from 0 to 255, of the middle plane."""
    try:
        plane = read_plane(source, source.plane_count // 2 if source.plane_count > 1 else None)
    except DataError:
        return None
    gray = plane.astype(np.float32).mean(axis=-1) if plane.ndim == 3 else plane.astype(np.float32)
    steps = [max(1, -(-size // THUMBNAIL_PX)) for size in gray.shape]
    small = np.nan_to_num(gray[:: steps[0], :: steps[1]])
    low, high = np.percentile(small, (1, 99)) if small.size else (0, 1)
    return (np.clip((small - low) / max(high - low, 1e-9), 0, 1) * 255).astype(int).tolist()


def _stamp(path: str) -> float:
    try:
        return Path(path).stat().st_mtime
    except OSError:
        return 0.0
