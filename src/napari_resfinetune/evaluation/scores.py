"""Scores of a label image against the truth, from elf (``elf.evaluation``), as micro-sam reports them.

SA50 and SA75 are the segmentation accuracy tp / (tp + fp + fn) of objects matched one to one at an intersection over
union of at least 0.5 and 0.75; mSA is its mean over the thresholds 0.5, 0.55, ..., 0.95 (Caicedo et al. 2019,
doi 10.1038/s41592-019-0612-7).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from elf.evaluation import mean_segmentation_accuracy
from numpy.typing import NDArray

from napari_resfinetune.errors import DataError

METRICS = ("sa50", "sa75", "msa")
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
        ``sa50``, ``sa75``, ``msa`` from 0 to 1, and the numbers of objects ``n_true`` and ``n_pred``.

    Raises
    ------
    DataError
        When the shapes differ, or the labels are not integers or negative.
    """
    if labels_true.shape != labels_pred.shape:
        raise DataError(
            f"prediction: shape {labels_pred.shape} differs from the labels' {labels_true.shape}; crop one of them"
        )
    true, n_true = _numbered(labels_true, "labels")
    predicted, n_pred = _numbered(labels_pred, "prediction")
    counts = {"n_true": n_true, "n_pred": n_pred}
    if n_true == 0 or n_pred == 0:
        return {**dict.fromkeys(METRICS, float(n_true == n_pred)), **counts}
    mean, accuracies = mean_segmentation_accuracy(predicted, true, return_accuracies=True)
    return {"sa50": float(accuracies[0]), "sa75": float(accuracies[_AT_75]), "msa": float(mean), **counts}


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


def _numbered(labels: NDArray[Any], what: str) -> tuple[NDArray[np.uint32], int]:
    """Number objects from 1, so that ids may be of any size, and count them."""
    if labels.dtype.kind not in "iub" or labels.min(initial=0) < 0:
        raise DataError(
            f"{what}: found {labels.dtype} values from {labels.min(initial=0)}; expected integers of 0 and more"
        )
    ids, inverse = np.unique(labels, return_inverse=True)
    has_background = bool(ids.size) and ids[0] == 0
    numbers = inverse.reshape(labels.shape).astype(np.uint32) + np.uint32(not has_background)
    return numbers, int(ids.size) - int(has_background)
