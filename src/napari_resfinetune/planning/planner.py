"""What a run will take, and the cheapest levers that make it fit.

The bytes and operations of a step come from its own code (`training.dry_run`). What they become on a machine, where
libraries, workspaces and an allocator's holes come on top, was measured (docs/memory.md), and is corrected by what
runs on this machine really took (`planning.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from napari_resfinetune.config import FrozenStrategy
from napari_resfinetune.models.names import ARCHITECTURES
from napari_resfinetune.planning.levers import Pulled, Work, pull_lever
from napari_resfinetune.planning.limits import WORKER_GB
from napari_resfinetune.words import duration

# GB that a process takes before its first tensor: Python, torch, micro-sam; on a card also the driver's context.
LIBRARIES_GB = {"cpu": 1.0, "cuda": 3.0, "mps": 1.0}
CONTEXT_GB = 0.6
# What kernels need beside tensors and what an allocator cannot use again, in GB; see docs/memory.md.
WORKSPACE_GB = 0.25
# The same for an input of 1024 px, with whose area it grows: of the image encoder, and of each decoder that learns.
WORKSPACE_BY_AREA_GB: Mapping[Literal["keep", "return"], Mapping[str, float]] = {
    "keep": {"encoder": 0.15, "instances": 1.1, "masks": 0.6},
    "return": {"encoder": 0.05, "instances": 0.3, "masks": 0.2},
}
WORKSPACE_ON_CARD = 0.1
# How near to the rate of a large matrix product each part comes, and what levers cost beside their arithmetic.
EFFICIENCY = {"image encoder": 0.65, "instance decoder": 0.60, "mask decoder": 0.50}
RETURN_FACTOR = 1.12
# Levers are pulled until a prediction leaves this much of the limit, since it may be a little too low.
AIM = 0.95
# A validation sample goes forward only, through one or two of its rounds.
VALIDATION_SHARE = 0.3
_LIGHT = (("frozen", FrozenStrategy()),)


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step takes.

    Attributes
    ----------
    weights_gb, optimizer_gb
        Of the whole model, and of the moments of what learns.
    activations_gb
        Most that is alive beside them while each part runs, gradients included.
    tflop
        Multiplications and additions of each part, in 10**12, computed again where checkpointing does.
    frozen_tflop
        The same for frozen blocks, which run in the first epoch alone where their features are kept.
    features_gb
        What is kept of one patch.
    """

    weights_gb: float
    optimizer_gb: float
    activations_gb: Mapping[str, float]
    tflop: Mapping[str, float]
    frozen_tflop: float = 0.0
    features_gb: float = 0.0

    @property
    def tensors_gb(self) -> float:
        """Most that tensors take."""
        return self.weights_gb + self.optimizer_gb + max(self.activations_gb.values())


@dataclass(frozen=True)
class Rates:
    """What a machine makes of a step.

    Attributes
    ----------
    tflops
        10**12 operations a second in a large matrix product in the format of the activations.
    memory_factor, seconds_factor
        Measured over predicted, from earlier runs here; 1 before the first.
    measured
        Whether any was.
    """

    tflops: float
    memory_factor: float = 1.0
    seconds_factor: float = 1.0
    measured: bool = False


