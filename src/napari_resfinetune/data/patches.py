"""Patches for training and validation, each drawn from its number alone.

A patch depends on the seed and its index, on nothing else: not on workers, order, or what was drawn before. So a run
that was interrupted sees exactly the patches that it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import imagecodecs
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from napari_resfinetune.config import AugmentConfig, DataConfig
from napari_resfinetune.data.pairs import Pair, to_channels
from napari_resfinetune.data.scaling import Scaling, apply_scaling, measure_scaling
from napari_resfinetune.data.sources import read_plane
from napari_resfinetune.data.split import Region
from napari_resfinetune.errors import DataError

BLOCK_PX = 2048
TRIES = 30
# Compressed, those of a patch of 512 px take a few 100 kB.
TARGETS_TO_KEEP = 500
# What SAM pads with: its mean colour, which is zero once normalised.
PADDING_RGB = (123.675, 116.28, 103.53)
VALIDATION_PATCHES_PER_REGION, VALIDATION_PATCHES = 8, 64


class Patch(NamedTuple):
    """One training sample.

    Attributes
    ----------
    image
        float32, "CYX" with 3 channels, 0 to 255.
    labels
        int32, "YX", consecutive object ids, 0 is background.
    targets
        float32, "CYX": foreground, distance to the object's centre, distance to its boundary, each 0 to 1
        (Archit et al. 2025, doi 10.1038/s41592-024-02580-4).
    number
        Number of the sample, which also seeds its prompts.
    """

    image: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor
    number: int


@dataclass(frozen=True)
class Window:
    """Rectangle of a region that becomes a patch."""

    region: Region
    y: tuple[int, int]
    x: tuple[int, int]


class _Patches(Dataset[Patch]):
    # Whether the same patches come again, so that their targets are worth keeping.
    comes_again = False

    def __init__(
        self, pairs: Sequence[Pair], data: DataConfig, scalings: dict[int, Scaling], with_targets: bool
    ) -> None:
        self.pairs = tuple(pairs)
        self.data = data
        self.scalings = scalings
        self.with_targets = with_targets
        self._kept_targets: dict[bytes, bytes | bytearray] = {}

    def read(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return image, "YXC" from 0 to 255, and labels, "YX", of a window as they are, without padding."""
        pair = self.pairs[window.region.pair]
        where = (slice(*window.y), slice(*window.x))
        image = to_channels(read_plane(pair.image, window.region.plane, where), pair.channels)
        labels = read_plane(pair.labels, window.region.plane, where).astype(np.int64)
        return apply_scaling(image, self.scalings[window.region.pair]), labels

    def _finish(self, image: NDArray[np.float32], labels: NDArray[np.int64], index: int) -> Patch | None:
        size = self.data.patch_px
        height, width = labels.shape
        padded = np.empty((size, size, 3), np.float32)
        padded[:] = PADDING_RGB
        padded[:height, :width] = image
        targets = self._targets(labels)
        if targets is None:
            return None
        full = np.zeros((4, size, size), np.float32)
        full[:, :height, :width] = targets
        return Patch(
            torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1))),
            torch.from_numpy(full[0].astype(np.int32)),
            torch.from_numpy(full[1:]) if self.with_targets else torch.zeros(0),
            index,
        )

    def _targets(self, labels: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return `instance_targets`, which are kept, compressed without loss, where patches come again."""
        if not self.comes_again:
            return instance_targets(labels, self.data.min_object_px)
        key = hashlib.blake2b(f"{labels.shape}".encode() + labels.tobytes(), digest_size=16).digest()
        kept = self._kept_targets.get(key)
        if kept is not None:
            found: NDArray[np.float32] = np.frombuffer(imagecodecs.blosc_decode(kept), np.float32)
            return found.reshape(-1, *labels.shape)
        targets = instance_targets(labels, self.data.min_object_px)
        if targets is not None and len(self._kept_targets) < TARGETS_TO_KEEP:
            self._kept_targets[key] = imagecodecs.blosc_encode(targets.tobytes(), typesize=targets.itemsize, shuffle=1)
        return targets


class TrainingPatches(_Patches):
    """Endless training patches: item ``epoch * samples_per_epoch + i``.

    Every epoch takes all images equally often, in a new order; each patch is placed so that it holds at least one
    object of `DataConfig.min_object_px`.

    Parameters
    ----------
    pairs, regions
        Annotated images, and the parts of them to train on.
    data
        Patch size, augmentation, smallest object.
    samples_per_epoch
        Patches in an epoch.
    seed
        Seed of the run.
    scalings
        Intensity scaling of each pair, by its index.
    with_targets
        Whether the instance decoder's targets are computed.
    bank
        Draw so many patches, with their augmentation, and go through them again and again, each time in a new order;
        `None` draws new ones for ever.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        regions: Sequence[Region],
        data: DataConfig,
        *,
        samples_per_epoch: int,
        seed: int,
        scalings: dict[int, Scaling],
        with_targets: bool = True,
        bank: int | None = None,
    ) -> None:
        super().__init__(pairs, data, scalings, with_targets)
        self.samples_per_epoch = samples_per_epoch
        self.seed = seed
        self.bank = bank
        self.comes_again = bank is not None
        self._positions: dict[Region, NDArray[np.int64]] = {}
        self.by_image: list[list[Region]] = [
            [region for region in regions if region.pair == pair]
            for pair in sorted({region.pair for region in regions})
        ]

    def __getitem__(self, index: int) -> Patch:
        if self.bank is None:
            return self._draw(index)
        again, position = divmod(index, self.bank)
        order = np.random.default_rng([self.seed, 5, again]).permutation(self.bank) if again else range(self.bank)
        return self._draw(int(order[position]))._replace(number=index)

    def _draw(self, index: int) -> Patch:
        return self.draw_from(index)[0]

    def draw_from(self, index: int) -> tuple[Patch, Region]:
        """Draw a patch, and say which region it is from; in a bank these are the patches of its first round."""
        epoch, position = divmod(index, self.samples_per_epoch)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.by_image))
        rng = np.random.default_rng([self.seed, 2, index])
        for attempt in range(TRIES * len(order)):
            # An image that holds no object large enough leaves its turn to the next one.
            regions = self.by_image[order[(position + attempt // TRIES) % len(order)]]
            region = regions[rng.integers(len(regions))]
            window = self._place(region, rng)
            if window is None:
                continue
            image, labels = augment(*self.read(window), self.data.augment, rng)
            patch = self._finish(image, labels, index)
            if patch is not None:
                return patch, region
        raise DataError(
            f"no training image has an object of {self.data.min_object_px} px or more; lower data.min_object_px"
        )

    def _place(self, region: Region, rng: np.random.Generator) -> Window | None:
        if region not in self._positions:
            self._positions[region] = object_positions(self.pairs[region.pair], region, self.data.min_object_px)
        positions = self._positions[region]
        if len(positions) == 0:
            return None
        at = positions[rng.integers(len(positions))]
        spans = []
        for centre, (start, stop) in zip(at, (region.y, region.x), strict=True):
            size = min(self.data.patch_px, stop - start)
            first = int(rng.integers(max(start, centre - size + 1), min(centre, stop - size) + 1))
            spans.append((first, first + size))
        return Window(region, spans[0], spans[1])


class ValidationPatches(_Patches):
    """Fixed patches that tile the held-out regions and hold at least one object."""

    comes_again = True

    def __init__(
        self,
        pairs: Sequence[Pair],
        regions: Sequence[Region],
        data: DataConfig,
        *,
        scalings: dict[int, Scaling],
        with_targets: bool = True,
    ) -> None:
        super().__init__(pairs, data, scalings, with_targets)
        windows = [window for region in regions for window in self._tile(region)]
        self.windows = tuple(_spread(windows, VALIDATION_PATCHES))
        if not self.windows:
            names = sorted({self.pairs[region.pair].name for region in regions})
            raise DataError(
                f"{', '.join(names)}: the held-out part has no object of {data.min_object_px} px or more; "
                "hold out other images or lower data.min_object_px"
            )

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Patch:
        patch = self._finish(*self.read(self.windows[index]), index)
        if patch is None:
            raise DataError(f"{self.pairs[self.windows[index].region.pair].name}: the labels changed while training")
        return patch

    def _tile(self, region: Region) -> list[Window]:
        size = self.data.patch_px
        windows = [Window(region, y, x) for y in _tiles(region.y, size) for x in _tiles(region.x, size)]
        keep = [window for window in windows if self._holds_object(window)]
        return _spread(keep, VALIDATION_PATCHES_PER_REGION)

    def _holds_object(self, window: Window) -> bool:
        _, labels = self.read(window)
        return instance_targets(labels, self.data.min_object_px) is not None


def measure_scalings(pairs: Sequence[Pair], regions: Sequence[Region], data: DataConfig) -> dict[int, Scaling]:
    """Measure the intensity scaling of every image that the regions use, by index of the pair."""
    return {
        index: measure_scaling(pairs[index].image, pairs[index].channels, data.percentiles)
        for index in sorted({region.pair for region in regions})
    }


def augment(
    image: NDArray[np.float32], labels: NDArray[np.int64], config: AugmentConfig, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Mirror, turn and vary the intensity of a patch.

    Parameters
    ----------
    image
        "YXC", 0 to 255.
    labels
        "YX".
    """
    if config.flips:
        for axis in (0, 1):
            if rng.random() < 0.5:
                image, labels = np.flip(image, axis), np.flip(labels, axis)
    if config.rotations:
        turns = int(rng.integers(4))
        image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if config.intensity:
        contrast, brightness = 1 + config.intensity * rng.uniform(-1, 1, 2)
        mean = image.mean()
        image = np.clip((image - mean) * contrast + mean * brightness, 0, 255)
    return np.ascontiguousarray(image, dtype=np.float32), np.ascontiguousarray(labels)


def instance_targets(labels: NDArray[np.int64], min_object_px: int) -> NDArray[np.float32] | None:
    """Return instances, foreground, centre distance and boundary distance, "CYX", or `None` without objects.

    Objects below `min_object_px` become background; pieces of an object that the patch's edge separates become objects
    of their own, as in micro-sam.
    """
    if not labels.any():
        return None
    # Not at the top: it loads all of torch_em, which takes longer than torch, and a plan needs none of it.
    from torch_em.transform.label import PerObjectDistanceTransform

    transform = PerObjectDistanceTransform(
        distances=True,
        boundary_distances=True,
        directed_distances=False,
        foreground=True,
        instances=True,
        min_size=min_object_px,
    )
    targets: NDArray[np.float32] = transform(labels).astype(np.float32)
    return targets if targets[0].any() else None


def object_positions(pair: Pair, region: Region, min_object_px: int) -> NDArray[np.int64]:
    """Return one pixel of every object of some size, "NC" with C = (y, x), reading the labels block by block."""
    found = [np.zeros((0, 2), np.int64)]
    for y in _tiles(region.y, BLOCK_PX):
        for x in _tiles(region.x, BLOCK_PX):
            block = read_plane(pair.labels, region.plane, (slice(*y), slice(*x)))
            ids, first, sizes = np.unique(block, return_index=True, return_counts=True)
            rows, columns = np.unravel_index(first[(ids != 0) & (sizes >= min_object_px)], block.shape)
            found.append(np.stack([rows + y[0], columns + x[0]], axis=1))
    return np.concatenate(found)


def _spread(windows: list[Window], most: int) -> list[Window]:
    """Return at most so many, evenly spread."""
    if len(windows) <= most:
        return windows
    return [windows[i] for i in np.linspace(0, len(windows) - 1, most).round().astype(int)]


def _tiles(span: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """Cover a span with windows of `size` that stay inside it; the last is moved back to the end."""
    start, stop = span
    if stop - start <= size:
        return [span]
    firsts = [*range(start, stop - size, size), stop - size]
    return [(first, first + size) for first in firsts]
