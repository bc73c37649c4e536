"""What evaluation keeps on disk, so that nothing is computed twice: embeddings and scores, by what they come from.

An embedding is found by the encoder's weights, the pixels and how they are brought to the encoder; scores by all
weights, pixels, labels, the mode and the versions of the libraries that segment. So nothing stale can be read, and the
folder may be deleted at any time. Embeddings are `FeatureCache` of training, scores one JSON file each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_resfinetune.config.cache import cache_folder
from napari_resfinetune.inference.tiling import TileEmbedding, cut, embed_tile, field_input_px
from napari_resfinetune.models import SamModel, encoder_units, resized_shape, weights_hash
from napari_resfinetune.training.feature_cache import FeatureCache, name_of_part

logger = logging.getLogger(__name__)

FORMAT = 3
EMBEDDINGS_GB = 20.0
SCORES = "scores"
# What embeds, and what else decides about objects.
_ENCODERS = ("torch", "timm", "segment-anything-py")
_PACKAGES = (
    *_ENCODERS, "napari-resfinetune", "micro-sam", "python-elf", "torch-em", "bioimage-cpp", "scipy", "scikit-image",
    "numpy",
)  # fmt: skip


def evaluation_folder() -> Path:
    """Return where this user's embeddings and scores are."""
    return cache_folder() / "evaluation"


class Store:
    """Embeddings and scores of one model. It never raises: without room or access it keeps nothing.

    Parameters
    ----------
    folder
        Where; several processes may share it.
    model
        Its weights must not change while the store is in use.
    patch_px, precision
        As for `embed_plane`.
    """

    def __init__(self, folder: Path, model: SamModel, *, patch_px: int, precision: torch.dtype | None) -> None:
        self.folder = folder
        self.model = model
        self.patch_px, self.precision = patch_px, precision
        self.hits = self.misses = 0
        parts = {"sam": model.sam, "instance_decoder": model.instance_decoder}
        state = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            if module is not None
            for name, tensor in module.state_dict().items()
        }
        self._how = [FORMAT, _versions(_PACKAGES), weights_hash(state), model.device.type, patch_px, str(precision)]

    @functools.cached_property
    def features(self) -> FeatureCache:
        """Embeddings, opened when the first is asked for."""
        units = encoder_units(self.model.sam.image_encoder)
        # Pixels of a window and the side of a patch say how much of the input the window takes.
        how = {"patch_px": self.patch_px, "autocast": str(self.precision), "made_by": [FORMAT, *_versions(_ENCODERS)]}
        return FeatureCache(self.folder, name_of_part(units, **how), EMBEDDINGS_GB, logger.info)

    def embed(self, image: NDArray[np.float32]) -> list[TileEmbedding]:
        """Return what `embed_plane` gives, in 16-bit precision."""
        found = []
        padded, tiles = cut(self.model, image, self.patch_px)
        for tile in tiles:
            pixels = torch.from_numpy(np.ascontiguousarray(padded[tile.window]))
            compute = functools.partial(self._compute, padded, tile)
            features = self.features.get(pixels, compute).to(self.model.device)
            found.append(TileEmbedding(tile, features, resized_shape(tile.shape, field_input_px(self.model, tile))))
        return found

    def _compute(self, image: NDArray[np.float32], tile: Any) -> torch.Tensor:
        return embed_tile(self.model, image, tile, self.precision).features

    def key(self, images: Iterable[NDArray[Any]], labels: Iterable[NDArray[Any]], mode: str) -> str:
        """Return the name of scores, by everything that decides them."""
        pixels = [[_hash(plane) for plane in planes] for planes in (images, labels)]
        described = json.dumps([*self._how, pixels, mode])
        return hashlib.sha256(described.encode()).hexdigest()

    def read(self, key: str) -> Any:
        """Return what was written under a key; `None` when nothing whole is there."""
        try:
            content = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.misses += 1
            return None
        self.hits += 1
        return content

    def write(self, key: str, content: Any) -> None:
        """Keep plain data under a key."""
        file = self._file(key)
        new = file.with_name(f".{uuid.uuid4().hex}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(content), encoding="utf-8")
            os.replace(new, file)
        except OSError as error:
            logger.info("%s: scores are not kept (%s)", file, error)
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / SCORES / key[:2] / f"{key[2:]}.json"


@functools.cache
def _versions(packages: Sequence[str]) -> Sequence[str]:
    return [version(package) for package in packages]


def _hash(array: NDArray[Any]) -> str:
    digest = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=20)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
