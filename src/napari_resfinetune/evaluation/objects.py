"""Which object of a segmentation is which object of the truth, and which are missed, extra, merged or split.

Matching is elf's: one to one, at an intersection over union (IoU) of at least 0.5. Merged and split objects are found
as in Hoover et al. 1996, doi 10.1109/34.506791, with half of an object as the share that counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from elf.evaluation.matching import label_overlap
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

MATCH_IOU = 0.5
HALF = 0.5


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


def match_objects(true: NDArray[np.uint32], predicted: NDArray[np.uint32]) -> Objects:
    """Match objects, and sort those that are wrong by kind.

    Parameters
    ----------
    true, predicted
        "YX" or "ZYX" of the same shape, ids from 1 without gaps; 0 is background.
    """
    overlap, shares = _overlaps(true, predicted)
    if overlap.size == 0:
        sizes = [tuple(np.bincount(labels.ravel())[1:].tolist()) for labels in (true, predicted)]
        return Objects(sizes[0], (0.0,) * len(sizes[0]), sizes[1], len(sizes[0]), len(sizes[1]), 0, 0)
    true_px, predicted_px = shares
    iou = overlap / (true_px[:, None] + predicted_px[None] - overlap)
    rows, columns = _match(iou)
    true_iou = np.zeros(len(true_px))
    true_iou[rows] = iou[rows, columns]
    matched = np.isin(np.arange(len(predicted_px)), columns)

    holds = overlap > HALF * true_px[:, None]  # a prediction holds most of a true object
    lies_in = overlap > HALF * predicted_px[None]  # a prediction lies mostly in a true object
    merging = holds.sum(0) >= 2
    covered = np.where(lies_in, overlap, 0).sum(1) > HALF * true_px
    broken = (lies_in.sum(1) >= 2) & covered
    explained_true = broken | (holds & merging[None]).any(1)
    explained_predicted = merging | (lies_in & broken[:, None]).any(0)
    return Objects(
        true_px=tuple(int(px) for px in true_px),
        true_iou=tuple(float(value) for value in true_iou),
        extra_px=tuple(int(px) for px in predicted_px[~matched]),
        missed=int(np.count_nonzero((true_iou == 0) & ~explained_true)),
        extra=int(np.count_nonzero(~matched & ~explained_predicted)),
        merged=int(np.count_nonzero(merging)),
        split=int(np.count_nonzero(broken)),
    )


def matched_pairs(true: NDArray[np.uint32], predicted: NDArray[np.uint32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return indices, from 0, of true objects that are matched and of those that they are matched to."""
    overlap, (true_px, predicted_px) = _overlaps(true, predicted)
    if overlap.size == 0:
        return np.zeros(0, int), np.zeros(0, int)
    return _match(overlap / (true_px[:, None] + predicted_px[None] - overlap))


def panoptic_quality(objects: Objects) -> float:
    """Return the panoptic quality (Kirillov et al. 2019, https://arxiv.org/abs/1801.00868) of one class.

    It is the mean IoU of matched objects times their F1 score; here, as for SA50, an IoU of exactly 0.5 is a match.
    """
    found = [iou for iou in objects.true_iou if iou > 0]
    wrong = len(objects.extra_px) + len(objects.true_iou) - len(found)
    return sum(found) / (len(found) + wrong / 2) if found else 0.0


def _overlaps(
    true: NDArray[np.uint32], predicted: NDArray[np.uint32]
) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return shared pixels "TP" of T true and P predicted objects, and the sizes of both."""
    table, background = label_overlap(true, predicted, ignore_label=0)
    true_px, predicted_px = table.sum(1), table.sum(0)
    if background[0] is not None:
        table, true_px = np.delete(table, background[0], 0), np.delete(true_px, background[0])
    if background[1] is not None:
        table, predicted_px = np.delete(table, background[1], 1), np.delete(predicted_px, background[1])
    return table.astype(np.float64), (true_px.astype(np.float64), predicted_px.astype(np.float64))


def _match(iou: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return rows and columns of the pairs that most matches come to, with elf's costs."""
    good = iou >= MATCH_IOU
    rows, columns = linear_sum_assignment(-good.astype(float) - iou / (2 * min(iou.shape)))
    kept = good[rows, columns]
    return rows[kept], columns[kept]
