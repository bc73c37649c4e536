"""The feature cache of a training run: opened for its frozen part, and announced before it fills."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.data.patches import TrainingPatches, ValidationPatches
from napari_resfinetune.models import SamModel
from napari_resfinetune.models.encoder import Unit
from napari_resfinetune.planning.memory import GB
from napari_resfinetune.training.feature_cache import FeatureCache, name_of_part
from napari_resfinetune.training.run_folder import RunFolder
from napari_resfinetune.training.step import StepSettings, frozen_tokens, frozen_units


def open_features(
    config: FinetuneConfig, run: RunFolder, model: SamModel, settings: StepSettings, say: Callable[[str], None]
) -> FeatureCache:
    """Open the cache for the weights as they are now."""
    resources = config.resources
    part = name_of_units(frozen_units(model, settings), settings)
    return FeatureCache(resources.feature_cache_dir or run.features, part, resources.feature_cache_gb, say)


def name_of_units(units: Sequence[Unit], settings: StepSettings) -> str:
    """Return the name in the cache of the first units of an image encoder, as the settings compute them."""
    return name_of_part(
        units, input_px=settings.input_px, positions=settings.positions, autocast=str(settings.autocast)
    )


def announce(
    features: FeatureCache,
    model: SamModel,
    settings: StepSettings,
    training: TrainingPatches,
    validation: ValidationPatches,
    samples_per_epoch: int,
) -> str:
    """Say what the cache will take, after encoding one patch that is needed anyway."""
    room_gb = features.room_gb
    tokens = frozen_tokens(model, validation[0], settings, features)
    bank, gb = training.bank or 0, tokens.numel() * 2 / GB
    patches = bank + len(validation)
    epochs = math.ceil(bank / samples_per_epoch)
    then = f"it is computed in the first {'epoch' if epochs == 1 else f'{epochs} epochs'} alone"
    if patches * gb > room_gb:
        then = f"about {max(0, int(room_gb / gb))} of them fit there, the others are computed in every epoch"
    return (
        f"frozen features: {bank} patches are drawn and used again and again (training.patch_bank); what the "
        f"frozen part makes of them and of {len(validation)} held-out ones takes up to "
        f"{patches * gb:.2f} GB in {features.folder}; {then}"
    )
