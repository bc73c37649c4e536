"""One call per verb, over one configuration: what scripts, the command and the window all use."""

from napari_resfinetune.api.models import (
    evaluate,
    export_model,
    inference_settings,
    load_model,
    segment,
    segment_files,
    segment_many,
)
from napari_resfinetune.api.studies import (
    doctor,
    report,
    report_sweep,
    suggest_models,
    sweep,
)
from napari_resfinetune.api.training import (
    check,
    plan,
    resume,
    train,
)
from napari_resfinetune.training.result import TrainResult

__all__ = [
    "TrainResult",
    "check",
    "doctor",
    "evaluate",
    "export_model",
    "inference_settings",
    "load_model",
    "plan",
    "report",
    "report_sweep",
    "resume",
    "segment",
    "segment_files",
    "segment_many",
    "suggest_models",
    "sweep",
    "train",
]
