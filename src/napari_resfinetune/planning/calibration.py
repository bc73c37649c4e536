"""What this machine made of earlier runs, kept in one small file, so that the next prediction is nearer."""

from __future__ import annotations

import functools
import time
from typing import Any

from napari_resfinetune.config.cache import read_cached, write_cached
from napari_resfinetune.planning.hardware import Hardware
from napari_resfinetune.planning.levers import Work
from napari_resfinetune.planning.planner import Rates, own_memory_gb

# How much the newest run counts, and how far one may pull the prediction.
_WEIGHT = 0.5
_MEMORY_RANGE = (0.85, 1.2)
_SECONDS_RANGE = (0.3, 4.0)
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 4096, "mps": 2048}
# Own memory of a run, in GB, from which on it tells something about others.
_TELLING_GB = 2.0
_MEASURE_SECONDS = 0.3
FILE = "machine.json"


def rates_here(work: Work, hardware: Hardware, device: str, threads: int) -> Rates:
    """Return what this machine makes of a step; once in a process it measures a matrix product for that."""
    known = _read()
    speed = known.get(_speed_key(work, hardware, device, threads), {})
    memory = known.get(_memory_key(work, hardware, device), {})
    # A busy moment makes a machine look slow, never fast.
    tflops, now = speed.get("tflops", 0.0), _measure_tflops(work.precision, device, threads)
    if now > tflops:
        # The factor belongs to the rate that it was learned with.
        factor = speed.get("factor", 1.0) * now / tflops if "factor" in speed and tflops else None
        tflops = now
        speed = {**speed, "tflops": tflops, **({} if factor is None else {"factor": factor})}
        _merge(_speed_key(work, hardware, device, threads), speed)
    return Rates(
        tflops=tflops,
        memory_factor=memory.get("factor", 1.0),
        seconds_factor=speed.get("factor", 1.0),
        measured="factor" in memory or "factor" in speed,
    )


def learn_from_run(
    work: Work,
    hardware: Hardware,
    device: str,
    threads: int,
    rates: Rates,
    *,
    predicted_gb: float | None = None,
    measured_gb: float | None = None,
    predicted_seconds: float | None = None,
    measured_seconds: float | None = None,
) -> None:
    """Remember how far a run was from its prediction, which had the factors of `rates`."""
    known = _read()
    for key, predicted, measured, allowed in (
        (_memory_key(work, hardware, device), predicted_gb, measured_gb, _MEMORY_RANGE),
        (_speed_key(work, hardware, device, threads), predicted_seconds, measured_seconds, _SECONDS_RANGE),
    ):
        if not predicted or not measured:
            continue
        before = known.get(key, {}).get("factor", 1.0)
        planned_with = rates.memory_factor if allowed is _MEMORY_RANGE else rates.seconds_factor
        if allowed is _MEMORY_RANGE:
            # Libraries are the same whatever the model; the factor is for the rest.
            rest_gb = own_memory_gb(predicted, work)
            # Of a card only tensors are measured, which is not what is predicted.
            if work.device != "cpu" or rest_gb < _TELLING_GB:
                continue
            now = planned_with * own_memory_gb(measured, work) / rest_gb
        else:
            now = planned_with * measured / predicted
        factor = (1 - _WEIGHT) * before + _WEIGHT * now
        _merge(key, {"factor": round(min(max(factor, allowed[0]), allowed[1]), 4)})


def _memory_key(work: Work, hardware: Hardware, device: str) -> str:
    return f"memory, {_name(hardware, device)}, {work.freed_memory}"


def _speed_key(work: Work, hardware: Hardware, device: str, threads: int) -> str:
    return f"speed, {_name(hardware, device)}, {work.precision}, {threads} threads"


def _name(hardware: Hardware, device: str) -> str:
    card = hardware.gpu(device)
    return card.name if card is not None else f"{hardware.cpu} {'mps' if device == 'mps' else ''}".strip()


@functools.cache
def _measure_tflops(precision: str, device: str, threads: int) -> float:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = _PRODUCT_SIDE[device.partition(":")[0]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        (a @ b).sum().item()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < _MEASURE_SECONDS:
            (a @ b)[0, 0].item()
            done += 1
        return float(2 * size**3 * done / (time.perf_counter() - started) / 1e12)
    finally:
        torch.set_num_threads(before)


def _read() -> dict[str, Any]:
    return {
        key: {n: v for n, v in entry.items() if isinstance(v, int | float) and v > 0}
        for key, entry in read_cached(FILE).items()
        if isinstance(entry, dict)
    }


def _merge(key: str, values: dict[str, float]) -> None:
    """Put figures into the file; two processes at once may lose one of theirs, which the next run brings again."""
    known = _read()
    write_cached(FILE, {**known, key: {**known.get(key, {}), **values}})
