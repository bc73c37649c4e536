"""Which part of the data is learned from and which is held out. Nothing is ever in both.

The split is by image: patches and slices of one image all go to the same side, since neighbouring patches look alike
and would make a model look better than it is. A single image is cut in two regions, and the split says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from napari_resfinetune.data.pairs import Pair
from napari_resfinetune.data.sources import read_plane, shape_yx
from napari_resfinetune.errors import DataError
from napari_resfinetune.words import counted

TRAIN_SHARE_OF_SINGLE_IMAGE = 0.75


@dataclass(frozen=True)
class Region:
    """A rectangle of one annotated plane.

    Attributes
    ----------
    pair
        Index into the list of pairs.
    plane
        Index of the annotated slice or frame; `None` for an image with one plane.
    y, x
        Start and stop in pixels.
    """

    pair: int
    plane: int | None
    y: tuple[int, int]
    x: tuple[int, int]


@dataclass(frozen=True)
class Split:
    """Regions to train on and regions held out."""

    kind: Literal["by image", "by region", "given"]
    train: tuple[Region, ...]
    validation: tuple[Region, ...]
    note: str

    def to_dict(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Return plain data with image names, for `split.json`."""

        def named(regions: tuple[Region, ...]) -> list[dict[str, Any]]:
            return [{"image": pairs[region.pair].name, **asdict(region)} for region in regions]

        return {
            "kind": self.kind,
            "note": self.note,
            "train": named(self.train),
            "validation": named(self.validation),
        }


def split_pairs(
    pairs: Sequence[Pair], *, validation_fraction: float = 0.2, max_images: int | None = None, seed: int = 0
) -> Split:
    """Split by image, or by region when there is one image only.

    Parameters
    ----------
    pairs
        All annotated images.
    validation_fraction
        Share of the images that is held out; at least one image.
    max_images
        Use only this many of the remaining images for training. Smaller numbers take a subset of what larger ones
        take, and the held-out images do not depend on it.
    seed
        Decides the order in which images are drawn.

    Raises
    ------
    DataError
        When no plane has an object, or a single image cannot be cut so that both parts hold objects.
    """
    usable = [index for index, pair in enumerate(pairs) if pair.planes]
    if not usable:
        raise DataError("labels: no image has a labelled object; label at least one object, better twenty")
    if len(usable) == 1:
        return _split_region(pairs, usable[0])
    order = np.random.default_rng([seed, 0]).permutation(usable).tolist()
    held_out = min(max(1, round(validation_fraction * len(order))), len(order) - 1)
    validation, train = order[:held_out], order[held_out:]
    too_few = ""
    if max_images is not None:
        if max_images > len(train):
            too_few = f" (max_images is {max_images}, but only {len(train)} are left for training)"
        train = train[:max_images]
    note = f"{counted(len(train), 'image')} to train on, {held_out} held out{too_few}"
    return Split("by image", whole_regions(pairs, train), whole_regions(pairs, validation), note)


def whole_regions(pairs: Sequence[Pair], indices: Sequence[int]) -> tuple[Region, ...]:
    """Return one region per annotated plane of the chosen pairs."""
    regions = []
    for index in indices:
        height, width = shape_yx(pairs[index].image)
        regions += [Region(index, plane, (0, height), (0, width)) for plane in pairs[index].planes]
    return tuple(regions)


def _split_region(pairs: Sequence[Pair], index: int) -> Split:
    pair = pairs[index]
    height, width = shape_yx(pair.image)
    along_x = width >= height
    cut = round((width if along_x else height) * TRAIN_SHARE_OF_SINGLE_IMAGE)
    candidates = []
    for first_is_train in (True, False):
        at = cut if first_is_train else (width if along_x else height) - cut
        low = [
            Region(index, p, (0, height), (0, at)) if along_x else Region(index, p, (0, at), (0, width))
            for p in pair.planes
        ]
        high = [
            Region(index, p, (0, height), (at, width)) if along_x else Region(index, p, (at, height), (0, width))
            for p in pair.planes
        ]
        candidates.append((low, high) if first_is_train else (high, low))
    for train, validation in candidates:
        train = [region for region in train if _has_objects(pair, region)]
        validation = [region for region in validation if _has_objects(pair, region)]
        if train and validation:
            share = round(TRAIN_SHARE_OF_SINGLE_IMAGE * 100)
            note = (
                f"only one image ({pair.name}): {share} % of it is trained on and the rest held out; "
                "scores on the same image flatter the model, so add a second image when you can"
            )
            return Split("by region", tuple(train), tuple(validation), note)
    raise DataError(
        f"{pair.name}: the only image has objects on one side only, so no part can be held out; "
        "label objects all over the image, or add a second image"
    )


def _has_objects(pair: Pair, region: Region) -> bool:
    return bool(read_plane(pair.labels, region.plane, (slice(*region.y), slice(*region.x))).any())
