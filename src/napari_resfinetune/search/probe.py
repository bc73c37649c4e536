"""A ridge probe from frozen embeddings to what the instance decoder must predict, in closed form.

How well a linear map reads foreground, boundary and distance from a token says how much of the work the image encoder
has done (linear probes: Alain and Bengio 2016, https://arxiv.org/abs/1610.01644). Every image is predicted from the
others. That takes no second look at the tokens: sums of products ("moments") of each patch are enough, they add up over
patches, and what remains is one small system of equations an image (Hoerl and Kennard 1970, doi 10.2307/1267351).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve

TARGETS = ("foreground", "boundary", "distance")
# Times the number of tokens that are learned from, for features of unit variance.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ProbeResult:
    """How well tokens were predicted that were not learned from.

    Attributes
    ----------
    explained, spread
        Of each unit and target, shape (units, targets): the sum of squares around the mean over all units that was
        explained, and that sum. The ratio of their sums is R².
    penalty
        The one of `PENALTIES` with the best R².
    """

    explained: Array
    spread: Array
    penalty: float

    @property
    def r2(self) -> Array:
        """R² of each target; 0 where it does not vary."""
        spread = self.spread.sum(0)
        return np.divide(self.explained.sum(0), spread, out=np.zeros_like(spread), where=spread > 0)


def moments(tokens: NDArray[np.floating], targets: NDArray[np.floating]) -> Array:
    """Return the sums of products of a one, the features and the targets of some tokens.

    Parameters
    ----------
    tokens
        Shape (tokens, features).
    targets
        Shape (tokens, targets).

    Returns
    -------
    float64, square, of side 1 + features + targets
    """
    joined = np.concatenate([np.ones((len(tokens), 1)), tokens, targets], axis=1, dtype=np.float64)
    return np.asarray(joined.T @ joined)


def fit_ridge(total: Array, n_targets: int, penalty: float) -> tuple[Array, Array]:
    """Solve the ridge regression whose moments are given; the intercept is not penalised.

    Parameters
    ----------
    total
        Moments of what is learned from.
    n_targets
        How many of its last rows are targets.
    penalty
        Factor on the sum of squared weights (``alpha`` of scikit-learn's ``Ridge``).

    Returns
    -------
    weights
        Shape (features, targets).
    intercept
        Shape (targets,).
    """
    count = total[0, 0]
    mean = total[0, 1:] / count
    centred = total[1:, 1:] - count * np.outer(mean, mean)
    features = len(mean) - n_targets
    gram = centred[:features, :features] + penalty * np.eye(features)
    weights = solve(gram, centred[:features, features:], assume_a="pos")
    return weights, mean[features:] - mean[:features] @ weights


def leave_one_out(units: Sequence[Array], groups: Sequence[int], n_targets: int) -> ProbeResult:
    """Predict each group of units from the others.

    Parameters
    ----------
    units
        Moments of each unit, for instance of each patch.
    groups
        Which image each unit belongs to. Where there is nothing else to learn from, nothing is explained.
    n_targets
        Number of targets.

    Returns
    -------
    ProbeResult
        With the penalty, the same for all groups, that predicts best.
    """
    scaled = _unit_variance(np.stack(units), n_targets)
    total = scaled.sum(0)
    mean = total[0, -n_targets:] / total[0, 0]
    spread = np.stack([_around(unit, mean) for unit in scaled])
    which = np.asarray(groups)
    best: ProbeResult | None = None
    for share in PENALTIES:
        errors = np.zeros_like(spread)
        for group in np.unique(which):
            rest = scaled[which != group].sum(0)
            if rest[0, 0] == 0:  # nothing to learn from
                errors[which == group] = spread[which == group]
                continue
            fitted = fit_ridge(rest, n_targets, share * rest[0, 0])
            for index in np.flatnonzero(which == group):
                errors[index] = _squared_errors(scaled[index], *fitted)
        result = ProbeResult(spread - errors, spread, share)
        if best is None or result.r2.mean() > best.r2.mean():
            best = result
    if best is None:
        raise ValueError("no penalty to try")
    return best


def _unit_variance(units: Array, n_targets: int) -> Array:
    """Scale features to unit variance over all tokens; those that do not vary become 0."""
    total = units.sum(0)
    features = slice(1, total.shape[0] - n_targets)
    variance = np.diag(total)[features] / total[0, 0] - (total[0, features] / total[0, 0]) ** 2
    scale = np.ones(len(total))
    varies = variance > 1e-12 * max(variance.max(initial=0.0), 1e-300)
    scale[features] = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
    return np.asarray(units * scale[:, None] * scale[None, :])


def _around(unit: Array, mean: Array) -> Array:
    """Return the sum of squares of each target around a value."""
    count, sums, squares = unit[0, 0], unit[0, -len(mean) :], np.diag(unit)[-len(mean) :]
    return np.asarray(squares - 2 * mean * sums + count * mean**2)


def _squared_errors(unit: Array, weights: Array, intercept: Array) -> Array:
    """Return the sum of squared errors of each target, from the moments of what is predicted."""
    n_targets = len(intercept)
    known = unit.shape[0] - n_targets
    coefficients = np.concatenate([intercept[None], weights])  # of the one and the features
    cross = unit[:known, known:]
    fitted = np.einsum("it,ij,jt->t", coefficients, unit[:known, :known], coefficients, optimize=True)
    return np.maximum(np.diag(unit)[known:] - 2 * (coefficients * cross).sum(0) + fitted, 0.0)
