"""The training loop: a generator of events that can be stopped and continued at every step."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.amp import GradScaler
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from napari_resfinetune.config import FinetuneConfig, TrainingConfig
from napari_resfinetune.data.patches import Patch, TrainingPatches, ValidationPatches
from napari_resfinetune.errors import ResourceError, TrainingError
from napari_resfinetune.events import (
    Checkpointed,
    EpochEnded,
    Event,
    Finished,
    Message,
    Started,
    Status,
    Step,
    StopToken,
)
from napari_resfinetune.models import SamModel, save_adapter, save_model
from napari_resfinetune.planning.memory import GB, MemoryGauge
from napari_resfinetune.training.checkpoints import (
    Progress,
    find_checkpoint,
    keep_checkpoint,
    load_training,
    load_weights,
    save_checkpoint,
)
from napari_resfinetune.training.feature_cache import FeatureCache, name_of_part
from napari_resfinetune.training.prompts import PromptPlan, plan_training_prompts, plan_validation_prompts
from napari_resfinetune.training.run_folder import RunFolder
from napari_resfinetune.training.step import (
    Losses,
    StepSettings,
    backward_samples,
    frozen_tokens,
    frozen_units,
    validate_sample,
)

# Weight of the instance decoder's loss in the validation metric, as in micro-sam.
INSTANCE_METRIC_WEIGHT = 1 / 3
SAM_INPUT_PX = 1024
# What a CPU and an Apple GPU say; CUDA has an exception of its own.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "MPS backend out of memory")
# First words of the random streams, so that patches (1, 2, 5), prompts, validation and dropout never share numbers.
PROMPT_STREAM, VALIDATION_STREAM, DROPOUT_STREAM = 3, 4, 6


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a training run works on.

    Attributes
    ----------
    config
        What was asked.
    run
        Where results go.
    model
        On its device, with `requires_grad` set by the strategy.
    training, validation
        Patches.
    settings
        How a step is computed.
    objects
        At most this many objects of a patch are prompted in a step.
    use_scaler
        Whether losses are scaled (float16).
    workers
        Processes that load patches; 0 loads in this one.
    keep_features
        Whether what the frozen part of the image encoder computes is kept on disk.
    base_is_lasting
        Whether an adapter can be put onto the start model again; fresh random weights are gone after the run.
    """

    config: FinetuneConfig
    run: RunFolder
    model: SamModel
    training: TrainingPatches
    validation: ValidationPatches
    settings: StepSettings
    objects: int
    use_scaler: bool = False
    workers: int = 0
    keep_features: bool = False
    base_is_lasting: bool = True


