"""The plan of a run: its configuration, this machine or a preset's, and what a step takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.errors import ResourceError
from napari_resfinetune.models import known_model, resolve_model
from napari_resfinetune.models.names import RANDOM_PREFIX
from napari_resfinetune.planning import (
    Hardware,
    Length,
    Limits,
    Plan,
    Preset,
    Rates,
    Work,
    device_of,
    get_preset,
    make_plan,
    rates_here,
    what_else,
    what_larger,
)
from napari_resfinetune.training.dry_run import step_cost
from napari_resfinetune.training.prepare import Setup, choose_setup, with_objects, work_of

# How far beyond its limit a prediction may be for a run to be tried all the same: it is seldom more than that too high.
TRIED_SHARE = 1.15
# A CPU that nothing is known of, in fp32.
SOME_CPU_TFLOPS = 0.3


def architecture_of(model: str) -> str:
    """Return a model's architecture; a known name is not downloaded for it."""
    known = known_model(model)
    if known is not None:
        return known.architecture
    return model.removeprefix(RANDOM_PREFIX) if model.startswith(RANDOM_PREFIX) else resolve_model(model).architecture


def length_of(config: FinetuneConfig, held_out: int) -> Length:
    """Return how often steps and validations of a run with so many held-out regions happen."""
    training = config.training
    kept = training.patch_bank or training.samples_per_epoch
    most_seconds = math.inf if training.minutes is None else 60 * training.minutes
    return Length(training.epochs, training.steps_per_epoch, held_out, kept + held_out, most_seconds)


def plan_run(config: FinetuneConfig, setup: Setup, hardware: Hardware, architecture: str, length: Length) -> Plan:
    """Plan a run on this machine.

    Parameters
    ----------
    config
        Settled, so with its number of objects.
    setup
        Device, number format and limits.
    hardware
        The machine.
    architecture
        Of the model.
    length
        How often steps happen.
    """
    work = work_of(config, architecture, setup.device, setup.precision.name, setup.workers)
    return _plan(config, work, setup.limits.deciding_gb(setup.device), length, _rates(setup, hardware))


def plan_anywhere(
    config: FinetuneConfig, hardware: Hardware, architecture: str, length: Length, *, larger: bool = False
) -> Plan:
    """Plan a run under its preset's limits, which may be those of another computer than this one.

    With `larger` its advice also says what a larger model would take, which takes as long again to find out.
    """
    if config.resources.preset != "auto":
        preset = get_preset(config.resources.preset)
        if not _is_here(preset, config, hardware):
            return _plan_elsewhere(with_objects(config, preset.name, architecture), preset, architecture, length)
        # What a preset allows is asked, not what happens to be free now.
        cards = tuple(replace(gpu, memory_free_gb=gpu.memory_total_gb) for gpu in hardware.gpus)
        hardware = replace(hardware, memory_free_gb=math.inf, gpus=cards)
    setup = choose_setup(config, hardware)
    config = with_objects(config, setup.preset, architecture)
    plan = plan_run(config, setup, hardware, architecture, length)
    if not larger or not plan.fits:
        return plan
    work = work_of(config, architecture, setup.device, setup.precision.name, setup.workers)
    said = what_larger(work, plan.limit_gb, length, step_cost, _rates(setup, hardware))
    return replace(plan, advice=(*plan.advice, *said))


def _is_here(preset: Preset, config: FinetuneConfig, hardware: Hardware) -> bool:
    """Say whether this computer has the kind of device that a preset is for, and a card as much memory."""
    device, _ = device_of(config.resources, hardware)
    card = hardware.gpu(device)
    enough = card is None or preset.gpu_memory_gb is None or card.memory_total_gb >= 0.9 * preset.gpu_memory_gb
    return device.partition(":")[0] == preset.device and enough


def _plan_elsewhere(config: FinetuneConfig, preset: Preset, architecture: str, length: Length) -> Plan:
    precision = config.resources.precision
    if precision == "auto":
        precision = preset.precision or "fp32"
    work = work_of(config, architecture, preset.device, precision, 0)
    asked_gb = config.resources.memory_gb if preset.gpu_memory_gb is None else config.resources.gpu_memory_gb
    limit_gb = asked_gb or preset.gpu_memory_gb or preset.memory_gb
    plan = _plan(config, work, limit_gb, length, lambda _: Rates(preset.tflops or SOME_CPU_TFLOPS))
    rough = f"no such device here: times are guesses from what a {preset.name} is known to reach"
    return replace(plan, advice=(*plan.advice, rough))


def _rates(setup: Setup, hardware: Hardware) -> Callable[[Work], Rates]:
    return functools.partial(rates_here, hardware=hardware, device=setup.device, threads=setup.limits.threads)


def what_would_fit(config: FinetuneConfig, setup: Setup, hardware: Hardware, plan: Plan) -> tuple[str, ...]:
    """Say what would fit where a run did not."""
    length = length_of(config, 1)
    work = replace(plan.work, object_chunk=None)
    pull_levers = config.resources.levers == "auto"
    return what_else(work, plan.limit_gb, length, step_cost, _rates(setup, hardware), pull_levers=pull_levers)


def refuse_if_hopeless(plan: Plan, config: FinetuneConfig, limits: Limits) -> None:
    """Refuse a run that is predicted to be far beyond its limit.

    Raises
    ------
    ResourceError
        With what it would take, what is allowed, and what would fit.
    """
    if plan.peak_gb > TRIED_SHARE * plan.limit_gb:
        auto = config.resources.levers == "auto"
        how = "with everything switched on that saves memory" if auto else "with resources.levers=off"
        raise ResourceError(
            f"{plan.work.architecture}, strategy {plan.work.strategy.kind}: would take {plan.peak_gb:.1f} GB {how}, "
            f"and {plan.limit_gb:.1f} GB are allowed ({limits.reason})",
            *plan.advice,
        )


def _plan(config: FinetuneConfig, work: Work, limit_gb: float, length: Length, rates: Callable[[Work], Rates]) -> Plan:
    pull_levers = config.resources.levers == "auto"
    plan = make_plan(work, limit_gb, length, step_cost, rates, pull_levers=pull_levers)
    if plan.fits:
        return plan
    return replace(plan, advice=what_else(work, limit_gb, length, step_cost, rates, pull_levers=pull_levers))
