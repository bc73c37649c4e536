"""What a run says while it runs: frozen events, and the token that asks it to stop.

The trainer yields events and never prints. Listeners (progress bar, log files, window) only read them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["finished", "early_stopped", "stopped", "failed"]
Verdict = Literal["better", "no clear difference", "worse"]


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain data, with its class name under ``"event"``."""
        return {"event": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Started(Event):
    """Training begins (or goes on, when `epoch` or `step` is not zero)."""

    run_dir: str
    device: str
    precision: str
    epochs: int
    steps_per_epoch: int
    epoch: int
    step: int
    trainable_parameters: int
    total_parameters: int
    memory_limit_gb: float | None = None


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step is done. Losses are means over the step's samples; `None` where a part is not trained."""

    epoch: int
    step: int
    loss: float
    mask_loss: float | None
    iou_loss: float | None
    instance_loss: float | None
    seconds: float
    memory_gb: float
    peak_memory_gb: float


@dataclass(frozen=True)
class EpochEnded(Event):
    """An epoch and its validation are done. `metric` is lower for a better model."""

    epoch: int
    train_loss: float
    metric: float
    mask_metric: float | None
    instance_metric: float | None
    best_metric: float
    best_epoch: int
    learning_rate: float
    seconds: float
    peak_memory_gb: float
    memory_limit_gb: float | None = None


@dataclass(frozen=True)
class Checkpointed(Event):
    """A checkpoint is on disk, whole."""

    path: str
    name: str
    epoch: int


@dataclass(frozen=True)
class MemoryLever(Event):
    """The trainer changed how it computes to stay inside its memory, and goes on from the same step."""

    lever: str
    before: str
    after: str
    reason: str
    changes_training: bool


@dataclass(frozen=True)
class Preview(Event):
    """A prediction of the current model lies at `path`."""

    epoch: int
    path: str


@dataclass(frozen=True)
class Message(Event):
    """Something worth saying in words."""

    text: str


@dataclass(frozen=True)
class Searched(Event):
    """A search for a start model has looked at one more patch with a model, or trained it one more step."""

    model: str
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True)
class Compared(Event):
    """The run's model was compared with its start model on held-out images.

    `before` and `after` hold ``sa50``, ``sa75``, ``msa``; `images` has ``{"name", "before", "after"}`` with SA50.
    """

    verdict: Verdict
    sentence: str
    mode: str
    before: dict[str, float]
    after: dict[str, float]
    images: list[dict[str, Any]]


@dataclass(frozen=True)
class Finished(Event):
    """The run has ended by itself or by request, and what it reached is saved."""

    status: Status
    best_epoch: int
    best_metric: float | None
    peak_memory_gb: float
    seconds: float


@dataclass(frozen=True)
class Failed(Event):
    """The run cannot go on; `resumable` says whether a checkpoint is there to go on from."""

    error: str
    resumable: bool


OnEvent = Callable[[Event], None]


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """Return the event that `Event.to_dict` gave.

    Raises
    ------
    ValueError
        When there is no such event.
    """
    fields = dict(values)
    name = fields.pop("event", None)
    kind = next((kind for kind in Event.__subclasses__() if kind.__name__ == name), None)
    if kind is None:
        raise ValueError(f"{name}: no such event")
    return kind(**fields)


class StopToken:
    """A request to stop, safe to make from any thread or signal handler.

    The trainer looks at it between steps, saves a checkpoint and ends by itself.
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def stop(self) -> None:
        """Ask the run to stop after the current step."""
        self._event.set()

    @property
    def stopped(self) -> bool:
        """Whether a stop was asked for."""
        return self._event.is_set()
