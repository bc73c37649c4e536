"""Embeddings of patches by many models, with what their image encoders share computed once.

Finetuned models often have their first blocks in common: those that a strategy froze. Blocks are compared by the hash
of their weights. Where models part, what comes out of the common blocks is kept in the same cache on disk that training
uses (`training.feature_cache`), and so is each embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from napari_resfinetune.data.patches import Patch
from napari_resfinetune.models import SamModel, to_model_input
from napari_resfinetune.models.encoder import Unit, run_units
from napari_resfinetune.training.feature_cache import FeatureCache, name_of_part
from napari_resfinetune.training.frozen import name_of_units
from napari_resfinetune.training.step import StepSettings, autocast, encoder_units_of


@dataclass(frozen=True)
class UnitHashes:
    """What the units of an image encoder are: a hash of each one's weights, and which are blocks."""

    hashes: tuple[str, ...]
    is_block: tuple[bool, ...]


@dataclass
class SharedEncoder:
    """Where embeddings of one search are kept.

    What comes out of shared blocks is rounded to 16 bit, so an embedding may differ by that much from one that was
    computed at one go.

    Attributes
    ----------
    folder
        Of the feature cache.
    settings
        How patches are brought to the image encoder.
    max_gb
        Most room that the cache takes.
    say
        Told once when nothing more can be kept.
    units_run
        How many units were computed for a patch, and not found.
    """

    folder: Path
    settings: StepSettings
    max_gb: float
    say: Callable[[str], None]
    units_run: int = 0
    _said: bool = False

    def open(self, model: SamModel, cuts: Sequence[int]) -> Callable[[Patch], Tensor]:
        """Return the function that embeds a patch with a model.

        Parameters
        ----------
        model
            In evaluation mode.
        cuts
            After so many units, other models part from this one (`shared_cuts`).

        Returns
        -------
        callable
            From a patch to its embedding, float32 "BCYX" on the model's device.
        """
        units = encoder_units_of(model, self.settings)
        ends = sorted({*cuts, len(units)})
        caches = [
            FeatureCache(self.folder, name_of_units(units[:end], self.settings), self.max_gb, self._say_once)
            for end in ends
        ]

        def embed(patch: Patch) -> Tensor:
            with torch.no_grad():
                return self._tokens(model, patch, units, ends, caches).to(model.device).float()

        return embed

    def _say_once(self, text: str) -> None:
        if not self._said:
            self._said = True
            self.say(text)

    def _tokens(
        self, model: SamModel, patch: Patch, units: Sequence[Unit], ends: Sequence[int], caches: Sequence[FeatureCache]
    ) -> Tensor:
        """Return what comes out of the last of `ends`, computing no more of it than is not kept."""
        *before, end = ends
        start = before[-1] if before else 0
        computed = 0

        def compute() -> Tensor:
            nonlocal computed
            with autocast(model.device, self.settings):
                if before:
                    tokens = self._tokens(model, patch, units, before, caches[:-1]).to(model.device)
                else:
                    tokens, _ = to_model_input(patch.image[None].to(model.device), self.settings.input_px)
                computed = end - start
                return run_units(units[start:end], tokens)

        kept = caches[-1].get(patch.image, compute)
        self.units_run += computed
        return kept


def hash_units(model: SamModel, settings: StepSettings) -> UnitHashes:
    """Hash the weights of each unit of a model's image encoder."""
    units = encoder_units_of(model, settings)
    return UnitHashes(tuple(name_of_part([unit]) for unit in units), tuple(unit.is_block for unit in units))


def shared_cuts(encoders: Mapping[str, UnitHashes]) -> dict[str, tuple[int, ...]]:
    """Say after how many units each image encoder parts from others, where they have at least a block in common.

    Parameters
    ----------
    encoders
        By model.
    """
    cuts: dict[str, set[int]] = {model: set() for model in encoders}
    for (one, a), (other, b) in itertools.combinations(encoders.items(), 2):
        same = [x == y for x, y in zip(a.hashes, b.hashes, strict=False)]
        length = same.index(False) if False in same else len(same)
        if any(a.is_block[:length]):
            cuts[one].add(length)
            cuts[other].add(length)
    return {model: tuple(sorted(found)) for model, found in cuts.items()}
