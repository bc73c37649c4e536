"""What training may take, and how that is made to hold: by torch, by the system, or by looking."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from napari_resfinetune.config import ResourcesConfig
from napari_resfinetune.errors import ResourceError
from napari_resfinetune.planning.hardware import Hardware
from napari_resfinetune.planning.memory import GB, MAPPED_LIBRARIES_GB
from napari_resfinetune.planning.presets import Preset

logger = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
# Libraries that are loaded after the cap is set.
_LATER_GB = 0.2
# What a loader process takes.
WORKER_GB = 0.4
# Share of the limit that a heap may fill again of what it gave back.
_REFILLED = 0.05
# Limits in force, the innermost last.
_caps: list[float] = []


@dataclass(frozen=True)
class Limits:
    """What training may take.

    Attributes
    ----------
    memory_gb
        RAM, loader processes included.
    gpu_memory_gb
        On the card; `None` where there is none of its own.
    threads
        CPU threads.
    nice
        How much a process of its own gives way to others, from 0 to 19.
    reason
        Where the memory limit comes from, in words.
    """

    memory_gb: float
    gpu_memory_gb: float | None
    threads: int
    nice: int
    reason: str

    def deciding_gb(self, device: str) -> float:
        """Return the limit of the memory that decides on a device."""
        if device.startswith("cuda") and self.gpu_memory_gb is not None:
            return self.gpu_memory_gb
        return self.memory_gb


def choose_limits(resources: ResourcesConfig, preset: Preset, hardware: Hardware, device: str) -> Limits:
    """Put together what was asked for, the preset, and what is free on the machine.

    Parameters
    ----------
    resources
        Its own numbers go over the preset's.
    preset
        A preset, not ``"auto"``.
    hardware
        The machine that training will run on.
    device
        As `pick_device` gave it.
    """
    memory_gb, reason = preset.memory_gb, f"preset {preset.name}"
    if resources.memory_gb is not None:
        memory_gb, reason = resources.memory_gb, "resources.memory_gb"
    if hardware.memory_free_gb < memory_gb:
        reason = f"{hardware.memory_free_gb:.1f} GB RAM are free, {reason} would allow {memory_gb:g}"
        memory_gb = hardware.memory_free_gb
    gpu_gb = None
    card = hardware.gpu(device)
    if device.startswith("cuda"):
        gpu_gb, gpu_reason = preset.gpu_memory_gb, f"preset {preset.name}"
        if resources.gpu_memory_gb is not None:
            gpu_gb, gpu_reason = resources.gpu_memory_gb, "resources.gpu_memory_gb"
        if card is not None and (gpu_gb is None or card.memory_free_gb < gpu_gb):
            gpu_reason = f"{card.memory_free_gb:.1f} GB are free on {card.name}"
            gpu_gb = card.memory_free_gb
        reason = gpu_reason
    threads = resources.threads or min(preset.cores, usable_cores(hardware))
    return Limits(memory_gb, gpu_gb, threads, resources.nice, reason)


def usable_cores(hardware: Hardware) -> int:
    """Return how many cores there are, or fewer where OMP_NUM_THREADS gives numerical libraries no more threads."""
    # A list of them is for nested levels, of which there is one here.
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    given = int(first) if first.isascii() and first.isdecimal() else 0
    return max(1, min(hardware.physical_cores, given or hardware.physical_cores))


@contextlib.contextmanager
def within_limits(
    limits: Limits, device: str, hardware: Hardware, *, enforce: bool, workers: int = 0
) -> Iterator[None]:
    """Keep training inside its limits for a while; `workers` loader processes have a share of the memory.

    Threads and the share of a card always; with `enforce` also niceness, and on Linux a cap on the memory of this
    process that the system keeps: what goes beyond is refused, which the trainer survives. They bind all of the
    process, so that is for processes of training's own.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(limits.threads)
    card = hardware.gpu(device)
    if card is not None and limits.gpu_memory_gb is not None:
        share = min(1.0, limits.gpu_memory_gb / card.memory_total_gb)
        torch.cuda.set_per_process_memory_fraction(share, card.index)
    try:
        if enforce:
            with contextlib.suppress(psutil.Error, OSError):
                _give_way(limits.nice)
        # A card's driver maps memory in ways of its own.
        own_gb = limits.memory_gb - WORKER_GB * workers
        with _capped(own_gb) if enforce and device == "cpu" else contextlib.nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        if card is not None and limits.gpu_memory_gb is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, card.index)


@contextlib.contextmanager
def _capped(memory_gb: float) -> Iterator[None]:
    """Let Linux refuse memory beyond a limit; elsewhere nothing is enforced, and the trainer looks after each step."""
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    _caps.append(memory_gb)
    renew_cap(again=False)
    try:
        yield
    finally:
        _caps.pop()
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_DATA, before)


def widen_cap(memory_gb: float) -> None:
    """Let this process take what a loader process no longer does."""
    if _caps:
        _caps[-1] += memory_gb
        renew_cap()


def renew_cap(*, again: bool = True) -> None:
    """Set the cap in force, if any, for the process as it is now.

    The system counts memory that can be written to (RLIMIT_DATA), whether it was touched or not. Beside it a process
    has the pages of its libraries; and of what is counted some was never touched, as the stacks of threads, or given
    back, as the holes of a heap after `return_free_memory`.
    """
    if not _caps:
        return
    import resource

    status = _status()
    untouched_gb = status["VmData"] - status["RssAnon"]
    # What was given back may be filled again without asking the system, so a second time some room is left for that.
    margin = _REFILLED if again else 0.0
    libraries_gb = min(status["RssFile"], MAPPED_LIBRARIES_GB)
    allowed = int(((1 - margin) * _caps[-1] - libraries_gb - _LATER_GB + untouched_gb) * GB)
    taken = int(status["VmData"] * GB)
    if allowed <= taken and not again:
        raise ResourceError(
            f"a limit of {_caps[-1]:.1f} GB is less than what Python and its libraries take already; allow more"
        )
    allowed = max(allowed, taken)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        allowed = min(allowed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    except (ValueError, OSError) as error:
        logger.warning("the memory limit cannot be enforced here: %s", error)


def _give_way(nice: int) -> None:
    process = psutil.Process()
    if sys.platform == "win32":
        if nice:
            process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
    elif nice > process.nice():
        process.nice(nice)


def _status() -> dict[str, float]:
    """Sizes in GB that Linux tells about this process."""
    text = _STATUS.read_text(encoding="utf-8", errors="replace")
    sizes = dict.fromkeys(("VmData", "RssAnon", "RssFile"), 0.0)
    for name, kilobytes in re.findall(r"^(\w+):\s*(\d+) kB", text, re.MULTILINE):
        sizes[name] = int(kilobytes) * 1024 / GB
    return sizes
