"""Segmentation from prompts that the true labels give: one box or one point for every object.

As in micro-sam's own evaluation, a box asks for one mask, and a point for three of which the one with the best
predicted overlap is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from napari_resfinetune.inference.segment import Labels
from napari_resfinetune.inference.tiling import TileEmbedding, set_embedding
from napari_resfinetune.models import SamModel, upstream

PromptMode = Literal["box", "point"]
PROMPTS_PER_BATCH = 32


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
    shape_yx: tuple[int, int],
    embeddings: Sequence[TileEmbedding],
    prompts: ObjectPrompts,
    mode: PromptMode,
) -> Labels:
    """Predict one mask per object and join them; where masks overlap, the better predicted one wins.

    Parameters
    ----------
    model
        In evaluation mode, and the one that made the embeddings.
    shape_yx
        Of the plane before padding.
    embeddings
        Of all windows. An object is predicted in the window whose core holds its point.
    prompts
        Of all objects.
    mode
        "box" or "point".

    Returns
    -------
    uint32 array "YX"
        With the ids of the prompts.
    """
    labels = np.zeros(shape_yx, np.uint32)
    best = np.full(shape_yx, -np.inf, np.float32)
    predictor = upstream.SamPredictor(model.sam)
    for embedding in embeddings:
        tile = embedding.tile
        x, y = prompts.points.T
        inside = (tile.core_y[0] <= y) & (y < tile.core_y[1]) & (tile.core_x[0] <= x) & (x < tile.core_x[1])
        chosen = np.flatnonzero(inside)
        if len(chosen) == 0:
            continue
        set_embedding(predictor, embedding)
        seen_labels, seen_best = labels[tile.window], best[tile.window]
        height, width = seen_labels.shape
        for start in range(0, len(chosen), PROMPTS_PER_BATCH):
            batch = chosen[start : start + PROMPTS_PER_BATCH]
            masks, quality = _predict(predictor, embedding, prompts, batch, mode)
            for number, mask, value in zip(prompts.ids[batch], masks, quality, strict=True):
                better = mask[:height, :width] & (value > seen_best)
                seen_labels[better] = number
                seen_best[better] = value
    return labels


def _predict(
    predictor: Any, embedding: TileEmbedding, prompts: ObjectPrompts, batch: NDArray[np.int64], mode: PromptMode
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return masks "NYX" of the window, and their predicted overlaps."""
    tile = embedding.tile
    height, width = tile.shape
    corner = np.array([tile.x[0], tile.y[0]], np.float32)
    coords: dict[str, Any]
    if mode == "box":
        boxes = (prompts.boxes[batch] - np.tile(corner, 2)).clip(0, [width, height, width, height])
        scaled = predictor.transform.apply_boxes_torch(torch.from_numpy(boxes), tile.shape)
        coords = {"point_coords": None, "point_labels": None, "boxes": scaled.float().to(predictor.device)}
    else:
        points = torch.from_numpy(prompts.points[batch] - corner)[:, None]
        scaled = predictor.transform.apply_coords_torch(points, tile.shape).float().to(predictor.device)
        ones = torch.ones(scaled.shape[:2], dtype=torch.int, device=predictor.device)
        coords = {"point_coords": scaled, "point_labels": ones}
    masks, quality, _ = predictor.predict_torch(**coords, multimask_output=mode == "point")
    best = quality.argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return masks[rows, best].cpu().numpy(), quality[rows, best].float().cpu().numpy()
