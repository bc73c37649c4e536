"""What this machine has and what of it is free, and which device to train on."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.planning.cgroups import read_text, usable_cores, usable_memory_gb
from napari_resfinetune.planning.memory import GB

logger = logging.getLogger(__name__)

MIN_FREE_GPU_GB = 4.0
_CPUINFO = Path("/proc/cpuinfo")
_FEATURES = {"avx2": "avx2", "avx512f": "avx512_f", "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
_PACKAGES = (
    "napari-resfinetune",
    "torch",
    "torchvision",
    "micro-sam",
    "segment-anything-py",
    "torch-em",
    "timm",
    "python-elf",
    "numpy",
    "zarr",
    "napari",
)
_NO_TORCH: tuple[str | None, str | None, str] = (None, None, "torch cannot be imported; install it again")
T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """A CUDA (or ROCm) card as torch sees it.

    Attributes
    ----------
    index
        Its number, as in ``cuda:0``.
    name
        As the driver says.
    memory_total_gb, memory_free_gb
        Of the card; free counts what this process may use again.
    capability
        Compute capability, as ``(8, 6)``.
    has_kernels
        Whether the installed torch can compute on it.
    advice
        What to install when it cannot; else empty.
    """

    index: int
    name: str
    memory_total_gb: float
    memory_free_gb: float
    capability: tuple[int, int]
    has_kernels: bool = True
    advice: str = ""

    @property
    def device(self) -> str:
        """Its name for torch."""
        return f"cuda:{self.index}" if self.index else "cuda"


@dataclass(frozen=True)
class Hardware:
    """What the machine has, as far as this process may use it.

    Attributes
    ----------
    cpu
        Model name.
    physical_cores, logical_cores
        That this process may use, after affinity and container quota.
    memory_total_gb, memory_free_gb
        RAM that this process may use, after container or batch system limits.
    platform, python
        Operating system and Python version.
    cpu_features
        Those of ``avx2``, ``avx512f``, ``avx512_bf16``, ``amx_bf16`` that the CPU has.
    gpus
        Cards that torch sees.
    has_mps
        Whether torch can use Apple's GPU.
    torch, torch_cuda
        Version of torch, and of the CUDA (or ROCm) it was built for; `None` without.
    gpu_problem
        Why there is no card, where that can be known; else empty.
    """

    cpu: str
    physical_cores: int
    logical_cores: int
    memory_total_gb: float
    memory_free_gb: float
    platform: str = ""
    python: str = ""
    cpu_features: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    has_mps: bool = False
    torch: str | None = None
    torch_cuda: str | None = None
    gpu_problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dataclasses.asdict(self)

    def gpu(self, device: str) -> Gpu | None:
        """Return the card that ``"cuda"`` or ``"cuda:1"`` names, or `None`."""
        return next((gpu for gpu in self.gpus if device in (gpu.device, f"cuda:{gpu.index}")), None)


def probe_hardware() -> Hardware:
    """Look at the machine. Never raises; what cannot be found out is left empty, and said in the log."""
    physical, logical = _attempt(usable_cores, (1, 1))
    total_gb, free_gb = _attempt(usable_memory_gb, (0.0, 0.0))
    torch, cuda, problem = _attempt(_torch_build, _NO_TORCH)
    gpus: tuple[Gpu, ...] = ()
    if cuda is not None:
        gpus, problem = _attempt(_probe_gpus, (gpus, "torch failed to look for cards; see the log"))
    return Hardware(
        cpu=_attempt(_cpu_name, "") or platform.machine() or "unknown CPU",
        physical_cores=physical,
        logical_cores=logical,
        memory_total_gb=total_gb,
        memory_free_gb=free_gb,
        platform=_attempt(platform.platform, sys.platform),
        python=platform.python_version(),
        cpu_features=_attempt(_cpu_features, ()),
        gpus=gpus,
        has_mps=_attempt(_has_mps, False),
        torch=torch,
        torch_cuda=cuda,
        gpu_problem=problem,
    )


def pick_device(requested: str, hardware: Hardware) -> tuple[str, tuple[str, ...]]:
    """Choose where to run.

    Parameters
    ----------
    requested
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``. What is named is taken or refused.
    hardware
        What `probe_hardware` found.

    Returns
    -------
    device
        A device name for torch.
    reasons
        For each device that was passed over, why; and what is tight on the chosen one.

    Raises
    ------
    ConfigError
        For a name that is no device.
    ResourceError
        When the named device cannot be used.
    """
    if requested == "cpu":
        return "cpu", ()
    if requested == "mps":
        if not hardware.has_mps:
            raise ResourceError("device mps: torch finds no Apple GPU on this machine; choose cpu or auto")
        return "mps", ()
    if requested == "cuda" or requested.removeprefix("cuda:").isdecimal():
        return _named_card(requested, hardware)
    if requested != "auto":
        raise ConfigError(f"device {requested!r}: not known; expected auto, cpu, cuda or mps")
    passed_over = tuple(
        f"{gpu.name} ({gpu.device}) is not used: {why}" for gpu in hardware.gpus if (why := _unfit(gpu))
    )
    usable = [gpu for gpu in hardware.gpus if not _unfit(gpu)]
    if usable:
        return _freest(usable).device, passed_over
    if hardware.has_mps:
        return "mps", passed_over
    return "cpu", passed_over or ((f"no GPU is used: {hardware.gpu_problem}",) if hardware.gpu_problem else ())


def environment_report(hardware: Hardware) -> dict[str, Any]:
    """Return versions, platform and devices as plain data for `environment.json`. Nothing is imported for it."""
    return {"packages": {name: package_version(name) for name in _PACKAGES}, "hardware": hardware.to_dict()}


def has_kernels(capability: tuple[int, int], arch_list: Sequence[str]) -> bool:
    """Whether a torch build has code for a card.

    Parameters
    ----------
    capability
        Of the card.
    arch_list
        As `torch.cuda.get_arch_list` gives: ``sm_86`` is machine code, for cards of the same major and at least that
        minor version; ``compute_86`` is PTX, for all later cards; a final ``a`` binds either to this very version,
        ``f`` to its major version.
    """
    return not arch_list or any(_runs_on(capability, arch) for arch in arch_list)


def _runs_on(capability: tuple[int, int], arch: str) -> bool:
    kind, _, number = arch.partition("_")
    digits = number.rstrip("af")
    if kind not in ("sm", "compute") or not digits.isdecimal():
        return True  # ROCm's gfx names, and whatever comes later, are torch's to judge
    built = (int(digits) // 10, int(digits) % 10)
    if number.endswith("a"):
        return capability == built
    if kind == "sm" or number.endswith("f"):
        return capability[0] == built[0] and capability >= built
    return capability >= built


def _attempt(probe: Callable[[], T], otherwise: T) -> T:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe()
    except Exception as error:  # drivers and half-installed libraries raise anything
        logger.warning("%s: %s: %s", getattr(probe, "__name__", probe), type(error).__name__, error)
        return otherwise


def _cpu_name() -> str:
    for line in read_text(_CPUINFO).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    return platform.processor()


def _cpu_features() -> tuple[str, ...]:
    """From the kernel where it tells, else from torch, whose way of asking differs between versions."""
    for line in read_text(_CPUINFO).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return tuple(name for name in _FEATURES if name in value.split())
    import torch.cpu

    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    found = {name for name, theirs in _FEATURES.items() if capabilities.get(theirs)}
    for name, question in (("avx512_bf16", "_is_avx512_bf16_supported"), ("amx_bf16", "_is_amx_tile_supported")):
        if getattr(torch.cpu, question, bool)():
            found.add(name)
    return tuple(name for name in _FEATURES if name in found)


def _torch_build() -> tuple[str | None, str | None, str]:
    import torch

    cuda = torch.version.cuda
    if cuda is None and getattr(torch.version, "hip", None):
        cuda = f"ROCm {torch.version.hip}"
    problem = ""
    if cuda is None and shutil.which("nvidia-smi"):
        problem = (
            f"this torch ({torch.__version__}) is built without CUDA, but the machine has an NVIDIA driver; "
            "install torch and torchvision built for CUDA"
        )
    return torch.__version__, cuda, problem


def _probe_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Cards, and why there is none, in torch's own words where it warns (as it does for a driver that is too old)."""
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return (), "CUDA_VISIBLE_DEVICES hides all cards"
        return (), " ".join(str(said[-1].message).split()) if said else ""
    # One broken card must not hide the others.
    count = torch.cuda.device_count()
    cards = [card for index in range(count) if (card := _attempt(functools.partial(_probe_gpu, index), None))]
    return tuple(cards), "" if cards else f"the driver lists {count} cards, but none answers; restart the machine"


