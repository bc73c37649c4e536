"""Prompts from instance labels, for training and validation, as micro-sam draws them.

All randomness of a sample is drawn at once, per object and per round. So neither the number of objects that are sent
through the decoder together nor the order of work changes what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

BOX_DISTORTION = 0.025
NEGATIVE_MARGIN_PX = 10
CORRECTION_MARGIN_PX = 3
MOST_POINTS = 4


@dataclass(frozen=True)
class Prompts:
    """Prompts of N objects in image pixels.

    Attributes
    ----------
    points
        float32, "NPC" with C = (x, y), or `None`.
    point_labels
        int, "NP"; 1 lies in the object, 0 outside.
    boxes
        float32, "NC" with C = (x0, y0, x1, y1), or `None`.
    """

    points: Tensor | None
    point_labels: Tensor | None
    boxes: Tensor | None

    def rows(self, chosen: slice) -> Prompts:
        """Return the prompts of some objects."""
        return Prompts(
            *(None if part is None else part[chosen] for part in (self.points, self.point_labels, self.boxes))
        )

    def to(self, device: torch.device) -> Prompts:
        """Return these prompts on a device."""
        parts = (self.points, self.point_labels, self.boxes)
        return Prompts(*(None if part is None else part.to(device, non_blocking=True) for part in parts))

    def with_points(self, points: Tensor, labels: Tensor) -> Prompts:
        """Return these prompts and further points per object."""
        if self.points is None or self.point_labels is None:
            return Prompts(points, labels, self.boxes)
        return Prompts(torch.cat([self.points, points], 1), torch.cat([self.point_labels, labels], 1), self.boxes)


@dataclass(frozen=True)
class PromptPlan:
    """Everything random about the prompting of one sample.

    Attributes
    ----------
    masks
        bool, "NYX": the N objects that were drawn.
    first
        Prompts of the first round.
    multimask
        Whether the first round predicts three candidates per object.
    draws
        float32, (rounds - 1, N, 2), 0 to 1: where the next positive and negative point fall.
    mask_prompts
        Per later round, whether the last mask is a prompt too.
    place
        Where a window that is a part of the model's field of view lies in it, down and right, 0 to 1.
    """

    masks: Tensor
    first: Prompts
    multimask: bool
    draws: Tensor
    mask_prompts: tuple[bool, ...]
    place: tuple[float, float] = (0.0, 0.0)


def plan_training_prompts(
    labels: Tensor,
    rng: np.random.Generator,
    *,
    step: int,
    objects: int,
    sub_iterations: int,
    mask_prompt_probability: float,
) -> PromptPlan:
    """Plan the prompts of one training sample.

    Even steps start from one point per object and three candidates, odd steps from one box and one candidate.

    Parameters
    ----------
    labels
        int, "YX", with at least one object.
    rng
        Seeded for the sample.
    step
        Number of the optimizer step.
    objects
        At most this many objects are drawn.
    """
    masks, boxes = draw_objects(labels, rng, objects)
    first = first_prompts(masks, boxes, rng, positives=0 if step % 2 else 1, negatives=0, with_boxes=bool(step % 2))
    rounds = sub_iterations - 1
    return PromptPlan(
        masks=masks,
        first=first,
        multimask=step % 2 == 0,
        draws=torch.from_numpy(rng.random((rounds, len(masks), 2), dtype=np.float32)),
        mask_prompts=tuple(bool(draw < mask_prompt_probability) for draw in rng.random(rounds)),
        place=_somewhere(rng),
    )


def plan_validation_prompts(labels: Tensor, rng: np.random.Generator, *, index: int, objects: int) -> PromptPlan:
    """Plan one round of prompts: by turns a point, a box, several points, a box with points."""
    masks, boxes = draw_objects(labels, rng, objects)
    kind = index % 4
    positives, negatives = (1, 0) if kind == 0 else (0, 0)
    if kind >= 2:
        positives = int(rng.integers(1, MOST_POINTS + 1))
        negatives = int(rng.integers(1 if positives == 1 and kind == 2 else 0, MOST_POINTS + 1))
    first = first_prompts(masks, boxes, rng, positives=positives, negatives=negatives, with_boxes=kind in (1, 3))
    return PromptPlan(masks, first, kind == 0, torch.zeros(0, len(masks), 2), (), _somewhere(rng))


def _somewhere(rng: np.random.Generator) -> tuple[float, float]:
    """Draw a place, often at the rim of the field: few places show a corner, many the middle."""
    down, right = (1.5 * rng.random(2) - 0.25).clip(0, 1).tolist()
    return down, right


def draw_objects(labels: Tensor, rng: np.random.Generator, objects: int) -> tuple[Tensor, NDArray[np.int64]]:
    """Draw up to `objects` objects.

    Returns
    -------
    masks
        bool, "NYX".
    boxes
        int64, "NC" with C = (y0, x0, y1, x1), end exclusive.
    """
    ids = torch.unique(labels)
    ids = ids[ids != 0]
    if len(ids) > objects:
        ids = ids[torch.from_numpy(np.sort(rng.choice(len(ids), objects, replace=False)))]
    masks = labels[None] == ids[:, None, None]
    return masks, bounding_boxes(masks)


def first_prompts(
    masks: Tensor,
    boxes: NDArray[np.int64],
    rng: np.random.Generator,
    *,
    positives: int,
    negatives: int,
    with_boxes: bool,
) -> Prompts:
    """Draw points in and around each object, and its box enlarged by up to 2.5 % a side."""
    points = point_labels = None
    if positives + negatives:
        draws = torch.from_numpy(rng.random((positives + negatives, len(masks)), dtype=np.float32))
        drawn = [pick(masks, draws[i]) for i in range(positives)]
        if negatives:
            around = _around(masks, boxes)
            drawn += [pick(around, draws[positives + i], ~masks) for i in range(negatives)]
        points = torch.stack(drawn, 1)
        outside = _label_outside(masks)[:, None].expand(-1, negatives)
        point_labels = torch.cat([torch.ones(len(masks), positives, dtype=torch.long), outside], 1)
    prompt_boxes = None
    if with_boxes:
        size = (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]]
        grown = boxes + np.array([-1, -1, 1, 1]) * rng.uniform(0, BOX_DISTORTION, boxes.shape) * size
        limit = np.array(masks.shape[1:])[[0, 1, 0, 1]]
        prompt_boxes = torch.from_numpy(np.clip(grown, 0, limit).round()[:, [1, 0, 3, 2]]).float()
    return Prompts(points, point_labels, prompt_boxes)


def next_points(predicted: Tensor, masks: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one positive point where the prediction misses the object and one negative where it goes beyond.

    Without a missed pixel the positive point falls where prediction and object agree; without a pixel too many the
    negative one falls in the object's box (grown by 3 px) outside the object, else anywhere outside.

    Parameters
    ----------
    predicted, masks
        bool, "NYX".
    draws
        float, (N, 2), 0 to 1.

    Returns
    -------
    points
        float32, (N, 2, 2), (x, y) in image pixels.
    labels
        int64, (N, 2), 1 and 0, or 1 and -1 (no point) for an object that fills the patch.
    """
    positive = pick(masks & ~predicted, draws[:, 0], masks)
    beyond = predicted & ~masks
    # All without looking at a value, which would make a card wait.
    needs_box = ~beyond.flatten(1).any(1)
    beside = _filled(_boxes_of(masks), masks, CORRECTION_MARGIN_PX) & ~masks
    beyond = torch.where(needs_box[:, None, None], beside, beyond)
    negative = pick(beyond, draws[:, 1], ~masks)
    labels = torch.stack([torch.ones_like(needs_box, dtype=torch.long), _label_outside(masks)], 1)
    return torch.stack([positive, negative], 1), labels


