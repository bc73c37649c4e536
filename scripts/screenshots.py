"""Make the pictures of the window in docs/images anew: every state, light and dark, 1280 x 800.

Layers, widgets and layout are real. What the engine says is scripted (tests/window_helpers.py), so that the pictures
take seconds, need no model, and look the same every time; their numbers are made up.

``xvfb-run -s "-screen 0 1600x1000x24" python scripts/screenshots.py [FOLDER]``
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = Path(tempfile.mkdtemp(prefix="resfinetune-pictures-"))
os.environ["NAPARI_CONFIG"] = str(SCRATCH / "settings.yaml")
os.environ["RESFINETUNE_CACHEDIR"] = str(SCRATCH / "cache")
sys.path.insert(0, str(ROOT / "tests"))

import napari  # noqa: E402
import numpy as np  # noqa: E402
from npe2 import PluginManager, PluginManifest  # noqa: E402
from PIL import Image  # noqa: E402
from qtpy.QtCore import QEventLoop, QTimer  # noqa: E402
from qtpy.QtWidgets import QApplication  # noqa: E402

from napari_resfinetune.config import make_config, write_config  # noqa: E402
from napari_resfinetune.events import Started, Step  # noqa: E402
from napari_resfinetune.widgets import controller as controller_module  # noqa: E402
from window_helpers import (  # noqa: E402
    COMPUTER,
    ScriptedEngine,
    an_epoch,
    checked,
    finished,
    plan,
    problem,
    row,
)

SIZE = (1280, 800)
COLOURS = 200
THEMES = ("dark", "light")


class Session:
    """A window whose engine says what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        controller_module.EngineClient = ScriptedEngine  # type: ignore[misc]
        controller_module.RUNS_FOLDER = SCRATCH / "runs"
        PluginManager.instance().register(PluginManifest.from_file(ROOT / "src" / "napari_resfinetune" / "napari.yaml"))
        self.viewer = napari.Viewer()
        self.viewer.window.resize(*SIZE)
        _, self.widget = self.viewer.window.add_plugin_dock_widget("napari-resfinetune", "Finetune")
        self.controller = self.widget.controller
        self.engine: ScriptedEngine = self.controller.engine
        self.until(lambda: self.asked("computer"))
        self.engine.answer("computer", COMPUTER)

    def asked(self, verb: str) -> bool:
        return any(request["verb"] == verb for request in self.engine.requests)

    def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            self.wait(20)

    def wait(self, milliseconds: int = 500) -> None:
        loop = QEventLoop()
        QTimer.singleShot(milliseconds, loop.quit)
        loop.exec()

    def shoot(self, name: str) -> None:
        for theme in THEMES:
            self.viewer.theme = theme
            self.wait()
            file = self.folder / f"window-{name}-{theme}.png"
            picture = Image.fromarray(self.viewer.screenshot(canvas_only=False, flash=False)).convert("RGB")
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)  # a third of the size
        self.viewer.theme = THEMES[0]

    def planned(self, answer: dict[str, Any], *rows: dict[str, Any]) -> None:
        count = sum(request["verb"] == "check" for request in self.engine.requests)
        self.widget.images.again_button.click()
        self.until(lambda: sum(request["verb"] == "check" for request in self.engine.requests) > count)
        for number, each in enumerate(rows, 1):
            small = self.viewer.layers[f"cells {number}"].data[::8, ::8]
            each["thumbnail"] = (small / small.max() * 255).astype(int).tolist()
        self.engine.answer("check", checked(*rows))
        self.widget.computer.plan_again()
        self.wait()
        # The first may be an answer to a question that is not asked any more.
        for _ in range(2):
            self.engine.answer("plan", answer)

    def train(self) -> str:
        self.widget.start_button.click()
        self.until(lambda: self.controller.training.busy)
        return str(self.engine.sent("train")["config"]["output"])

    def learn(self, run_dir: str, epochs: int, falls: float = 0.25) -> None:
        """Say what a run would say in so many epochs."""
        rng = np.random.default_rng(0)
        self.engine.tell(Started(run_dir, "cpu", "bfloat16", 100, 4, 0, 0, 90, 100, 16.0))
        for epoch in range(epochs):
            loss = 0.35 + 0.6 * math.exp(-falls * epoch)
            for event in an_epoch(epoch, loss - 0.05 + 0.04 * rng.random(), epoch, loss + 0.08 * rng.random()):
                self.engine.tell(event)
        self.controller.training.history.seconds_per_epoch = 240.0
        self.engine.tell(Step(epochs, 0, loss, 0.3, 0.1, 0.3, 31.0, 5.8, 6.2))

    def end(self, run_dir: str, status: str, comparison: dict[str, Any]) -> None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        for name in ("model.pt", "report.html"):
            (Path(run_dir) / name).write_bytes(b"")
        write_config(make_config(self.controller.training.history.config), Path(run_dir) / "config.yaml")
        (Path(run_dir) / "comparison.json").write_text(json.dumps(comparison))
        event, result = finished(run_dir, status, 7)
        (Path(run_dir) / "events.jsonl").write_text(json.dumps(event.to_dict()) + "\n")
        self.engine.tell(event)
        self.engine.answer("train", result)


