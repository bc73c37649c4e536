"""Where the time and memory of one training step go, part by part, and how far that is from the machine's own rate.

    python benchmarks/profile_step.py --model vit_b --objects 10
    python benchmarks/profile_step.py --part mask-decoder --ops 15

For each part: seconds forward and backward (medians), memory that it keeps for its backward pass, the most that the
process (on CUDA, the tensors) held meanwhile, floating-point operations, and the rate in relation to a plain matrix
product of this machine in the same number format. `--ops` also lists the operators that one part spends most time in.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import make_patch, make_settings, patch_px_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from napari_resfinetune.models import load_model
from napari_resfinetune.planning import freed_memory, peak_memory_gb
from napari_resfinetune.training import step as training_step
from napari_resfinetune.training.prompts import plan_training_prompts

PARTS = ("image-encoder", "instance-decoder", "mask-decoder", "prompts", "optimizer")


def main() -> None:
    """Profile a step and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b", choices=("vit_t", "vit_b", "vit_l", "vit_h"))
    parser.add_argument("--objects", type=int, default=10)
    parser.add_argument("--sub-iterations", type=int, default=8)
    parser.add_argument(
        "--iterations", type=int, default=5, help="the first is not timed, nor the last, which counts operations"
    )
    parser.add_argument("--levers", default="", help="as for benchmarks/step.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", choices=PARTS[:3], default="mask-decoder", help="the part that --ops looks into")
    parser.add_argument("--ops", type=int, default=0, help="list so many operators of one part")
    options = parser.parse_args()
    with freed_memory("return" if "return-memory" in options.levers else "keep"):
        profile(options)


def profile(options: argparse.Namespace) -> None:
    """Time the parts of a few steps."""
    settings, targets, _ = make_settings(options.levers, options.device)
    if targets != "both" or {"alternating", "no-cache"} & set(options.levers.split(",")):
        raise SystemExit(
            "levers: a profile is of both decoders in one step, nothing frozen; leave out targets, "
            "alternating and no-cache"
        )
    model = load_model(f"random:{options.model}", decoder="new", device=options.device)
    model.train()
    patch = make_patch(options.objects, patch_px_of(settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    clock = _Clock(options.device)
    for iteration in range(options.iterations):
        clock.counting = iteration == options.iterations - 1
        with clock("prompts", "forward"):
            plan = plan_training_prompts(
                patch.labels,
                np.random.default_rng(iteration),
                step=iteration,
                objects=options.objects,
                sub_iterations=options.sub_iterations,
                mask_prompt_probability=0.5,
            )
        optimizer.zero_grad(set_to_none=True)
        looked_at = options.part if options.ops and clock.counting else None
        _one_step(model, patch, plan, settings, clock, looked_at, options.ops)
        with clock("optimizer", "forward"):
            optimizer.step()
    _print(clock, settings, options)


def _one_step(
    model: Any, patch: Any, plan: Any, settings: Any, clock: _Clock, looked_at: str | None, operators: int
) -> None:
    with _operators("image-encoder", looked_at, operators):
        with clock("image-encoder", "forward"):
            embedding, input_size = training_step.encode_patches(model, [patch], settings)
        leaf = embedding.detach().requires_grad_()
    with _operators("instance-decoder", looked_at, operators):
        with clock("instance-decoder", "forward"):
            loss = training_step.instance_part(model, leaf, patch, input_size, settings)
        with clock("instance-decoder", "backward"):
            loss.backward()
        del loss
    with _operators("mask-decoder", looked_at, operators):
        rounds = training_step.mask_part(model, leaf, plan, input_size, settings)
        while True:
            with clock("mask-decoder", "forward"):
                pair = next(rounds, None)
            if pair is None:
                break
            with clock("mask-decoder", "backward"):
                (pair[0] + pair[1]).backward()
            del pair
    gradient = leaf.grad
    with _operators("image-encoder", looked_at, operators), clock("image-encoder", "backward"):
        embedding.backward(gradient)


class _Clock:
    """Seconds per part and direction of each step, and what the last step kept and computed."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.counting = False
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.kept_gb: dict[str, float] = defaultdict(float)
        self.peak_gb: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self._running: dict[tuple[str, str], float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str, direction: str) -> Iterator[None]:
        if self.counting:  # hooks and counters take time of their own, so the last step is not timed
            counter = FlopCounterMode(display=False)
            kept = _Kept()
            with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor), counter:
                yield
            self.flops[part] += counter.get_total_flops()
            self.kept_gb[part] = max(self.kept_gb[part], kept.gb)
            return
        _forget_peak(self.device)
        started = time.perf_counter()
        yield
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self._running[part, direction] += time.perf_counter() - started
        self.peak_gb[part] = max(self.peak_gb[part], _peak_gb(self.device))
        if part == PARTS[-1]:
            for key, value in self._running.items():
                self.seconds[key].append(value)
            self._running.clear()


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_gb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else peak_memory_gb()


class _Kept:
    """Adds up the memory of tensors that autograd keeps, each storage once, parameters not."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def gb(self) -> float:
        return sum(self.storages.values()) / 1e9


@contextmanager
def _operators(part: str, looked_at: str | None, most: int) -> Iterator[None]:
    if part != looked_at:
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    by = "self_cuda_time_total" if torch.cuda.is_initialized() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=most, max_name_column_width=48))


def matrix_rate(dtype: torch.dtype, device: str, side: int = 4096) -> float:
    """Return the rate of a plain matrix product, in TFLOP/s (median)."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return 2 * side**3 / _median(once, 6) / 1e12


def _median(once: Callable[[], float], times: int) -> float:
    return statistics.median([once() for _ in range(times)][1:])


def _print(clock: _Clock, settings: Any, options: argparse.Namespace) -> None:
    dtype = settings.autocast or torch.float32
    rate = matrix_rate(dtype, options.device)
    print(f"{options.model}, {options.objects} objects, {options.device}, {dtype}, {torch.get_num_threads()} threads, ")
    print(f"levers: {options.levers or '-'}; a plain matrix product runs at {rate:.2f} TFLOP/s")
    columns = ("forward s", "backward s", "kept GB", "peak GB", "TFLOP", "at rate s", "of rate")
    print(f"{'':18}{''.join(f'{column:>11}' for column in columns)}")
    total_seconds = total_flops = 0.0
    for part in PARTS:
        forward, backward = (
            statistics.median(clock.seconds[part, way][1:] or clock.seconds[part, way] or [0.0])
            for way in ("forward", "backward")
        )
        tflop = clock.flops[part] / 1e12
        seconds = forward + backward
        total_seconds, total_flops = total_seconds + seconds, total_flops + tflop
        share = f"{tflop / rate / seconds:11.0%}" if tflop else ""
        values = (forward, backward, clock.kept_gb[part], clock.peak_gb[part], tflop, tflop / rate)
        print(f"{part:18}{''.join(f'{value:11.2f}' for value in values)}{share}")
    ideal = total_flops / rate
    print(f"{'sum':18}{total_seconds:22.2f}{'':22}{total_flops:11.2f}{ideal:11.2f}{ideal / total_seconds:11.0%}")


if __name__ == "__main__":
    main()
