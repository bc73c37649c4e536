"""Synthetic microscopy: deterministic, exactly labelled, varied."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from napari_resfinetune.data.synthetic import MODALITIES, Sample, make_sample, make_samples
from napari_resfinetune.errors import DataError

SHAPE = (192, 192)


def contrast(sample: Sample) -> float:
    """Objects against background in mean intensity, in standard deviations of the image."""
    grey = sample.image.astype(float)
    grey = grey.mean(axis=2) if grey.ndim == 3 else grey
    inside = sample.labels > 0
    if inside.all() or not inside.any():
        return 0.0
    return float((grey[inside].mean() - grey[~inside].mean()) / (grey.std() + 1e-9))


@pytest.mark.parametrize("modality", MODALITIES)
def test_same_seed_same_sample(modality: str) -> None:
    np.random.seed(0)  # noqa: NPY002 - global state must not matter
    first = make_sample(modality, seed=11, shape=SHAPE)
    np.random.seed(1)  # noqa: NPY002
    second = make_sample(modality, seed=11, shape=SHAPE)
    assert first.modality == modality
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)


@pytest.mark.parametrize("modality", MODALITIES)
def test_global_random_state_is_left_alone(modality: str) -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    make_sample(modality, seed=0, shape=SHAPE)
    assert np.random.random() == expected  # noqa: NPY002


@pytest.mark.parametrize("modality", MODALITIES)
def test_other_seeds_other_samples(modality: str) -> None:
    samples = [make_sample(modality, seed=seed, shape=SHAPE) for seed in range(8)]
    assert len({sample.image.tobytes() for sample in samples}) == 8
    counts = {int(sample.labels.max()) for sample in samples}
    assert len(counts) >= 4
    sizes = [np.median(np.bincount(sample.labels.ravel())[1:]) for sample in samples]
    assert max(sizes) > 3 * min(sizes)
    cover = [(sample.labels > 0).mean() for sample in samples]
    assert max(cover) > 1.2 * min(cover)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("shape", [(256, 256), (96, 201), (300, 130)])
def test_labels_are_exact(modality: str, shape: tuple[int, int]) -> None:
    for seed in range(4):
        labels = make_sample(modality, seed=seed, shape=shape).labels
        assert labels.dtype == np.int32
        assert labels.shape == shape
        n = int(labels.max())
        assert n >= 1
        sizes = np.bincount(labels.ravel(), minlength=n + 1)[1:]
        assert sizes.min() >= 25
        for index, here in enumerate(ndimage.find_objects(labels)):
            assert ndimage.label(labels[here] == index + 1)[1] == 1


@pytest.mark.parametrize("modality", MODALITIES)
def test_images_are_in_a_natural_format(modality: str) -> None:
    kinds = set()
    for seed in range(14):
        image = make_sample(modality, seed=seed, shape=(128, 160), field_px=400).image
        assert image.shape[:2] == (128, 160)
        assert image.min() < image.max()
        assert image.ndim == 2 or (image.shape[2] == 3 and image.dtype == np.uint8)
        kinds.add((image.dtype.name, image.ndim))
    expected = {"uint8"} if modality == "histology" else {"uint8", "uint16"}
    assert {dtype for dtype, _ in kinds} == expected
    if modality == "histology":
        assert kinds == {("uint8", 3)}
    elif modality != "brightfield":
        assert {ndim for _, ndim in kinds} == {2}


def test_twelve_and_sixteen_bits_both_occur() -> None:
    images = [make_sample("fluorescence_nuclei", seed=seed, shape=(96, 96), field_px=384).image for seed in range(30)]
    deep = [int(image.max()) for image in images if image.dtype == np.uint16]
    assert any(top < 4096 for top in deep)
    assert any(top >= 4096 for top in deep)


@pytest.mark.parametrize(
    ("modality", "sign"), [("fluorescence_nuclei", 1), ("crowded_cytoplasm", 1), ("histology", -1)]
)
def test_objects_stand_out(modality: str, sign: int) -> None:
    contrasts = [sign * contrast(make_sample(modality, seed=seed, shape=SHAPE, field_px=400)) for seed in range(16)]
    # A few inverted or membrane-only pictures may differ.
    assert np.mean(np.asarray(contrasts) > 0.25) >= 0.7
    assert np.median(contrasts) > 0.5


def test_phase_contrast_has_halos() -> None:
    """Just outside the cells it is brighter than far away, in most pictures."""
    brighter = []
    for seed in range(16):
        sample = make_sample("phase_contrast", seed=seed, shape=(256, 256), field_px=512)
        outside = ndimage.distance_transform_edt(sample.labels == 0)
        near, far = (outside > 1) & (outside < 4), outside > 12
        if far.sum() > 500:
            brighter.append(np.median(sample.image[near]) > np.median(sample.image[far]))
    assert np.mean(brighter) > 0.6


def test_a_window_of_a_large_field_has_its_scale() -> None:
    def median_area(field_px: int) -> float:
        areas = []
        for seed in range(10):
            labels = make_sample("fluorescence_nuclei", seed=seed, shape=(256, 256), field_px=field_px).labels
            areas.append(np.median(np.bincount(labels.ravel())[1:]))
        return float(np.mean(areas))

    assert median_area(1024) > 4 * median_area(256)


def test_many_samples_are_different_and_stable() -> None:
    few = list(make_samples("brightfield", 2, 5, (96, 96)))
    more = list(make_samples("brightfield", 3, 5, (96, 96)))
    assert len(few) == 2
    for one, other in zip(few, more, strict=False):
        np.testing.assert_array_equal(one.image, other.image)
    assert more[1].image.tobytes() != more[2].image.tobytes()
    assert list(make_samples("brightfield", 0, 5)) == []


def test_bad_arguments_are_named_together() -> None:
    with pytest.raises(DataError) as caught:
        make_sample("xray", seed=-1, shape=(10, 512))
    assert len(caught.value.problems) == 3
    with pytest.raises(DataError, match="field_px"):
        make_sample("histology", seed=1, field_px=3)