class Trainer:
    """Trains a model and says what happens.

    Parameters
    ----------
    job
        What to work on.
    resume
        Continue from ``checkpoints/latest`` when there is one.
    """

    def __init__(self, job: TrainingJob, *, resume: bool = False) -> None:
        self.job = job
        self.device = next(job.model.parameters()).device
        self.gauge = MemoryGauge(str(self.device))
        self.plan: TrainingConfig = job.config.training
        self.steps_per_epoch = math.ceil(self.plan.samples_per_epoch / self.plan.batch_size)
        self.with_masks = self.plan.targets in ("both", "masks")
        self.with_instances = self.plan.targets in ("both", "instances")
        parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(parameters, lr=self.plan.learning_rate, fused=True)
        self.scheduler = ReduceLROnPlateau(
            self.optimizer, mode="min", factor=self.plan.plateau_factor, patience=self.plan.plateau_patience
        )
        self.scaler = GradScaler(self.device.type) if job.use_scaler else None
        self.progress = Progress()
        self._clock = time.monotonic()
        latest = find_checkpoint(job.run.latest) if resume else None
        if latest is not None:
            load_weights(latest, job.model)
            self.progress = load_training(latest, self.optimizer, self.scheduler, self.scaler)
        self._notes: list[str] = []
        self.features = self._open_features() if job.keep_features else None

    def run(self, stop: StopToken) -> Iterator[Event]:
        """Train until the last epoch, early stopping, or a request to stop; then write ``model.pt``.

        Raises
        ------
        TrainingError
            When the loss is no longer a number.
        """
        progress = self.progress
        self._clock = time.monotonic() - progress.seconds
        yield self._started()
        status = self._ended()
        if self.features is not None and status is None:
            with self._within_memory():
                plan = self._announce(self.features)
            yield Message(plan)
        for batch in self._loader() if status is None else ():
            if stop.stopped:
                status = "stopped"
                yield self._save("latest")
                break
            with self._within_memory():
                event = self._train_step(batch)
            yield event
            if progress.step == self.steps_per_epoch:
                yield from self._end_epoch()
            while self._notes:
                yield Message(self._notes.pop(0))
            if progress.step == 0:
                status = self._ended()
                if status is not None:
                    break
        self.write_best()
        if status != "stopped":
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
        if progress.epoch >= self.plan.epochs:
            return "finished"
        if progress.step == 0 and patience is not None and progress.epoch - 1 - progress.best_epoch >= patience:
            return "early_stopped" if progress.best_epoch >= 0 else None
        return None

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
        if best is None:
            return None
        load_weights(best, self.job.model)
        data = self.job.config.data
        # A patch of this size has the scale of objects that the model was trained at when it fills SAM's whole input.
        patch_px = data.patch_px * SAM_INPUT_PX // self.plan.input_px
        meta = {
            "start_model": self.job.config.model,
            "strategy": self.job.config.strategy.kind,
            "best_epoch": self.progress.best_epoch,
            "patch_px": patch_px,
            "percentiles": list(data.percentiles),
            **({"channels": list(data.channels)} if data.channels is not None else {}),
        }
        save_model(self.job.run.model, self.job.model, meta)
        if self.job.model.lora is not None and self.job.base_is_lasting:
            save_adapter(self.job.run.adapter, self.job.model, self.job.config.model, meta)
        return self.job.run.model

    def _open_features(self) -> FeatureCache:
        """Open the cache for the weights as they are now, after those of a checkpoint are in."""
        resources, settings = self.job.config.resources, self.job.settings
        part = name_of_part(
            frozen_units(self.job.model, settings),
            input_px=settings.input_px,
            positions=settings.positions,
            autocast=str(settings.autocast),
        )
        folder = resources.feature_cache_dir or self.job.run.features
        return FeatureCache(folder, part, resources.feature_cache_gb, self._notes.append)

    def _announce(self, features: FeatureCache) -> str:
        """Say what the cache will take, after encoding one patch that is needed anyway."""
        room_gb = features.room_gb
        tokens = frozen_tokens(self.job.model, self.job.validation[0], self.job.settings, features)
        bank, gb = self.job.training.bank or 0, tokens.numel() * 2 / GB
        patches = bank + len(self.job.validation)
        epochs = math.ceil(bank / self.plan.samples_per_epoch)
        then = f"it is computed in the first {'epoch' if epochs == 1 else f'{epochs} epochs'} alone"
        if patches * gb > room_gb:
            then = f"about {max(0, int(room_gb / gb))} of them fit there, the others are computed in every epoch"
        return (
            f"frozen features: {bank} patches are drawn and used again and again (training.patch_bank); what the "
            f"frozen part makes of them and of {len(self.job.validation)} held-out ones takes up to "
            f"{patches * gb:.2f} GB in {features.folder}; {then}"
        )

    def _started(self) -> Started:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.job.model.parameters()]
        autocast = self.job.settings.autocast
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
        )

    def _loader(self) -> DataLoader[Patch]:
        return DataLoader(
            self.job.training,
            batch_sampler=_Batches(self.progress, self.plan, self.steps_per_epoch),
            num_workers=self.job.workers,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_parent,
        )

    @contextlib.contextmanager
    def _within_memory(self) -> Iterator[None]:
        """Say in our own words that memory ran out, as each kind of device does in its own."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and not any(
                words in str(error) for words in OUT_OF_MEMORY
            ):
                raise
            raise ResourceError(
                f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}: out of memory on {self.device}; "
                "set resources.object_chunk=1, choose --strategy frozen or a smaller model, or close what else uses "
                "the device; then train again"
            ) from error

    def _train_step(self, batch: Sequence[Patch]) -> Step:
        started = time.monotonic()
        progress = self.progress
        self.job.model.train()
        step = progress.epoch * self.steps_per_epoch + progress.step
        # Dropout of adapters draws from torch's generators, on whatever device: the same numbers in the same step.
        torch.manual_seed(int(np.random.SeedSequence([self.plan.seed, DROPOUT_STREAM, step]).generate_state(1)[0]))
        plans = [self._training_prompts(patch, step) for patch in batch]
        if self.plan.update == "alternating" and self.with_masks and self.with_instances:
            masks = self._update(batch, plans, train_instances=False)
            instances = self._update(batch, [None] * len(batch), train_instances=True)
            losses = [replace(one, instance=other.instance) for one, other in zip(masks, instances, strict=True)]
        else:
            losses = self._update(batch, plans, train_instances=self.with_instances)
        loss = _mean([sample.total for sample in losses])
        event = Step(
            epoch=progress.epoch,
            step=progress.step,
            loss=loss,
            mask_loss=_mean_part(losses, "mask"),
            iou_loss=_mean_part(losses, "iou"),
            instance_loss=_mean_part(losses, "instance"),
            seconds=time.monotonic() - started,
            memory_gb=self.gauge.read().now_gb,
        )
        progress.step += 1
        progress.loss_sum += loss
        progress.seconds = time.monotonic() - self._clock
        return event

    def _update(
        self, batch: Sequence[Patch], plans: Sequence[PromptPlan | None], *, train_instances: bool
    ) -> list[Losses]:
        """Take one optimizer step, unless the loss is no longer a number."""
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Losses] = []
        at_once = self.job.config.resources.micro_batch
        for first in range(0, len(batch), at_once):
            chosen = slice(first, first + at_once)
            losses += backward_samples(
                self.job.model,
                batch[chosen],
                plans[chosen],
                self.job.settings,
                train_instances=train_instances,
                weight=1 / len(batch),
                scaler=self.scaler,
                features=self.features,
            )
        if not all(math.isfinite(sample.total) for sample in losses):
            raise self._fail("the loss")
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        return losses

    def _end_epoch(self) -> Iterator[Event]:
        progress = self.progress
        with self._within_memory():
            metric, mask, instance = self._validate()
        if not math.isfinite(metric):
            raise self._fail("the validation metric")
        progress.seconds = time.monotonic() - self._clock
        self.scheduler.step(metric)
        improved = metric < progress.best_metric
        if improved:
            progress.best_metric, progress.best_epoch = metric, progress.epoch
        ended = EpochEnded(
            epoch=progress.epoch,
            train_loss=progress.loss_sum / self.steps_per_epoch,
            metric=metric,
            mask_metric=mask,
            instance_metric=instance,
            best_metric=progress.best_metric,
            best_epoch=progress.best_epoch,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=progress.seconds,
            peak_memory_gb=self.gauge.read().peak_gb,
        )
        progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
        yield ended
        if improved:
            yield self._save("best")
        yield self._save("latest")
        if self.plan.keep_every and progress.epoch % self.plan.keep_every == 0:
            kept = keep_checkpoint(self.job.run.latest, f"epoch-{progress.epoch:04d}")
            yield Checkpointed(str(kept), kept.name, ended.epoch)

    def _validate(self) -> tuple[float, float | None, float | None]:
        """Return the metric, the mean dice error of the masks and the mean loss of the instance decoder."""
        self.job.model.eval()
        losses = []
        for index in range(len(self.job.validation)):
            patch = self.job.validation[index]
            rng = np.random.default_rng([self.plan.seed, VALIDATION_STREAM, index])
            prompts = (
                plan_validation_prompts(patch.labels, rng, index=index, objects=self.job.objects)
                if self.with_masks
                else None
            )
            losses.append(
                validate_sample(
                    self.job.model,
                    patch,
                    prompts,
                    self.job.settings,
                    with_instances=self.with_instances,
                    features=self.features,
                )
            )
        mask, instance = _mean_part(losses, "mask"), _mean_part(losses, "instance")
        if mask is None or instance is None:
            return (mask if mask is not None else instance) or 0.0, mask, instance
        return mask + INSTANCE_METRIC_WEIGHT * instance, mask, instance

    def _training_prompts(self, patch: Patch, step: int) -> PromptPlan | None:
        if not self.with_masks:
            return None
        return plan_training_prompts(
            patch.labels,
            np.random.default_rng([self.plan.seed, PROMPT_STREAM, patch.number]),
            step=step,
            objects=self.job.objects,
            sub_iterations=self.plan.sub_iterations,
            mask_prompt_probability=self.plan.mask_prompt_probability,
        )

    def _save(self, name: str) -> Checkpointed:
        folder = self.job.run.path / "checkpoints" / name
        if name == "best":
            save_checkpoint(folder, self.job.model, self.progress)
        else:
            save_checkpoint(folder, self.job.model, self.progress, self.optimizer, self.scheduler, self.scaler)
        return Checkpointed(str(folder), name, self.progress.epoch)


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Batches:
    """Indices of the patches of every step from where a run stands to its last epoch."""

    def __init__(self, progress: Progress, plan: TrainingConfig, steps_per_epoch: int) -> None:
        self.first = (progress.epoch, progress.step)
        self.plan = plan
        self.steps_per_epoch = steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        samples, size = self.plan.samples_per_epoch, self.plan.batch_size
        epoch, step = self.first
        for e in range(epoch, self.plan.epochs):
            for s in range(step if e == epoch else 0, self.steps_per_epoch):
                yield [e * samples + i for i in range(s * size, min((s + 1) * size, samples))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_part(losses: Sequence[Losses], part: str) -> float | None:
    values = [getattr(sample, part) for sample in losses]
    return None if values[0] is None else _mean(values)