def compared(verdict: str, before: float, after: float, sentence: str) -> dict[str, Any]:
    images = [{"name": f"cells {number}", "before": before, "after": after} for number in (2, 5)]
    scores = {"before": {"sa50": before}, "after": {"sa50": after}}
    return {"verdict": verdict, "sentence": sentence, "mode": "ais", "images": images, **scores}


def main(folder: Path) -> None:
    """Walk through the states and take a picture of each."""
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(folder)
    session.shoot("empty")
    session.widget.images.sample_button.click()
    mask = problem("error", "foreground-mask", "one id covers 11 separate objects: it looks like a foreground mask")
    specks = problem("warning", "small-objects", "2 objects below 25 px, not trained on")
    session.planned(plan(), row(48, None, specks), row(0, None, mask), row(24, None))
    session.shoot("problems")
    smaller = session.widget.value().model_dump(mode="json")
    offer = {"label": "Let the last blocks learn instead", "peak_gb": 7.4, "config": smaller}
    rows = (row(48, "train"), row(11, "train"), row(24, "held out"))
    session.planned(plan(18.3, smaller=offer), *rows)
    session.shoot("too-large")
    session.planned(plan(), *rows)
    session.shoot("planned")
    run_dir = session.train()
    session.learn(run_dir, 9)
    session.widget.running.preview.setCurrentIndex(1)
    session.shoot("running")
    session.end(run_dir, "early_stopped", compared("better", 0.61, 0.83, "The model finds more cells, on both images."))
    session.shoot("better")
    session.widget.outcome.buttons["new"].click()
    session.wait()
    run_dir = session.train()
    session.learn(run_dir, 8, falls=0.02)
    session.end(run_dir, "finished", compared("worse", 0.71, 0.66, "The model finds fewer cells, on both images."))
    session.shoot("worse")
    session.widget.outcome.buttons["new"].click()
    session.wait()
    run_dir = session.train()
    session.learn(run_dir, 3)
    (Path(run_dir) / "checkpoints" / "latest").mkdir(parents=True)
    session.engine.refuse("train", f"{Path(run_dir).name}: the training process was killed (SIGKILL), by the system")
    session.shoot("failed")
    others(session)
    session.viewer.close()


def others(session: Session) -> None:
    """Segment, Evaluate and Models, each with something in it."""
    viewer = session.viewer
    segment = session.controller.open("Segment")
    segment.image.set_layer(viewer.layers["cells 1"])
    segment.button.click()
    session.until(lambda: session.asked("segment"))
    labels = viewer.layers["labels 1"].data
    file = SCRATCH / "labels.npy"
    np.save(file, labels.astype(np.uint32))
    session.engine.answer("segment", {"labels": str(file), "objects": 48, "seconds": 2.4, "model": "run"})
    segment.explain_correcting()
    session.shoot("segment")
    evaluate = session.controller.open("Evaluate")
    evaluate.what.setCurrentIndex(0)
    for number, score in ((1, 0.91), (2, 0.78)):
        evaluate.truth.set_layer(viewer.layers[f"labels {number}"])
        evaluate.prediction.set_layer(viewer.layers["cells 1 segmented"])
        evaluate.button.click()
        count = len(session.engine.requests)
        session.until(lambda: len(session.engine.requests) > count or session.asked("compare"))  # noqa: B023
        np.save(file, np.where(labels > 0, 1 + labels % 5, 0).astype(np.uint8))
        scores = {"sa50": score, "sa75": score - 0.2, "msa": score - 0.25, "n_true": 48, "n_pred": 46}
        counts = {"right": 43, "extra": 1, "missed": 3, "merged": 1, "split": 1}
        curve = [(round(0.5 + 0.05 * step, 2), score * (1 - (step / 10) ** 2)) for step in range(10)]
        one = {"image": f"cells {number}", "plane": None, "mode": "layer", **scores}
        session.wait()
        session.engine.answer("compare", {"row": one, "errors": str(file), "counts": counts, "curve": curve})
    session.shoot("evaluate")
    models = session.controller.open("Models")
    session.wait()
    models.table.selectRow(0)
    session.shoot("models")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
    QApplication.processEvents()
