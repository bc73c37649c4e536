"""How sure a mean is: bootstrap intervals over images, and of the change from one model to another.

Planes of one image, and objects of one image, are alike, so images are what is drawn (Efron and Tibshirani 1993). Where
two models are compared on a few images, objects are drawn within the drawn images too: the hierarchical bootstrap of
Saravanan, Berman and Sober 2020, arXiv 2007.07797.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.evaluation.objects import Objects

DRAWS = 2000
COVERAGE_PERCENT = 95
THRESHOLDS = np.arange(0.5, 1.0, 0.05)


@dataclass(frozen=True)
class PlanePair:
    """One plane as two models segmented it."""

    image: str
    before: Objects
    after: Objects


def interval_of_mean(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean of values that come in groups; groups are drawn.

    Parameters
    ----------
    groups
        The values of each image: one for each of its planes.
    seed
        Fixes what is drawn.

    Returns
    -------
    tuple of float or None
        `None` for fewer than two groups: one image says nothing about others.
    """
    if len(groups) < 2:
        return None
    sums, counts = np.array([[sum(group), len(group)] for group in groups], float).T
    drawn = np.random.default_rng(seed).integers(len(groups), size=(DRAWS, len(groups)))
    return _interval(sums[drawn].sum(1) / counts[drawn].sum(1))


def interval_of_difference(planes: Sequence[PlanePair], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % hierarchical bootstrap interval of how much the mean mSA of the images has changed.

    An image's objects are drawn as pairs, each with what became of it before and after. Predicted objects without a
    true one have no such pair; their number is drawn from a Poisson distribution. With one image, what is drawn are
    its objects alone, and the interval is about that image.

    Parameters
    ----------
    planes
        At least one.
    seed
        Fixes what is drawn.
    """
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys(plane.image for plane in planes))
    which = np.array([names.index(plane.image) for plane in planes])
    # How often each image is drawn, and the change of each plane under its own draw of objects.
    drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), size=DRAWS)[:, which]
    changes = np.stack([_drawn_changes(plane, rng) for plane in planes], axis=1)
    return _interval((drawn * changes).sum(1) / drawn.sum(1))


def _drawn_changes(plane: PlanePair, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the change of mSA for each draw of a plane's objects."""
    count = len(plane.before.true_px)
    times = rng.multinomial(count, [1 / count] * count, size=DRAWS) if count else np.zeros((DRAWS, 0), int)
    after, before = (_drawn_msa(objects, times, rng) for objects in (plane.after, plane.before))
    return after - before


def _drawn_msa(objects: Objects, times: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
    iou = np.array(objects.true_iou).reshape(-1, 1)
    found = times @ (iou >= THRESHOLDS)  # true positives, "DT": draws and thresholds
    matched = times @ (iou > 0)
    predicted = matched + rng.poisson(len(objects.extra_px), (DRAWS, 1))
    everything = times.sum(1, keepdims=True) + predicted - found
    # Where there is nothing and nothing was found, nothing is wrong.
    shares = np.divide(found, everything, out=np.ones(found.shape), where=everything > 0)
    return np.asarray(shares.mean(1))


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    rest = (100 - COVERAGE_PERCENT) / 2
    low, high = np.percentile(values, [rest, 100 - rest])
    return float(low), float(high)
