"""Named limits and defaults for the machines that people have.

Limits are those of the hardware table in micro-sam's notes on training with limited resources. Strategies and objects
began there and ask for more where this package's training step allows it: all layers of ``vit_b`` learn in each of
them, where the table has a frozen ``vit_t`` with one object for 8 GB of RAM.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from napari_resfinetune.config import ResourcesConfig
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.planning.hardware import Hardware, pick_device

logger = logging.getLogger(__name__)

DeviceKind = Literal["cpu", "cuda", "mps"]

# Beside a GPU, the process itself takes less than this; a preset's own limit on RAM may be larger.
_HOST_MEMORY_GB = 8.0


@dataclass(frozen=True)
class Preset:
    """Limits that training stays inside, also on larger machines, and the settings to start from. Immutable.

    Attributes
    ----------
    name
        As in ``resources.preset``.
    device
        The kind of device it is for: ``"cpu"``, ``"cuda"`` or ``"mps"``.
    memory_gb
        Most RAM, of training and its loader processes together.
    gpu_memory_gb
        Most memory on the card; `None` where there is none of its own.
    cores
        Most CPU cores.
    model
        The model to suggest. Those for light microscopy learn cells two to four times sooner than the original ones.
    objects_by_architecture
        Objects per patch in one step; an architecture that is not named gets those of the last.
    tflops
        What the card reaches in a large 16-bit matrix product, about, for a plan without the card; `None` is this
        computer's own.
    precision
        Number format of the activations on that device; `None` is found out.
    strategy
        What learns. Levers, which the planner pulls until a run fits, make room for all of it everywhere.
    """

    name: str
    device: DeviceKind
    memory_gb: float
    gpu_memory_gb: float | None
    cores: int
    model: str
    objects_by_architecture: tuple[tuple[str, int], ...]
    tflops: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    strategy: Literal["full"] = "full"

    @property
    def objects(self) -> dict[str, int]:
        """Objects per patch by architecture, as a copy."""
        return dict(self.objects_by_architecture)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "device": self.device,
            "memory_gb": self.memory_gb,
            "gpu_memory_gb": self.gpu_memory_gb,
            "cores": self.cores,
            "model": self.model,
            "strategy": self.strategy,
            "objects": self.objects,
        }


def get_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises
    ------
    ConfigError
        For a name that is none; ``"auto"`` is one only together with a machine (`auto_preset`).
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(PRESETS)}"
    if name == "auto":
        hint = "it stands for one that is chosen for a machine; name that one"
    raise ConfigError(f"preset {name!r}: not a preset with limits of its own; {hint}")


def preset_fits(preset: Preset, hardware: Hardware, device: str | None = None) -> tuple[bool, str]:
    """Say whether what is free on a machine is enough for all that a preset may take.

    Cores are a ceiling only: with fewer, training is slower but no different.

    Parameters
    ----------
    preset
        Its limits are compared.
    hardware
        What `probe_hardware` found.
    device
        The card to look at, as `pick_device` gave it; if unset, the one with the most free memory.

    Returns
    -------
    fits
        Whether it is enough.
    reason
        What was compared, in one sentence.
    """
    if preset.device == "mps" and not hardware.has_mps:
        return False, f"{preset.name} needs an Apple GPU, and torch finds none"
    card = None
    if preset.gpu_memory_gb is not None:
        usable = [gpu for gpu in hardware.gpus if gpu.has_kernels and device in (None, gpu.device, f"cuda:{gpu.index}")]
        if not usable:
            why = "; ".join(f"{gpu.name}: {gpu.advice}" for gpu in hardware.gpus if gpu.advice) or hardware.gpu_problem
            return False, f"{preset.name} needs a CUDA card{f'; {why}' if why else ', and torch finds none'}"
        card = max(usable, key=lambda gpu: gpu.memory_free_gb)
        if card.memory_free_gb < preset.gpu_memory_gb:
            found = f"{card.memory_free_gb:.1f} of {card.memory_total_gb:.1f} GB are free on {card.name}"
            return False, f"{preset.name} takes up to {preset.gpu_memory_gb:.0f} GB on the card, and {found}"
    ram_gb = preset.memory_gb if preset.device != "cuda" else min(preset.memory_gb, _HOST_MEMORY_GB)
    free = f"{hardware.memory_free_gb:.1f} of {hardware.memory_total_gb:.1f} GB RAM are free"
    if hardware.memory_free_gb < ram_gb:
        return False, f"{preset.name} takes up to {ram_gb:.0f} GB RAM, and {free}"
    on_card = f"{card.memory_free_gb:.1f} GB are free on {card.name}, and " if card else ""
    return True, f"{on_card}{free}"


def asked_device(resources: ResourcesConfig) -> str:
    """Return the device that a configuration asks for: a preset for CPUs means one, whatever cards there are."""
    if resources.device == "auto" and resources.preset != "auto" and get_preset(resources.preset).device == "cpu":
        return "cpu"
    return resources.device


def device_of(resources: ResourcesConfig, hardware: Hardware) -> tuple[str, tuple[str, ...]]:
    """Choose where a configuration runs, with the reasons, as `pick_device` gives them."""
    return pick_device(asked_device(resources), hardware)


def auto_preset(hardware: Hardware, device: str | None = None) -> str:
    """Choose the preset with the largest limits that fits what is free.

    Where not even the smallest of the device's kind fits, that one is the answer, and the log says so.

    Parameters
    ----------
    hardware
        What `probe_hardware` found.
    device
        Where training will run, as `pick_device` gave it; if unset, where ``"auto"`` would.

    Returns
    -------
    name
        Of a preset; never ``"auto"``.
    """
    device = pick_device("auto", hardware)[0] if device is None else device
    kind = device.partition(":")[0]
    # From small to large; MPS has one preset, and a card no other way than CUDA's.
    of_kind = sorted((each for each in PRESETS.values() if each.device == kind), key=_size)
    fitting = [each for each in of_kind if preset_fits(each, hardware, device if kind == "cuda" else None)[0]]
    if fitting:
        return fitting[-1].name
    smallest = of_kind[0]
    logger.warning("no preset fits what is free; taking the smallest: %s", preset_fits(smallest, hardware)[1])
    return smallest.name


def _size(preset: Preset) -> tuple[float, float]:
    return preset.gpu_memory_gb or 0.0, preset.memory_gb


def _both(vit_t: int, vit_b: int) -> tuple[tuple[str, int], ...]:
    return ("vit_t", vit_t), ("vit_b", vit_b)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset("cpu-8gb", "cpu", 8, None, 8, "vit_t_lm", _both(5, 5)),
            Preset("cpu-16gb", "cpu", 16, None, 8, "vit_b_lm", _both(10, 10)),
            Preset("cpu-32gb", "cpu", 32, None, 16, "vit_b_lm", _both(15, 15)),
            Preset("cpu-64gb", "cpu", 64, None, 16, "vit_b_lm", _both(25, 25)),
            Preset("gtx1080", "cuda", 32, 8, 8, "vit_b_lm", _both(10, 10), 8, "fp32"),
            Preset("rtx5000", "cuda", 32, 16, 8, "vit_b_lm", _both(20, 20), 45, "fp16"),
            Preset("rtx3090", "cuda", 32, 24, 8, "vit_b_lm", _both(30, 30), 60, "bf16"),
            Preset("v100", "cuda", 32, 32, 8, "vit_b_lm", _both(45, 35), 70, "fp16"),
            Preset("a100", "cuda", 64, 80, 16, "vit_b_lm", _both(45, 35), 200, "bf16"),
            Preset("mps", "mps", 16, None, 8, "vit_t_lm", _both(5, 5), 4, "fp32"),
        )
    }
)
