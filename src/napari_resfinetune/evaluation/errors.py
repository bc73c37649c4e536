"""What is wrong with a segmentation, object by object, and how its score falls with the overlap that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from elf.evaluation import mean_segmentation_accuracy
from numpy.typing import NDArray

from napari_resfinetune.errors import DataError
from napari_resfinetune.evaluation.objects import KINDS, kinds_of_objects, numbered

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


def classify_errors(truth: NDArray[Any], prediction: NDArray[Any]) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Tell what became of every object.

    The kinds are those that `rf.evaluate` counts (evaluation/objects.py): a predicted object is "merged" when it holds
    more than half of each of several true ones, else "right" when it is matched to a true one at an intersection over
    union of at least 0.5, else "extra"; a true one is "split" when several predicted objects lie in it with more than
    half of themselves and cover most of it, else "merged", "right" or "missed".

    Parameters
    ----------
    truth, prediction
        Integer "YX" or "ZYX" of the same shape; 0 is background.

    Returns
    -------
    errors
        uint8 of the same shape with a value of `KINDS` in each object; a predicted one lies above a true one.
    counts
        Objects by kind; "merged" counts predicted objects, "split" and "missed" true ones.

    Raises
    ------
    DataError
        When the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise DataError(
            f"prediction: shape {prediction.shape} differs from the labels' {truth.shape}; crop one of them"
        )
    true, found = numbered(truth, "labels"), numbered(prediction, "prediction")
    of_true, of_found = kinds_of_objects(true, found)
    # What of a true object was not found shows only where the object as a whole is wrong.
    shown_true = np.where(of_true == KINDS["right"], 0, of_true)
    errors = np.where(found > 0, of_found[found], shown_true[true]).astype(np.uint8)
    counts = {kind: int((of_true == value).sum()) for kind, value in KINDS.items()}
    counts |= {kind: int((of_found == KINDS[kind]).sum()) for kind in ("extra", "merged")}
    return errors, counts


def score_curve(truth: NDArray[Any], prediction: NDArray[Any]) -> list[tuple[float, float]]:
    """Return the segmentation accuracy at each of `THRESHOLDS` of the intersection over union."""
    true, found = numbered(truth, "labels"), numbered(prediction, "prediction")
    if not true.any() or not found.any():
        return [(threshold, float(true.any() == found.any())) for threshold in THRESHOLDS]
    _, accuracies = mean_segmentation_accuracy(found, true, return_accuracies=True)
    return list(zip(THRESHOLDS, map(float, accuracies), strict=True))