def _probe_gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    arch_list = torch.cuda.get_arch_list()
    usable = has_kernels(capability, arch_list)
    free = _attempt(functools.partial(_free_on_card, index), 0)
    advice = "" if usable else kernel_advice(capability, arch_list, torch.__version__)
    return Gpu(index, properties.name, properties.total_memory / GB, free / GB, capability, usable, advice)


def _free_on_card(index: int) -> int:
    """Free bytes, with those that torch keeps for reuse in this process."""
    import torch

    free, _ = torch.cuda.mem_get_info(index)
    return int(free) + torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


def kernel_advice(capability: tuple[int, int], arch_list: Sequence[str], torch_version: str) -> str:
    """Say in one sentence what to install for a card that this torch has no code for.

    Parameters
    ----------
    capability
        Of the card.
    arch_list
        What torch was built for.
    torch_version
        Of the installed torch.
    """
    found = f"torch {torch_version} has no kernels for compute capability {capability[0]}.{capability[1]}"
    built = sorted(int(digits) for arch in arch_list if (digits := arch.partition("_")[2].rstrip("af")).isdecimal())
    if capability < (5, 0):
        return f"{found}, nor has any torch that this package works with; train on the CPU"
    if capability < (7, 5):
        return f"{found}; install torch 2.14 or older built for CUDA 12.6, with the torchvision built for it"
    if built and capability[0] * 10 + capability[1] > built[-1]:
        return f"{found}; install a newer torch, with the torchvision built for it"
    return f"{found} (it has {', '.join(arch_list)}); install the official torch and torchvision for CUDA"


