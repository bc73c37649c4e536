"""Automatic segmentation of planes with micro-sam's generators.

Modes: "ais" grows objects from the instance decoder's distances, "apg" turns those into point prompts for the mask
decoder (both Archit et al. 2025, doi 10.1038/s41592-024-02580-4, and micro-sam), "amg" prompts the mask decoder with a
grid of points (Kirillov et al. 2023, https://arxiv.org/abs/2304.02643).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from napari_resfinetune.errors import ConfigError, DataError, ModelError
from napari_resfinetune.inference.tiling import Tile, TileEmbedding, autocast, embed_plane, set_embedding, whole_field
from napari_resfinetune.models import SamModel, upstream

Labels = NDArray[np.uint32]
MIN_SIZE_PX = 25
# How much of an object must be new to count as another one, when windows are joined.
FREE_SHARE = 0.5
FREE_SHARE_AT_RIM = 0.9
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "ais": (
        "min_size",
        "center_distance_threshold",
        "boundary_distance_threshold",
        "foreground_threshold",
        "foreground_smoothing",
        "distance_smoothing",
    ),
    "apg": (
        "min_size",
        "center_distance_threshold",
        "boundary_distance_threshold",
        "foreground_threshold",
        "multimasking",
        "batch_size",
        "nms_threshold",
        "intersection_over_min",
        "mask_threshold",
        "refine_with_box_prompts",
    ),
    "amg": (
        "min_size",
        "points_per_side",
        "points_per_batch",
        "pred_iou_thresh",
        "stability_score_thresh",
        "box_nms_thresh",
        "with_background",
    ),
}
MODES = tuple(_PARAMETERS)
# What the instance decoder gives, as micro-sam's generators call it.
MAPS = ("foreground", "center_distances", "boundary_distances")
_NEED_DECODER = ("ais", "apg")
_GRID = ("points_per_side", "points_per_batch")


def check_mode(mode: str, parameters: Mapping[str, Any] | None = None) -> None:
    """Check a segmentation mode and the names of its parameters.

    Raises
    ------
    ConfigError
        For an unknown mode or parameter.
    """
    if mode not in _PARAMETERS:
        raise ConfigError(f"mode: found {mode!r}; expected one of {', '.join(MODES)}")
    problems = []
    for name in parameters or {}:
        if name not in _PARAMETERS[mode]:
            near = difflib.get_close_matches(name, _PARAMETERS[mode], n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(_PARAMETERS[mode])}"
            problems.append(f"{mode}: unknown parameter '{name}'; {fix}")
    if problems:
        raise ConfigError(*problems)


def check_decoder(model: SamModel, mode: str) -> None:
    """Check that a model can segment in a mode.

    Raises
    ------
    ModelError
        When the mode needs an instance decoder and the model has none.
    """
    if mode in _NEED_DECODER and model.instance_decoder is None:
        raise ModelError(
            f"{model.name}: mode '{mode}' needs the instance decoder, which this model does not have; choose mode "
            "'amg', a model with decoder such as vit_b_lm, or finetune this one with training.targets 'both'"
        )


def segment_plane(
    model: SamModel,
    image: NDArray[np.float32],
    *,
    mode: str = "ais",
    patch_px: int = 512,
    halo_px: int | None = None,
    precision: torch.dtype | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Labels:
    """Segment one plane.

    Objects are shown to the model at the size it knows from training (`plan_tiles` says how).

    Parameters
    ----------
    model
        A loaded model; its training mode is put back afterwards.
    image
        float32 "YXC" with 3 channels from 0 to 255, as `apply_scaling` gives it.
    mode
        "ais", "apg" or "amg".
    patch_px
        Side of the patches the model was trained with, in pixels.
    halo_px
        Least overlap of a window beyond its core, in pixels.
    precision
        Number format for the image encoder and the instance decoder; `None` is float32. The mask decoder always
        computes in float32.
    parameters
        Of micro-sam's generator for this mode, and ``min_size`` (25), the smallest object in pixels.

    Returns
    -------
    uint32 array "YX"
        Consecutive ids; 0 is background. All zero when nothing was found.

    Raises
    ------
    ConfigError
        For an unknown mode or parameter, or a patch smaller than two halos.
    DataError
        When the image does not have the shape or values it should have.
    ModelError
        When the mode needs an instance decoder and the model has none.
    """
    check_mode(mode, parameters)
    check_decoder(model, mode)
    check_image(image)
    with evaluating(model):
        embeddings = embed_plane(model, image, patch_px=patch_px, halo_px=halo_px, precision=precision)
        return segment_embedded(model, image, embeddings, mode=mode, precision=precision, parameters=parameters)


@torch.no_grad()
def segment_embedded(
    model: SamModel,
    image: NDArray[np.float32],
    embeddings: Iterable[TileEmbedding],
    *,
    mode: str,
    precision: torch.dtype | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Labels:
    """Segment one plane whose embeddings are there; like `segment_plane` otherwise.

    Parameters
    ----------
    model
        In evaluation mode, and the one that made the embeddings.
    image
        The plane before padding.
    embeddings
        Of all windows of the padded plane.
    """
    settings = {"min_size": MIN_SIZE_PX, **(parameters or {})}
    shape = image.shape[:2]
    if mode == "ais":
        return segment_maps(model, decode_embedded(model, shape, embeddings, precision), settings)
    pieces = (
        (embedding.tile, segment_window(model, embedding, shape, mode, precision, settings)) for embedding in embeddings
    )
    return consecutive(merge_windows(shape, pieces), settings["min_size"])


def segment_maps(
    model: SamModel, maps: Mapping[str, NDArray[np.float32]], parameters: Mapping[str, Any] | None = None
) -> Labels:
    """Segment one plane from what `decode_embedded` gave; this takes no network, so parameters can be tried quickly."""
    segmenter = upstream.InstanceSegmentationWithDecoder(upstream.SamPredictor(model.sam), model.instance_decoder)
    segmenter.set_state(dict(maps))
    return consecutive(segmenter.generate(**{"min_size": MIN_SIZE_PX, **(parameters or {})}), 0)


@contextmanager
def evaluating(model: SamModel) -> Iterator[None]:
    """Put a model in evaluation mode, and back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_image(image: NDArray[np.float32]) -> None:
    """Check a scaled plane.

    Raises
    ------
    DataError
        When it is not "YXC" with 3 channels of finite values from 0 to 255.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise DataError(f"image: shape {image.shape}; expected YXC with 3 channels, as to_channels gives it")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 255):
        raise DataError(f"image: values from {low:g} to {high:g}; expected 0 to 255, as apply_scaling gives them")


@torch.no_grad()
def decode_embedded(
    model: SamModel,
    shape: tuple[int, ...],
    embeddings: Iterable[TileEmbedding],
    precision: torch.dtype | None,
) -> dict[str, NDArray[np.float32]]:
    """Run the instance decoder on all windows and keep the cores; `shape` leaves the padding out.

    Returns
    -------
    dict
        float32 "YX" under ``"foreground"``, ``"center_distances"`` and ``"boundary_distances"``.
    """
    maps = np.zeros((3, *shape), np.float32)
    for embedding in embeddings:
        predicted = decode_window(model, embedding, precision)
        rows, columns = embedding.tile.core
        kept = maps[:, rows, columns]
        inner = predicted[(slice(None), *embedding.tile.core_in_window)]
        kept[:] = inner[:, : kept.shape[1], : kept.shape[2]]
    return dict(zip(MAPS, maps, strict=True))


def decode_window(model: SamModel, embedding: TileEmbedding, precision: torch.dtype | None) -> NDArray[np.float32]:
    """Run the instance decoder on one window: foreground, distances to centre and boundary, "CYX"."""
    with autocast(model.device, precision):
        predicted = model.decode_instances(embedding.features, embedding.input_size, embedding.tile.shape)
    array: NDArray[np.float32] = predicted[0].float().cpu().numpy()
    return array


def segment_window(
    model: SamModel,
    embedding: TileEmbedding,
    shape: tuple[int, ...],
    mode: str,
    precision: torch.dtype | None,
    settings: Mapping[str, Any],
) -> Labels:
    """Segment one window of a plane of this shape with prompts, as "YX" of the window without padding."""
    whole = whole_field(model, embedding)
    size = whole.tile.shape
    predictor = upstream.SamPredictor(model.sam)
    set_embedding(predictor, whole)
    if mode == "apg":
        segmenter = upstream.AutomaticPromptGenerator(predictor, model.instance_decoder)
        maps = {}
        # What is padded further is background, so far from everything as can be.
        for name, values, outside in zip(MAPS, decode_window(model, embedding, precision), (0, 1, 1), strict=True):
            maps[name] = np.full(size, outside, np.float32)
            maps[name][: values.shape[0], : values.shape[1]] = values
        segmenter.set_state(maps)
        return _visible(segmenter.generate(**settings), embedding.tile, shape)
    grid = {name: value for name, value in settings.items() if name in _GRID}
    filters = {name: value for name, value in settings.items() if name not in (*_GRID, "min_size", "with_background")}
    generator = upstream.AutomaticMaskGenerator(predictor, **grid)
    known = {"features": whole.features, "input_size": whole.input_size, "original_size": size}
    # With the embedding given, the generator takes nothing but the shape from the image.
    generator.initialize(np.zeros((*size, 3), np.uint8), image_embeddings=known)
    # The largest region, which often is the background, is dropped here: upstream would take padding for it.
    found = _visible(generator.generate(with_background=False, **filters), embedding.tile, shape)
    if settings.get("with_background", True):
        ids, counts = np.unique(found, return_counts=True)
        found[found == ids[counts.argmax()]] = 0
    return found


def _visible(labels: Labels, tile: Tile, shape: tuple[int, ...]) -> Labels:
    """Return what a window shows of a plane, without padding."""
    return labels[: shape[0] - tile.y[0], : shape[1] - tile.x[0]]


def merge_windows(
    shape: tuple[int, ...], pieces: Iterable[tuple[Tile, Labels]], merged: Labels | None = None
) -> Labels:
    """Join label images of overlapping windows; `shape` leaves the padding out, `merged` is an empty array to fill.

    Windows overlap so far that objects up to twice the halo are whole in one of them, and what is whole in one window
    is preferred to what the rim of another window cuts.
    """
    found: list[tuple[bool, int, int, int, NDArray[np.bool_]]] = []
    for tile, labels in pieces:
        visible = _visible(labels, tile, shape)
        for number, place in enumerate(find_objects(visible.astype(np.int32)), 1):
            if place is None:
                continue
            mask = visible[place] == number
            rows, columns = place
            at_rim = (
                (rows.start == 0 and tile.y[0] > 0)
                or (columns.start == 0 and tile.x[0] > 0)
                or (rows.stop == visible.shape[0] and tile.y[1] < shape[0])
                or (columns.stop == visible.shape[1] and tile.x[1] < shape[1])
            )
            area = int(np.count_nonzero(mask))
            found.append((not at_rim, area, tile.y[0] + rows.start, tile.x[0] + columns.start, mask))
    merged = np.zeros(shape, np.uint32) if merged is None else merged
    # Whole before cut, then large before small: a part of an object never takes the place of more of it.
    found.sort(key=lambda item: item[:4], reverse=True)
    for number, (whole, area, y, x, mask) in enumerate(found, 1):
        window = merged[y : y + mask.shape[0], x : x + mask.shape[1]]
        free = mask & (window == 0)
        if np.count_nonzero(free) >= area * (FREE_SHARE if whole else FREE_SHARE_AT_RIM):
            window[free] = number
    return merged


def consecutive(labels: NDArray[Any], min_size: int) -> Labels:
    """Drop small objects and number the rest from 1."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = counts >= min_size
    kept[0] &= labels.min(initial=1) > 0
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.uint32)
    result: Labels = numbers[inverse.reshape(labels.shape)]
    return result
