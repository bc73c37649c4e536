"""A training run from its configuration to its result, in this process."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from napari_resfinetune.config import FinetuneConfig, write_config
from napari_resfinetune.errors import ConfigError, ResFinetuneError, ResourceError
from napari_resfinetune.events import EpochEnded, Event, Failed, Finished, Message, OnEvent, Step, StopToken
from napari_resfinetune.models import resolve_model
from napari_resfinetune.planning import (
    Hardware,
    Plan,
    environment_report,
    freed_memory,
    learn_from_run,
    levered,
    probe_hardware,
    watched_memory_gb,
    within_limits,
)
from napari_resfinetune.planning.planner import LIBRARIES_GB
from napari_resfinetune.planning.precision import tf32_as_chosen
from napari_resfinetune.training.checkpoints import find_checkpoint
from napari_resfinetune.training.job import TrainingJob
from napari_resfinetune.training.loop import Trainer
from napari_resfinetune.training.planned import length_of, plan_run, refuse_if_hopeless, what_would_fit
from napari_resfinetune.training.prepare import (
    OpenedData,
    Setup,
    check_same_split,
    choose_setup,
    make_job,
    open_data,
    settle,
)
from napari_resfinetune.training.ranks import Ranks, joined_ranks, per_process
from napari_resfinetune.training.result import TrainResult
from napari_resfinetune.training.run_folder import RunFolder, RunLog, create_run, open_run, training_alone
from napari_resfinetune.training.survival import OutOfMemory, is_out_of_memory

# The first steps of a process warm up.
WARM_UP_STEPS = 2


class Ending(Protocol):
    """What a floor above does with a run that has ended, before it says so: compare its model, report on it."""

    def __call__(
        self, job: TrainingJob, finished: Finished, stop: StopToken, tell: OnEvent, /
    ) -> dict[str, Any] | None:
        """Return the comparison of `TrainResult`; what is worth knowing is told as events."""


def run_training(
    config: FinetuneConfig,
    images: Any = None,
    labels: Any = None,
    *,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
    resume: bool = False,
    keep_levers: bool = True,
    enforce: bool = False,
    ending: Ending | None = None,
) -> TrainResult:
    """Train, from the first check to ``model.pt``; together with other processes where the environment names them.

    Parameters
    ----------
    config
        With its output folder, which is new, or with `resume` holds the run.
    images, labels
        Where the configuration names none.
    on_event, stop
        Told what happens; asked whether to stop.
    resume
        Continue the run in the output folder.
    keep_levers
        As for `Trainer`.
    enforce
        The process is training's own: let the system keep the limits.
    ending
        Called once ``model.pt`` is written, inside the same limits.

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError, TrainingError
        Before anything is written wherever possible.
    """
    how: dict[str, Any] = {"resume": resume, "keep_levers": keep_levers}
    with joined_ranks(config) as ranks:
        return _run_training(config, images, labels, on_event, stop, ranks, ending, enforce=enforce, **how)


def _run_training(
    config: FinetuneConfig,
    images: Any,
    labels: Any,
    on_event: OnEvent | None,
    stop: StopToken | None,
    ranks: Ranks,
    ending: Ending | None,
    *,
    resume: bool,
    keep_levers: bool,
    enforce: bool,
) -> TrainResult:
    run = RunFolder(Path(str(config.output)))
    if resume and config.data.images is None and images is None:
        raise ConfigError(f"{config.output}: the run was given arrays; resume it from Python with the same arrays")
    data = open_data(config, images, labels)
    if resume:
        check_same_split(run.read_json("split.json"), data, run)
    hardware = probe_hardware()
    setup = ranks.share(choose_setup(ranks.with_own_card(config, hardware), hardware))
    location = resolve_model(config.model)
    if not resume:
        config = settle(config, setup, location)
    length = length_of(config, len(data.split.validation))
    plan = plan_run(per_process(config, ranks), setup, hardware, location.architecture, length)
    refuse_if_hopeless(plan, config, setup.limits)
    config = levered(config, plan.levers)
    foreign_gb = 0.0 if enforce else max(0.0, watched_memory_gb() - LIBRARIES_GB["cpu"])
    try:
        with (
            tf32_as_chosen(setup.precision, setup.device),
            within_limits(setup.limits, setup.device, hardware, enforce=enforce, workers=plan.work.workers),
            contextlib.ExitStack() as held,
        ):
            if resume and ranks.is_first:
                held.enter_context(training_alone(run))
                _keep_length(run, config)
            # A model that cannot be used leaves no run folder behind.
            job, learning = make_job(config, run, data, setup, location, foreign_gb)
            if not resume and ranks.is_first:
                create_run(run.path, job.config)
                held.enter_context(training_alone(run))
                run.write_json("environment.json", environment_report(hardware))
                run.write_json("plan.json", {**setup.to_dict(), **plan.to_dict()})
                run.write_json("split.json", data.split.to_dict(data.pairs))
            # What the others write into the folder must not be there before it is made.
            ranks.wait()
            opening = _opening(data, setup, plan, learning)
            learn = _Calibration(job, plan, hardware, setup) if enforce and ranks.size == 1 else None
            trainer = Trainer(job, resume=resume, keep_levers=keep_levers, ranks=ranks)
            return _run(trainer, opening, learn, on_event, stop or StopToken(), ending)
    except OutOfMemory as error:
        problems = error.problems
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problems = (f"out of memory before or after a step ({error})",)
    # Behind the handlers and the limits there is room to look for what would fit.
    raise ResourceError(*problems, *what_would_fit(config, setup, hardware, plan))


def _keep_length(run: RunFolder, config: FinetuneConfig) -> None:
    """Write down how long a run that goes on is to be, for whoever goes on with it after this."""
    _, stored = open_run(run.path)
    if stored.training != config.training:
        write_config(stored.model_copy(update={"training": config.training}), run.config)


def _run(
    trainer: Trainer,
    opening: Iterator[str],
    learn: _Calibration | None,
    on_event: OnEvent | None,
    stop: StopToken,
    ending: Ending | None,
) -> TrainResult:
    run = trainer.job.run
    # Only one of the processes of a run says what happens: the others see the same.
    log = RunLog(run, first_epoch=trainer.progress.epoch) if trainer.ranks.is_first else None
    finished = comparison = None

    def tell(event: Event) -> None:
        if log is None:
            return
        log(event)
        if on_event is not None:
            on_event(event)

    try:
        for text in opening:
            tell(Message(text))
        with (
            freed_memory(trainer.work.freed_memory),
            contextlib.closing(trainer.run(stop)) as events,
        ):
            for event in events:
                if isinstance(event, Finished):
                    finished = event
                    if ending is not None and trainer.ranks.is_first:
                        trainer.release()
                        comparison = ending(trainer.job, finished, stop, tell)
                tell(event)
                if learn is not None:
                    learn(event, trainer)
    except (ResFinetuneError, MemoryError, RuntimeError) as error:
        if isinstance(error, ResFinetuneError) or is_out_of_memory(error):
            tell(Failed(str(error), resumable=find_checkpoint(run.latest) is not None))
        raise
    finally:
        if log is not None:
            log.close()
    if finished is None:
        raise RuntimeError("the trainer ended without saying how")
    return TrainResult(
        run.path,
        finished.status,
        finished.best_epoch,
        finished.best_metric,
        finished.peak_memory_gb,
        finished.seconds,
        comparison,
    )


class _Calibration:
    """Compares the first epoch with its prediction, and remembers the difference for the next plan."""

    def __init__(self, job: TrainingJob, plan: Plan, hardware: Hardware, setup: Setup) -> None:
        self.job, self.plan, self.hardware, self.setup = job, plan, hardware, setup
        self.seconds: list[float] = []
        self.done = False

    def __call__(self, event: Event, trainer: Trainer) -> None:
        if isinstance(event, Step):
            self.seconds.append(event.seconds)
        # The epoch in which features are computed is no measure of the others.
        if not isinstance(event, EpochEnded) or self.done:
            return
        filling = math.ceil((self.job.training.bank or 0) / self.job.config.training.samples_per_epoch)
        if trainer.work.keep_features and event.epoch < filling:
            self.seconds.clear()
            return
        self.done = True
        steps = self.seconds[WARM_UP_STEPS:]
        as_planned = replace(trainer.work, keep_features=self.plan.work.keep_features) == self.plan.work
        learn_from_run(
            trainer.work,
            self.hardware,
            self.setup.device,
            self.setup.limits.threads,
            self.plan.rates,
            predicted_gb=self.plan.peak_gb if as_planned else None,
            measured_gb=event.peak_memory_gb,
            predicted_seconds=self.plan.seconds_per_step if as_planned else None,
            measured_seconds=statistics.median(steps) if steps else None,
        )


def _opening(data: OpenedData, setup: Setup, plan: Plan, report: Any) -> Iterator[str]:
    """Say in words what is about to run."""
    yield data.split.note
    yield from (str(problem) for problem in data.report.warnings)
    yield from setup.notes
    yield setup.precision.reason
    yield f"learning: {report}"
    yield plan.in_words(setup.limits.reason)
    yield from (f"to fit, {pulled}" for pulled in plan.levers)