@dataclass(frozen=True)
class Length:
    """How often steps and validations happen."""

    epochs: int
    steps_per_epoch: int
    validation_samples: int
    patches_kept: int = 0
    most_seconds: float = math.inf


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes
    ----------
    peak_gb, limit_gb
        Predicted and allowed, of the memory that decides: the card's, or RAM.
    fits
        Whether it does.
    ram_gb
        RAM; the same as `peak_gb` on a CPU.
    breakdown_gb
        `peak_gb` by what takes it.
    seconds_per_step, seconds_first_epoch, seconds_per_epoch, seconds_at_most
        The last is all epochs, or the minutes that are allowed; early stopping may end it sooner.
    disk_gb
        Of the run folder, with its feature cache.
    levers
        What was switched on to make it fit.
    rates
        What the machine makes of it, as far as it is known.
    work
        The step that was planned.
    advice
        What else would fit, or would take more.
    """

    peak_gb: float
    limit_gb: float
    fits: bool
    ram_gb: float
    breakdown_gb: Mapping[str, float]
    seconds_per_step: float
    seconds_first_epoch: float
    seconds_per_epoch: float
    seconds_at_most: float
    disk_gb: float
    levers: tuple[Pulled, ...]
    rates: Rates
    work: Work
    advice: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether earlier runs on this machine have corrected the prediction."""
        return self.rates.measured

    def in_words(self, limit_reason: str = "") -> str:
        """Say what the run will take, in one sentence."""
        why = f" ({limit_reason})" if limit_reason else ""
        verdict = "" if self.fits else "; that may be too much"
        basis = "corrected by earlier runs here" if self.measured else "no earlier run here to compare with"
        digits = 1 if self.limit_gb > 3 else 2
        memory = f"{self.peak_gb:.{digits}f} of {self.limit_gb:.{digits}f} GB{why}"
        return (
            f"plan: about {memory}, {duration(self.seconds_per_step)} a step, {duration(self.seconds_per_epoch)} an "
            f"epoch, {duration(self.seconds_at_most)} for all epochs, {self.disk_gb:.1f} GB on disk; {basis}{verdict}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        numbers = ("peak_gb", "limit_gb", "ram_gb", "seconds_per_step", "seconds_first_epoch", "seconds_per_epoch",
                   "seconds_at_most", "disk_gb")  # fmt: skip
        return {
            **{name: round(getattr(self, name), 3) for name in numbers},
            "fits": self.fits,
            "breakdown_gb": {name: round(gb, 3) for name, gb in self.breakdown_gb.items()},
            "levers": [pulled.to_dict() for pulled in self.levers],
            "measured": self.measured,
            "architecture": self.work.architecture,
            "strategy": self.work.strategy.kind,
            "objects": self.work.objects,
            "device": self.work.device,
            "precision": self.work.precision,
            "advice": list(self.advice),
        }


CostOf = Callable[[Work], StepCost]
RatesOf = Callable[[Work], Rates]


def make_plan(
    work: Work, limit_gb: float, length: Length, cost_of: CostOf, rates_of: RatesOf, *, pull_levers: bool = True
) -> Plan:
    """Predict a run, and pull levers, cheapest first, until it fits or none is left.

    Parameters
    ----------
    work
        As the configuration has it.
    limit_gb
        What may be taken of the memory that decides.
    length
        How often steps happen.
    cost_of, rates_of
        What a step takes, and what the machine makes of it.
    pull_levers
        Without it, the work is planned as it is.
    """
    pulled: list[Pulled] = []
    while True:
        plan = _plan(work, limit_gb, length, cost_of(work), rates_of(work), tuple(_joined(pulled)))
        smaller = pull_lever(work) if pull_levers and plan.peak_gb > AIM * limit_gb else None
        if smaller is None:
            return plan
        work, lever = smaller
        pulled.append(lever)


def own_memory_gb(peak_gb: float, work: Work) -> float:
    """Return what of a peak is the model's doing, without libraries, loader processes and driver."""
    return peak_gb - sum(_foreign(work).values())


def what_larger(work: Work, limit_gb: float, length: Length, cost_of: CostOf, rates_of: RatesOf) -> tuple[str, ...]:
    """Say what the next larger model would take; arguments are those of `what_else`."""
    if work.architecture != "vit_t":  # larger ones than vit_b are seldom better for cells
        return ()
    larger = replace(work, architecture=ARCHITECTURES[ARCHITECTURES.index(work.architecture) + 1])
    plan = make_plan(larger, limit_gb, length, cost_of, rates_of)
    how = f" with {', '.join(pulled.lever for pulled in plan.levers)}" if plan.levers else ""
    verdict = "fits" if plan.fits else f"does not fit in {limit_gb:.1f} GB"
    return (
        f"{plan.work.architecture} would take {plan.peak_gb:.1f} GB{how} and "
        f"{plan.seconds_per_epoch / work_seconds(work, length, cost_of, rates_of):.1f} times the time: {verdict}",
    )


