"""LogME: how probable the labels are under a linear model of the features, with its two precisions chosen best.

You et al. 2021 (ICML), https://arxiv.org/abs/2102.11005. A prior of precision alpha on the weights and noise of
precision beta give the evidence of the labels in closed form; alpha and beta that make it largest are found by
iteration to a fixed point. Unlike the fit of a linear model it does not grow just because there are more features.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 5000
_TOLERANCE = 1e-13
_SMALLEST = 1e-12


def logme(features: NDArray[np.floating], classes: NDArray[np.integer]) -> float:
    """Return the log of the maximum evidence per token, as a mean over one-against-all labels of each class.

    Parameters
    ----------
    features
        Shape (tokens, features), at least two tokens.
    classes
        Shape (tokens,).

    Returns
    -------
    float
        In nats a token; larger is better. Features of the same tokens may be compared, whatever their number.
    """
    matrix = np.asarray(features, np.float64)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    squares = np.where(values > values.max(initial=0.0) * 1e-12, values**2, 0.0)
    evidences = []
    for each in np.unique(classes):
        labels = (classes == each).astype(np.float64)
        evidences.append(_max_evidence(squares, (left.T @ labels) ** 2, labels @ labels, *matrix.shape))
    return float(np.mean(evidences))


def explained_share(features: NDArray[np.floating], classes: NDArray[np.integer]) -> tuple[float, float]:
    """Return LogME, and what it gains over a constant as a share from 0 to 1.

    The share is ``1 - exp(-2 gain)``, which for a Gaussian model is the part of the variance that is explained (Cox and
    Snell's R²), so that it can stand beside the R² of a probe.

    Parameters
    ----------
    features, classes
        As for `logme`; features are brought to mean 0 and variance 1, and get a constant beside them.
    """
    matrix = np.asarray(features, np.float64)
    spread = matrix.std(0)
    ones = np.ones((len(matrix), 1))
    varies = spread > 1e-12 * max(spread.max(initial=0.0), 1e-300)
    standard = (matrix[:, varies] - matrix[:, varies].mean(0)) / spread[varies]
    found = logme(np.concatenate([ones, standard], axis=1), classes)
    gain = found - logme(ones, classes)
    return found, 1 - math.exp(-2 * max(gain, 0.0))


def _max_evidence(squares: NDArray[np.float64], projected: NDArray[np.float64], total: float, n: int, d: int) -> float:
    """Return the evidence per token at its maximum over alpha and beta.

    `squares` are the squared singular values of the features, `projected` the squared coordinates of the labels along
    their left singular vectors, `total` the squared length of the labels.
    """
    alpha = beta = 1.0
    outside = max(total - projected.sum(), 0.0)  # no weights reach that part of the labels
    previous = -math.inf
    for _ in range(_ROUNDS):
        scaled = alpha + beta * squares
        length = float((beta**2 * squares * projected / scaled**2).sum())  # of the mean weights, squared
        error = float((projected * (alpha / scaled) ** 2).sum()) + outside
        evidence = 0.5 * (
            d * math.log(alpha)
            + n * math.log(beta)
            - beta * error
            - alpha * length
            - float(np.log(scaled).sum())
            - (d - len(squares)) * math.log(alpha)
            - n * math.log(2 * math.pi)
        )
        if abs(evidence - previous) <= _TOLERANCE * abs(evidence):
            break
        previous = evidence
        used = float((beta * squares / scaled).sum())
        alpha = max(used, _SMALLEST) / max(length, _SMALLEST)
        beta = max(n - used, _SMALLEST) / max(error, _SMALLEST)
    return evidence / n
