"""Scores of a label image against the truth, from elf (``elf.evaluation``), as micro-sam reports them.

SA50 and SA75 are the segmentation accuracy tp / (tp + fp + fn) of objects matched one to one at an intersection over
union of at least 0.5 and 0.75; mSA is its mean over the thresholds 0.5, 0.55, ..., 0.95 (Caicedo et al. 2019,
doi 10.1038/s41592-019-0612-7). docs/evaluation.md describes them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from elf.evaluation import dice_score, mean_segmentation_accuracy
from numpy.typing import NDArray

from napari_resfinetune.errors import DataError
from napari_resfinetune.evaluation.objects import Objects, match_objects, matched_pairs, numbered, panoptic_quality

METRICS = ("sa50", "sa75", "msa")
# Beside the main ones.
MORE_METRICS = ("dice", "precision", "recall", "pq")
COUNTS = ("n_true", "n_pred", "missed", "extra", "merged", "split")
_AT_75 = 5


def score(labels_true: NDArray[Any], labels_pred: NDArray[Any]) -> dict[str, float]:
    """Score a segmentation.

    Where neither has an object, nothing was missed and nothing invented: all scores are 1 (elf says 0). Where only
    one has, they are 0.

    Parameters
    ----------
    labels_true, labels_pred
        Integer "YX" or "ZYX" of the same shape; 0 is background.

    Returns
    -------
    dict
        ``sa50``, ``sa75``, ``msa``, ``dice`` (of foreground), ``precision``, ``recall``, ``pq`` (panoptic quality) from
        0 to 1, and the numbers of objects ``n_true`` and ``n_pred``, of them ``missed``, ``extra``, ``merged``,
        ``split``.

    Raises
    ------
    DataError
        When the shapes differ, or the labels are not integers or negative.
    """
    return score_objects(labels_true, labels_pred)[0]


def score_objects(labels_true: NDArray[Any], labels_pred: NDArray[Any]) -> tuple[dict[str, float], Objects]:
    """Return what `score` does, and the objects one by one."""
    if labels_true.shape != labels_pred.shape:
        raise DataError(
            f"prediction: shape {labels_pred.shape} differs from the labels' {labels_true.shape}; crop one of them"
        )
    true, predicted = numbered(labels_true, "labels"), numbered(labels_pred, "prediction")
    n_true, n_pred = int(true.max(initial=0)), int(predicted.max(initial=0))
    objects = match_objects(true, predicted)
    kinds = {name: getattr(objects, name) for name in ("missed", "extra", "merged", "split")}
    counts = {"n_true": n_true, "n_pred": n_pred, **kinds}
    if n_true == 0 or n_pred == 0:
        return {**dict.fromkeys((*METRICS, *MORE_METRICS), float(n_true == n_pred)), **counts}, objects
    mean, accuracies = mean_segmentation_accuracy(predicted, true, return_accuracies=True)
    found = n_true - objects.true_iou.count(0.0)
    scores = {
        "sa50": float(accuracies[0]),
        "sa75": float(accuracies[_AT_75]),
        "msa": float(mean),
        "dice": float(dice_score(predicted, true)),
        "precision": found / n_pred,
        "recall": found / n_true,
        "pq": panoptic_quality(objects),
    }
    return {**scores, **counts}, objects


def matched_ids(labels_true: NDArray[Any], labels_pred: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return ids of the true objects that were found, and of the predicted ones that found them.

    Parameters
    ----------
    labels_true, labels_pred
        As for `score`.
    """
    pairs = matched_pairs(numbered(labels_true, "labels"), numbered(labels_pred, "prediction"))
    names = [np.unique(labels[labels > 0]) for labels in (labels_true, labels_pred)]
    return names[0][pairs[0]], names[1][pairs[1]]


def mean_scores(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over images; every image counts the same, however many objects it has.

    Raises
    ------
    DataError
        When there are no scores.
    """
    rows = list(scores)
    if not rows:
        raise DataError("scores: there are none; no image was evaluated")
    return {metric: float(np.mean([row[metric] for row in rows])) for metric in METRICS}
