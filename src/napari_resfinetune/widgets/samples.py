"""Sample data for File > Open Sample: made-up images with labels, of two kinds."""

from __future__ import annotations

from typing import Any

SHAPE = (384, 384)
FIELD_PX = 768
COUNT = 3


def fluorescence_nuclei() -> list[tuple[Any, ...]]:
    """Return three images of nuclei in fluorescence, with labels."""
    return _samples("fluorescence_nuclei", "nuclei")


def stained_tissue() -> list[tuple[Any, ...]]:
    """Return three images of a stained tissue section (RGB), with labels."""
    return _samples("histology", "tissue")


def _samples(modality: str, name: str) -> list[tuple[Any, ...]]:
    from napari_resfinetune.data.synthetic import make_samples

    layers: list[tuple[Any, ...]] = []
    for number, sample in enumerate(make_samples(modality, COUNT, 11, SHAPE, field_px=FIELD_PX), 1):
        visible = number == 1
        layers.append((sample.image, {"name": f"{name} {number}", "visible": visible}, "image"))
        layers.append((sample.labels, {"name": f"{name} labels {number}", "visible": visible}, "labels"))
    return layers
