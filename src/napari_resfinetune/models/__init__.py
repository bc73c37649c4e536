"""Floor 1: SAM, TinyViT, weights and strategies; the only floor that knows micro-sam's and segment-anything's modules.

Names are imported when they are first used, so that the list of models can be shown without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from napari_resfinetune.models.adapters import add_adapter, save_adapter
    from napari_resfinetune.models.build import (
        DecoderChoice,
        SamModel,
        assemble_sam,
        load_model,
        new_model,
        parts,
        predictor,
    )
    from napari_resfinetune.models.encoder import encoder_units, run_units
    from napari_resfinetune.models.names import (
        ARCHITECTURES,
        KNOWN_MODELS,
        RANDOM_NAMES,
        KnownModel,
        decoder_path_in_cache,
        is_downloaded,
        known_model,
        model_path_in_cache,
        near_names,
    )
    from napari_resfinetune.models.preprocess import (
        masks_to_image,
        resized_shape,
        scale_boxes,
        scale_coords,
        to_model_input,
    )
    from napari_resfinetune.models.resolve import ModelLocation, resolve_model
    from napari_resfinetune.models.strategies import TrainableReport, apply_strategy, count_parameters
    from napari_resfinetune.models.tiny_vit import (
        TinyViTEncoder,
        freeze_batch_norm,
        measure_batch_norm,
        mobile_sam_name,
    )
    from napari_resfinetune.models.weights import (
        Weights,
        load_decoder_state,
        load_safetensors,
        load_state,
        save_model,
        save_safetensors,
        weights_hash,
    )

_MODULES = {
    "adapters": ("add_adapter", "save_adapter"),
    "build": ("DecoderChoice", "SamModel", "assemble_sam", "load_model", "new_model", "parts", "predictor"),
    "encoder": ("encoder_units", "run_units"),
    "names": (
        "ARCHITECTURES",
        "KNOWN_MODELS",
        "RANDOM_NAMES",
        "KnownModel",
        "decoder_path_in_cache",
        "is_downloaded",
        "known_model",
        "model_path_in_cache",
        "near_names",
    ),
    "preprocess": ("masks_to_image", "resized_shape", "scale_boxes", "scale_coords", "to_model_input"),
    "resolve": ("ModelLocation", "resolve_model"),
    "strategies": ("TrainableReport", "apply_strategy", "count_parameters"),
    "tiny_vit": ("TinyViTEncoder", "freeze_batch_norm", "measure_batch_norm", "mobile_sam_name"),
    "weights": (
        "Weights",
        "load_decoder_state",
        "load_safetensors",
        "load_state",
        "save_model",
        "save_safetensors",
        "weights_hash",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ARCHITECTURES",
    "KNOWN_MODELS",
    "RANDOM_NAMES",
    "DecoderChoice",
    "KnownModel",
    "ModelLocation",
    "SamModel",
    "TinyViTEncoder",
    "TrainableReport",
    "Weights",
    "add_adapter",
    "apply_strategy",
    "assemble_sam",
    "count_parameters",
    "decoder_path_in_cache",
    "encoder_units",
    "freeze_batch_norm",
    "is_downloaded",
    "known_model",
    "load_decoder_state",
    "load_model",
    "load_safetensors",
    "load_state",
    "masks_to_image",
    "measure_batch_norm",
    "mobile_sam_name",
    "model_path_in_cache",
    "near_names",
    "new_model",
    "parts",
    "predictor",
    "resized_shape",
    "resolve_model",
    "run_units",
    "save_adapter",
    "save_model",
    "save_safetensors",
    "scale_boxes",
    "scale_coords",
    "to_model_input",
    "weights_hash",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
