"""The patches that models are compared on: those that a training with the same settings would draw.

So what the image encoder makes of them is found again in the feature cache when one of the models is trained.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries
from torch.nn.functional import adaptive_avg_pool2d

from napari_resfinetune.config import DataConfig, FinetuneConfig
from napari_resfinetune.data.doctor import check_pairs
from napari_resfinetune.data.pairs import check_channels, find_images, find_pairs, to_channels
from napari_resfinetune.data.patches import PADDING_RGB, Patch, TrainingPatches, ValidationPatches, measure_scalings
from napari_resfinetune.data.scaling import apply_scaling, measure_scaling
from napari_resfinetune.data.sources import ArraySource, read_plane, shape_yx
from napari_resfinetune.data.split import Region, whole_regions
from napari_resfinetune.errors import ConfigError, DataError
from napari_resfinetune.training.prepare import open_data


@dataclass(frozen=True)
class SearchPatch:
    """A patch that every model is judged on.

    Attributes
    ----------
    patch
        As training sees it; `labels` and `targets` are empty without labels.
    image
        Which image it is from.
    group
        What the probe leaves out together: the image, or the part of it where a single one is split.
    held_out
        Whether a training with these settings would not learn from it.
    key
        Hash of its pixels and labels.
    """

    patch: Patch
    image: str
    group: str
    held_out: bool
    key: str

    @property
    def labels(self) -> NDArray[np.int64]:
        """Object ids "YX"."""
        return np.asarray(self.patch.labels.numpy().astype(np.int64))


@dataclass(frozen=True)
class SearchData:
    """What a search looks at.

    Attributes
    ----------
    patches
        In the order in which they are looked at: images by turns.
    labelled
        Whether there are labels.
    can_train
        Whether the images can be split, so that a training could start.
    notes
        What should be known about them, in words.
    """

    patches: tuple[SearchPatch, ...]
    labelled: bool
    can_train: bool
    notes: tuple[str, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Images, in the order in which they come."""
        return tuple(dict.fromkeys(patch.image for patch in self.patches))

    @property
    def groups(self) -> tuple[str, ...]:
        """What the probe leaves out one by one."""
        return tuple(dict.fromkeys(patch.group for patch in self.patches))


def search_patches(config: FinetuneConfig, images: Any, labels: Any, count: int) -> SearchData:
    """Choose patches: by turns held-out ones and those that training would draw first.

    Parameters
    ----------
    config
        Of the training to come.
    images, labels
        As for `open_data`; without labels in either place, patches are cut evenly from the images.
    count
        At most so many.

    Raises
    ------
    ConfigError
        Without images.
    DataError
        When images or labels cannot be used.
    """
    images = images if images is not None else config.data.images
    labels = labels if labels is not None else config.data.labels
    if images is None:
        raise ConfigError("images: not given; name a folder, a glob or files, as in --images cells/ --labels masks/")
    if labels is None:
        return _without_labels(config.data, images, count, "there are no labels")
    try:
        return _as_training(config, images, labels, count)
    except DataError as error:
        if config.data.validation_images is not None:
            raise
        return _as_far_as_possible(config.data, images, labels, count, error)


