"""Which object of a segmentation is which object of the truth, and which are missed, extra, merged or split.

Matching is elf's: one to one, at an intersection over union (IoU) of at least 0.5. Merged and split objects are found
as in Hoover et al. 1996, doi 10.1109/34.506791, with half of an object as the share that counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from elf.evaluation.matching import label_overlap
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from napari_resfinetune.errors import DataError, ResourceError

MATCH_IOU = 0.5
HALF = 0.5
# What tables of all true with all predicted objects take, together.
_BYTES_PER_PAIR = 48
# What an object can be; the numbers are the values of an image of errors, where 0 is background.
KINDS: Mapping[str, int] = {"right": 1, "extra": 2, "missed": 3, "merged": 4, "split": 5}


@dataclass(frozen=True)
class Objects:
    """The objects of a plane or volume, one by one.

    Attributes
    ----------
    true_px
        Size of every true object, in pixels or voxels.
    true_iou
        Its IoU with the object that it is matched to; 0 where there is none.
    extra_px
        Sizes of predicted objects that are matched to no true one.
    missed, extra
        Number of true objects without a match, and of predicted ones, that are no part of a merge or split.
    merged
        Number of predicted objects that hold most of several true ones.
    split
        Number of true objects that several predicted ones lie in and together cover most of.
    """

    true_px: tuple[int, ...]
    true_iou: tuple[float, ...]
    extra_px: tuple[int, ...]
    missed: int
    extra: int
    merged: int
    split: int


def numbered(labels: NDArray[Any], what: str) -> NDArray[np.uint32]:
    """Number objects from 1 without gaps, so that ids may be of any size; 0 stays background, even where there is none.

    Raises
    ------
    DataError
        When `labels`, called `what` in the message, are not integers, or negative.
    """
    if labels.dtype.kind not in "iub" or labels.min(initial=0) < 0:
        raise DataError(
            f"{what}: found {labels.dtype} values from {labels.min(initial=0)}; expected integers of 0 and more"
        )
    ids, inverse = np.unique(labels, return_inverse=True)
    has_background = bool(ids.size) and ids[0] == 0
    return inverse.reshape(labels.shape).astype(np.uint32) + np.uint32(not has_background)


def match_objects(true: NDArray[np.uint32], predicted: NDArray[np.uint32]) -> Objects:
    """Match objects, and sort those that are wrong by kind.

    Parameters
    ----------
    true, predicted
        "YX" or "ZYX" of the same shape, ids from 1 without gaps; 0 is background.
    """
    overlap, (true_px, predicted_px) = _overlaps(true, predicted)
    rows, columns, iou = _matched(overlap, true_px, predicted_px)
    true_iou = np.zeros(len(true_px))
    true_iou[rows] = iou
    of_true, of_predicted = _kinds(overlap, true_px, predicted_px, rows, columns)
    return Objects(
        true_px=tuple(int(px) for px in true_px),
        true_iou=tuple(float(value) for value in true_iou),
        extra_px=tuple(int(px) for px in np.delete(predicted_px, columns)),
        missed=int(np.count_nonzero(of_true == KINDS["missed"])),
        extra=int(np.count_nonzero(of_predicted == KINDS["extra"])),
        merged=int(np.count_nonzero(of_predicted == KINDS["merged"])),
        split=int(np.count_nonzero(of_true == KINDS["split"])),
    )


def kinds_of_objects(
    true: NDArray[np.uint32], predicted: NDArray[np.uint32]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the kind (`KINDS`) of every true and of every predicted object, by id; background, id 0, is 0.

    An object that is matched and yet part of a merge or split is that, not right.
    """
    overlap, (true_px, predicted_px) = _overlaps(true, predicted)
    rows, columns, _ = _matched(overlap, true_px, predicted_px)
    of_true, of_predicted = _kinds(overlap, true_px, predicted_px, rows, columns)
    return np.insert(of_true, 0, 0), np.insert(of_predicted, 0, 0)


