"""Patches in the order of training, from where a run stands."""

from __future__ import annotations

import signal
from collections.abc import Iterator

from torch.utils.data import DataLoader

from napari_resfinetune.config import TrainingConfig
from napari_resfinetune.data.patches import Patch, TrainingPatches
from napari_resfinetune.training.checkpoints import Progress
from napari_resfinetune.training.ranks import Ranks


def load_batches(
    patches: TrainingPatches, progress: Progress, plan: TrainingConfig, workers: int, ranks: Ranks, *, pinned: bool
) -> DataLoader[Patch]:
    """Return a loader of this process's patches of every step from where a run stands to its last epoch.

    Parameters
    ----------
    patches
        All there are.
    progress
        Where the run stands now.
    plan
        Epochs, samples and batch size.
    workers
        Processes that load; 0 loads in this one.
    ranks
        Processes that share every step.
    pinned
        Put patches into memory that a card can copy from in the background.
    """
    return DataLoader(
        patches,
        batch_sampler=_Batches(progress, plan, ranks),
        num_workers=workers,
        collate_fn=list,
        pin_memory=pinned,
        worker_init_fn=_leave_interrupts_to_parent,
    )


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Batches:
    """Indices of this process's patches of every step from where a run stands to its last epoch."""

    def __init__(self, progress: Progress, plan: TrainingConfig, ranks: Ranks) -> None:
        self.first = (progress.epoch, progress.step)
        self.plan = plan
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        samples, size = self.plan.samples_per_epoch, self.plan.batch_size
        epoch, step = self.first
        for e in range(epoch, self.plan.epochs):
            for s in range(step if e == epoch else 0, self.plan.steps_per_epoch):
                count = samples_of_step(self.plan, s)
                yield [e * samples + s * size + i for i in self.ranks.own(count)]


def samples_of_step(plan: TrainingConfig, step: int) -> int:
    """Return how many patches a step of an epoch has; the last may have fewer."""
    return min(plan.batch_size, plan.samples_per_epoch - step * plan.batch_size)
