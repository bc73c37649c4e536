"""Prompts for training: drawn from the object, alike for any chunking, reproducible."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_resfinetune.training.prompts import (
    bounding_boxes,
    next_points,
    pick,
    plan_training_prompts,
    plan_validation_prompts,
)


def labels_of(n: int, seed: int = 0, size: int = 64) -> torch.Tensor:
    """Return an image of n discs with gaps in the ids."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.int32)
    for i in range(n):
        cy, cx = rng.integers(6, size - 6, 2)
        labels[(y - cy) ** 2 + (x - cx) ** 2 < 25] = 2 * i + 1
    return torch.from_numpy(labels)


def inside(points: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return whether each object's point (x, y) is in its mask."""
    x, y = points.long().unbind(-1)
    return masks[torch.arange(len(masks)), y, x]


def plan(labels, step, objects=20, seed=0):
    return plan_training_prompts(
        labels, np.random.default_rng(seed), step=step, objects=objects, sub_iterations=4, mask_prompt_probability=0.5
    )


def test_even_steps_start_with_a_point_in_each_object_and_odd_steps_with_its_box():
    labels = labels_of(6)
    even, odd = plan(labels, 0), plan(labels, 1)
    assert even.multimask and even.first.boxes is None and even.first.points is not None
    assert inside(even.first.points[:, 0], even.masks).all()
    assert not odd.multimask and odd.first.points is None and odd.first.boxes is not None
    tight = torch.from_numpy(bounding_boxes(odd.masks)[:, [1, 0, 3, 2]]).float()
    grown = odd.first.boxes - tight
    assert (grown[:, :2] <= 0).all() and (grown[:, 2:] >= 0).all() and grown.abs().max() <= 1


def test_an_object_that_fills_the_patch_has_no_point_outside_it():
    labels = torch.ones(32, 32, dtype=torch.int32)
    masks = plan(labels, 0).masks
    _, kinds = next_points(torch.zeros_like(masks), masks, torch.rand(1, 2))
    assert kinds.tolist() == [[1, -1]]
    for index in (2, 3):
        first = plan_validation_prompts(labels, np.random.default_rng(0), index=index, objects=1).first
        assert first.point_labels is not None and 0 not in first.point_labels


def test_objects_are_drawn_without_repeats_and_the_same_seed_draws_the_same():
    labels = labels_of(12)
    first, again, other = plan(labels, 0, 5), plan(labels, 0, 5), plan(labels, 0, 5, seed=1)
    assert len(first.masks) == 5
    assert torch.equal(first.masks, again.masks) and torch.equal(first.draws, again.draws)
    assert not torch.equal(first.masks, other.masks)
    assert len({tuple(mask.flatten().nonzero().flatten().tolist()) for mask in first.masks}) == 5


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_corrections_fall_where_the_prediction_is_wrong(seed):
    rng = np.random.default_rng(seed)
    masks = torch.from_numpy(rng.random((4, 20, 20)) < 0.3)
    masks[:, 3, 3] = True
    predicted = torch.from_numpy(rng.random((4, 20, 20)) < 0.3)
    points, labels = next_points(predicted, masks, torch.from_numpy(rng.random((4, 2))))
    assert labels.tolist() == [[1, 0]] * 4
    assert inside(points[:, 0], masks & ~predicted).all()
    assert inside(points[:, 1], predicted & ~masks).all()


def test_a_perfect_prediction_gets_a_point_inside_and_one_in_the_box_around():
    masks = torch.zeros(1, 30, 30, dtype=torch.bool)
    masks[0, 10:15, 10:15] = True
    for draw in np.linspace(0, 0.999, 20):
        points, _ = next_points(masks, masks, torch.full((1, 2), draw, dtype=torch.float64))
        assert inside(points[:, 0], masks).all()
        x, y = points[0, 1].tolist()
        assert not masks[0, int(y), int(x)] and 7 <= x < 18 and 7 <= y < 18


def test_all_pixels_of_a_region_are_picked_alike():
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[0, 2, 3] = region[0, 5, 1] = region[0, 7, 7] = True
    draws = torch.linspace(0, 1, 301, dtype=torch.float64)[:-1]
    picked = [tuple(pick(region, draw[None])[0].tolist()) for draw in draws]
    assert {p: picked.count(p) for p in set(picked)} == {(3.0, 2.0): 100, (1.0, 5.0): 100, (7.0, 7.0): 100}


@pytest.mark.parametrize("index", range(4))
def test_validation_takes_its_four_kinds_of_prompts_by_turns(index):
    prompts = plan_validation_prompts(labels_of(5), np.random.default_rng(3), index=index, objects=5)
    assert (prompts.first.boxes is not None) == (index in (1, 3))
    assert (prompts.first.points is not None) == (index != 1)
    if prompts.first.points is not None:
        for i in range(prompts.first.points.shape[1]):
            expected = prompts.first.point_labels[:, i].bool()
            assert torch.equal(inside(prompts.first.points[:, i], prompts.masks), expected)
    assert prompts.mask_prompts == ()