def matched_pairs(true: NDArray[np.uint32], predicted: NDArray[np.uint32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return indices, from 0, of true objects that are matched and of those that they are matched to."""
    overlap, (true_px, predicted_px) = _overlaps(true, predicted)
    return _matched(overlap, true_px, predicted_px)[:2]


def panoptic_quality(objects: Objects) -> float:
    """Return the panoptic quality (Kirillov et al. 2019, https://arxiv.org/abs/1801.00868) of one class.

    It is the mean IoU of matched objects times their F1 score; here, as for SA50, an IoU of exactly 0.5 is a match.
    """
    found = [iou for iou in objects.true_iou if iou > 0]
    wrong = len(objects.extra_px) + len(objects.true_iou) - len(found)
    return sum(found) / (len(found) + wrong / 2) if found else 0.0


def _check_memory(true: NDArray[np.uint32], predicted: NDArray[np.uint32]) -> None:
    free = psutil.virtual_memory().available
    # Ids are at least as large as there are objects; counting those takes longer than all the rest of a plane.
    if math.prod(int(labels.max(initial=0)) + 1 for labels in (true, predicted)) * _BYTES_PER_PAIR <= free:
        return
    counts = [len(np.unique(labels)) for labels in (true, predicted)]
    needed = math.prod(counts) * _BYTES_PER_PAIR
    if needed > free:
        raise ResourceError(
            f"comparing {counts[0]} with {counts[1]} objects takes about {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; evaluate a part of the image"
        )


def _overlaps(
    true: NDArray[np.uint32], predicted: NDArray[np.uint32]
) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return shared pixels "TP" of T true and P predicted objects, and the sizes of both."""
    _check_memory(true, predicted)
    table, background = label_overlap(true, predicted, ignore_label=0)
    true_px, predicted_px = table.sum(1), table.sum(0)
    if background[0] is not None:
        table, true_px = np.delete(table, background[0], 0), np.delete(true_px, background[0])
    if background[1] is not None:
        table, predicted_px = np.delete(table, background[1], 1), np.delete(predicted_px, background[1])
    return table.astype(np.float64), (true_px.astype(np.float64), predicted_px.astype(np.float64))


def _matched(
    overlap: NDArray[np.float64], true_px: NDArray[np.float64], predicted_px: NDArray[np.float64]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """Return rows, columns and IoU of the pairs that most matches come to, with elf's costs."""
    if overlap.size == 0:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
    iou = overlap / (true_px[:, None] + predicted_px[None] - overlap)
    good = iou >= MATCH_IOU
    rows, columns = linear_sum_assignment(-good.astype(float) - iou / (2 * min(iou.shape)))
    kept = good[rows, columns]
    rows, columns = rows[kept], columns[kept]
    return rows, columns, iou[rows, columns]


def _kinds(
    overlap: NDArray[np.float64],
    true_px: NDArray[np.float64],
    predicted_px: NDArray[np.float64],
    rows: NDArray[Any],
    columns: NDArray[Any],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the kinds of true and predicted objects, of which `rows` and `columns` are matched."""
    holds = overlap > HALF * true_px[:, None]  # a prediction holds most of a true object
    lies_in = overlap > HALF * predicted_px[None]  # a prediction lies mostly in a true object
    merging = holds.sum(0) >= 2
    covered = np.where(lies_in, overlap, 0).sum(1) > HALF * true_px
    broken = (lies_in.sum(1) >= 2) & covered
    of_true = np.full(len(true_px), KINDS["missed"], np.uint8)
    of_predicted = np.full(len(predicted_px), KINDS["extra"], np.uint8)
    of_true[rows], of_predicted[columns] = KINDS["right"], KINDS["right"]
    of_true[(holds & merging[None]).any(1)] = KINDS["merged"]
    of_predicted[(lies_in & broken[:, None]).any(0)] = KINDS["split"]
    of_true[broken], of_predicted[merging] = KINDS["split"], KINDS["merged"]
    return of_true, of_predicted
