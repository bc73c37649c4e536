"""Scores on made-up label images whose result is known."""

from __future__ import annotations

import numpy as np
import pytest
from elf.evaluation import mean_segmentation_accuracy

from napari_resfinetune.errors import DataError
from napari_resfinetune.evaluation import mean_scores, score


def squares(shift: int = 0) -> np.ndarray:
    labels = np.zeros((80, 80), np.uint16)
    for number, (y, x) in enumerate([(10, 10), (10, 40), (45, 10), (45, 40)], 1):
        labels[y : y + 20, x + shift : x + shift + 20] = number
    return labels


def test_perfect_whatever_the_ids_and_dimensions() -> None:
    true = squares()
    renamed = np.array([0, 70_000, 3, 2, 9], np.int64)[true]
    perfect = {"sa50": 1.0, "sa75": 1.0, "msa": 1.0, "n_true": 4, "n_pred": 4}
    assert score(true, renamed) == pytest.approx(perfect)
    assert score(np.stack([true, true]), np.stack([renamed, renamed])) == pytest.approx(perfect)


def test_nothing_found_nothing_there() -> None:
    true, empty = squares(), np.zeros((80, 80), np.uint8)
    assert score(true, empty) == {"sa50": 0, "sa75": 0, "msa": 0, "n_true": 4, "n_pred": 0}
    assert score(empty, true) == {"sa50": 0, "sa75": 0, "msa": 0, "n_true": 0, "n_pred": 4}
    assert score(empty, empty) == {"sa50": 1, "sa75": 1, "msa": 1, "n_true": 0, "n_pred": 0}


def test_without_background() -> None:
    whole = np.ones((8, 8), np.uint8)
    assert score(whole, whole)["msa"] == 1
    assert score(np.arange(1, 65).reshape(8, 8), whole)["msa"] == 0


def test_shift_counts_between_the_thresholds() -> None:
    # 20 px wide, shifted by 4: overlap 16 of 24 = 0.667, so thresholds 0.5, 0.55, 0.6, 0.65 of ten are met.
    found = score(squares(), squares(4))
    assert (found["sa50"], found["sa75"]) == (1, 0)
    assert found["msa"] == pytest.approx(0.4)


def test_merged_and_split_objects() -> None:
    merged = squares()
    merged[10:30, 30:40] = 1
    merged[merged == 2] = 1
    # Of four objects two are matched; the merged one is one too many, and two are missed.
    assert score(squares(), merged)["sa50"] == pytest.approx(2 / 5)
    split = squares()
    split[10:20, 10:30] = 9
    # Half an object has an overlap of exactly 0.5, so that it still counts at 0.5, and its other half is too many.
    assert score(squares(), split)["sa75"] == pytest.approx(3 / 6)
    assert score(squares(), split)["n_pred"] == 5


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_elf(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, found = squares(), squares(int(rng.integers(0, 6)))
    found[:, int(rng.integers(20, 60)) :] = 0
    found[70:, 70:] = 17
    mean, accuracies = mean_segmentation_accuracy(found, true, return_accuracies=True)
    mine = score(true, found)
    assert (mine["msa"], mine["sa50"], mine["sa75"]) == pytest.approx((mean, accuracies[0], accuracies[5]))


def test_mean_counts_images_alike() -> None:
    rows = [score(squares(), squares()), score(squares(), np.zeros_like(squares()))]
    assert mean_scores(rows) == {"sa50": 0.5, "sa75": 0.5, "msa": 0.5}


def test_wrong_input() -> None:
    with pytest.raises(DataError, match="shape"):
        score(squares(), squares()[:40])
    with pytest.raises(DataError, match="float64"):
        score(squares(), squares().astype(float))
    with pytest.raises(DataError, match="-1"):
        score(squares().astype(int) - 1, squares())
    with pytest.raises(DataError, match="none"):
        mean_scores([])
