"""How long napari's event loop keeps a person waiting while a real training runs.

A timer of 10 ms runs in the window's thread; how much later than due it fires is what a click would have waited. The
training is a real one, through the Finetune widget and the engine, with a preview after each epoch.

``xvfb-run -s "-screen 0 1600x1000x24" python benchmarks/gui_latency.py [--model vit_b] [--seconds 120]``
prints one JSON object: opening times in seconds, latencies in ms idle and while training, memory in GB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRATCH = Path(tempfile.mkdtemp(prefix="resfinetune-latency-"))
os.environ["NAPARI_CONFIG"] = str(SCRATCH / "settings.yaml")

import napari  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from npe2 import PluginManager, PluginManifest  # noqa: E402
from qtpy.QtCore import QEventLoop, Qt, QTimer  # noqa: E402

from napari_resfinetune.widgets import controller as controller_module  # noqa: E402

MANIFEST = Path(__file__).resolve().parents[1] / "src" / "napari_resfinetune" / "napari.yaml"
EVERY_MS = 10
IDLE_SECONDS = 5.0
WAIT_SECONDS = 600.0


class Latency:
    """Measures, while it is open, how late a timer fires."""

    def __init__(self) -> None:
        self.late_ms: list[float] = []
        self._timer = QTimer()
        self._timer.setTimerType(Qt.TimerType.PreciseTimer)
        self._timer.timeout.connect(self._fired)

    def __enter__(self) -> Latency:
        self._last = time.perf_counter()
        self._timer.start(EVERY_MS)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.stop()

    def _fired(self) -> None:
        now = time.perf_counter()
        self.late_ms.append(max(0.0, (now - self._last) * 1000 - EVERY_MS))
        self._last = now

    def to_dict(self) -> dict[str, float]:
        late = np.array(self.late_ms)
        return {
            "samples": late.size,
            "median_ms": round(float(np.median(late)), 1),
            "p99_ms": round(float(np.percentile(late, 99)), 1),
            "max_ms": round(float(late.max()), 1),
        }


def wait(seconds: float, until: Callable[[], Any] = lambda: False) -> bool:
    """Let the event loop run, as napari does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        loop = QEventLoop()
        QTimer.singleShot(100, loop.quit)
        loop.exec()
    return bool(until())


def opened(viewer: napari.Viewer, name: str) -> tuple[Any, float]:
    began = time.perf_counter()
    _, widget = viewer.window.add_plugin_dock_widget("napari-resfinetune", name)
    napari.Viewer.show(viewer)
    loop = QEventLoop()
    QTimer.singleShot(0, loop.quit)
    loop.exec()
    return widget, round(time.perf_counter() - began, 3)


def gb(process: psutil.Process) -> float:
    return round(process.memory_info().rss / 1e9, 3)


def main(model: str, seconds: float) -> dict[str, Any]:
    controller_module.RUNS_FOLDER = SCRATCH / "runs"
    PluginManager.instance().register(PluginManifest.from_file(MANIFEST))
    viewer = napari.Viewer()
    viewer.window.resize(1280, 800)
    wait(1)
    found: dict[str, Any] = {"model": model, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    widget, found["open_finetune_s"] = opened(viewer, "Finetune")
    for name in ("Segment", "Evaluate", "Models"):
        _, found[f"open_{name.lower()}_s"] = opened(viewer, name)
    controller, training = widget.controller, widget.controller.training
    widget.images.sample_button.click()
    controller.draft.change_config({"model": model, "training": {"samples_per_epoch": 5}})
    ready = wait(WAIT_SECONDS, lambda: widget.images.report is not None and widget.computer.plan is not None)
    assert ready, "no plan"
    with Latency() as idle:
        wait(IDLE_SECONDS)
    found["idle"] = idle.to_dict()
    found["window_before_gb"] = gb(psutil.Process())
    widget.running.preview.setCurrentIndex(1)
    widget.start_button.click()
    assert wait(30, lambda: training.busy), "not started"
    wait(WAIT_SECONDS, lambda: training.history.losses or not training.busy)
    if not training.history.losses:
        raise SystemExit(f"no step: {training.history.problems}")
    with Latency() as busy:
        wait(seconds, lambda: not training.busy)
    found["training"] = {**busy.to_dict(), "steps": len(training.history.losses), "problems": training.history.problems}
    training.stop()
    wait(WAIT_SECONDS, lambda: not training.busy)
    found["window_after_gb"] = gb(psutil.Process())
    viewer.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="random:vit_t")
    parser.add_argument("--seconds", type=float, default=120)
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.model, arguments.seconds), indent=2))
