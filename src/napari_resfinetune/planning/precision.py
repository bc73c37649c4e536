"""Which number format the activations get: the fastest that the device really computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from napari_resfinetune.config.schema import Precision
from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.planning.hardware import Gpu, Hardware

Format = Literal["fp32", "bf16", "fp16"]

_BF16_CPU = ("amx_bf16", "avx512_bf16")
_AMPERE = (8, 0)
_VOLTA = (7, 0)
_PASCAL = (6, 0)


@dataclass(frozen=True)
class PrecisionChoice:
    """A number format and why.

    Attributes
    ----------
    name
        ``"fp32"``, ``"bf16"`` or ``"fp16"``: what autocast computes in; weights stay fp32.
    scaler
        Whether the loss needs scaling, since small gradients vanish in this format.
    reason
        In one sentence.
    tf32
        Whether products of what stays in fp32 may be rounded to TF32 on the way.
    """

    name: Format
    scaler: bool
    reason: str
    tf32: bool = False


@contextlib.contextmanager
def tf32_as_chosen(choice: PrecisionChoice, device: str) -> Iterator[None]:
    """Let a card round products of fp32 as was chosen, and restore what the process did before."""
    if not device.startswith("cuda"):
        yield
        return
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if choice.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = choice.tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def choose_precision(requested: str, device: str, hardware: Hardware) -> PrecisionChoice:
    """Choose the number format for a device.

    Parameters
    ----------
    requested
        ``"auto"``, ``"fp32"``, ``"bf16"`` or ``"fp16"``; a named one is taken or refused, never replaced.
    device
        As `pick_device` gave it.
    hardware
        What `probe_hardware` found.

    Raises
    ------
    ConfigError
        For a name that is no number format.
    ResourceError
        When the device cannot compute in the named format, or is not there.
    """
    if requested not in get_args(Precision):
        raise ConfigError(f"precision {requested!r}: not known; expected {', '.join(get_args(Precision))}")
    kind = device.partition(":")[0]
    if requested == "fp32":
        return PrecisionChoice("fp32", False, "fp32 as asked, without TF32")
    if kind == "cpu":
        return _on_cpu(requested, hardware)
    if kind == "mps":
        return _on_mps(requested)
    card = hardware.gpu(device)
    if card is None:
        raise ResourceError(f"precision {requested}: device {device} is not on this machine; choose auto or cpu")
    return _on_card(requested, card)


def _on_cpu(requested: str, hardware: Hardware) -> PrecisionChoice:
    fast = next((feature for feature in _BF16_CPU if feature in hardware.cpu_features), None)
    if requested == "fp16":
        better = "bf16, which this CPU computes in, or fp32" if fast else "fp32"
        raise ResourceError(f"precision fp16: a CPU does not train in fp16; choose auto or {better}")
    if fast:
        return PrecisionChoice("bf16", False, f"bf16, since the CPU has {fast}")
    if requested == "bf16":
        reason = (
            "bf16 as asked; without amx_bf16 or avx512_bf16 this CPU is slower in it than in fp32, but saves memory"
        )
        return PrecisionChoice("bf16", False, reason)
    return PrecisionChoice("fp32", False, "fp32, since the CPU has neither amx_bf16 nor avx512_bf16")


def _on_mps(requested: str) -> PrecisionChoice:
    if requested != "auto":
        raise ResourceError(f"precision {requested}: on Apple GPUs only fp32 is supported; choose auto or fp32")
    return PrecisionChoice("fp32", False, "fp32, since 16-bit training on Apple GPUs lacks loss scaling")


def _on_card(requested: str, card: Gpu) -> PrecisionChoice:
    name = f"{card.name} (compute capability {card.capability[0]}.{card.capability[1]})"
    if requested == "bf16" and card.capability < _AMPERE:
        better = "fp16" if card.capability >= _VOLTA else "fp32"
        raise ResourceError(f"precision bf16: {name} cannot; it takes 8.0 or newer; choose auto or {better}")
    if requested == "fp16" and card.capability < _PASCAL:
        raise ResourceError(f"precision fp16: {name} cannot; it takes 6.0 or newer; choose auto or fp32")
    if requested == "fp16":
        slow = " and is slow in it, but saves memory" if card.capability < _VOLTA else ""
        return PrecisionChoice("fp16", True, f"fp16 with loss scaling as asked; {name} can{slow}")
    if card.capability >= _AMPERE:
        return PrecisionChoice("bf16", False, f"bf16, and TF32 for the rest, since {name} has both", tf32=True)
    if card.capability >= _VOLTA:
        return PrecisionChoice("fp16", True, f"fp16 with loss scaling, since {name} is fast in it and has no bf16")
    return PrecisionChoice("fp32", False, f"fp32, since {name} has no fast 16-bit arithmetic")
