"""What an adapter's folder says of itself, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from napari_resfinetune.config import LoraStrategy, Strategy
from napari_resfinetune.errors import ModelError

CONFIG, WEIGHTS, DECODERS, ORIGIN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "decoders.safetensors",
    "resfinetune.json",
)
FORMAT = 1


@dataclass(frozen=True)
class AdapterOrigin:
    """What an adapter belongs to.

    Attributes
    ----------
    base_model
        The model that it was trained on, as it was asked for.
    architecture
        Of that model.
    encoder_sha256
        Hash of that model's image encoder.
    strategy
        ``lora`` or ``late_lora``, with its settings.
    meta
        What a checkpoint says of itself: ``patch_px``, ``percentiles`` and so on.
    """

    base_model: str
    architecture: str
    encoder_sha256: str
    strategy: LoraStrategy
    meta: Mapping[str, Any]


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_origin(folder: Path) -> AdapterOrigin:
    """Read what an adapter belongs to.

    Raises
    ------
    ModelError
        When that is missing or damaged.
    """
    path = folder / ORIGIN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ModelError(f"{path}: format {content['format']}; this version reads format {FORMAT}")
        strategy: Any = TypeAdapter(Strategy).validate_python(content["strategy"])
        if not isinstance(strategy, LoraStrategy):
            raise ModelError(f"{path}: strategy {strategy.kind} has no adapter; expected lora or late_lora")
        named = {name: str(content[name]) for name in ("base_model", "architecture", "encoder_sha256")}
        return AdapterOrigin(**named, strategy=strategy, meta=dict(content["meta"]))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: missing, so nobody knows which model the adapter belongs to; only adapters that this project "
            "wrote can be opened"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        what = type(error).__name__ if isinstance(error, ValidationError) else error
        raise ModelError(f"{path}: damaged ({what}); copy the adapter again") from None
