"""What is wrong with a segmentation, object by object, and how its score falls with the overlap that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from elf.evaluation import mean_segmentation_accuracy
from numpy.typing import NDArray

from napari_resfinetune.errors import DataError

# Values of the error image; 0 is background.
CLASSES: Mapping[str, int] = {"right": 1, "extra": 2, "missed": 3, "merged": 4, "split": 5}
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_HALF = 0.5


def classify_errors(truth: NDArray[Any], prediction: NDArray[Any]) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """Tell what became of every object.

    A predicted object is "right" when it and a true one overlap by an intersection over union of more than 0.5, which
    is one to one; "merged" when it holds more than half of each of several true objects; else "extra". A true object
    without a right one is "split" when several predicted objects lie in it with more than half of themselves; "merged"
    when a merged one holds it; else "missed".

    Parameters
    ----------
    truth, prediction
        Integer "YX" or "ZYX" of the same shape; 0 is background.

    Returns
    -------
    errors
        uint8 of the same shape with a value of `CLASSES` in each object; a predicted one lies above a true one.
    counts
        Objects by class; "merged" counts predicted objects, "split" and "missed" true ones.

    Raises
    ------
    DataError
        When the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise DataError(
            f"prediction: shape {prediction.shape} differs from the labels' {truth.shape}; crop one of them"
        )
    true, area_true = _numbered(truth)
    found, area_found = _numbered(prediction)
    pairs, overlap = np.unique(true.ravel().astype(np.int64) * area_found.size + found.ravel(), return_counts=True)
    t, f = pairs // area_found.size, pairs % area_found.size
    objects = (t > 0) & (f > 0)
    t, f, overlap = t[objects], f[objects], overlap[objects]
    right = overlap / (area_true[t] + area_found[f] - overlap) > _HALF
    of_found, of_true = np.zeros(area_found.size, np.uint8), np.zeros(area_true.size, np.uint8)
    of_found[1:], of_true[1:] = CLASSES["extra"], CLASSES["missed"]
    held = overlap > _HALF * area_true[t]
    merged = np.bincount(f[held], minlength=area_found.size) > 1
    of_found[merged] = CLASSES["merged"]
    of_true[t[held & merged[f]]] = CLASSES["merged"]
    inside = overlap > _HALF * area_found[f]
    split = np.bincount(t[inside], minlength=area_true.size) > 1
    of_true[split] = CLASSES["split"]
    of_found[f[inside & split[t]]] = CLASSES["split"]
    of_found[f[right]] = of_true[t[right]] = CLASSES["right"]
    # What of a true object was not found shows only where the object as a whole is wrong.
    shown_true = np.where(of_true == CLASSES["right"], 0, of_true)
    errors = np.where(found > 0, of_found[found], shown_true[true]).astype(np.uint8)
    counts = {name: int((of_true == value).sum()) for name, value in CLASSES.items()}
    counts["extra"] = int((of_found == CLASSES["extra"]).sum())
    counts["merged"] = int((of_found == CLASSES["merged"]).sum())
    return errors, counts


def score_curve(truth: NDArray[Any], prediction: NDArray[Any]) -> list[tuple[float, float]]:
    """Return the segmentation accuracy at each of `THRESHOLDS` of the intersection over union."""
    true, area_true = _numbered(truth)
    found, area_found = _numbered(prediction)
    if area_true.size == 1 or area_found.size == 1:
        return [(threshold, float(area_true.size == area_found.size)) for threshold in THRESHOLDS]
    _, accuracies = mean_segmentation_accuracy(found, true, return_accuracies=True)
    return list(zip(THRESHOLDS, map(float, accuracies), strict=True))


def _numbered(labels: NDArray[Any]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Number objects from 1, and return the area of each number; background is 0, even where there is none."""
    ids, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    has_background = bool(ids.size) and ids[0] == 0
    numbers = inverse.reshape(labels.shape).astype(np.uint32) + np.uint32(not has_background)
    areas = counts if has_background else np.concatenate([[0], counts])
    return numbers, areas.astype(np.int64)
