"""Finetune Segment Anything on your own cells, with the computer you have.

Importing this package loads neither torch nor Qt nor napari; each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from napari_resfinetune.api import (
        TrainResult,
        check,
        doctor,
        evaluate,
        export_model,
        load_model,
        plan,
        resume,
        segment,
        segment_files,
        train,
    )
    from napari_resfinetune.config import FinetuneConfig
    from napari_resfinetune.errors import (
        ConfigError,
        DataError,
        ModelError,
        ResFinetuneError,
        ResourceError,
        TrainingError,
    )
    from napari_resfinetune.events import StopToken

_HOMES = {
    "api": (
        "TrainResult",
        "check",
        "doctor",
        "evaluate",
        "export_model",
        "load_model",
        "plan",
        "resume",
        "segment",
        "segment_files",
        "train",
    ),
    "config": ("FinetuneConfig",),
    "errors": ("ConfigError", "DataError", "ModelError", "ResFinetuneError", "ResourceError", "TrainingError"),
    "events": ("StopToken",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ConfigError",
    "DataError",
    "FinetuneConfig",
    "ModelError",
    "ResFinetuneError",
    "ResourceError",
    "StopToken",
    "TrainResult",
    "TrainingError",
    "check",
    "doctor",
    "evaluate",
    "export_model",
    "load_model",
    "plan",
    "resume",
    "segment",
    "segment_files",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
