"""Score a model on labelled images, automatically and with prompts from the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_resfinetune.data.pairs import Pair, Pairs, to_channels
from napari_resfinetune.data.scaling import apply_scaling, measure_scaling
from napari_resfinetune.data.sources import read_plane
from napari_resfinetune.errors import ConfigError, DataError
from napari_resfinetune.evaluation.objects import Objects
from napari_resfinetune.evaluation.prompted import ROUNDS, PromptMode, segment_prompted
from napari_resfinetune.evaluation.rows import Evaluation, ImageScore
from napari_resfinetune.evaluation.scores import score_objects
from napari_resfinetune.evaluation.store import Store
from napari_resfinetune.inference.segment import (
    MODES as AUTOMATIC_MODES,
)
from napari_resfinetune.inference.segment import (
    Labels,
    check_decoder,
    evaluating,
    segment_embedded,
)
from napari_resfinetune.inference.stacks import link_slices
from napari_resfinetune.inference.tiling import TileEmbedding, embed_plane
from napari_resfinetune.models import SamModel

# First prompt of each object, and how many rounds of prompting.
PROMPTED_MODES: dict[str, tuple[PromptMode, int]] = {
    "box": ("box", 1),
    "point": ("point", 1),
    "iterative_box": ("box", ROUNDS),
    "iterative_point": ("point", ROUNDS),
}
MODES = (*AUTOMATIC_MODES, *PROMPTED_MODES)
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class How:
    """How planes are brought to the model; as for `evaluate_model`."""

    percentiles: tuple[float, float]
    patch_px: int
    precision: torch.dtype | None


@dataclass(frozen=True)
class Scored:
    """What is scored as one: a plane, or all slices of a volume.

    Attributes
    ----------
    image
        Name of the image.
    plane
        As in `ImageScore`.
    images
        float32 "YXC", 0 to 255, one per slice.
    labels
        "YX", one per slice.
    """

    image: str
    plane: int | None
    images: tuple[NDArray[np.float32], ...]
    labels: tuple[NDArray[Any], ...]


def check_modes(modes: Sequence[str]) -> None:
    """Check the names of evaluation modes.

    Raises
    ------
    ConfigError
        When one is unknown, or there is none.
    """
    if isinstance(modes, str) or not modes:
        raise ConfigError(f"modes: found {modes!r}; expected a list of {', '.join(MODES)}")
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ConfigError(*(f"modes: found {mode!r}; expected some of {', '.join(MODES)}" for mode in unknown))


def evaluate_model(
    model: SamModel,
    pairs: Pairs,
    *,
    modes: Sequence[str] = ("ais",),
    percentiles: tuple[float, float] = (0.1, 99.9),
    patch_px: int = 512,
    precision: torch.dtype | None = None,
    max_images: int | None = None,
    volumes: bool = False,
    store: Store | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Segment labelled images in every mode and score the results.

    Only annotated planes of a stack count. The image encoder runs once per window, whatever the number of modes.

    Parameters
    ----------
    model
        A loaded model; its training mode is put back afterwards.
    pairs
        Images and labels.
    modes
        Any of "ais", "apg", "amg", "box", "point", "iterative_box", "iterative_point"; the last four get prompts for
        every true object from the labels.
    percentiles, patch_px, precision
        As for `segment_source`.
    max_images
        Evaluate the first so many images only.
    volumes
        Score a "ZYX" stack as one volume, from its first annotated slice to its last, instead of each slice by itself.
        Automatic segmentations are linked over slices as micro-sam does.
    store
        Of this model, to keep embeddings and scores, and take those that are kept.
    on_progress
        Called before each image with the images done, the images in all, and its name.

    Raises
    ------
    ConfigError
        For unknown modes.
    DataError
        When no image has labelled objects, or data cannot be read.
    ModelError
        When a mode needs an instance decoder and the model has none.
    """
    check_modes(modes)
    chosen = tuple(dict.fromkeys(modes))
    for mode in chosen:
        check_decoder(model, mode)
    labelled = [pair for pair in pairs.pairs if pair.planes][:max_images]
    if not labelled:
        raise DataError("labels: no image has a labelled object; label at least one image to score a model")
    how = How(percentiles, patch_px, precision)
    rows: list[ImageScore] = []
    with evaluating(model):
        for done, pair in enumerate(labelled):
            if on_progress is not None:
                on_progress(done, len(labelled), pair.name)
            for scored in _read(pair, percentiles, volumes=volumes):
                rows += _evaluate(model, scored, chosen, how, store)
    return Evaluation(model.name, tuple(rows))


