"""What is kept because it is likely to be asked for again: the last model, and embeddings of planes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.api import load_model
from napari_resfinetune.inference import TileEmbedding
from napari_resfinetune.inference.tiling import cut, embed_tile
from napari_resfinetune.models import SamModel

KEPT_GB = 1.0
Maps = dict[str, NDArray[np.float32]]


class Kept:
    """One model, and what it made of planes, up to a limit.

    Parameters
    ----------
    limit_gb
        Most that all of it takes; what was not used for longest goes first.
    """

    def __init__(self, limit_gb: float = KEPT_GB) -> None:
        self._limit_gb = limit_gb
        self._model_key: tuple[Any, ...] | None = None
        self._model: SamModel | None = None
        self._embeddings: OrderedDict[tuple[Any, ...], list[TileEmbedding]] = OrderedDict()
        self._maps: OrderedDict[tuple[Any, ...], Maps] = OrderedDict()

    def model(self, name: str, device: str, decoder: str) -> SamModel:
        """Return a model, loaded only when it is another one than last time."""
        key = (name, _stamp(name), device, decoder)
        if self._model is None or key != self._model_key:
            # The old one goes first, so that there are never two.
            self._model, self._model_key = None, None
            self._embeddings.clear()
            self._maps.clear()
            self._model = load_model(name, device=device, decoder=decoder)
            self._model_key = key
        return self._model

    def embeddings(
        self,
        key: tuple[Any, ...],
        model: SamModel,
        image: NDArray[np.float32],
        *,
        patch_px: int,
        precision: Any,
        on_tile: Callable[[int, int], None],
    ) -> list[TileEmbedding]:
        """Return the embeddings of a plane by the last model.

        Parameters
        ----------
        key
            Of the plane and how it was scaled.
        model
            As `model` gave it.
        image
            float32 "YXC", as `apply_scaling` gives it.
        patch_px, precision
            As for `segment_plane`.
        on_tile
            Called with the part that is done and the whole; may raise to end it.
        """
        key = (*key, patch_px)
        if key not in self._embeddings:
            padded, tiles = cut(model, image, patch_px)
            made = []
            for done, tile in enumerate(tiles):
                on_tile(done, 2 * len(tiles))
                made.append(embed_tile(model, padded, tile, precision))
            self._embeddings[key] = made
            while len(self._embeddings) > 1 and self._taken_gb() > self._limit_gb:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        return self._embeddings[key]

    def maps(self, key: tuple[Any, ...], decode: Callable[[], Maps]) -> Maps:
        """Return what the instance decoder made of a plane; `decode` is called when that is not there."""
        if key not in self._maps:
            self._maps[key] = decode()
            while len(self._maps) > 1 and self._taken_gb() > self._limit_gb:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def _taken_gb(self) -> float:
        features = (one.features for kept in self._embeddings.values() for one in kept)
        maps = (array for kept in self._maps.values() for array in kept.values())
        return (sum(one.numel() * one.element_size() for one in features) + sum(array.nbytes for array in maps)) / 1e9


def _stamp(name: str) -> float:
    """Tell a run that was trained on from what it was."""
    path = Path(name).expanduser()
    file = path / "model.pt" if path.is_dir() else path
    return file.stat().st_mtime if file.is_file() else 0.0
