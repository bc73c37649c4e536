"""A training as the window sees it: its state, and what it said so far."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from qtpy.QtCore import QObject, Signal

from napari_resfinetune.training.run_folder import RunFolder
from napari_resfinetune.widgets.engine_client import TRAINING, EngineClient

RECENT_STEPS = 20
LOG_LINES = 500


class State(Enum):
    """Where a training stands."""

    NONE = "none"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    STOPPING = "stopping"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"


BUSY = (State.STARTING, State.RUNNING, State.PAUSING, State.STOPPING)


@dataclass
class History:
    """What a run said, as far as the window shows it."""

    run_dir: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    epochs: int = 0
    steps_per_epoch: int = 0
    epoch: int = 0
    step: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    train_losses: list[tuple[float, float]] = field(default_factory=list)
    metrics: list[tuple[float, float]] = field(default_factory=list)
    best_epoch: int = -1
    best_metric: float | None = None
    memory_gb: float | None = None
    peak_gb: float | None = None
    limit_gb: float | None = None
    seconds_per_epoch: float | None = None
    log: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    log_count: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    resumable: bool = False
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    epoch_began: float = 0.0

    def note(self, line: str) -> None:
        """Add a line to the log, of which the last ones are kept."""
        self.log.append(line)
        self.log_count += 1

    @property
    def share_done(self) -> float:
        """Part of all epochs that is done, from 0 to 1."""
        whole = self.epochs * self.steps_per_epoch
        return (self.epoch * self.steps_per_epoch + self.step) / whole if whole else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At most so long, from what was measured; `None` before the first steps."""
        if self.seconds_per_epoch is not None:
            return self.seconds_per_epoch * self.epochs * (1 - self.share_done)
        if len(self.recent) < 2:
            return None
        steps_left = self.epochs * self.steps_per_epoch * (1 - self.share_done)
        return statistics.median(self.recent) * steps_left

    @property
    def verdict(self) -> str:
        """Return "better", "worse", "no clear difference", or "" when nothing was compared."""
        return str(self.comparison.get("verdict", ""))


