"""Processes that share one training: each takes its part of every batch, and their gradients are added up.

They meet as torchrun arranges it, through the variables ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and
``MASTER_PORT``: over gloo between CPUs, over NCCL between cards. A step has the same samples, prompts and weights of
losses as in one process with the same ``training.batch_size``, so what is learned differs by rounding only.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.errors import ConfigError, TrainingError
from napari_resfinetune.planning import Hardware, asked_device

if TYPE_CHECKING:
    import torch

    from napari_resfinetune.training.prepare import Setup

# One rank may encode a whole bank of patches, or wait for a slow disk, while the others wait for it.
PATIENCE = datetime.timedelta(hours=2)
T = TypeVar("T")


class PeerLost(TrainingError):
    """Another process of the same training has ended."""


class PeerOutOfMemory(MemoryError):
    """Memory ran out in another process of the same training, so this one makes its work smaller too."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that share a training; alone, nothing is exchanged.

    Attributes
    ----------
    rank, size
        Number of this process, from 0, and how many there are.
    local_rank, local_size
        The same on this computer.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """Return which of so many samples are this process's."""
        return range(self.rank, count, self.size)

    def any(self, flag: bool) -> bool:
        """Say whether a flag is set in any process."""
        return bool(self.most(float(flag)))

    def wait(self) -> None:
        """Go on once all processes are here."""
        self.any(False)

    def most(self, value: float) -> float:
        """Return the largest of all processes' values."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([value], dtype=torch.float64)
        with _told_when_lost():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor.item())

    def least(self, value: float) -> float:
        """Return the smallest of all processes' values."""
        return -self.most(-value)

    def together(self, attempt: Callable[[], T]) -> T:
        """Return what an attempt gives; when memory runs out in one process, all of them raise.

        Raises
        ------
        PeerOutOfMemory
            When it was another.
        """
        from napari_resfinetune.training.survival import is_out_of_memory

        try:
            result = attempt()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self.any(True)
            raise
        if self.any(False):
            raise PeerOutOfMemory("another process of the run ran out of memory")
        return result

    def gather(self, values: Sequence[Sequence[float]], count: int) -> list[list[float]]:
        """Put rows of numbers of all processes' samples in the order of the samples.

        Parameters
        ----------
        values
            One row for each of `own`.
        count
            Samples of all processes.
        """
        if self.size == 1:
            return [list(row) for row in values]
        import torch
        import torch.distributed as dist

        width = int(self.most(max((len(row) for row in values), default=0)))
        table = torch.zeros(count, width, dtype=torch.float64)
        for index, row in zip(self.own(count), values, strict=True):
            table[index] = torch.tensor(row, dtype=torch.float64)
        with _told_when_lost():
            dist.all_reduce(table)
        rows: list[list[float]] = table.tolist()
        return rows

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Add up the gradients of all processes; what none of them has a gradient for stays without."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        with _told_when_lost():
            dist.all_reduce(there, dist.ReduceOp.MAX)
            pending = []
            for parameter, anywhere in zip(parameters, there.tolist(), strict=True):
                if not anywhere:
                    continue
                if parameter.grad is None:  # a last batch may leave nothing for this process
                    parameter.grad = torch.zeros_like(parameter)
                pending.append(dist.all_reduce(parameter.grad, async_op=True))
            for work in pending:
                work.wait()

    def share(self, setup: Setup) -> Setup:
        """Divide what a run may take of this computer among its processes here; each has a card of its own.

        All of them get the least of what any may take, so that they plan the same and pull the same levers.
        """
        if self.size == 1:
            return setup
        card_gb = self.least(setup.limits.gpu_memory_gb or 0.0)
        limits = replace(
            setup.limits,
            memory_gb=self.least(setup.limits.memory_gb / self.local_size),
            gpu_memory_gb=card_gb or None,
            threads=max(1, setup.limits.threads // self.local_size),
            reason=f"a share for each of {self.local_size} processes: {setup.limits.reason}",
        )
        return replace(setup, limits=limits)

    def with_own_card(self, config: FinetuneConfig, hardware: Hardware) -> FinetuneConfig:
        """Return the configuration with the card of this process where it would run on some card."""
        wants_card = asked_device(config.resources) in ("auto", "cuda")
        if self.size == 1 or not wants_card or self.local_rank >= len(hardware.gpus):
            return config
        own = {"device": f"cuda:{self.local_rank}"}
        return config.model_copy(update={"resources": config.resources.model_copy(update=own)})


def check_processes(config: FinetuneConfig, processes: int) -> None:
    """Refuse more processes than a batch has patches.

    Raises
    ------
    ConfigError
        With what to set.
    """
    size = config.training.batch_size
    if processes < 1:
        raise ConfigError(f"processes: found {processes}; expected at least 1")
    if size < processes:
        raise ConfigError(
            f"training.batch_size: {size} patches a step cannot be shared by {processes} processes; set it to "
            f"{processes} or a multiple, which is one optimizer step for that many patches with any number of processes"
        )


def is_first_rank() -> bool:
    """Say whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def per_process(config: FinetuneConfig, ranks: Ranks) -> FinetuneConfig:
    """Return the configuration with the batch that one process sees, for its plan."""
    size = math.ceil(config.training.batch_size / ranks.size)
    return config.model_copy(update={"training": config.training.model_copy(update={"batch_size": size})})


@contextlib.contextmanager
def joined_ranks(config: FinetuneConfig) -> Iterator[Ranks]:
    """Meet the other processes of this training, if the environment names any.

    Raises
    ------
    ConfigError
        When they cannot share a batch, or there are fewer cards than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    check_processes(config, size)
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    ranks = Ranks(rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    cards = torch.cuda.device_count() if asked_device(config.resources) in ("auto", "cuda") else 0
    if cards and cards < ranks.local_size:
        raise ConfigError(
            f"processes: {ranks.local_size} shall share a training and there are {cards} cards; use as many, or "
            "resources.device=cpu"
        )
    if cards:
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def _told_when_lost() -> Iterator[None]:
    """Say in our words that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"another process of the run ended ({str(error).partition(chr(10))[0][:120]})") from None
