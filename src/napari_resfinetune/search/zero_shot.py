"""What a model can do before any training: prompted masks, automatic segmentation, and how steady both are.

All of it comes from one embedding of a patch. Each score of a patch is a pair of sums whose ratio is the score, so that
patches may be added up and drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from napari_resfinetune.data.patches import Patch
from napari_resfinetune.evaluation.prompted import ObjectPrompts, best_masks, prompts_from_labels
from napari_resfinetune.evaluation.scores import score
from napari_resfinetune.inference.segment import MIN_SIZE_PX
from napari_resfinetune.models import SamModel, resized_shape, upstream
from napari_resfinetune.training.prompts import Prompts
from napari_resfinetune.training.step import StepSettings, autocast, predict_round

MOST_OBJECTS = 24
# Side of the grid of points whose masks are compared when there are no labels.
GRID = 5
CONTRAST, NOISE = 0.8, 4.0
Sums = Mapping[str, tuple[float, float]]
Masks = NDArray[np.bool_]


@torch.no_grad()
def score_patch(
    model: SamModel, patch: Patch, embedding: Tensor, settings: StepSettings
) -> dict[str, tuple[float, float]]:
    """Score a model on a patch with labels.

    Parameters
    ----------
    model
        In evaluation mode.
    patch
        With at least one object.
    embedding
        Of the patch, "BCYX".
    settings
        How patches are brought to the model.

    Returns
    -------
    dict
        ``box_iou`` and ``point_iou``: sum of the intersections over unions of objects with the masks that their boxes
        and innermost points give, and number of objects. ``ais_sa50``, where there is an instance decoder: objects
        matched at an IoU of 0.5, and those matched, missed or invented.
    """
    labels = patch.labels.numpy().astype(np.int64)
    prompts = some_objects(prompts_from_labels(labels), MOST_OBJECTS)
    truth = labels[None] == prompts.ids[:, None, None]
    size = (labels.shape[0], labels.shape[1])
    found: dict[str, tuple[float, float]] = {}
    for name, given in (("box_iou", box_prompts(prompts)), ("point_iou", point_prompts(prompts.points))):
        masks = prompted_masks(model, embedding, given, size, settings)
        found[name] = (float(_ious(masks, truth).sum()), float(len(truth)))
    if model.instance_decoder is not None:
        found["ais_sa50"] = agreement(labels, automatic(model, embedding, size, settings))
    return found


@torch.no_grad()
def steadiness(
    model: SamModel, patch: Patch, embedding: Tensor, changed: Tensor, settings: StepSettings
) -> dict[str, tuple[float, float]]:
    """Score a model on a patch without labels: how little its results change when the image does.

    After Talks and Kreshuk 2025, https://arxiv.org/abs/2503.00450.

    Parameters
    ----------
    embedding, changed
        Of the patch, and of what `perturb` makes of it.

    Returns
    -------
    dict
        ``point_steadiness``: by how much more a point's mask overlaps with its own mask in the changed image than with
        those of other points, summed over points, and their number; a model that gives every point the same mask gets
        0. ``ais_steadiness``, where there is an instance decoder: the SA50 of one segmentation against the other, as
        sums; two empty ones count as nothing found.
    """
    size = (int(patch.image.shape[-2]), int(patch.image.shape[-1]))
    points = grid_points(size)
    first = prompted_masks(model, embedding, point_prompts(points), size, settings)
    mirrored = points * [-1, 1] + [size[1] - 1, 0]
    second = prompted_masks(model, changed, point_prompts(mirrored.astype(np.float32)), size, settings)[..., ::-1]
    overlaps = _all_ious(first, second)
    own, count = float(np.trace(overlaps)), len(points)
    others = (float(overlaps.sum()) - own) / (count - 1)
    found = {"point_steadiness": (own - others, float(count))}
    if model.instance_decoder is not None:
        one = automatic(model, embedding, size, settings)
        other = automatic(model, changed, size, settings)[:, ::-1]
        found["ais_steadiness"] = agreement(one, other) if one.any() or other.any() else (0.0, 1.0)
    return found


def perturb(patch: Patch, number: int) -> Patch:
    """Mirror a patch, lower its contrast and add noise, the same for every model."""
    image = patch.image.flip(-1)
    mean = image.mean()
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(number)) * NOISE
    changed = ((image - mean) * CONTRAST + mean + noise).clamp(0, 255).contiguous()
    return patch._replace(image=changed)


def prompted_masks(
    model: SamModel, embedding: Tensor, prompts: Prompts, size: tuple[int, int], settings: StepSettings
) -> Masks:
    """Return the mask "NYX" that each prompt gives; of three candidates for a point the best by predicted overlap."""
    input_size = resized_shape(size, settings.input_px)
    low_res, quality = predict_round(
        model, embedding, prompts.to(embedding.device), None, size, prompts.boxes is None, settings
    )
    masks, _ = best_masks(low_res, quality, input_size, size, settings.input_px)
    return np.asarray(masks.cpu().numpy())


def automatic(model: SamModel, embedding: Tensor, size: tuple[int, int], settings: StepSettings) -> NDArray[np.uint32]:
    """Segment a patch with the instance decoder, as mode "ais" does; objects "YX"."""
    input_size = resized_shape(size, settings.input_px)
    with autocast(model.device, settings):
        maps = model.decode_instances(embedding, input_size, size)[0].float().cpu().numpy()
    segmenter = upstream.InstanceSegmentationWithDecoder(upstream.SamPredictor(model.sam), model.instance_decoder)
    segmenter.set_state({"foreground": maps[0], "center_distances": maps[1], "boundary_distances": maps[2]})
    return np.asarray(segmenter.generate(min_size=MIN_SIZE_PX), np.uint32)


def agreement(one: NDArray[np.integer], other: NDArray[np.integer]) -> tuple[float, float]:
    """Return the objects of two label images that match at an IoU of 0.5, and all of them, matches counted once."""
    scores = score(np.ascontiguousarray(one), np.ascontiguousarray(other))
    both = scores["n_true"] + scores["n_pred"]
    if not both:
        return 1.0, 1.0
    matched = scores["sa50"] * both / (1 + scores["sa50"])
    return float(matched), float(both - matched)


def some_objects(prompts: ObjectPrompts, most: int) -> ObjectPrompts:
    """Take at most so many objects, evenly spread over their ids."""
    chosen = np.unique(np.linspace(0, len(prompts.ids) - 1, min(most, len(prompts.ids))).round().astype(int))
    return ObjectPrompts(prompts.ids[chosen], prompts.points[chosen], prompts.boxes[chosen])


def point_prompts(points: NDArray[np.float32]) -> Prompts:
    """Return a prompt for each point (x, y)."""
    return Prompts(torch.from_numpy(points)[:, None], torch.ones(len(points), 1, dtype=torch.long), None)


def box_prompts(prompts: ObjectPrompts) -> Prompts:
    """Return a prompt for the box of each object."""
    return Prompts(None, None, torch.from_numpy(prompts.boxes))


def grid_points(size: tuple[int, int]) -> NDArray[np.float32]:
    """Return points (x, y) spread evenly over a patch."""
    rows, columns = ((np.arange(GRID) + 0.5) / GRID * length for length in size)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)


def _ious(masks: Masks, truth: Masks) -> NDArray[np.float64]:
    union = (masks | truth).sum((1, 2))
    return np.asarray((masks & truth).sum((1, 2)) / np.maximum(union, 1))


def _all_ious(first: Masks, second: Masks) -> NDArray[np.float64]:
    a, b = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (first, second))
    common = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1)[None] - common
    return np.asarray(common / np.maximum(union, 1), np.float64)
