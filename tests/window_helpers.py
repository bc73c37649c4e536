"""What tests of the window share: an engine that answers what a test tells it, and answers of the engine's shape."""

from __future__ import annotations

from typing import Any

from napari_resfinetune.engine import data_verbs
from napari_resfinetune.events import Checkpointed, EpochEnded, Event, Finished, Started, Step, StopToken
from napari_resfinetune.widgets.engine_client import EngineClient


class ScriptedEngine(EngineClient):
    """Keeps requests until the test answers them; no process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: list[dict[str, Any]] = []

    def start(self) -> None:
        if self.status != "ready":
            self._set_status("ready")

    def _send(self, message: dict[str, Any]) -> None:
        self.requests.append(message)
        if message["verb"] == "samples":  # there is nothing to invent about them
            made = data_verbs.samples(message, lambda event: None, StopToken())
            self._take(self._generation, {"id": message["id"], "result": made})

    def sent(self, verb: str) -> dict[str, Any]:
        """The last request of a kind."""
        return [request for request in self.requests if request["verb"] == verb][-1]

    def answer(self, verb: str, result: dict[str, Any]) -> None:
        self._take(self._generation, {"id": self.sent(verb)["id"], "result": result})

    def refuse(self, verb: str, *problems: str) -> None:
        self._take(self._generation, {"id": self.sent(verb)["id"], "error": "DataError", "problems": list(problems)})

    def tell(self, *events: Event) -> None:
        """Let the training say something."""
        number = self.sent("train")["id"]
        for event in events:
            self._take(self._generation, {"id": number, "event": event.to_dict()})


COMPUTER = {"device": "cpu", "name": "CPU", "memory_gb": 32.0, "free_gb": 20.0, "preset": "cpu-16gb", "presets": []}


def row(objects: int = 12, part: str | None = "train", *problems: dict[str, str]) -> dict[str, Any]:
    return {
        "shape": [256, 256],
        "axes": "YX",
        "objects": objects,
        "thumbnail": [[0, 128], [255, 60]],
        "problems": list(problems),
        "part": part,
    }


def problem(level: str, code: str, found: str) -> dict[str, str]:
    message = f"labels: {found}; mend it"
    return {"level": level, "code": code, "where": "labels", "found": found, "fix": "mend it", "message": message}


def checked(*rows: dict[str, Any]) -> dict[str, Any]:
    note = "2 images to train on, 1 held out" if all(row["part"] for row in rows) else ""
    return {"pairs": list(rows), "problems": [], "note": note, "held_out_regions": 1}


def plan(peak_gb: float = 6.1, limit_gb: float = 16.0, smaller: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "peak_gb": peak_gb,
        "limit_gb": limit_gb,
        "fits": peak_gb <= limit_gb,
        "seconds_per_epoch": 240.0,
        "seconds_at_least": 3600.0,
        "seconds_at_most": 24000.0,
        "disk_gb": 2.5,
        "measured": True,
        "precision": "bf16",
        "objects": 10,
        "levers": [],
        "smaller": smaller,
    }


def started(run_dir: str, epoch: int = 0, step: int = 0) -> Started:
    return Started(run_dir, "cpu", "bfloat16", 3, 4, epoch, step, 90, 100, 16.0)


def an_epoch(epoch: int, metric: float, best: int, loss: float = 0.8) -> list[Event]:
    steps = [Step(epoch, step, loss - 0.05 * step, 0.3, 0.1, 0.3, 0.5, 5.8, 6.2) for step in range(4)]
    ended = EpochEnded(epoch, loss, metric, 0.3, 0.4, min(metric, 0.5), best, 1e-5, 2.0 * (epoch + 1), 6.2, 16.0)
    return [*steps, ended, Checkpointed("latest", "latest", epoch)]


def finished(run_dir: str, status: str = "finished", best_epoch: int = 1) -> tuple[Finished, dict[str, Any]]:
    said = {"status": status, "best_epoch": best_epoch, "best_metric": 0.5, "peak_memory_gb": 6.2, "seconds": 754.0}
    return Finished(**said), {"run_dir": run_dir, **said}
