"""The numbers that models are ranked by: equal to plain versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from napari_resfinetune.search.logme import explained_share, logme
from napari_resfinetune.search.probe import PENALTIES, fit_ridge, leave_one_out, moments


def tokens(n: int, d: int, seed: int, noise: float = 0.5):
    """Features of very different scales, and three targets that depend on them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) * np.geomspace(0.1, 30, d) + rng.normal(size=d)
    truth = np.random.default_rng(0).normal(size=(d, 3)) / np.geomspace(0.1, 30, d)[:, None]
    return features, features @ truth + 2.0 + noise * rng.normal(size=(n, 3))


def test_ridge_from_moments_is_scikit_learns():
    features, targets = tokens(300, 12, seed=1)
    joined = moments(features[:100], targets[:100]) + moments(features[100:], targets[100:])
    for penalty in (1e-3, 1.0, 1e3):
        weights, intercept = fit_ridge(joined, 3, penalty)
        plain = Ridge(alpha=penalty, solver="cholesky").fit(features, targets)
        np.testing.assert_allclose(weights, plain.coef_.T, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(intercept, plain.intercept_, rtol=1e-8)


def test_leaving_images_out_is_what_scikit_learn_predicts_for_them():
    parts = [tokens(80, 10, seed=seed) for seed in range(5)]
    groups = [0, 0, 1, 2, 2]
    found = leave_one_out([moments(*part) for part in parts], groups, 3)
    everything, everywhere = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    scale, mean = everything.std(0), everywhere.mean(0)
    scores = {}
    for penalty in PENALTIES:
        errors = []
        for (features, targets), group in zip(parts, groups, strict=True):
            rest = [part for part, other in zip(parts, groups, strict=True) if other != group]
            learned, wanted = (np.concatenate([part[i] for part in rest]) for i in (0, 1))
            plain = Ridge(alpha=penalty * len(learned)).fit(learned / scale, wanted)
            errors.append(((plain.predict(features / scale) - targets) ** 2).sum(0))
        spread = np.stack([((targets - mean) ** 2).sum(0) for _, targets in parts])
        scores[penalty] = (spread - np.stack(errors), spread)
    best = max(PENALTIES, key=lambda penalty: (scores[penalty][0].sum(0) / scores[penalty][1].sum(0)).mean())
    assert found.penalty == best
    np.testing.assert_allclose(found.explained, scores[best][0], rtol=1e-7)
    np.testing.assert_allclose(found.spread, scores[best][1], rtol=1e-9)


def test_a_probe_tells_features_with_the_answer_from_noise():
    rng = np.random.default_rng(3)
    units = [tokens(60, 8, seed=seed) for seed in range(4)]
    knowing = leave_one_out([moments(*unit) for unit in units], [0, 1, 2, 3], 3).r2
    guessing = leave_one_out([moments(rng.normal(size=(60, 8)), unit[1]) for unit in units], [0, 1, 2, 3], 3).r2
    assert knowing.min() > 0.5 > 0.1 > guessing.max()


def test_nothing_is_explained_where_there_is_nothing_to_learn_from():
    unit, nothing = moments(*tokens(30, 4, seed=1)), np.zeros((8, 8))
    assert leave_one_out([unit, nothing, nothing], [0, 1, 2], 3).r2.tolist() == [0.0, 0.0, 0.0]
    assert leave_one_out([unit], [0], 3).r2.tolist() == [0.0, 0.0, 0.0]


def test_features_and_targets_that_do_not_vary_give_zero_rather_than_an_error():
    units = [moments(np.ones((20, 4)), np.zeros((20, 3))) for _ in range(2)]
    assert leave_one_out(units, [0, 1], 3).r2.tolist() == [0.0, 0.0, 0.0]


def plain_logme(features: np.ndarray, classes: np.ndarray) -> float:
    """The evidence of the paper (its equation 2), with dense matrices, made largest by a general optimizer."""
    n, d = features.shape

    def negative(logs: np.ndarray, labels: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        a = alpha * np.eye(d) + beta * features.T @ features
        m = beta * np.linalg.solve(a, features.T @ labels)
        residual = features @ m - labels
        return -0.5 * (
            n * np.log(beta) + d * np.log(alpha) - n * np.log(2 * np.pi) - beta * residual @ residual
            - alpha * m @ m - np.linalg.slogdet(a)[1]
        )  # fmt: skip

    best = []
    for each in np.unique(classes):
        labels = (classes == each).astype(np.float64)
        starts = [(0.0, 0.0), (3.0, 1.0), (-3.0, 3.0)]
        found = [
            minimize(negative, start, (labels,), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-11})
            for start in starts
        ]
        best.append(-min(result.fun for result in found) / n)
    return float(np.mean(best))


@pytest.mark.parametrize(("n", "d"), [(60, 5), (40, 30), (20, 30)])
def test_logme_is_the_evidence_at_its_maximum(n, d):
    rng = np.random.default_rng(n + d)
    features = rng.normal(size=(n, d))
    classes = (features[:, :3] + 0.7 * rng.normal(size=(n, 3))).argmax(1)
    assert logme(features, classes) == pytest.approx(plain_logme(features, classes), rel=1e-6)
    assert logme(features.astype(np.float32), classes) == pytest.approx(logme(features, classes), rel=1e-5)


def test_the_share_that_logme_explains_orders_features_by_what_they_know():
    rng = np.random.default_rng(5)
    classes = np.repeat(np.arange(3), 100)
    shares = [
        explained_share(np.eye(3)[classes] + noise * rng.normal(size=(300, 3)), classes)[1] for noise in (0.1, 1, 100)
    ]
    assert 1 > shares[0] > 0.9 > shares[1] > 0.2 > shares[2] >= 0
    assert explained_share(np.ones((300, 3)), classes)[1] == pytest.approx(0, abs=1e-6)
