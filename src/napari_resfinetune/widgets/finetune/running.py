"""The page of a training that runs: how far, how well, how much memory, and the two ways to end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from napari.layers import Image
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.exports import axes_of
from napari_resfinetune.widgets.parts import Curve, Gauge, Rows, Words
from napari_resfinetune.widgets.theme import follow_layers
from napari_resfinetune.widgets.training_run import State
from napari_resfinetune.words import counted, rough_duration

PREVIEW = "preview of the training"
BEST, LATEST = "best", "latest"


class RunningPage(QWidget):
    """Shows the controller's training.

    Parameters
    ----------
    controller
        Of the viewer.
    """

    def __init__(self, controller: Controller, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._controller, self._training = controller, controller.training
        viewer = controller.viewer
        self.summary = Words(viewer)
        self.curve = Curve(viewer, 170)
        self.curve.x_start = 0
        self.curve.setToolTip("loss of each step, and the validation metric after each epoch; lower is better")
        self.where = Words(viewer)
        self.bar = QProgressBar()
        self.bar.setRange(0, 1000)
        self.bar.setTextVisible(False)
        self.left = Words(viewer, tone="muted")
        self.gauge = Gauge(viewer)
        self.gauge.setToolTip("memory that training takes now, with its peak as a line, against what is allowed")
        self.preview = QComboBox()
        self.preview.setAccessibleName("preview on")
        self.preview.setToolTip("segmented after each epoch with the model as it is then; a layer of its own")
        self.pause_button = QPushButton("Pause")
        self.pause_button.setToolTip("Saves and gives the memory back; it goes on later from the same step")
        self.stop_button = QPushButton("Stop and keep the best")
        self.stop_button.setToolTip("Ends the run after this step; the best model so far is kept")
        self.log = QPlainTextEdit()
        self.log.setReadOnly(True)
        self.log.setFixedHeight(130)
        self._shown_lines = 0
        self._lay_out()
        self.pause_button.clicked.connect(self._training.pause)
        self.stop_button.clicked.connect(self._training.stop)
        self._training.progressed.connect(self.show_progress)
        self._training.state_changed.connect(self.show_progress)
        self._training.epoch_ended.connect(self._preview_now)
        follow_layers(viewer, self._layers_changed)
        self._layers_changed()
        self.show_progress()

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(6)
        for widget in (self.summary, self.curve, self.where, self.bar, self.left):
            layout.addWidget(widget)
        rows = Rows(layout)
        rows.add("Memory", self.gauge)
        rows.add("Preview on", self.preview)
        buttons = QHBoxLayout()
        buttons.addWidget(self.pause_button)
        buttons.addWidget(self.stop_button, 1)
        layout.addLayout(buttons)
        folded = QCollapsible("Log")
        folded.addWidget(self.log)
        layout.addWidget(folded)
        layout.addStretch()

    def show_progress(self) -> None:
        """Show how far the training is."""
        history, state = self._training.history, self._training.state
        self.summary.say(summary_of(history.config, history.images))
        self.curve.set_lines(
            {"loss": history.losses, "validation": history.metrics},
            "epoch",
            history.best_epoch + 1 if history.best_epoch >= 0 else None,
        )
        self.where.say(self._where())
        self.bar.setRange(0, 0 if state is State.STARTING else 1000)
        self.bar.setValue(round(1000 * history.share_done))
        self.left.say(self._left())
        self.gauge.set_values(history.memory_gb, history.limit_gb, history.peak_gb)
        for button in (self.pause_button, self.stop_button):
            button.setEnabled(state in (State.STARTING, State.RUNNING))
        self._show_log()

    def _where(self) -> str:
        history, state = self._training.history, self._training.state
        said = {
            State.STARTING: "Starting: looking at the images, loading the model…",
            State.PAUSING: "Finishing this step and saving, then it pauses…",
            State.STOPPING: "Finishing this step and saving, then it stops…",
        }
        if state in said:
            return said[state]
        epoch = min(history.epoch + 1, history.epochs)
        best = f" · best so far: {history.best_epoch + 1}" if history.best_epoch >= 0 else ""
        return f"Epoch {epoch} of up to {history.epochs}{best}"

    def _left(self) -> str:
        seconds, history = self._training.history.seconds_left, self._training.history
        if self._training.state is not State.RUNNING or seconds is None:
            return ""
        early = ", less if it stops early" if history.config.get("training", {}).get("early_stopping") else ""
        return f"{history.share_done:.0%} · at most {rough_duration(seconds)} left{early}"

    def _show_log(self) -> None:
        history = self._training.history
        new = history.log_count - self._shown_lines
        if new < 0:
            self.log.clear()
            new = history.log_count
        for line in list(history.log)[-new:] if new else ():
            self.log.appendPlainText(line)
        self._shown_lines = history.log_count

    # The preview

    def _layers_changed(self, event: Any = None) -> None:
        chosen = self.preview.currentData()
        self.preview.clear()
        self.preview.addItem("nothing", None)
        for layer in self._controller.viewer.layers:
            if isinstance(layer, Image):
                self.preview.addItem(layer.name, layer)
        self.preview.setCurrentIndex(max(0, self.preview.findData(chosen)))

    def _preview_now(self) -> None:
        """Segment the chosen image with the checkpoint that was just written."""
        layer = self.preview.currentData()
        if layer is None or not self._training.busy:
            return
        run_dir, config = self._training.history.run_dir, self._training.history.config
        plane = shown_slice(self._controller.viewer, layer) if layer.ndim > 2 else None

        def exported(files: Any) -> None:
            if isinstance(files, Exception):
                return
            self._controller.engine.ask(
                "preview",
                owner=self,
                topic="preview",
                on_result=lambda answer: self._show_preview(answer, layer),
                on_error=lambda problems: self._training.history.note(f"no preview: {problems[0]}"),
                config=config,
                run_dir=run_dir,
                checkpoint=LATEST,
                image=files[id(layer)],
                axes=axes_of(layer),
                plane=plane,
                output=str(self._controller.arrays),
            )

        self._controller.exporter.export([layer], exported)

    def _show_preview(self, answer: dict[str, Any], image: Any) -> None:
        show_labels(self._controller.viewer, answer["labels"], PREVIEW, image)


def shown_slice(viewer: Any, layer: Any) -> int:
    """Return the index of the slice of a stack that the viewer shows; layers may be scaled and moved."""
    axis = layer.ndim - 3
    index = round(float(layer.world_to_data(viewer.dims.point)[axis]))
    return int(min(max(index, 0), layer.data.shape[axis] - 1))


def show_labels(viewer: Any, file: str, name: str, image: Any) -> Any:
    """Show labels as a layer over their image, and leave the active layer and the camera as they are."""
    data = np.load(file)
    Path(file).unlink(missing_ok=True)
    there = next((layer for layer in viewer.layers if layer.name == name and layer.ndim == data.ndim), None)
    if there is not None and there.data.shape == data.shape:
        there.data = data
        return there
    chosen, camera = list(viewer.layers.selection), (viewer.scene.camera.center, viewer.scene.camera.zoom)
    last = image.ndim - (data.ndim if data.ndim <= image.ndim else image.ndim)
    layer = viewer.add_labels(data, name=name, scale=image.scale[last:], translate=image.translate[last:], opacity=0.6)
    viewer.layers.selection = set(chosen)
    viewer.scene.camera.center, viewer.scene.camera.zoom = camera
    return layer


def summary_of(config: dict[str, Any], images: int) -> str:
    """Say in one line what is being trained."""
    if not config:
        return ""
    strategy = config["strategy"]["kind"].replace("_", " ")
    return f"{counted(images, 'image')} · {Path(config['model']).stem} · {strategy}"
