"""What it takes to try a step again after memory ran out: to notice it, and to be back where the step began."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from napari_resfinetune.errors import ResourceError
from napari_resfinetune.models import SamModel
from napari_resfinetune.planning.allocator import return_free_memory
from napari_resfinetune.planning.limits import renew_cap

# What a CPU, oneDNN, the C++ library and an Apple GPU say; CUDA has an exception of its own, and so has Python.
WORDS = (
    "DefaultCPUAllocator",
    "could not create a primitive",
    "could not create a memory",
    "bad_alloc",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
)


class OutOfMemory(ResourceError):
    """Memory ran out and no lever is left."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


@dataclass(frozen=True)
class Before:
    """What a step changes before its optimizer does: statistics of batch norms, and the scale of losses."""

    buffers: tuple[Tensor, ...]
    scale: dict[str, Any] | None


def remember(model: SamModel, scaler: GradScaler | None) -> Before:
    """Copy what an attempt at a step may change."""
    buffers = tuple(buffer.detach().clone() for buffer in _buffers(model))
    return Before(buffers, None if scaler is None else scaler.state_dict())


def go_back(before: Before, model: SamModel, optimizer: Optimizer, scaler: GradScaler | None) -> GradScaler | None:
    """Undo an attempt, free what it took, and return the scaler to use from now on."""
    with torch.no_grad():
        for buffer, old in zip(_buffers(model), before.buffers, strict=True):
            buffer.copy_(old)
    optimizer.zero_grad(set_to_none=True)
    # Moments are made at the first step, one by one; half-made ones would be taken for whole.
    for parameter in [p for p, state in optimizer.state.items() if "exp_avg_sq" not in state]:
        del optimizer.state[parameter]
    # A step that runs out leaves the scale on the optimizer, and the next one would divide by it once more.
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)
    free()
    if scaler is None or before.scale is None:
        return None
    fresh = GradScaler(next(model.parameters()).device.type)
    fresh.load_state_dict(before.scale)
    return fresh


def free() -> None:
    """Give what nobody holds any more back to the device and the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_free_memory()
    renew_cap()


def _buffers(model: SamModel) -> list[Tensor]:
    parts = [part for part in (model.sam, model.instance_decoder) if part is not None]
    return [buffer for part in parts for name, buffer in part.named_buffers() if "running_" in name or "num_b" in name]
