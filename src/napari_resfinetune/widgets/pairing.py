"""Which labels layer goes with which image layer, and sample images."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from napari.layers import Image, Labels

from napari_resfinetune.widgets.draft import PairItem

SAMPLE_PX = 256
SAMPLES = 3


def best_labels(image: Any, layers: Iterable[Any]) -> Any | None:
    """Return the labels layer of an image's size whose name is most like it; `None` when there is none."""
    fitting = [layer for layer in layers if isinstance(layer, Labels) and _plane(layer) == _plane(image)]
    likeness = {id(layer): difflib.SequenceMatcher(None, image.name, layer.name).ratio() for layer in fitting}
    return max(fitting, key=lambda layer: likeness[id(layer)], default=None)


def pairs_of_layers(layers: Iterable[Any]) -> list[PairItem]:
    """Pair every image layer with labels of its own; labels that fit several images go to the most alike."""
    free = [layer for layer in layers if isinstance(layer, Labels)]
    pairs = []
    for image in (layer for layer in layers if isinstance(layer, Image)):
        labels = best_labels(image, free)
        if labels is not None:
            free.remove(labels)
            pairs.append(PairItem(image, labels))
    return pairs


def open_sample_cells(viewer: Any) -> list[PairItem]:
    """Add made-up images of cells and their labels as layers, and return them as pairs."""
    from napari_resfinetune.data.synthetic import make_samples

    pairs = []
    samples = make_samples("fluorescence_nuclei", SAMPLES, 11, (SAMPLE_PX, SAMPLE_PX), field_px=2 * SAMPLE_PX)
    for number, sample in enumerate(samples, 1):
        image = viewer.add_image(sample.image, name=f"cells {number}", visible=number == 1)
        pairs.append(PairItem(image, viewer.add_labels(sample.labels, name=f"labels {number}", visible=number == 1)))
    return pairs


def _plane(layer: Any) -> tuple[int, ...]:
    data = layer.data[0] if getattr(layer, "multiscale", False) else layer.data
    shape = data.shape[:-1] if getattr(layer, "rgb", False) else data.shape
    return tuple(shape[-2:])
