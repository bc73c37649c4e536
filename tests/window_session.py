"""A whole session in a real napari window with the real engine, through clicks; prints what came of it as JSON.

Run by test_window_session.py in a process of its own, so that what is imported there is the window's doing:
``python window_session.py CELLS FOLDER``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import napari
import psutil
import tifffile
from npe2 import PluginManager, PluginManifest
from qtpy.QtCore import QPoint, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QPushButton

from napari_resfinetune.widgets import controller as controller_module
from napari_resfinetune.widgets.training_run import State

MANIFEST = Path(__file__).resolve().parents[1] / "src" / "napari_resfinetune" / "napari.yaml"
TINY = {
    "data": {"patch_px": 64},
    "training": {
        "input_px": 128,
        "epochs": 2,
        "samples_per_epoch": 4,
        "batch_size": 2,
        "objects": 2,
        "sub_iterations": 1,
    },
    "resources": {"precision": "fp32", "device": "cpu", "workers": 0, "nice": 0},
}
WAIT_SECONDS = 400


def until(condition: Callable[[], Any], seconds: float = WAIT_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(condition.__code__.co_names)
        QApplication.processEvents()
        time.sleep(0.01)


def click(button: QPushButton) -> None:
    until(lambda: button.isEnabled() and button.isVisible(), 30)
    QTest.mouseClick(button, Qt.MouseButton.LeftButton, pos=QPoint(5, 5))


def main(cells: Path, folder: Path) -> dict[str, Any]:
    controller_module.RUNS_FOLDER = folder / "runs"
    PluginManager.instance().register(PluginManifest.from_file(MANIFEST))
    viewer = napari.Viewer()
    for file in sorted((cells / "images").iterdir()):
        viewer.add_image(tifffile.imread(file), name=file.stem)
        viewer.add_labels(tifffile.imread(cells / "labels" / file.name), name=f"{file.stem} labels")
    _, finetune = viewer.window.add_plugin_dock_widget("napari-resfinetune", "Finetune")
    controller, training = finetune.controller, finetune.controller.training
    found: dict[str, Any] = {}

    # Finetune: pause after the first epoch, go on to the end.
    controller.draft.change_config({**TINY, "model": str(cells / "start.pt")})
    click(finetune.images.add_all_button)
    until(lambda: finetune.images.report is not None and finetune.computer.plan is not None)
    before = {layer.name: layer.data.copy() for layer in viewer.layers}
    finetune.running.preview.setCurrentIndex(finetune.running.preview.findText("c0"))
    click(finetune.start_button)
    until(lambda: training.history.metrics)
    click(finetune.running.pause_button)
    until(lambda: not training.busy)
    found["after pause"] = training.state.value
    click(finetune.outcome.buttons["resume"])
    until(lambda: not training.busy)
    first = Path(training.history.run_dir)
    found["first"] = {**training.history.result, "state": training.state.value, "problems": training.history.problems}
    found["headline"] = finetune.outcome.headline.text()
    found["files"] = sorted(path.name for path in first.iterdir())

    # Segment with it, other parameters, correct, add.
    click(finetune.outcome.buttons["correct"])
    segment = next(w for w in QApplication.allWidgets() if type(w).__name__ == "SegmentWidget")
    found["segment model"] = Path(segment.model.value()).name
    segment.image.set_layer(viewer.layers["c0"])
    click(segment.button)
    until(lambda: segment.result is not None)
    result, changes = segment.result, []
    result.events.data.connect(lambda event: changes.append(event))
    segment.forms["ais"]["foreground_threshold"].value = 0.1
    until(lambda: changes)
    found["followed in place"] = segment.result is result
    result.paint((20, 20), 77)
    click(segment.add_button)
    found["pairs"] = [(pair.image_name, pair.labels_name) for pair in controller.draft.pairs]

    # Continue: a second training in the session, from the first; stopped by hand.
    click(segment.continue_button)
    controller.draft.change_config({"training": {"epochs": 50}})
    click(finetune.start_button)
    until(lambda: training.history.metrics)
    click(finetune.running.stop_button)
    until(lambda: not training.busy)
    found["second"] = {
        **training.history.result,
        "state": training.state.value,
        "model": training.history.config["model"],
    }
    found["rounds"] = len(controller.draft.rounds)

    # Evaluate the labels that were corrected.
    click(finetune.outcome.buttons["evaluate"])
    evaluate = next(w for w in QApplication.allWidgets() if type(w).__name__ == "EvaluateWidget")
    evaluate.what.setCurrentIndex(evaluate.what.findData("layers"))
    evaluate.truth.set_layer(viewer.layers["c0 labels"])
    evaluate.prediction.set_layer(result)
    click(evaluate.button)
    until(lambda: evaluate.rows)
    found["evaluated"] = evaluate.rows[0]
    found["error layer"] = any(layer.name.startswith("errors of") for layer in viewer.layers)

    # The engine is killed while a third run trains: the child saves, the window says so, and it goes on.
    click(finetune.outcome.buttons["longer"])
    until(lambda: training.state is State.RUNNING and training.history.losses)
    os.kill(controller.engine.pid, signal.SIGKILL)
    until(lambda: not training.busy)
    found["after crash"] = {"state": training.state.value, "said": training.history.problems}
    found["layers as before"] = all(bool((viewer.layers[name].data == data).all()) for name, data in before.items())
    click(finetune.outcome.buttons["resume"])
    until(lambda: training.state is State.RUNNING and training.history.losses)
    click(finetune.running.stop_button)
    until(lambda: not training.busy)
    found["went on"] = training.state.value

    engine = psutil.Process(controller.engine.pid)
    found["torch"] = sorted(name for name in ("torch", "micro_sam", "torchvision") if name in sys.modules)
    found["first run"] = str(first)
    viewer.close()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 60)
    QApplication.processEvents()
    found["engine ended"] = True
    found["folder removed"] = not controller.folder.exists()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
