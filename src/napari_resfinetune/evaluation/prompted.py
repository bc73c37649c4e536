"""Segmentation from prompts that the true labels give: a box or a point for every object, and corrections after it.

As in micro-sam's own evaluation, a box asks for one mask, and a point for three of which the one with the best
predicted overlap is taken. Iterative prompting goes on from there as somebody would who corrects the mask: each round
adds a point where the object was missed and one where the mask went beyond it, and asks for one mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from napari_resfinetune.inference.segment import Labels
from napari_resfinetune.inference.tiling import TileEmbedding, field_input_px
from napari_resfinetune.models import SamModel, scale_boxes, scale_coords, upstream
from napari_resfinetune.training.losses import upsample_masks
from napari_resfinetune.training.prompts import Prompts, next_points

PromptMode = Literal["box", "point"]
PROMPTS_PER_BATCH = 32
# With the first prompt, as in micro-sam.
ROUNDS = 8


@dataclass(frozen=True)
class ObjectPrompts:
    """Prompts for the objects of a plane, in pixels.

    Attributes
    ----------
    ids
        Object ids, shape (N,).
    points
        The pixel of each object that is farthest from its boundary, as (x, y), shape (N, 2).
    boxes
        Bounding boxes as (x0, y0, x1, y1), shape (N, 4).
    """

    ids: NDArray[np.int64]
    points: NDArray[np.float32]
    boxes: NDArray[np.float32]


def prompts_from_labels(labels: NDArray[Any]) -> ObjectPrompts:
    """Derive one point and one box per object from a label image "YX"."""
    if not labels.any():
        return ObjectPrompts(np.zeros(0, np.int64), np.zeros((0, 2), np.float32), np.zeros((0, 4), np.float32))
    centers, boxes = upstream.get_centers_and_bounding_boxes(labels.astype(np.int64))
    ids = np.array(sorted(centers), np.int64)
    return ObjectPrompts(
        ids,
        np.array([centers[i] for i in ids], np.float32)[:, ::-1].copy(),
        np.array([boxes[i] for i in ids], np.float32)[:, [1, 0, 3, 2]],
    )


@torch.no_grad()
def segment_prompted(
    model: SamModel,
    labels: NDArray[Any],
    embeddings: Sequence[TileEmbedding],
    mode: PromptMode,
    *,
    rounds: int = 1,
    seed: int = 0,
) -> list[Labels]:
    """Predict one mask per object and join them; where masks overlap, the better predicted one wins.

    Parameters
    ----------
    model
        In evaluation mode, and the one that made the embeddings.
    labels
        The truth, "YX", before padding.
    embeddings
        Of all windows. An object is predicted in the window whose core holds its point.
    mode
        "box" or "point": the first prompt.
    rounds
        How often a mask is asked for; from the second round on, points correct the one before.
    seed
        Fixes where those points fall.

    Returns
    -------
    list of uint32 arrays "YX"
        One for each round, with the ids of the labels.
    """
    prompts = prompts_from_labels(labels)
    found = [np.zeros(labels.shape, np.uint32) for _ in range(rounds)]
    best = [np.full(labels.shape, -np.inf, np.float32) for _ in range(rounds)]
    rng = np.random.default_rng(seed)
    for embedding in embeddings:
        tile = embedding.tile
        x, y = prompts.points.T
        inside = (tile.core_y[0] <= y) & (y < tile.core_y[1]) & (tile.core_x[0] <= x) & (x < tile.core_x[1])
        chosen = np.flatnonzero(inside)
        if len(chosen) == 0:
            continue
        for start in range(0, len(chosen), PROMPTS_PER_BATCH):
            batch = chosen[start : start + PROMPTS_PER_BATCH]
            ids = prompts.ids[batch]
            truth = torch.from_numpy(labels[tile.window].astype(np.int64) == ids[:, None, None])
            draws = torch.from_numpy(rng.random((rounds - 1, len(batch), 2), dtype=np.float32))
            first = _first(prompts, batch, tile.x[0], tile.y[0], tile.shape, mode)
            for number, (masks, quality) in enumerate(_rounds(model, embedding, first, truth, draws)):
                _join(found[number][tile.window], best[number][tile.window], ids, masks, quality)
    return found


def _first(
    prompts: ObjectPrompts, batch: NDArray[np.int64], x: int, y: int, shape: tuple[int, int], mode: PromptMode
) -> Prompts:
    """Return the first prompts of some objects in pixels of a window that begins at x, y."""
    corner = np.array([x, y], np.float32)
    if mode == "box":
        boxes = (prompts.boxes[batch] - np.tile(corner, 2)).clip(0, [shape[1], shape[0]] * 2)
        return Prompts(None, None, torch.from_numpy(boxes).float())
    points = torch.from_numpy(prompts.points[batch] - corner)[:, None]
    return Prompts(points, torch.ones(points.shape[:2], dtype=torch.int), None)


def _rounds(
    model: SamModel, embedding: TileEmbedding, prompts: Prompts, truth: torch.Tensor, draws: torch.Tensor
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.float32]]]:
    """Yield masks "NYX", as far as the truth reaches, and their predicted overlaps, round by round."""
    height, width = truth.shape[1:]
    single_point = prompts.boxes is None
    for number in range(len(draws) + 1):
        masks, quality = _predict(model, embedding, prompts, multimask=single_point and number == 0)
        masks = masks[:, :height, :width]
        yield masks.numpy(), quality.numpy()
        if number < len(draws):
            prompts = prompts.with_points(*next_points(masks, truth, draws[number]))


def _predict(
    model: SamModel, embedding: TileEmbedding, prompts: Prompts, *, multimask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks "NYX" of the window and their predicted overlaps; of candidates the best."""
    shape, input_px = embedding.tile.shape, field_input_px(model, embedding.tile)
    prompts = prompts.to(embedding.features.device)
    low_res, quality = model.predict_masks(
        embedding.features,
        None if prompts.points is None else scale_coords(prompts.points, shape, input_px),
        prompts.point_labels,
        None if prompts.boxes is None else scale_boxes(prompts.boxes, shape, input_px),
        multimask=multimask,
    )
    masks, best = best_masks(low_res, quality, embedding.input_size, shape, input_px)
    return masks.cpu(), best.float().cpu()


def best_masks(
    low_res: torch.Tensor,
    quality: torch.Tensor,
    input_size: tuple[int, int],
    shape: tuple[int, int],
    input_px: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks "NYX" in image resolution and their predicted overlaps, of the best candidate of each object.

    Parameters
    ----------
    low_res, quality
        Logits "NCYX" and predicted overlaps "NC", as the mask decoder gives them.
    input_size, shape, input_px
        As for `upsample_masks`.
    """
    rows, best = torch.arange(len(quality), device=quality.device), quality.argmax(dim=1)
    logits = upsample_masks(low_res[rows, best][:, None], input_size, shape, input_px)[:, 0]
    return logits > 0, quality[rows, best]


def _join(
    labels: Labels,
    best: NDArray[np.float32],
    ids: NDArray[np.int64],
    masks: NDArray[np.bool_],
    quality: NDArray[np.float32],
) -> None:
    """Put masks into a label image where none with a better predicted overlap lies."""
    for number, mask, value in zip(ids, masks, quality, strict=True):
        better = mask & (value > best)
        labels[better] = number
        best[better] = value
