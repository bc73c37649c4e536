"""What is trained on, what is held out, and patches that depend on nothing but their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from napari_resfinetune.config import AugmentConfig, DataConfig
from napari_resfinetune.data.pairs import find_pairs
from napari_resfinetune.data.patches import (
    TrainingPatches,
    ValidationPatches,
    augment,
    instance_targets,
    measure_scalings,
)
from napari_resfinetune.data.split import split_pairs
from napari_resfinetune.errors import DataError

PLAIN = AugmentConfig(flips=False, rotations=False, intensity=0)


def blobs(shape, objects=12, seed=0, size=4):
    """Return an image and labels with square objects everywhere."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint16)
    for i in range(objects):
        y, x = rng.integers(0, shape[-2] - 2 * size), rng.integers(0, shape[-1] - 2 * size)
        labels[..., y : y + 2 * size, x : x + 2 * size] = i + 1
    image = (labels > 0) * 100 + rng.integers(0, 50, shape)
    return image.astype(np.uint8), labels


def pairs_of(n, shape=(96, 128), **kwargs):
    images, labels = zip(*(blobs(shape, seed=i, **kwargs) for i in range(n)), strict=True)
    return find_pairs(list(images), list(labels)).pairs


def overlap(a, b):
    same = (a.pair, a.plane) == (b.pair, b.plane)
    return same and max(a.y[0], b.y[0]) < min(a.y[1], b.y[1]) and max(a.x[0], b.x[0]) < min(a.x[1], b.x[1])