def _label_outside(masks: Tensor) -> Tensor:
    """Return the label of a point outside each object: 0, or -1 (no point) where the object fills the patch."""
    return -masks.flatten(1).all(1).long()


def pick(regions: Tensor, draws: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Pick one pixel of each region, all pixels alike; empty regions take from `otherwise`.

    Parameters
    ----------
    regions
        bool, "NYX".
    draws
        float, "N", 0 to 1.
    otherwise
        bool, "NYX".

    Returns
    -------
    float32, "NC" with C = (x, y).
    """
    if otherwise is not None:
        empty = ~regions.flatten(1).any(1)
        regions = torch.where(empty[:, None, None], otherwise, regions)
    order = regions.flatten(1).cumsum(1, dtype=torch.int32)
    wanted = (draws.to(order.device) * order[:, -1]).int().clamp_max(order[:, -1] - 1) + 1
    at = torch.searchsorted(order, wanted[:, None]).squeeze(1)
    width = regions.shape[2]
    return torch.stack([at % width, at // width], 1).float()


def _around(masks: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """Return each object's box grown by 10 px, less the object grown by 10 px."""
    margin = NEGATIVE_MARGIN_PX
    grown = F.max_pool2d(masks[:, None].float(), 2 * margin + 1, stride=1, padding=margin)[:, 0] > 0
    return _filled(torch.from_numpy(boxes).to(masks.device), masks, margin) & ~grown


def bounding_boxes(masks: Tensor) -> NDArray[np.int64]:
    """Return (y0, x0, y1, x1), end exclusive, of each mask of "NYX"."""
    boxes: NDArray[np.int64] = _boxes_of(masks).cpu().numpy()
    return boxes


def _boxes_of(masks: Tensor) -> Tensor:
    rows, columns = masks.any(2).int(), masks.any(1).int()
    height, width = masks.shape[1:]
    ends = height - rows.flip(1).argmax(1), width - columns.flip(1).argmax(1)
    return torch.stack([rows.argmax(1), columns.argmax(1), *ends], 1)


def _filled(boxes: Tensor, masks: Tensor, margin: int) -> Tensor:
    """Return "NYX", true within each box grown by a margin."""
    y0, x0, y1, x1 = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(size, device=masks.device) for size in masks.shape[1:])
    in_rows = (rows >= y0 - margin) & (rows < y1 + margin)
    in_columns = (columns >= x0 - margin) & (columns < x1 + margin)
    return in_rows[:, :, None] & in_columns[:, None, :]