def what_else(
    work: Work, limit_gb: float, length: Length, cost_of: CostOf, rates_of: RatesOf, *, pull_levers: bool = True
) -> tuple[str, ...]:
    """Say what would fit where the work does not.

    Parameters
    ----------
    work
        Without levers, as it was asked for.
    limit_gb, length, cost_of, rates_of, pull_levers
        As for `make_plan`.
    """
    position = ARCHITECTURES.index(work.architecture)
    smaller = [
        (f"--strategy {kind}", replace(work, strategy=strategy, keep_features=True)) for kind, strategy in _LIGHT
    ]
    smaller += [
        (f"an architecture {name} model", replace(work, architecture=name)) for name in ARCHITECTURES[:position][::-1]
    ]
    half = replace(work, input_px=work.input_px // 2, patch_px=work.patch_px // 2)
    if half.input_px % 64 == 0 and half.input_px >= 128 and half.patch_px >= 64:  # as the configuration allows
        name = f"data.patch_px={half.patch_px} with training.input_px={half.input_px}"
        smaller.append((f"{name} (a quarter of the field of view)", half))
    said = []
    if not pull_levers:
        plan = make_plan(work, limit_gb, length, cost_of, rates_of)
        if plan.fits:
            said.append(f"resources.levers=auto would take {plan.peak_gb:.1f} GB and fit")
    for name, candidate in smaller:
        plan = make_plan(candidate, limit_gb, length, cost_of, rates_of, pull_levers=pull_levers)
        if plan.fits:
            said.append(f"{name} would take {plan.peak_gb:.1f} GB and fit")
    return tuple(said) or (f"nothing smaller fits into {limit_gb:.1f} GB; allow more, or use another computer",)


def work_seconds(work: Work, length: Length, cost_of: CostOf, rates_of: RatesOf) -> float:
    """Return the seconds of an epoch of the work as it is."""
    return make_plan(work, float("inf"), length, cost_of, rates_of).seconds_per_epoch


def _foreign(work: Work) -> dict[str, float]:
    if work.device == "cuda":
        return {"driver": CONTEXT_GB}
    return {"libraries": LIBRARIES_GB[work.device], "loader processes": WORKER_GB * work.workers}


def _breakdown(work: Work, cost: StepCost, rates: Rates) -> dict[str, float]:
    """Where the memory that decides goes; libraries are not the model's doing, so no run corrects them."""
    by_area = WORKSPACE_BY_AREA_GB[work.freed_memory]
    by_area_gb = sum(gb for part, gb in by_area.items() if part in ("encoder", work.targets) or work.targets == "both")
    workspace_gb = WORKSPACE_GB + by_area_gb * (work.input_px / 1024) ** 2
    biggest = max(cost.activations_gb, key=lambda part: cost.activations_gb[part])
    own = {
        "weights": cost.weights_gb,
        "optimizer": cost.optimizer_gb,
        f"activations ({biggest})": cost.activations_gb[biggest],
        "workspace": workspace_gb if work.device == "cpu" else WORKSPACE_ON_CARD * cost.tensors_gb,
    }
    own = {name: gb * rates.memory_factor for name, gb in own.items()}
    return {**_foreign(work), **own}


def _plan(
    work: Work, limit_gb: float, length: Length, cost: StepCost, rates: Rates, pulled: tuple[Pulled, ...]
) -> Plan:
    breakdown = {name: gb for name, gb in _breakdown(work, cost, rates).items() if gb}
    peak_gb = sum(breakdown.values())
    on_card = work.device == "cuda"
    slower = RETURN_FACTOR if work.freed_memory == "return" and work.device == "cpu" else 1.0
    to_seconds = slower * rates.seconds_factor / rates.tflops
    learning = sum(tflop / EFFICIENCY[part] for part, tflop in cost.tflop.items()) * to_seconds
    frozen = cost.frozen_tflop / EFFICIENCY["image encoder"] * to_seconds
    step = learning if work.keep_features else learning + frozen
    validation = step * VALIDATION_SHARE * length.validation_samples / work.batch_size
    epoch = step * length.steps_per_epoch + validation
    first = epoch + (frozen * (length.patches_kept / work.batch_size) if work.keep_features else 0.0)
    saved_gb = cost.weights_gb + cost.optimizer_gb
    # A checkpoint is written beside the one that it replaces.
    disk_gb = 2 * saved_gb + 3 * cost.weights_gb + (cost.features_gb * length.patches_kept if work.keep_features else 0)
    return Plan(
        peak_gb=peak_gb,
        limit_gb=limit_gb,
        fits=peak_gb <= limit_gb,
        ram_gb=LIBRARIES_GB["cuda"] + WORKER_GB * work.workers if on_card else peak_gb,
        breakdown_gb=breakdown,
        seconds_per_step=step,
        seconds_first_epoch=first,
        seconds_per_epoch=epoch,
        seconds_at_most=min(first + epoch * max(0, length.epochs - 1), length.most_seconds + validation),
        disk_gb=disk_gb,
        levers=pulled,
        rates=rates,
        work=work,
    )


def _joined(pulled: list[Pulled]) -> list[Pulled]:
    """Make one of several pulls of the same lever."""
    joined: dict[str, Pulled] = {}
    for each in pulled:
        first = joined.get(each.lever, each)
        joined[each.lever] = Pulled(each.lever, first.before, each.after, each.effect, each.changes_training)
    return list(joined.values())
