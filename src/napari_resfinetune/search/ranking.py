"""One ranking from many scores, and how sure it is.

Every score is on a scale from 0 to 1 that does not depend on the other models: overlaps, accuracies, shares of variance
explained. The combined score is their weighted mean, and its interval comes from drawing images again, with the same
draws for all models, so that two models are compared on the same images (Efron 1979, doi 10.1214/aos/1176344552).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.config.schema import Targets
from napari_resfinetune.search.probe import TARGETS

Array = NDArray[np.float64]
# What counts how much, by what shall be trained; docs/search.md says how they were chosen.
WEIGHTS: Mapping[Targets, Mapping[str, float]] = {
    "both": {"ais_sa50": 0.35, "probe_r2": 0.2, "box_iou": 0.15, "point_iou": 0.1, "logme_share": 0.2},
    "instances": {"ais_sa50": 0.4, "probe_r2": 0.3, "logme_share": 0.3},
    "masks": {"box_iou": 0.35, "point_iou": 0.35, "probe_r2": 0.15, "logme_share": 0.15},
}
WEIGHTS_WITHOUT_LABELS: Mapping[str, float] = {"ais_steadiness": 0.5, "point_steadiness": 0.5}
DRAWS = 2000
# Fewer images than this say nothing about others; patches are drawn again instead.
LEAST_IMAGES = 3
LEVEL = 0.95
# A smaller difference is not taken for one. Drawing few images again says little, so there it is larger.
SMALLEST_DIFFERENCE, SMALLEST_WITH_FEW_IMAGES = 0.01, 0.05


@dataclass(frozen=True)
class Evidence:
    """What is known of a model.

    Attributes
    ----------
    sums
        By score, one row a patch: two numbers whose sums over patches have the score as ratio, shape (patches, 2).
    whole
        Scores of all patches together, by name.
    """

    sums: Mapping[str, Array]
    whole: Mapping[str, float]

    @property
    def patches(self) -> int:
        """How many patches it was judged on."""
        return max((len(rows) for rows in self.sums.values()), default=0)


@dataclass(frozen=True)
class Standing:
    """Where a model stands.

    Attributes
    ----------
    model
        Its name.
    score
        Combined, from 0 to 1; higher is better.
    low, high
        Of its interval at 95 %; `None` where there is nothing to draw again.
    close
        Whether it is too close to the first to call.
    scores
        What the combined score is made of, and more.
    """

    model: str
    score: float
    low: float | None
    high: float | None
    close: bool
    scores: Mapping[str, float]


def rank(
    evidence: Mapping[str, Evidence],
    groups: Sequence[str],
    weights: Mapping[str, float],
    earlier: Callable[[str, int], Evidence],
    *,
    seed: int = 0,
) -> list[Standing]:
    """Rank models, best first; those that were judged on more patches come before the others.

    Parameters
    ----------
    evidence
        By model. The patches of each are the first so many of `groups`.
    groups
        Which image each patch is from; images are drawn again, or patches where there are few of them.
    weights
        Of the scores, as in `WEIGHTS`. What a model lacks counts as 0.
    earlier
        What was known of a model after so many patches, to compare it with one that was dropped then.
    seed
        Of the draws.
    """
    draws = {each.patches: _draws(groups[: each.patches], seed) for each in evidence.values()}
    ranked = sorted(
        evidence, key=lambda model: (-evidence[model].patches, -_combined(evidence[model], weights, None)[0])
    )
    # What is known of the first one, by the number of patches that another one was judged on.
    leading = {
        patches: evidence[ranked[0]] if patches == evidence[ranked[0]].patches else earlier(ranked[0], patches)
        for patches in draws
    }
    standings = []
    for model in ranked:
        each = evidence[model]
        (score,) = _combined(each, weights, None)
        low = high = None
        drawn = draws[each.patches]
        if drawn is not None:
            low, high = np.quantile(_combined(each, weights, drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        scores = {name: float(values[0]) for name, values in _values(each, None).items()} | dict(each.whole)
        images = len(set(groups[: each.patches]))
        close = model != ranked[0] and _is_close(leading[each.patches], each, weights, drawn, images)
        standings.append(Standing(model, float(score), _plain(low), _plain(high), close, scores))
    return standings


def sums_of_probe(explained: Array, spread: Array) -> dict[str, Array]:
    """Return the sums of `ProbeResult` as `Evidence` takes them, one score for each target."""
    return {f"probe_{name}": np.stack([explained[:, i], spread[:, i]], axis=1) for i, name in enumerate(TARGETS)}


def uncertainty_in_words(groups: Sequence[str]) -> str:
    """Say what the intervals mean."""
    images, patches = len(set(groups)), len(groups)
    if images >= LEAST_IMAGES:
        return f"intervals come from drawing the {images} images again"
    if patches > 1:
        few = "one image" if images == 1 else f"{images} images"
        return f"there are patches of only {few}: intervals say nothing about other images"
    return "there is one patch only, so there are no intervals"


def _draws(groups: Sequence[str], seed: int) -> Array | None:
    """Return how often each patch is taken in each draw, shape (draws, patches)."""
    names = list(dict.fromkeys(groups))
    units = [names.index(group) for group in groups] if len(names) >= LEAST_IMAGES else list(range(len(groups)))
    count = len(set(units))
    if count < 2:
        return None
    taken = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return np.asarray(taken[:, units], np.float64)


def _values(evidence: Evidence, drawn: Array | None) -> dict[str, Array]:
    """Return each score in each draw; without draws, over all patches once."""
    values = {}
    for name, rows in evidence.sums.items():
        taken = np.ones((1, len(rows))) if drawn is None else drawn[:, : len(rows)]
        above, below = (taken @ rows).T
        # A draw without any of these patches says what all of them say.
        whole = rows[:, 0].sum() / rows[:, 1].sum() if rows[:, 1].sum() > 0 else 0.0
        values[name] = np.divide(above, below, out=np.full_like(above, whole), where=below > 0)
    parts = [np.clip(values[f"probe_{name}"], 0, 1) for name in TARGETS if f"probe_{name}" in values]
    if parts:
        values["probe_r2"] = np.mean(parts, axis=0)
    return values


def _combined(evidence: Evidence, weights: Mapping[str, float], drawn: Array | None) -> Array:
    values: dict[str, Array] = {**_values(evidence, drawn)}
    values |= {name: np.full(1, value) for name, value in evidence.whole.items()}
    total = sum(weights.values()) or 1.0
    parts: Iterable[Array] = (
        weight / total * np.clip(values.get(name, np.zeros(1)), 0, 1) for name, weight in weights.items()
    )
    return np.asarray(sum(parts, np.zeros(1 if drawn is None else len(drawn))))


def _is_close(first: Evidence, other: Evidence, weights: Mapping[str, float], drawn: Array | None, images: int) -> bool:
    """Whether the first is hardly better, or not in enough draws, on the patches that both were judged on."""
    ahead = _combined(first, weights, None)[0] - _combined(other, weights, None)[0]
    if ahead < (SMALLEST_DIFFERENCE if images >= LEAST_IMAGES else SMALLEST_WITH_FEW_IMAGES):
        return True
    if drawn is None:
        return False
    better = _combined(first, weights, drawn) > _combined(other, weights, drawn)
    return bool(better.mean() < LEVEL)


def _plain(value: float | None) -> float | None:
    return None if value is None else float(value)
