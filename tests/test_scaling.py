"""Scaling: percentiles to 0 and 255, the same every time, whatever the image holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_resfinetune.data.pairs import to_channels
from napari_resfinetune.data.scaling import Scaling, apply_scaling, measure_scaling
from napari_resfinetune.data.sources import open_array
from napari_resfinetune.errors import DataError

DEV = Path(__file__).parents[1].parent / "shared" / "data" / "dev"
needs_dev = pytest.mark.skipif(not DEV.is_dir(), reason=f"real images of shared are not at {DEV}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    )
)
def test_any_image_ends_in_0_to_255(array: np.ndarray) -> None:
    scaled = apply_scaling(to_channels(array), measure_scaling(open_array(array)))
    assert scaled.dtype == np.float32
    assert scaled.shape == (*array.shape, 3)
    assert np.isfinite(scaled).all()
    assert scaled.min() >= 0
    assert scaled.max() <= 255


def test_percentiles_become_the_ends() -> None:
    ramp = np.arange(10_000, dtype=np.uint16).reshape(100, 100) + 1000
    scaling = measure_scaling(open_array(ramp), percentiles=(10, 90))
    assert scaling.low == pytest.approx((1999.9,) * 3)
    scaled = apply_scaling(to_channels(ramp), scaling)[..., 0]
    assert (scaled.min(), scaled.max()) == (0, 255)
    assert scaled[50, 0] == pytest.approx(127.5, abs=0.1)
    assert (scaled == 0).mean() == pytest.approx(0.1, abs=0.01)


def test_not_finite_values_and_constant_images() -> None:
    image = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    image[0, :3] = np.nan, np.inf, -np.inf
    scaling = measure_scaling(open_array(image), percentiles=(0, 100))
    assert 0 < scaling.low[0] < 0.01
    assert scaling.high[0] == 1
    assert apply_scaling(to_channels(image), scaling)[0, :3, 0].tolist() == [0, 255, 0]
    for value in (0, 7, np.nan):
        flat = np.full((5, 5), value, np.float32)
        assert not apply_scaling(to_channels(flat), measure_scaling(open_array(flat))).any()


def test_one_bright_spot_is_kept() -> None:
    image = np.zeros((200, 200), np.uint8)
    image[5, 5] = 50
    assert apply_scaling(to_channels(image), measure_scaling(open_array(image))).max() == 255


def test_colours_stay_and_chosen_channels_do_not_share() -> None:
    image = np.zeros((20, 20, 3), np.uint16)
    image[..., 0] = np.arange(20) * 100
    image[..., 1] = np.arange(20) * 10
    rgb = measure_scaling(open_array(image))
    assert len(set(rgb.low)) == len(set(rgb.high)) == 1
    chosen = measure_scaling(open_array(image), (0, 1, 2), (0, 100))
    assert chosen.high == (1900, 190, 0)
    two = measure_scaling(open_array(image[..., :2], axes="YXC"), None, (0, 100))
    assert two.high == (1900, 190, 1045)
    assert measure_scaling(open_array(image), (1,), (0, 100)).high == (190, 190, 190)
    with pytest.raises(DataError, match="4 channels"):
        measure_scaling(open_array(np.zeros((9, 9, 4)), axes="YXC"))


def test_subsample_is_regular_and_covers_all_planes(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 1000, (12, 64, 64)).astype(np.uint16) + 100
    stack[11] += 5000
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack")
    source = open_array(tmp_path / "a.tif")
    few, whole = measure_scaling(source, max_values=4000), measure_scaling(source)
    assert few == measure_scaling(source, max_values=4000)
    assert whole.high[0] > 5000
    np.testing.assert_allclose(few.low, whole.low, atol=20)


def test_plain_data_and_back() -> None:
    scaling = Scaling((1.5, 2, 3), (10, 20, 30.25))
    assert Scaling.from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling
    for values in ({}, {"low": [1]}, {"low": [1], "high": [1, 2]}, {"low": "x", "high": None}):
        with pytest.raises(DataError, match="scaling"):
            Scaling.from_dict(values)


@needs_dev
@pytest.mark.parametrize("folder", ["fluo_u2os", "phase_t98g", "histology", "stack3d", "timelapse"])
def test_real_images_use_the_range(folder: str) -> None:
    source = open_array(sorted((DEV / folder / "images").iterdir())[0])
    array = source.read()
    scaled = apply_scaling(
        to_channels(array if array.ndim == 2 or source.axes == "YXC" else array[5]), measure_scaling(source)
    )
    assert 0 < scaled.mean() < 255
    assert scaled.std() > 5
