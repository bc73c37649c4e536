"""Floor 2: what the machine has, and how a run fits into it."""

from napari_resfinetune.planning.allocator import Freed, freed_memory, kept_where_there_is_room
from napari_resfinetune.planning.calibration import learn_from_run, rates_here
from napari_resfinetune.planning.hardware import Gpu, Hardware, environment_report, pick_device, probe_hardware
from napari_resfinetune.planning.levers import Pulled, Work, levered, pull_lever
from napari_resfinetune.planning.limits import Limits, choose_limits, usable_cores, within_limits
from napari_resfinetune.planning.memory import (
    MemoryGauge,
    MemoryReading,
    gpu_memory_gb,
    peak_memory_gb,
    process_memory_gb,
    watched_memory_gb,
)
from napari_resfinetune.planning.planner import Length, Plan, Rates, StepCost, make_plan, what_else, what_larger
from napari_resfinetune.planning.precision import PrecisionChoice, choose_precision
from napari_resfinetune.planning.presets import (
    PRESETS,
    Preset,
    asked_device,
    auto_preset,
    device_of,
    get_preset,
    preset_fits,
)
from napari_resfinetune.planning.report import doctor_report

__all__ = [
    "Gpu",
    "Hardware",
    "probe_hardware",
    "pick_device",
    "environment_report",
    "device_of",
    "doctor_report",
    "PrecisionChoice",
    "choose_precision",
    "PRESETS",
    "Preset",
    "asked_device",
    "auto_preset",
    "get_preset",
    "preset_fits",
    "learn_from_run",
    "rates_here",
    "Pulled",
    "Work",
    "levered",
    "pull_lever",
    "Limits",
    "choose_limits",
    "usable_cores",
    "within_limits",
    "Length",
    "Plan",
    "Rates",
    "StepCost",
    "make_plan",
    "what_else",
    "what_larger",
    "Freed",
    "freed_memory",
    "kept_where_there_is_room",
    "MemoryGauge",
    "MemoryReading",
    "gpu_memory_gb",
    "peak_memory_gb",
    "process_memory_gb",
    "watched_memory_gb",
]
