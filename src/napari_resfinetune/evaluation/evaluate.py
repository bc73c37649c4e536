"""Score a model on labelled images, automatically and with prompts from the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from napari_resfinetune.data.pairs import Pair, Pairs, to_channels
from napari_resfinetune.data.scaling import apply_scaling, measure_scaling
from napari_resfinetune.data.sources import read_plane
from napari_resfinetune.errors import ConfigError, DataError
from napari_resfinetune.evaluation.prompted import PromptMode, prompts_from_labels, segment_prompted
from napari_resfinetune.evaluation.scores import mean_scores, score
from napari_resfinetune.inference.segment import (
    MODES as AUTOMATIC_MODES,
)
from napari_resfinetune.inference.segment import (
    Labels,
    check_decoder,
    evaluating,
    segment_embedded,
)
from napari_resfinetune.inference.tiling import TileEmbedding, embed_plane, pad_to_patch
from napari_resfinetune.models import SamModel

PROMPTED_MODES = ("box", "point")
MODES = (*AUTOMATIC_MODES, *PROMPTED_MODES)
OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ImageScore:
    """Scores of one plane in one mode.

    Attributes
    ----------
    image
        Name of the image.
    plane
        Index of the slice or frame; `None` for an image with one plane.
    mode
        How it was segmented.
    sa50, sa75, msa
        From 0 to 1, see `score`.
    n_true, n_pred
        Number of objects in the labels and in the segmentation.
    """

    image: str
    plane: int | None
    mode: str
    sa50: float
    sa75: float
    msa: float
    n_true: int
    n_pred: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model.

    Attributes
    ----------
    model
        Name of the model.
    rows
        One per plane and mode.
    """

    model: str
    rows: tuple[ImageScore, ...]

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return ``{"mode": {"sa50": .., "sa75": .., "msa": ..}, ...}``: means over planes."""
        modes = dict.fromkeys(row.mode for row in self.rows)
        return {mode: mean_scores(dataclasses.asdict(row) for row in self.rows if row.mode == mode) for mode in modes}


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
        Any of "ais", "apg", "amg", "box", "point"; the last two get one prompt per true object.
    percentiles, patch_px, precision
        As for `segment_source`.
    max_images
        Evaluate the first so many images only.
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
    rows: list[ImageScore] = []
    with evaluating(model):
        for done, pair in enumerate(labelled):
            if on_progress is not None:
                on_progress(done, len(labelled), pair.name)
            rows += _evaluate_pair(model, pair, chosen, percentiles, patch_px=patch_px, precision=precision)
    return Evaluation(model.name, tuple(rows))


def _evaluate_pair(
    model: SamModel,
    pair: Pair,
    modes: Sequence[str],
    percentiles: tuple[float, float],
    *,
    patch_px: int,
    precision: torch.dtype | None,
) -> list[ImageScore]:
    scaling = measure_scaling(pair.image, pair.channels, percentiles)
    rows = []
    for plane in pair.planes:
        image = apply_scaling(to_channels(read_plane(pair.image, plane), pair.channels), scaling)
        labels = read_plane(pair.labels, plane)
        if image.shape[:2] != labels.shape:
            raise DataError(
                f"{pair.labels.where}: shape {labels.shape} differs from {pair.image.where} {image.shape[:2]}; "
                "crop or re-export the label image"
            )
        padded = pad_to_patch(image, patch_px)
        embeddings = list(embed_plane(model, padded, patch_px=patch_px, precision=precision))
        for mode in modes:
            found = _segment(model, image, labels, embeddings, mode, precision)
            rows.append(ImageScore(pair.name, plane, mode, **cast("dict[str, Any]", score(labels, found))))
    return rows


def _segment(
    model: SamModel,
    image: NDArray[np.float32],
    labels: NDArray[Any],
    embeddings: Sequence[TileEmbedding],
    mode: str,
    precision: torch.dtype | None,
) -> Labels:
    if mode in PROMPTED_MODES:
        prompts = prompts_from_labels(labels)
        shape = (image.shape[0], image.shape[1])
        return segment_prompted(model, shape, embeddings, prompts, cast("PromptMode", mode))
    return segment_embedded(model, image, embeddings, mode=mode, precision=precision)
