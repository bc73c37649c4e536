"""Image intensities to the range that SAM expects, the same way in training and inference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.data.pairs import to_channels
from napari_resfinetune.data.sources import ArraySource
from napari_resfinetune.errors import DataError


@dataclass(frozen=True)
class Scaling:
    """Intensities that become 0 and 255, one pair for each of the three channels that the model sees."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain data that `from_dict` gives back equal."""
        return {"low": list(self.low), "high": list(self.high)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scaling:
        """Read what `to_dict` wrote.

        Raises
        ------
        DataError
            When `low` or `high` is missing or is not a list of numbers of the same length.
        """
        try:
            low, high = (tuple(float(value) for value in values[name]) for name in ("low", "high"))
        except (KeyError, TypeError, ValueError):
            low, high = (), ()
        if not low or len(low) != len(high):
            raise DataError(f"scaling: found {dict(values)}; expected 'low' and 'high' with one number per channel")
        return cls(low, high)


def measure_scaling(
    source: ArraySource,
    channels: tuple[int, ...] | None = None,
    percentiles: tuple[float, float] = (0.1, 99.9),
    max_values: int = 2_000_000,
) -> Scaling:
    """Measure the intensity percentiles of an image, over all its planes.

    A regular subsample is read, so that the result is the same every time. An RGB image keeps its colours: its three
    channels share one scaling. Channels that were chosen, and two-channel images, are scaled each by itself.

    Parameters
    ----------
    channels
        The channels that are shown to the model; see `napari_resfinetune.data.pairs.to_channels`.
    percentiles
        Those that become 0 and 255.
    max_values
        About how many pixels are read at most.

    Raises
    ------
    DataError
        When the image cannot be read, or has several channels and none are chosen.
    """
    sizes = dict(zip(source.axes, source.shape, strict=True))
    planes = source.plane_count
    plane_step = math.ceil(planes * 10_000 / max_values) if planes > 1 else 1
    pixels = sizes["Y"] * sizes["X"] * math.ceil(planes / plane_step)
    pixel_step = max(1, math.ceil(math.sqrt(pixels / max_values)))
    by_axis = {axis: slice(None, None, plane_step) for axis in "ZT"}
    by_axis |= {"Y": slice(None, None, pixel_step), "X": slice(None, None, pixel_step), "C": slice(None)}
    values = source.read(tuple(by_axis[axis] for axis in source.axes))
    if "C" in source.axes:
        values = np.moveaxis(values, source.axes.index("C"), -1)
        values = values.reshape(-1, 1, values.shape[-1])
    else:
        values = values.reshape(-1, 1)
    output = to_channels(values, channels).reshape(-1, 3)
    columns = [output.ravel()] if channels is None and sizes.get("C", 3) != 2 else list(output.T)
    if sizes.get("C", 1) == 1 and channels is None:
        columns = [output[:, 0]]
    limits = [_limits(column, percentiles) for column in columns]
    limits = limits * (3 // len(limits))
    return Scaling(tuple(low for low, _ in limits), tuple(high for _, high in limits))


def apply_scaling(array: NDArray[Any], scaling: Scaling) -> NDArray[np.float32]:
    """Scale and clip intensities.

    Parameters
    ----------
    array
        "YXC" with as many channels as `scaling` has.

    Returns
    -------
    array
        float32 "YXC", 0 to 255. NaN, and images of one intensity, become 0; infinity becomes 0 or 255.
    """
    low = np.array(scaling.low, np.float64)
    extent = np.array(scaling.high, np.float64) - low
    factor = np.divide(255, extent, out=np.zeros_like(extent), where=extent > 0)
    with np.errstate(invalid="ignore"):
        scaled = (array.astype(np.float32) - low.astype(np.float32)) * factor.astype(np.float32)
    scaled = np.clip(np.nan_to_num(scaled, copy=False, nan=0, posinf=255, neginf=0), 0, 255)
    return np.asarray(scaled, np.float32)


def _limits(values: NDArray[np.float32], percentiles: tuple[float, float]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 0.0
    low, high = np.percentile(finite, percentiles)
    if low == high:
        # A few bright objects on an even background lie beyond the percentiles.
        low, high = finite.min(), finite.max()
    return float(low), float(high)
