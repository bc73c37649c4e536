"""The training loop: a generator of events that can be stopped and continued at every step."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch.amp import GradScaler
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from napari_resfinetune.config import TrainingConfig
from napari_resfinetune.data.patches import Patch
from napari_resfinetune.errors import ResFinetuneError, TrainingError
from napari_resfinetune.events import (
    Checkpointed,
    EpochEnded,
    Event,
    Finished,
    MemoryLever,
    Message,
    Started,
    Status,
    Step,
    StopToken,
)
from napari_resfinetune.models import save_adapter, save_model
from napari_resfinetune.planning.allocator import switch_freed_memory
from napari_resfinetune.planning.levers import at_most, pull_lever
from napari_resfinetune.planning.limits import WORKER_GB, widen_cap
from napari_resfinetune.planning.memory import MemoryGauge, MemoryWatch
from napari_resfinetune.training.checkpoints import (
    Progress,
    find_checkpoint,
    keep_checkpoint,
    load_training,
    load_weights,
    save_checkpoint,
)
from napari_resfinetune.training.feature_cache import FeatureCache
from napari_resfinetune.training.frozen import announce, open_features
from napari_resfinetune.training.job import TrainingJob
from napari_resfinetune.training.loading import load_batches, samples_of_step
from napari_resfinetune.training.prompts import PromptPlan, plan_training_prompts, plan_validation_prompts
from napari_resfinetune.training.ranks import PeerLost, Ranks
from napari_resfinetune.training.step import Losses, backward_samples, step_settings, validate_sample
from napari_resfinetune.training.survival import OutOfMemory, free, go_back, is_out_of_memory, remember

# Weight of the instance decoder's loss in the validation metric, as in micro-sam.
INSTANCE_METRIC_WEIGHT = 1 / 3
# First words of the random streams, so that patches (1, 2, 5), prompts, validation and dropout never share numbers.
PROMPT_STREAM, VALIDATION_STREAM, DROPOUT_STREAM = 3, 4, 6
T = TypeVar("T")


class Trainer:
    """Trains a model and says what happens.

    Parameters
    ----------
    job
        What to work on.
    resume
        Continue from ``checkpoints/latest`` when there is one.
    keep_levers
        Leave what an earlier session had to switch on when its memory ran out.
    ranks
        Processes that share the training; the first of them writes.
    """

    def __init__(
        self, job: TrainingJob, *, resume: bool = False, keep_levers: bool = True, ranks: Ranks | None = None
    ) -> None:
        self.job = job
        self.ranks = ranks or Ranks()
        self.device = next(job.model.parameters()).device
        self.work = job.work
        self.gauge = MemoryGauge(str(self.device), job.memory_limit_gb)
        self.watch = MemoryWatch()
        self.plan: TrainingConfig = job.config.training
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.with_masks = self.plan.targets in ("both", "masks")
        self.with_instances = self.plan.targets in ("both", "instances")
        self.parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(self.parameters, lr=self.plan.learning_rate, fused=True)
        self.scheduler = ReduceLROnPlateau(
            self.optimizer, mode="min", factor=self.plan.plateau_factor, patience=self.plan.plateau_patience
        )
        self.scaler = GradScaler(self.device.type) if job.use_scaler else None
        self.progress = Progress()
        self._clock = self._saved = time.monotonic()
        latest = find_checkpoint(job.run.latest) if resume else None
        if latest is not None:
            load_weights(latest, job.model)
            self.progress = load_training(latest, self.optimizer, self.scheduler, self.scaler)
            if not keep_levers:
                self.progress.levers.clear()
            self.work = at_most(self.work, self.progress.levers)
        self.settings = step_settings(self.work)
        self._notes: list[str] = []
        self._pending: list[Event] = []
        # Whether weights and progress belong together, so that they may be saved.
        self._between_steps = True
        self.features = None
        if self.work.keep_features:
            self.features = open_features(job.config, job.run, job.model, self.settings, self._notes.append)

    def run(self, stop: StopToken) -> Generator[Event, None, None]:
        """Train until the last epoch, early stopping, or a request to stop; then write ``model.pt``.

        Raises
        ------
        OutOfMemory
            When memory ran out and no lever is left; ``checkpoints/latest`` is where it stood.
        TrainingError
            When the loss is no longer a number, or another process of the run has ended.
        """
        try:
            yield from self._run(stop)
        except PeerLost as error:
            raise self._end_alone(error) from None

    def _run(self, stop: StopToken) -> Generator[Event, None, None]:
        progress = self.progress
        self._clock = time.monotonic() - progress.seconds
        self._saved = time.monotonic()
        yield self._started()
        status = self._ended()
        with self.watch:
            if progress.step == self.steps_per_epoch:  # memory had run out in its validation
                yield from self._end_epoch()
                status = self._ended()
            if self.features is not None and status is None:
                features = self.features
                yield Message(
                    (yield from self._surviving(lambda: self.ranks.together(lambda: self._announce(features))))
                )
            for batch in self._batches() if status is None else ():
                if self.ranks.any(stop.stopped):
                    status = "stopped"
                    yield self._save("latest")
                    break
                yield from self._pending
                self._pending.clear()
                yield from self._train_step(batch)
                if progress.step == self.steps_per_epoch or self._time_is_over():
                    yield from self._end_epoch()
                    status = self._ended()
                elif time.monotonic() - self._saved > self.plan.save_minutes * 60:
                    yield self._save("latest")
                while self._notes:
                    yield Message(self._notes.pop(0))
                if status is not None:
                    break
                yield from self._stay_inside()
        self.write_best()
        if status != "stopped" and self.ranks.is_first:
            shutil.rmtree(self.job.run.features, ignore_errors=True)
        yield Finished(
            status=status or "finished",
            best_epoch=progress.best_epoch,
            best_metric=progress.best_metric if progress.best_epoch >= 0 else None,
            peak_memory_gb=self.gauge.read().peak_gb,
            seconds=progress.seconds,
        )

    def _ended(self) -> Status | None:
        """Say whether the run is over, between two epochs."""
        progress, patience = self.progress, self.plan.early_stopping
        if progress.epoch >= self.plan.epochs or (progress.step == 0 and self._time_is_over()):
            return "finished"
        if progress.step == 0 and patience is not None and progress.epoch - 1 - progress.best_epoch >= patience:
            return "early_stopped" if progress.best_epoch >= 0 else None
        return None

    def _time_is_over(self) -> bool:
        """Say so to all processes alike, whose clocks differ."""
        minutes = self.plan.minutes
        return minutes is not None and self.ranks.any(self.progress.seconds >= 60 * minutes)

    def _fail(self, what: str) -> TrainingError:
        """Save what was reached and return the error to raise."""
        model = self.write_best()
        saved = f"; the best model so far is {model}" if model else ""
        return TrainingError(
            f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}: {what} is no longer a number{saved}; "
            "train again with a lower training.learning_rate or with resources.precision=fp32"
        )

    def write_best(self) -> Path | None:
        """Write the best checkpoint as ``model.pt``; without one yet there is nothing to write."""
        best = find_checkpoint(self.job.run.best)
        if best is None or not self.ranks.is_first:
            return None
        load_weights(best, self.job.model)
        data = self.job.config.data
        meta = {
            "start_model": self.job.config.model,
            "strategy": self.job.config.strategy.kind,
            "best_epoch": self.progress.best_epoch,
            "patch_px": self.job.inference_patch_px,
            "percentiles": list(data.percentiles),
            **({"channels": list(data.channels)} if data.channels is not None else {}),
        }
        save_model(self.job.run.model, self.job.model, meta)
        if self.job.model.lora is not None and self.job.base_is_lasting:
            save_adapter(self.job.run.adapter, self.job.model, self.job.config.model, meta)
        return self.job.run.model

    def release(self) -> None:
        """Give back what only further steps would need; the trainer is done then."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        free()

    def _announce(self, features: FeatureCache) -> str:
        job = self.job
        return announce(features, job.model, self.settings, job.training, job.validation, self.plan.samples_per_epoch)

    def _started(self) -> Started:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.job.model.parameters()]
        autocast = self.settings.autocast
        return Started(
            run_dir=str(self.job.run.path),
            device=str(self.device),
            precision=str(autocast).removeprefix("torch.") if autocast is not None else "float32",
            epochs=self.plan.epochs,
            steps_per_epoch=self.steps_per_epoch,
            epoch=self.progress.epoch,
            step=self.progress.step,
            trainable_parameters=sum(count for count, learns in counts if learns),
            total_parameters=sum(count for count, _ in counts),
            memory_limit_gb=self.job.memory_limit_gb,
        )

    def _batches(self) -> Iterator[Sequence[Patch]]:
        """Load patches from where the run stands; the loader starts again when the number of its processes changed."""
        pinned = self.device.type == "cuda"
        while True:
            workers = self.work.workers
            try:
                loader = load_batches(self.job.training, self.progress, self.plan, workers, self.ranks, pinned=pinned)
                for batch in loader:
                    yield batch
                    if self.work.workers != workers:
                        break
                else:
                    return
                continue
            except MemoryError as error:
                reason = f"no memory to load an image ({error})"
            free()
            self._pending.append(self._pull_lever(reason))

    def _surviving(self, attempt: Callable[[], T]) -> Generator[Event, None, T]:
        """Return what an attempt gives; when memory runs out, pull a lever and try again from the same state."""
        while True:
            before = remember(self.job.model, self.scaler)
            try:
                return attempt()
            except PeerLost:
                self.scaler = go_back(before, self.job.model, self.optimizer, self.scaler)
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # What the CPU's allocator says is about its own source code.
                said = "" if "alloc_cpu" in str(error) else str(error).partition("\n")[0]
                reason = f"out of memory on {self.device}{f': {said}' if said else ''}"
            # Only here, behind the handler, is what the attempt held no longer held by its traceback.
            self.scaler = go_back(before, self.job.model, self.optimizer, self.scaler)
            yield self._pull_lever(reason)

    def _stay_inside(self) -> Iterator[Event]:
        """Pull a lever when the last step took more than it may, where no system enforces the limit."""
        limit_gb = self.job.memory_limit_gb
        if limit_gb is None or self.device.type != "cpu":
            return
        taken_gb = self.watch.peak_gb - self.job.foreign_gb + WORKER_GB * self.work.workers
        if self.ranks.any(taken_gb > limit_gb):
            self.optimizer.zero_grad(set_to_none=True)
            yield self._pull_lever(f"{taken_gb:.1f} GB were taken, {limit_gb:.1f} GB are allowed")
            free()
            self.watch.forget()

    def _pull_lever(self, reason: str) -> MemoryLever:
        """Make the work smaller, or end the run where nothing is left."""
        allowed = self.job.config.resources.levers == "auto"
        smaller = pull_lever(self.work, ran_out=True) if allowed else None
        if smaller is None:
            raise self._give_up(reason)
        self.work, pulled = smaller
        self.settings = step_settings(self.work)
        self.progress.levers[pulled.lever.partition(".")[2]] = pulled.after
        if pulled.lever == "resources.workers":
            widen_cap(WORKER_GB * (pulled.before - pulled.after))
        switch_freed_memory(self.work.freed_memory)
        return MemoryLever(pulled.lever, str(pulled.before), str(pulled.after), reason, pulled.changes_training)

    def _give_up(self, reason: str) -> OutOfMemory:
        free()
        where = f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}"
        saved = "the run is saved as it stood"
        try:
            if self._between_steps:
                self._save("latest")
            else:
                saved = "it was in the middle of a step; its last checkpoint stays"
        except (ResFinetuneError, MemoryError):
            saved = "there was no memory left to save it; its last checkpoint stays"
        if find_checkpoint(self.job.run.latest) is None:
            saved = "nothing is saved yet"
        saved += f"; with more memory: resfinetune resume {self.job.run.path} --set resources.memory_gb=N"
        left = "nothing is left to make the step smaller"
        if self.job.config.resources.levers == "off":
            left = "resources.levers is off, so nothing is switched on to save memory"
        return OutOfMemory(f"{where}: {reason}; {left}; {saved}")

    def _train_step(self, batch: Sequence[Patch]) -> Iterator[Event]:
        started = time.monotonic()
        progress = self.progress
        self.job.model.train()
        updates = [(self.with_masks, self.with_instances)]
        if self.plan.update == "alternating" and all(updates[0]):
            updates = [(True, False), (False, True)]
        losses: list[Losses] = []
        for number, parts in enumerate(updates):
            self._between_steps = number == 0
            found = yield from self._surviving(lambda number=number, parts=parts: self._update(batch, number, *parts))  # type: ignore[misc]
            losses = (
                [replace(one, instance=other.instance) for one, other in zip(losses, found, strict=True)]
                if losses
                else found
            )
        self._between_steps = True
        loss = _mean([sample.total for sample in losses])
        reading = self.gauge.read()
        event = Step(
            epoch=progress.epoch,
            step=progress.step,
            loss=loss,
            mask_loss=_mean_part(losses, "mask"),
            iou_loss=_mean_part(losses, "iou"),
            instance_loss=_mean_part(losses, "instance"),
            seconds=time.monotonic() - started,
            memory_gb=reading.now_gb,
            peak_memory_gb=reading.peak_gb,
        )
        progress.step += 1
        progress.loss_sum += loss
        progress.seconds = time.monotonic() - self._clock
        yield event

    def _update(self, batch: Sequence[Patch], number: int, with_masks: bool, with_instances: bool) -> list[Losses]:
        """Take one optimizer step, unless the loss is no longer a number; return the losses of all its samples."""
        count = samples_of_step(self.plan, self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        own = self.ranks.together(lambda: self._add_gradients(batch, count, number, with_masks, with_instances))
        with self._no_way_back():
            losses = self._gather(own, count, with_masks, with_instances)
            self.ranks.add_gradients(self.parameters)
            self._apply(losses)
        return losses

    @contextlib.contextmanager
    def _no_way_back(self) -> Iterator[None]:
        """End the run where one of several processes cannot try again alone: the others have gone on."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if self.ranks.size == 1 or not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}: memory ran out while several "
                "processes put their gradients together; allow more memory, or use fewer processes"
            ) from None

    def _apply(self, losses: Sequence[Losses]) -> None:
        if not all(math.isfinite(sample.total) for sample in losses):
            raise self._fail("the loss")
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _add_gradients(
        self, batch: Sequence[Patch], count: int, number: int, with_masks: bool, with_instances: bool
    ) -> list[Losses]:
        """Add the gradients of this process's samples, of `count` that the step has, and return their losses."""
        step = self.progress.epoch * self.steps_per_epoch + self.progress.step
        plans = [self._training_prompts(patch, step) if with_masks else None for patch in batch]
        losses: list[Losses] = []
        at_once = self.work.micro_batch
        for first in range(0, len(batch), at_once):
            chosen = slice(first, first + at_once)
            # Dropout of adapters draws from torch's generators, on whatever device: the same numbers for a sample.
            stream = [self.plan.seed, DROPOUT_STREAM, step, number, self.ranks.own(count)[first]]
            torch.manual_seed(int(np.random.SeedSequence(stream).generate_state(1)[0]))
            losses += backward_samples(
                self.job.model,
                batch[chosen],
                plans[chosen],
                self.settings,
                train_instances=with_instances,
                weight=1 / count,
                scaler=self.scaler,
                features=self.features,
            )
        return losses

    def _gather(self, own: Sequence[Losses], count: int, with_masks: bool, with_instances: bool) -> list[Losses]:
        """Return the losses of all processes' samples, in their order."""
        if self.ranks.size == 1:
            return list(own)
        rows = self.ranks.gather([[loss.mask or 0.0, loss.iou or 0.0, loss.instance or 0.0] for loss in own], count)
        return [
            Losses(mask if with_masks else None, iou if with_masks else None, instance if with_instances else None)
            for mask, iou, instance in rows
        ]

    def _end_alone(self, error: PeerLost) -> TrainingError:
        """Save where the run stood, and return the error that ends it, when another of its processes is gone."""
        folder = self.job.run.path
        if self.ranks.is_first and self._between_steps:
            self._save("latest")
        there = find_checkpoint(self.job.run.latest) is not None
        saved = "its last checkpoint is whole; go on" if there else "nothing is saved yet; begin again"
        return TrainingError(
            f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}: {error}; {saved} with: resfinetune "
            f"resume {folder}"
        )

    def _end_epoch(self) -> Iterator[Event]:
        progress = self.progress
        metric, mask, instance = yield from self._surviving(self._validate)
        if not math.isfinite(metric):
            raise self._fail("the validation metric")
        progress.seconds = time.monotonic() - self._clock
        self.scheduler.step(metric)
        improved = metric < progress.best_metric
        if improved:
            progress.best_metric, progress.best_epoch = metric, progress.epoch
        ended = EpochEnded(
            epoch=progress.epoch,
            train_loss=progress.loss_sum / progress.step,
            metric=metric,
            mask_metric=mask,
            instance_metric=instance,
            best_metric=progress.best_metric,
            best_epoch=progress.best_epoch,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=progress.seconds,
            peak_memory_gb=self.gauge.read().peak_gb,
            memory_limit_gb=self.job.memory_limit_gb,
        )
        progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
        yield ended
        if improved:
            yield self._save("best")
        yield self._save("latest")
        if self.plan.keep_every and progress.epoch % self.plan.keep_every == 0 and self.ranks.is_first:
            kept = keep_checkpoint(self.job.run.latest, f"epoch-{progress.epoch:04d}")
            yield Checkpointed(str(kept), kept.name, ended.epoch)

    def _validate(self) -> tuple[float, float | None, float | None]:
        """Return the metric, the mean dice error of the masks and the mean loss of the instance decoder."""
        count = len(self.job.validation)
        own = self.ranks.together(lambda: self._validate_own(count))
        losses = self._gather(own, count, self.with_masks, self.with_instances)
        mask, instance = _mean_part(losses, "mask"), _mean_part(losses, "instance")
        if mask is None or instance is None:
            return (mask if mask is not None else instance) or 0.0, mask, instance
        return mask + INSTANCE_METRIC_WEIGHT * instance, mask, instance

    def _validate_own(self, count: int) -> list[Losses]:
        self.job.model.eval()
        losses = []
        for index in self.ranks.own(count):
            patch = self.job.validation[index]
            rng = np.random.default_rng([self.plan.seed, VALIDATION_STREAM, index])
            prompts = (
                plan_validation_prompts(patch.labels, rng, index=index, objects=self.job.work.objects)
                if self.with_masks
                else None
            )
            losses.append(
                validate_sample(
                    self.job.model,
                    patch,
                    prompts,
                    self.settings,
                    with_instances=self.with_instances,
                    features=self.features,
                )
            )
        return losses

    def _training_prompts(self, patch: Patch, step: int) -> PromptPlan:
        return plan_training_prompts(
            patch.labels,
            np.random.default_rng([self.plan.seed, PROMPT_STREAM, patch.number]),
            step=step,
            objects=self.work.objects,
            sub_iterations=self.plan.sub_iterations,
            mask_prompt_probability=self.plan.mask_prompt_probability,
        )

    def _save(self, name: str) -> Checkpointed:
        folder = self.job.run.path / "checkpoints" / name
        self._saved = time.monotonic()
        if not self.ranks.is_first:
            return Checkpointed(str(folder), name, self.progress.epoch)
        if name == "best":
            save_checkpoint(folder, self.job.model, self.progress)
        else:
            save_checkpoint(folder, self.job.model, self.progress, self.optimizer, self.scheduler, self.scaler)
        return Checkpointed(str(folder), name, self.progress.epoch)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_part(losses: Sequence[Losses], part: str) -> float | None:
    values = [getattr(sample, part) for sample in losses]
    return None if values[0] is None else _mean(values)