class TrainingRun(QObject):
    """One training at a time, in the engine; it outlives the widget that started it."""

    state_changed = Signal()
    progressed = Signal()
    epoch_ended = Signal()

    def __init__(self, engine: EngineClient, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._engine = engine
        self.state = State.NONE
        self.history = History()
        self._job: int | None = None
        engine.crashed.connect(self._engine_crashed)

    @property
    def busy(self) -> bool:
        """Whether a training is under way."""
        return self.state in BUSY

    def start(self, config: dict[str, Any], copies: list[tuple[str, str]], images: int) -> None:
        """Begin a run, unless one is under way."""
        if self.busy:
            return
        self.history = History(run_dir=str(config["output"]), config=config, images=images)
        self._ask(config=config, copy=copies)

    def go_on(self, epochs: int | None = None) -> None:
        """Continue the run exactly where it was, with a new number of epochs if given, unless one is under way."""
        if self.busy:
            return
        self.history.result, self.history.comparison, self.history.problems = {}, {}, []
        self._ask(run_dir=self.history.run_dir, epochs=epochs)

    def go_on_with(self, run_dir: str, config: dict[str, Any], images: int) -> None:
        """Continue a run of an earlier session."""
        if not self.busy:
            self.history = History(run_dir=run_dir, config=config, images=images)
            self.go_on()

    def pause(self) -> None:
        """Save, end, and give the memory back; `go_on` continues."""
        self._end(State.PAUSING)

    def stop(self) -> None:
        """Save and end with the best model so far."""
        self._end(State.STOPPING)

    def forget(self) -> None:
        """Make room for the next run."""
        if not self.busy:
            self.history = History()
            self._set(State.NONE)

    def _ask(self, **request: Any) -> None:
        self._job = self._engine.ask(
            "train",
            owner=self,
            topic=TRAINING,
            on_result=self._finished,
            on_error=self._failed,
            on_event=self._listen,
            **request,
        )
        self._set(State.STARTING)

    def _end(self, state: State) -> None:
        if self._job is not None and self.state in (State.STARTING, State.RUNNING):
            self._engine.stop(self._job)
            self._set(state)

    def _set(self, state: State) -> None:
        self.state = state
        self.state_changed.emit()

    def _finished(self, result: dict[str, Any]) -> None:
        self._job = None
        self.history.result = result
        self.history.run_dir = result["run_dir"]
        if not self.history.comparison:
            self.history.comparison = read_comparison(Path(result["run_dir"]))
        paused = self.state is State.PAUSING and result["status"] == "stopped"
        self._set(State.PAUSED if paused else State.DONE)

    def _engine_crashed(self, text: str) -> None:
        """Tell at once; the training has a process of its own, which saves what it has, and only then it is over."""
        if self.busy:
            self.history.note(text)
            self._set(State.STOPPING)

    def _failed(self, problems: list[str]) -> None:
        self._job = None
        history = self.history
        history.problems = problems
        history.resumable = RunFolder(Path(history.run_dir)).can_resume
        for problem in problems:
            history.note(problem)
        self._set(State.FAILED)

    def _listen(self, event: dict[str, Any]) -> None:
        take = getattr(self, f"_on_{event.get('event', '').lower()}", None)
        if take is not None:
            take(event)
        self.progressed.emit()

    def _on_started(self, event: dict[str, Any]) -> None:
        history = self.history
        history.epochs, history.steps_per_epoch = event["epochs"], event["steps_per_epoch"]
        history.epoch, history.step, history.limit_gb = event["epoch"], event["step"], event["memory_limit_gb"]
        history.epoch_began = time.monotonic()
        share = event["trainable_parameters"] / max(1, event["total_parameters"])
        history.note(f"on {event['device']} in {event['precision']}; {share:.0%} of the weights learn")
        if self.state is State.STARTING:
            self._set(State.RUNNING)

    def _on_step(self, event: dict[str, Any]) -> None:
        history = self.history
        history.epoch, history.step = event["epoch"], event["step"] + 1
        where = event["epoch"] + (event["step"] + 1) / max(1, history.steps_per_epoch)
        history.losses.append((where, event["loss"]))
        history.memory_gb, history.peak_gb = event["memory_gb"], event["peak_memory_gb"]
        history.recent.append(event["seconds"])

    def _on_epochended(self, event: dict[str, Any]) -> None:
        history = self.history
        history.epoch, history.step = event["epoch"] + 1, 0
        history.train_losses.append((event["epoch"] + 1, event["train_loss"]))
        history.metrics.append((event["epoch"] + 1, event["metric"]))
        history.best_epoch, history.best_metric = event["best_epoch"], event["best_metric"]
        history.peak_gb = event["peak_memory_gb"]
        now = time.monotonic()
        history.seconds_per_epoch, history.epoch_began = now - history.epoch_began, now
        history.note(f"epoch {event['epoch'] + 1}: validation {event['metric']:.3g}")

    def _on_checkpointed(self, event: dict[str, Any]) -> None:
        # The checkpoint of an epoch is on disk, whole, only now.
        if event["name"] == "latest":
            self.epoch_ended.emit()

    def _on_memorylever(self, event: dict[str, Any]) -> None:
        self.history.note(f"{event['lever']}: {event['before']} is {event['after']} now, because {event['reason']}")

    def _on_message(self, event: dict[str, Any]) -> None:
        self.history.note(event["text"])

    def _on_compared(self, event: dict[str, Any]) -> None:
        self.history.comparison = {name: value for name, value in event.items() if name != "event"}

    def _on_finished(self, event: dict[str, Any]) -> None:
        self.history.best_epoch, self.history.best_metric = event["best_epoch"], event["best_metric"]
        self.history.peak_gb = event["peak_memory_gb"]


def read_comparison(run_dir: Path) -> dict[str, Any]:
    """Return what the run's ``comparison.json`` says, if it is there."""
    try:
        found = json.loads((run_dir / "comparison.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
