"""Labelled pictures of cells that never were: for the start model, the demo, sample data and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.data.synthetic.histology import histology
from napari_resfinetune.data.synthetic.looks import Drawn, crowded_cytoplasm, fluorescence_nuclei
from napari_resfinetune.data.synthetic.transmitted import brightfield, phase_contrast
from napari_resfinetune.errors import DataError

__all__ = ["MODALITIES", "MIN_SIDE_PX", "Sample", "make_sample", "make_samples"]

MODALITIES = ("fluorescence_nuclei", "crowded_cytoplasm", "phase_contrast", "brightfield", "histology")
MIN_SIDE_PX = 64

_LOOKS: dict[str, Callable[[np.random.Generator, tuple[int, int], int], Drawn]] = {
    "fluorescence_nuclei": fluorescence_nuclei,
    "crowded_cytoplasm": crowded_cytoplasm,
    "phase_contrast": phase_contrast,
    "brightfield": brightfield,
    "histology": histology,
}
# A scene may come out empty by bad luck; so many are tried before that is given up.
_TRIES = 20


@dataclass(frozen=True)
class Sample:
    """One synthetic image with its labels.

    Attributes
    ----------
    image
        "YX" or, for histology and part of brightfield, "YXC" (RGB); uint8 or uint16.
    labels
        "YX" int32: 0 is background, objects are 1..n, each one connected piece.
    modality
        One of `MODALITIES`.
    """

    image: NDArray[Any]
    labels: NDArray[np.int32]
    modality: str


def make_sample(
    modality: str, *, seed: int, shape: tuple[int, int] = (512, 512), field_px: int | None = None
) -> Sample:
    """Draw one labelled image; the same arguments always give the same image.

    Parameters
    ----------
    modality
        One of `MODALITIES`.
    seed
        Non-negative; everything else about the picture is drawn from it.
    shape
        Height and width in pixels, each at least `MIN_SIDE_PX`.
    field_px
        Longest side, in pixels, of the field of view that the picture shows a part of; sets the scale. Objects are
        about 15 to 200 px wide in a field of 1024 px. The longest side of `shape` by default, so the whole field.

    Raises
    ------
    DataError
        When an argument cannot be used.
    """
    _check(modality, seed, shape, field_px)
    field = max(shape) if field_px is None else field_px
    for attempt in range(_TRIES):
        rng = np.random.default_rng([seed, MODALITIES.index(modality), attempt])
        image, labels = _LOOKS[modality](rng, shape, field)
        if labels.any():
            break
    return Sample(image=image, labels=labels, modality=modality)


def make_samples(
    modality: str, n: int, seed: int, shape: tuple[int, int] = (512, 512), *, field_px: int | None = None
) -> Iterator[Sample]:
    """Draw `n` different samples; the first ones stay the same when `n` grows."""
    children = np.random.SeedSequence(seed).generate_state(n, dtype=np.uint32) if n > 0 else ()
    return (make_sample(modality, seed=int(child), shape=shape, field_px=field_px) for child in children)


def _check(modality: str, seed: int, shape: tuple[int, int], field_px: int | None) -> None:
    """Refuse what cannot be drawn, all of it at once."""
    problems = []
    if modality not in _LOOKS:
        problems.append(f"modality: found {modality!r}; expected one of {', '.join(MODALITIES)}")
    if seed < 0:
        problems.append(f"seed: found {seed}; expected 0 or more")
    if len(shape) != 2 or min(shape) < MIN_SIDE_PX:
        problems.append(f"shape: found {tuple(shape)}; expected height and width of at least {MIN_SIDE_PX} px each")
    elif field_px is not None and field_px < MIN_SIDE_PX:
        problems.append(f"field_px: found {field_px}; expected at least {MIN_SIDE_PX} px, usually the longest side")
    if problems:
        raise DataError(*problems)
