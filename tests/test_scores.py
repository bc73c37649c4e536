"""Scores on made-up label images whose result is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from elf.evaluation import dice_score, matching, mean_segmentation_accuracy
from hypothesis import given, settings
from hypothesis import strategies as st
from micro_sam.evaluation.evaluation import _run_evaluation

from napari_resfinetune.errors import DataError
from napari_resfinetune.evaluation import mean_scores, score
from napari_resfinetune.evaluation.intervals import PlanePair, interval_of_difference, interval_of_mean
from napari_resfinetune.evaluation.objects import Objects
from napari_resfinetune.evaluation.scores import METRICS, MORE_METRICS, matched_ids, score_objects

KINDS = ("missed", "extra", "merged", "split")


def squares(shift: int = 0) -> np.ndarray:
    labels = np.zeros((80, 80), np.uint16)
    for number, (y, x) in enumerate([(10, 10), (10, 40), (45, 10), (45, 40)], 1):
        labels[y : y + 20, x + shift : x + shift + 20] = number
    return labels


def test_perfect_whatever_the_ids_and_dimensions() -> None:
    true = squares()
    renamed = np.array([0, 70_000, 3, 2, 9], np.int64)[true]
    wrong = dict.fromkeys(("missed", "extra", "merged", "split"), 0)
    perfect = {**dict.fromkeys((*METRICS, *MORE_METRICS), 1.0), "n_true": 4, "n_pred": 4, **wrong}
    assert score(true, renamed) == pytest.approx(perfect)
    assert score(np.stack([true, true]), np.stack([renamed, renamed])) == pytest.approx(perfect)


def test_nothing_found_nothing_there() -> None:
    true, empty = squares(), np.zeros((80, 80), np.uint8)
    cases = [(true, empty, 0, 4, 0), (empty, true, 0, 0, 4), (empty, empty, 1, 0, 0)]
    for labels, found, value, n_true, n_pred in cases:
        scores = score(labels, found)
        assert {scores[name] for name in (*METRICS, *MORE_METRICS)} == {value}
        assert (scores["n_true"], scores["missed"]) == (n_true, n_true)
        assert (scores["n_pred"], scores["extra"]) == (n_pred, n_pred)


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
    assert [score(squares(), merged)[kind] for kind in KINDS] == [0, 0, 1, 0]
    split = squares()
    split[10:20, 10:30] = 9
    # Half an object has an overlap of exactly 0.5, so that it still counts at 0.5, and its other half is too many.
    assert score(squares(), split)["sa75"] == pytest.approx(3 / 6)
    assert score(squares(), split)["n_pred"] == 5
    assert [score(squares(), split)[kind] for kind in KINDS] == [0, 0, 0, 1]


def scene(seed: int, count: int) -> np.ndarray:
    """Return so many rectangles, none at another, at least 8 px wide, in a grid of 24 px."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((120, 144), np.int32)
    for number, cell in enumerate(rng.permutation(30)[:count], 1):
        y, x = 24 * (cell // 6), 24 * (cell % 6)
        height, width = rng.integers(8, 20, 2)
        labels[y + 2 : y + 2 + height, x + 2 : x + 2 + width] = number
    return labels


scenes = st.builds(scene, st.integers(0, 10_000), st.integers(1, 30))


def spoiled(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return a segmentation with errors of every kind."""
    rng = np.random.default_rng(seed)
    found = np.roll(labels, tuple(rng.integers(-6, 7, 2)), (0, 1))
    found[rng.random(labels.max() + 1)[found] < 0.2] = 0
    column = rng.integers(0, 144)
    found[:, column:][found[:, column:] > 0] += 40  # splits what lies across
    found[90:, :40] = 99  # merges
    return found


@settings(max_examples=60, deadline=None)
@given(scenes, st.integers(0, 10_000))
def test_equal_to_elf_and_micro_sam(labels: np.ndarray, seed: int) -> None:
    found = spoiled(labels, seed)
    mean, accuracies = mean_segmentation_accuracy(found, labels, return_accuracies=True)
    stats = matching(found, labels)
    mine = score(labels, found)
    assert (mine["msa"], mine["sa50"], mine["sa75"]) == pytest.approx((mean, accuracies[0], accuracies[5]))
    assert (mine["precision"], mine["recall"]) == pytest.approx((stats["precision"], stats["recall"]))
    assert mine["dice"] == pytest.approx(dice_score(found, labels))
    # micro-sam's own evaluation takes arrays too.
    (msas, sa50s, sa75s), (precisions, recalls, _) = _run_evaluation([labels], [found], verbose=False)
    theirs = (msas[0], sa50s[0], sa75s[0], precisions[0], recalls[0])
    assert [mine[name] for name in ("msa", "sa50", "sa75", "precision", "recall")] == pytest.approx(theirs)


@settings(max_examples=60, deadline=None)
@given(scenes, st.integers(0, 10_000))
def test_numbers_fit_together(labels: np.ndarray, seed: int) -> None:
    found = spoiled(labels, seed)
    scores, objects = score_objects(labels, found)
    matched = sum(iou > 0 for iou in objects.true_iou)
    assert all(iou == 0 or iou >= 0.5 for iou in objects.true_iou)
    assert scores["n_pred"] == matched + len(objects.extra_px)
    assert scores["sa50"] == pytest.approx(matched / (scores["n_true"] + len(objects.extra_px)))
    assert scores["missed"] <= scores["n_true"] - matched
    assert scores["extra"] <= len(objects.extra_px)
    assert scores["sa75"] <= scores["sa50"]
    f1 = 2 * matched / (scores["n_true"] + scores["n_pred"])
    assert 0.5 * f1 <= scores["pq"] <= f1
    true_ids, found_ids = matched_ids(labels, found)
    ious = [
        ((labels == a) & (found == b)).sum() / ((labels == a) | (found == b)).sum()
        for a, b in zip(true_ids, found_ids, strict=True)
    ]
    assert sorted(ious) == pytest.approx(sorted(iou for iou in objects.true_iou if iou > 0))


@settings(max_examples=40, deadline=None)
@given(scenes)
def test_perfect_empty_shifted_merged_and_split(labels: np.ndarray) -> None:
    count = int(labels.max())
    perfect, empty = score(labels, labels + 7 * (labels > 0)), score(labels, np.zeros_like(labels))
    assert (perfect["msa"], [perfect[kind] for kind in KINDS]) == (1, [0, 0, 0, 0])
    assert (empty["msa"], [empty[kind] for kind in KINDS]) == (0, [count, 0, 0, 0])
    # Gaps between the cells of the grid are wider than objects are shifted: each still meets itself alone.
    shifted = score(labels, np.roll(labels, 2, 1))
    ious = [(width - 2) / (width + 2) for width in [(labels == number).any(0).sum() for number in range(1, count + 1)]]
    assert shifted["sa50"] == 1
    assert shifted["pq"] == pytest.approx(np.mean(ious))
    # Each object is cut 4 px from its left rim: two pieces that lie in it and cover it.
    split = labels + count * (np.arange(144) % 24 >= 2 + 4) * (labels > 0)
    assert [score(labels, split)[kind] for kind in KINDS] == [0, 0, 0, count]
    one = score(labels, np.ones_like(labels))
    assert [one[kind] for kind in KINDS] == ([0, 0, 1, 0] if count > 1 else [1, 1, 0, 0])


def test_intervals() -> None:
    assert interval_of_mean([[0.5]]) is None
    assert interval_of_mean([[0.5], [0.5]]) == (0.5, 0.5)
    low, high = interval_of_mean([[0.0], [1.0], [0.5], [0.7]])
    assert 0 <= low < 0.55 < high <= 1
    # Ten planes of one image weigh no more than the image: without groups the interval would be narrower.
    grouped = interval_of_mean([[0.0] * 10, [1.0] * 10])
    assert grouped == (0, 1)


def pairs(before: list[float], after: list[float], images: int = 1, extra: int = 0) -> list[PlanePair]:
    sizes = (100,) * len(before)
    objects = [Objects(sizes, tuple(ious), (50,) * extra, 0, 0, 0, 0) for ious in (before, after)]
    return [PlanePair(f"image {number}", *objects) for number in range(images)]


@pytest.mark.parametrize("images", [1, 4])
def test_interval_of_a_change(images: int) -> None:
    assert interval_of_difference(pairs([0.8] * 20, [0.8] * 20, images)) == (0, 0)
    low, high = interval_of_difference(pairs([0.0] * 20, [0.93] * 20, images))
    assert low > 0.85
    assert high <= 0.9 + 1e-9
    low, high = interval_of_difference(pairs([0.9] * 10 + [0.0] * 10, [0.0] * 10 + [0.9] * 10, images))
    assert low < 0 < high
    # Predictions too many count, and their number is uncertain.
    low, high = interval_of_difference(pairs([0.9] * 10, [0.9] * 10, images, extra=10))
    assert low < 0 < high


def test_images_that_differ_make_a_change_uncertain() -> None:
    better, worse = pairs([0.0] * 40, [0.93] * 40)[0], pairs([0.93] * 40, [0.0] * 40)[0]
    assert interval_of_difference([better])[0] > 0.8
    low, high = interval_of_difference([better, replace(worse, image="other"), replace(better, image="third")])
    assert low < 0 < high


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