def token_targets(patch: Patch, grid: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Return what a probe shall read from each token of an embedding.

    Parameters
    ----------
    patch
        With labels and targets.
    grid
        Side of the embedding, in tokens.

    Returns
    -------
    targets
        float32, (tokens, 3): share of foreground, share of boundary, and mean distance to the boundary.
    classes
        int, (tokens,): 0 background, 1 inside of objects, 2 boundary.
    inside
        bool, (tokens,): whether the token shows the image, not its padding.
    """
    labels = patch.labels.numpy()
    boundary = find_boundaries(labels, mode="thick")
    maps = torch.stack([patch.targets[0], torch.from_numpy(boundary).float(), patch.targets[2]])
    padding = torch.tensor(PADDING_RGB, dtype=patch.image.dtype)[:, None, None]
    shown = (patch.image != padding).any(0)[None].float()
    pooled = adaptive_avg_pool2d(torch.cat([maps, shown]), (grid, grid)).flatten(1).numpy()
    targets = np.ascontiguousarray(pooled[:3].T)
    classes = np.where(targets[:, 1] > 0.25, 2, np.where(targets[:, 0] > 0.5, 1, 0)).astype(np.int64)
    return targets, classes, pooled[3] > 0.5


def _as_training(config: FinetuneConfig, images: Any, labels: Any, count: int) -> SearchData:
    """Return patches that are split as training would split them."""
    data, training = config.data, config.training
    opened = open_data(config, images, labels)
    scalings = measure_scalings(opened.pairs, opened.split.train + opened.split.validation, data)
    by_region = opened.split.kind == "by region"
    validation = ValidationPatches(opened.pairs, opened.split.validation, data, scalings=scalings)
    spread = _spread(len(validation), max(1, count // 2))
    held_out = _images_by_turns([_held_out(validation, index, by_region) for index in spread])
    bank = training.patch_bank or training.samples_per_epoch
    drawn = TrainingPatches(
        opened.pairs,
        opened.split.train,
        data,
        samples_per_epoch=training.samples_per_epoch,
        seed=training.seed,
        scalings=scalings,
        bank=bank,
    )
    learned = []
    for index in range(min(bank, count - len(held_out))):
        patch, region = drawn.draw_from(index)
        image = _image(opened.pairs[region.pair].name, region)
        learned.append(_search_patch(patch, image, " (learned)" if by_region else "", held_out=False))
    notes = (opened.split.note, *map(str, opened.report.warnings))
    return SearchData(tuple(_by_turns([learned, held_out])), True, True, notes)


def _as_far_as_possible(data: DataConfig, images: Any, labels: Any, count: int, error: DataError) -> SearchData:
    """Return patches of labels that training refuses: too few objects to hold any out, or none at all."""
    where: dict[str, Any] = data.model_dump(include={"image_key", "label_key", "axes", "channels"})
    found = find_pairs(images, labels, **where)
    report = check_pairs(found, patch_px=data.patch_px, min_object_px=data.min_object_px)
    only_empty = [problem.code for problem in report.errors] == ["no-objects"]
    if only_empty and not any(problem.code == "small-objects" for problem in report.warnings):
        return _without_labels(data, images, count, "the labels hold no object")
    report.raise_for_errors()
    regions = whole_regions(found.pairs, [i for i, pair in enumerate(found.pairs) if pair.planes])
    fixed = ValidationPatches(found.pairs, regions, data, scalings=measure_scalings(found.pairs, regions, data))
    chosen = tuple(_held_out(fixed, index, False) for index in _spread(len(fixed), count))
    return SearchData(
        chosen, True, False, (f"{error} (training would refuse these labels)", *map(str, report.warnings))
    )


def _held_out(patches: ValidationPatches, index: int, by_region: bool) -> SearchPatch:
    region = patches.windows[index].region
    image = _image(patches.pairs[region.pair].name, region)
    return _search_patch(patches[index], image, " (held out)" if by_region else "", held_out=True)


def _image(name: str, region: Region) -> str:
    return f"{region.pair} {name}"


def _search_patch(patch: Patch, image: str, part: str = "", *, held_out: bool) -> SearchPatch:
    digest = hashlib.blake2b(patch.image.contiguous().numpy().tobytes(), digest_size=16)
    digest.update(patch.labels.contiguous().numpy().tobytes())
    return SearchPatch(patch, image, image + part, held_out, digest.hexdigest())


def _images_by_turns(patches: Sequence[SearchPatch]) -> list[SearchPatch]:
    images = dict.fromkeys(patch.image for patch in patches)
    return list(_by_turns([[patch for patch in patches if patch.image == image] for image in images]))


def _by_turns(rows: Sequence[Sequence[SearchPatch]]) -> Iterator[SearchPatch]:
    for turn in itertools.zip_longest(*rows):
        yield from (patch for patch in turn if patch is not None)


def _spread(there: int, wanted: int) -> list[int]:
    """Return the numbers of at most so many of some things, evenly spread."""
    return sorted(set(np.linspace(0, there - 1, min(there, wanted)).round().astype(int).tolist()))


def _without_labels(data: DataConfig, images: Any, count: int, why: str) -> SearchData:
    sources = find_images(images, image_key=data.image_key, axes=data.axes)
    check_channels(sources, data.channels)
    windows = [list(_windows(source, data.patch_px)) for source in sources]
    share = max(1, count // len(sources))
    chosen = [[places[i] for i in _spread(len(places), share)] for places in windows]
    turns = [
        (source, places[turn])
        for turn in range(share)
        for source, places in zip(sources, chosen, strict=True)
        if turn < len(places)
    ]
    scalings: dict[str, Any] = {}
    patches: list[SearchPatch] = []
    for source, (plane, y, x) in turns[:count]:
        if source.name not in scalings:
            scalings[source.name] = measure_scaling(source, data.channels, data.percentiles)
        pixels = to_channels(read_plane(source, plane, (slice(*y), slice(*x))), data.channels)
        image = np.empty((data.patch_px, data.patch_px, 3), np.float32)
        image[:] = PADDING_RGB
        image[: y[1] - y[0], : x[1] - x[0]] = apply_scaling(pixels, scalings[source.name])
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        empty = torch.zeros(0, 0, dtype=torch.int32)
        patches.append(_search_patch(Patch(tensor, empty, torch.zeros(0), len(patches)), source.name, held_out=False))
    note = f"{why}: models are ranked by how little their results change when the image does, which is a weaker sign"
    return SearchData(tuple(patches), False, False, (note,))


def _windows(source: ArraySource, size: int) -> Iterator[tuple[int | None, tuple[int, int], tuple[int, int]]]:
    """Go through windows that cover a source: plane, rows and columns."""
    planes = range(source.plane_count) if source.plane_count > 1 else [None]
    spans = []
    for length in shape_yx(source):
        pieces = -(-length // size)
        firsts = [round((length - size) * i / (pieces - 1)) for i in range(pieces)] if pieces > 1 else [0]
        spans.append([(first, min(first + size, length)) for first in firsts])
    for plane in planes:
        for y in spans[0]:
            for x in spans[1]:
                yield plane, y, x
