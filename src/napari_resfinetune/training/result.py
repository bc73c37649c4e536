"""What a run came to, without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from napari_resfinetune.events import Status


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes
    ----------
    run_dir
        The run folder.
    status
        How it ended.
    best_epoch
        Epoch of the best validation metric, from 0; -1 when it was stopped before the first validation.
    best_metric
        Lower is better; `None` when it was stopped before the first validation.
    peak_memory_gb
        Most memory that training's process took.
    seconds
        Time spent training, over all sessions of the run.
    comparison
        With the start model on held-out images, as the event `Compared` has it: ``verdict``, ``sentence``, ``mode``,
        ``before``, ``after``, ``images``; `None` when it was not made.
    """

    run_dir: Path
    status: Status
    best_epoch: int
    best_metric: float | None
    peak_memory_gb: float
    seconds: float
    comparison: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "run_dir": str(self.run_dir)}