@given(n=st.integers(1, 9), fraction=st.floats(0.05, 0.9), most=st.none() | st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_nothing_is_ever_in_both_parts(n, fraction, most, seed):
    split = split_pairs(pairs_of(n), validation_fraction=fraction, max_images=most, seed=seed)
    assert split.train and split.validation
    assert not any(overlap(a, b) for a in split.train for b in split.validation)
    if n > 1:
        assert {r.pair for r in split.train}.isdisjoint(r.pair for r in split.validation)
        assert len({r.pair for r in split.train}) <= (most or n)


def test_fewer_images_are_a_part_of_more_and_the_held_out_ones_stay():
    splits = [split_pairs(pairs_of(10), max_images=most, seed=3) for most in (1, 2, 5, None)]
    taken = [{region.pair for region in split.train} for split in splits]
    assert [len(t) for t in taken] == [1, 2, 5, 8]
    assert taken[0] < taken[1] < taken[2] < taken[3]
    assert len({split.validation for split in splits}) == 1


def test_a_single_image_is_cut_and_it_is_said():
    split = split_pairs(pairs_of(1))
    assert split.kind == "by region"
    assert "only one image" in split.note
    (train,), (held_out,) = split.train, split.validation
    assert train.x == (0, 96)
    assert held_out.x == (96, 128)


def test_slices_of_one_stack_stay_together_and_unlabelled_ones_are_left_out():
    image, labels = blobs((5, 64, 96))
    labels[[0, 3]] = 0
    split = split_pairs(find_pairs([image], [labels], axes="ZYX").pairs)
    assert {region.plane for region in split.train + split.validation} == {1, 2, 4}
    assert not any(overlap(a, b) for a in split.train for b in split.validation)
    assert max(r.x[1] for r in split.train) <= min(r.x[0] for r in split.validation)


def test_objects_on_one_side_of_the_only_image_are_refused():
    image, labels = blobs((64, 64))
    labels[:] = 0
    labels[28:36, 28:36] = 1
    labels[:, 16:48] = np.where(labels[:, 16:48] > 0, 1, 0)
    with pytest.raises(DataError, match="add a second image"):
        split_pairs(find_pairs([image], [labels]).pairs)


def training_patches(pairs, data, seed=0, samples=6, bank=None):
    split = split_pairs(pairs)
    scalings = measure_scalings(pairs, split.train, data)
    return TrainingPatches(pairs, split.train, data, samples_per_epoch=samples, seed=seed, scalings=scalings, bank=bank)


def test_a_patch_depends_on_its_number_and_the_seed_alone():
    pairs, data = pairs_of(4), DataConfig(patch_px=64)
    one, two, other = (
        training_patches(pairs, data),
        training_patches(pairs, data),
        training_patches(pairs, data, seed=1),
    )
    drawn = [one[i] for i in (9, 3, 0)]
    again = [two[i] for i in (0, 3, 9)]
    for a, b in zip(drawn, reversed(again), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    assert any(not torch.equal(one[i].image, other[i].image) for i in range(3))


def test_loader_processes_give_the_same_patches():
    patches = training_patches(pairs_of(3), DataConfig(patch_px=64))
    loader = DataLoader(patches, batch_sampler=[[0, 1], [2]], num_workers=1, collate_fn=list)
    loaded = [patch for batch in loader for patch in batch]
    assert [patch.number for patch in loaded] == [0, 1, 2]
    assert all(torch.equal(patch.image, patches[i].image) for i, patch in enumerate(loaded))


def test_every_epoch_takes_every_image_and_every_patch_holds_an_object():
    pairs = pairs_of(5, objects=1)
    patches = training_patches(pairs, DataConfig(patch_px=64, augment=PLAIN), samples=8)
    for index in range(16):
        patch = patches[index]
        assert patch.labels.max() >= 1
        assert torch.bincount(patch.labels.flatten())[1:].max() >= 25
        assert patch.image.min() >= 0 and patch.image.max() <= 255
        assert torch.equal(patch.targets[0] > 0, patch.labels > 0)


def test_an_image_smaller_than_the_patch_is_padded_at_the_end():
    pairs, data = pairs_of(2, shape=(40, 50)), DataConfig(patch_px=64, augment=PLAIN)
    patch = training_patches(pairs, data)[0]
    assert patch.image.shape == (3, 64, 64)
    assert torch.allclose(patch.image[:, 40:], torch.tensor([123.675, 116.28, 103.53])[:, None, None])
    assert patch.labels[40:].max() == 0


def test_specks_are_not_trained_on():
    image, labels = blobs((64, 64), objects=3)
    labels[1:3, 1:3] = 99
    targets = instance_targets(labels.astype(np.int64), 25)
    assert targets is not None
    assert not targets[:, 1:3, 1:3][:2].any()
    labels[labels != 99] = 0
    assert instance_targets(labels.astype(np.int64), 25) is None
    with pytest.raises(DataError, match="min_object_px"):
        training_patches(find_pairs([image, image], [labels, labels]).pairs, DataConfig(patch_px=64))[0]


@given(seed=st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_image_and_labels_are_turned_together(seed):
    labels = np.arange(35).reshape(5, 7)
    image = np.repeat(labels[..., None], 3, axis=2).astype(np.float32)
    turned, with_it = augment(image, labels, AugmentConfig(intensity=0), np.random.default_rng(seed))
    assert np.array_equal(turned[..., 0], with_it)
    assert sorted(with_it.ravel()) == list(range(35))


def test_validation_patches_cover_the_held_out_part_and_are_few():
    pairs = pairs_of(2, shape=(300, 300), objects=150)
    split = split_pairs(pairs)
    data = DataConfig(patch_px=64)
    patches = ValidationPatches(pairs, split.validation, data, scalings=measure_scalings(pairs, split.validation, data))
    assert len(patches) == 8
    assert all(patches[i].labels.any() for i in range(8))
    assert torch.equal(patches[3].image, patches[3].image)


@pytest.mark.parametrize("modality", ["fluo_u2os", "phase_t98g", "histology", "fluo_mixed", "stack3d"])
def test_real_images_become_patches(dev_data, modality):
    pairs = find_pairs(dev_data / modality / "images", dev_data / modality / "labels").pairs
    patches = training_patches(pairs, DataConfig(patch_px=256))
    for index in range(3):
        patch = patches[index]
        assert patch.image.shape == (3, 256, 256)
        assert patch.image.std() > 1
        assert patch.labels.max() >= 1


def test_a_bank_of_patches_comes_again_in_another_order_and_with_new_numbers():
    pairs, data = pairs_of(4), DataConfig(patch_px=64)
    fresh, bank = training_patches(pairs, data), training_patches(pairs, data, bank=6)
    first, again = [bank[i] for i in range(6)], [bank[i] for i in range(6, 12)]
    for i, patch in enumerate(first):
        assert torch.equal(patch.image, fresh[i].image) and torch.equal(patch.targets, fresh[i].targets)
    assert [patch.number for patch in again] == list(range(6, 12))
    order = [next(i for i, one in enumerate(first) if torch.equal(one.image, patch.image)) for patch in again]
    assert sorted(order) == list(range(6)) and order != list(range(6))
    for i, patch in zip(order, again, strict=True):
        assert torch.equal(first[i].labels, patch.labels) and torch.equal(first[i].targets, patch.targets)


def test_targets_of_patches_that_come_again_are_computed_once(monkeypatch):
    pairs, data = pairs_of(4), DataConfig(patch_px=64)
    bank = training_patches(pairs, data, bank=3)
    first = [bank[i] for i in range(3)]
    monkeypatch.setattr("napari_resfinetune.data.patches.instance_targets", None)
    for i in range(3, 9):
        patch = bank[i]
        assert any(torch.equal(patch.labels, one.labels) and torch.equal(patch.targets, one.targets) for one in first)