def _read(pair: Pair, percentiles: tuple[float, float], *, volumes: bool) -> Iterator[Scored]:
    """Read what is scored as one, part by part."""
    scaling = measure_scaling(pair.image, pair.channels, percentiles)
    parts: list[tuple[int | None, ...]] = [(plane,) for plane in pair.planes]
    first, last = pair.planes[0], pair.planes[-1]
    whole = False
    if volumes and "Z" in pair.labels.axes and first is not None and last is not None:
        # Slices between annotated ones without an object are annotated as empty.
        parts, whole = [tuple(range(first, last + 1))], True
    for planes in parts:
        images, labels = [], []
        for plane in planes:
            images.append(apply_scaling(to_channels(read_plane(pair.image, plane), pair.channels), scaling))
            labels.append(read_plane(pair.labels, plane))
            if images[-1].shape[:2] != labels[-1].shape:
                raise DataError(
                    f"{pair.labels.where}: shape {labels[-1].shape} differs from {pair.image.where} "
                    f"{images[-1].shape[:2]}; crop or re-export the label image"
                )
        yield Scored(pair.name, None if whole else planes[0], tuple(images), tuple(labels))


def _evaluate(model: SamModel, scored: Scored, modes: Sequence[str], how: How, store: Store | None) -> list[ImageScore]:
    """Score in every mode; what the store has is not segmented again."""
    known: dict[str, list[ImageScore]] = {}
    keys = {}
    if store is not None:
        keys = {mode: store.key(scored.images, scored.labels, mode) for mode in modes}
        kept = {mode: store.read(key) for mode, key in keys.items()}
        known = {mode: [_row(scored, mode, row) for row in rows] for mode, rows in kept.items() if rows is not None}
    missing = [mode for mode in modes if mode not in known]
    found = _segment(model, scored, missing, how, store) if missing else {}
    for mode, rounds in found.items():
        known[mode] = []
        for number, labels in enumerate(rounds, 1):
            scores, objects = score_objects(np.stack(scored.labels), labels)
            values = {**scores, "objects": dataclasses.asdict(objects), "round": number if len(rounds) > 1 else None}
            known[mode].append(_row(scored, mode, values))
        if store is not None:
            values_of_rounds = [dataclasses.asdict(row) for row in known[mode]]
            store.write(keys[mode], [{name: row[name] for name in _KEPT} for row in values_of_rounds])
    return [row for mode in modes for row in known[mode]]


# What of a row does not depend on names.
_KEPT = tuple(
    field.name for field in dataclasses.fields(ImageScore) if field.name not in ("image", "plane", "mode", "slices")
)


def _row(scored: Scored, mode: str, values: dict[str, Any]) -> ImageScore:
    objects: dict[str, Any] = {
        name: tuple(part) if isinstance(part, list | tuple) else part for name, part in values["objects"].items()
    }
    return ImageScore(
        **{**values, "objects": Objects(**objects)},
        image=scored.image,
        plane=scored.plane,
        mode=mode,
        slices=len(scored.images),
    )


def _segment(
    model: SamModel, scored: Scored, modes: Sequence[str], how: How, store: Store | None
) -> dict[str, list[NDArray[Any]]]:
    """Return label images "ZYX" for each mode, one for each round of prompting."""
    planes: dict[str, list[list[Labels]]] = {mode: [] for mode in modes}
    for image, labels in zip(scored.images, scored.labels, strict=True):
        if store is not None:
            embeddings = store.embed(image)
        else:
            embeddings = list(embed_plane(model, image, patch_px=how.patch_px, precision=how.precision))
        for mode in modes:
            planes[mode].append(segment_in_mode(model, image, labels, embeddings, mode, how.precision))
    return {
        mode: [_join_slices([plane[number] for plane in rounds], mode) for number in range(len(rounds[0]))]
        for mode, rounds in planes.items()
    }


def segment_in_mode(
    model: SamModel,
    image: NDArray[np.float32],
    labels: NDArray[Any],
    embeddings: Sequence[TileEmbedding],
    mode: str,
    precision: torch.dtype | None,
) -> list[Labels]:
    """Segment one plane in any mode; iterative prompting gives one label image for each round.

    Parameters
    ----------
    model
        In evaluation mode.
    image
        float32 "YXC", before padding.
    labels
        The truth, "YX", which gives prompts.
    embeddings
        Of all windows.
    mode
        One of `MODES`.
    precision
        As for `segment_plane`.
    """
    if mode in PROMPTED_MODES:
        first, rounds = PROMPTED_MODES[mode]
        return segment_prompted(model, labels, embeddings, first, rounds=rounds)
    return [segment_embedded(model, image, embeddings, mode=mode, precision=precision)]


def _join_slices(slices: Sequence[Labels], mode: str) -> Labels:
    """Return "ZYX"; prompts follow objects over slices by themselves, automatic segmentations are linked."""
    if mode in PROMPTED_MODES:
        return np.stack(slices)
    firsts = np.cumsum([0, *(int(labels.max(initial=0)) for labels in slices[:-1])])
    apart = [np.where(labels > 0, labels + np.uint32(first), 0) for labels, first in zip(slices, firsts, strict=True)]
    return link_slices(np.stack(apart).astype(np.uint32))