def _unfit(gpu: Gpu) -> str:
    """Why a card is not chosen unless asked for; empty when it may be."""
    if not gpu.has_kernels:
        return gpu.advice or "this torch has no kernels for it"
    if gpu.memory_free_gb < MIN_FREE_GPU_GB:
        return (
            f"{gpu.memory_free_gb:.1f} of {gpu.memory_total_gb:.1f} GB are free, and training takes at least "
            f"{MIN_FREE_GPU_GB:.0f} GB; close what uses it"
        )
    return ""


def _freest(gpus: Sequence[Gpu]) -> Gpu:
    return max(gpus, key=lambda gpu: (gpu.memory_free_gb, -gpu.index))


def _named_card(requested: str, hardware: Hardware) -> tuple[str, tuple[str, ...]]:
    if not hardware.gpus:
        why = hardware.gpu_problem or (
            f"torch {hardware.torch} (CUDA {hardware.torch_cuda}) finds no card; see whether nvidia-smi shows one"
            if hardware.torch_cuda
            else f"torch {hardware.torch} is built without CUDA; install torch and torchvision built for CUDA"
        )
        raise ResourceError(f"device {requested}: {why}; or choose cpu or auto")
    wanted = [gpu for gpu in hardware.gpus if requested in ("cuda", f"cuda:{gpu.index}")]
    if not wanted:
        known = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in hardware.gpus)
        raise ResourceError(f"device {requested}: there is no such card; there is {known}")
    usable = [gpu for gpu in wanted if gpu.has_kernels]
    if not usable:
        raise ResourceError(
            *(f"device {requested}: {gpu.name}: {_unfit(gpu)}; or choose cpu or auto" for gpu in wanted)
        )
    card = _freest(usable)
    tight = _unfit(card)
    return card.device, (f"{card.name} ({card.device}): {tight}",) if tight else ()


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def package_version(distribution: str) -> str | None:
    """Return the version of an installed package; `None` where none is known."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
