"""Which labels layer goes with which image layer, and sample images."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from napari.layers import Image, Labels

from napari_resfinetune.widgets.draft import PairItem


def best_labels(image: Any, layers: Iterable[Any]) -> Any | None:
    """Return the labels layer of an image's size whose name is most like it; `None` when there is none."""
    fitting = [layer for layer in layers if isinstance(layer, Labels) and _plane(layer) == _plane(image)]
    return max(fitting, key=lambda layer: _likeness(image, layer), default=None)


def pairs_of_layers(layers: Iterable[Any]) -> tuple[list[PairItem], list[str]]:
    """Pair image layers with labels layers of their size, those first whose names are most alike.

    Returns
    -------
    pairs
        In the order of the images.
    left_out
        Names of the images for which no labels were left.
    """
    layers = list(layers)
    images = [layer for layer in layers if isinstance(layer, Image)]
    fitting = [
        (image, labels)
        for image in images
        for labels in layers
        if isinstance(labels, Labels) and _plane(labels) == _plane(image)
    ]
    labels_of: dict[int, Any] = {}
    for image, labels in sorted(fitting, key=lambda pair: -_likeness(*pair)):
        if id(image) not in labels_of and all(labels is not taken for taken in labels_of.values()):
            labels_of[id(image)] = labels
    pairs = [PairItem(image, labels_of[id(image)]) for image in images if id(image) in labels_of]
    return pairs, [image.name for image in images if id(image) not in labels_of]


def _likeness(image: Any, labels: Any) -> float:
    return difflib.SequenceMatcher(None, image.name, labels.name).ratio()


def add_sample_cells(viewer: Any, files: Iterable[dict[str, str]]) -> list[PairItem]:
    """Add images of cells and their labels, which the engine made, as layers, and return them as pairs."""
    pairs = []
    for number, sample in enumerate(files, 1):
        image, labels = (np.load(sample[part]) for part in ("image", "labels"))
        for part in ("image", "labels"):
            Path(sample[part]).unlink(missing_ok=True)
        first = number == 1
        layer = viewer.add_image(image, name=f"cells {number}", visible=first)
        pairs.append(PairItem(layer, viewer.add_labels(labels, name=f"labels {number}", visible=first)))
    return pairs


def _plane(layer: Any) -> tuple[int, ...]:
    data = layer.data[0] if getattr(layer, "multiscale", False) else layer.data
    shape = data.shape[:-1] if getattr(layer, "rgb", False) else data.shape
    return tuple(shape[-2:])
