"""The dock widget "Segment": a layer, a model, a few parameters that act at once, and what to do with the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from magicgui.widgets import Container, FloatSlider, SpinBox, Widget
from napari.layers import Image, Labels
from napari.viewer import Viewer
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QHBoxLayout,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_resfinetune.widgets.controller import controller_of
from napari_resfinetune.widgets.docked import Docked
from napari_resfinetune.widgets.draft import PairItem
from napari_resfinetune.widgets.engine_status import EngineStatus
from napari_resfinetune.widgets.exports import axes_of
from napari_resfinetune.widgets.finetune.running import show_labels, shown_slice
from napari_resfinetune.widgets.layer_choice import LayerChoice
from napari_resfinetune.widgets.model_choice import ModelChoice
from napari_resfinetune.widgets.parts import Rows, Words
from napari_resfinetune.words import counted, rough_duration

LIVE_MS = 250
# mode, name, when to take it
MODES = (
    ("ais", "Decoder (AIS)", "Fast: the decoder finds whole objects. For models with one, as yours."),
    ("apg", "Decoder and prompts (APG)", "Slower, better outlines: the decoder's objects are refined with prompts."),
    ("amg", "Grid of points (AMG)", "Slowest; for models without decoder."),
)
# name, words, lowest, highest, default, tooltip
PARAMETERS: dict[str, tuple[tuple[str, str, float, float, float, str], ...]] = {
    "ais": (
        ("foreground_threshold", "Foreground", 0.05, 0.95, 0.5, "higher: less is taken as object"),
        ("center_distance_threshold", "Centres", 0.05, 0.95, 0.5, "lower: more is one object, higher: more objects"),
        ("boundary_distance_threshold", "Borders", 0.05, 0.95, 0.5, "lower: objects are cut apart more easily"),
    ),
    "apg": (
        ("foreground_threshold", "Foreground", 0.05, 0.95, 0.5, "higher: less is taken as object"),
        ("nms_threshold", "Overlap", 0.1, 0.95, 0.9, "how far two objects may overlap before one goes"),
    ),
    "amg": (
        ("pred_iou_thresh", "Confidence", 0.5, 0.99, 0.88, "higher: fewer objects, of which the model is more sure"),
        ("stability_score_thresh", "Stability", 0.5, 0.99, 0.95, "higher: fewer objects, with clearer outlines"),
    ),
}
CORRECTING = (
    "1 Segment an image. 2 Correct the labels with napari's brush and eraser. 3 Add them to the training images. "
    "4 Continue training."
)


class SegmentWidget(Docked):
    """Segment a layer with a model; the result is a labels layer that one can edit and train on.

    Parameters
    ----------
    napari_viewer
        The viewer.
    """

    def __init__(self, napari_viewer: Viewer, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.controller = controller_of(napari_viewer)
        viewer = self.controller.viewer
        self.result: Any = None
        self._image: Any = None
        self._planes: list[int] | None = None
        self._edited = self._busy = False
        self._job: int | None = None
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(LIVE_MS)
        self._timer.timeout.connect(self.segment)
        self.guide = Words(viewer)
        self.guide.setVisible(False)
        self.image = LayerChoice(viewer, Image, "image")
        self.model = ModelChoice(self.controller, for_training=False, parent=self)
        if self.controller.last_model:
            self.model.set_value(self.controller.last_model)
        self.mode = QComboBox()
        for mode, name, advice in MODES:
            self.mode.addItem(name, mode)
            self.mode.setItemData(self.mode.count() - 1, advice, 3)
        self.mode.setAccessibleName("mode")
        self.mode_advice = Words(viewer, tone="muted")
        self.part = QComboBox()
        self.part.addItem("This slice", "slice")
        self.part.addItem("Whole stack", "stack")
        self.forms = {mode: _form(mode) for mode in PARAMETERS}
        self.live = QCheckBox("Follow changes at once")
        self.live.setChecked(True)
        self.live.setToolTip("The image is looked at once; other parameters then take moments")
        self.button = QPushButton("Segment")
        self.button.setMinimumHeight(38)
        self.cancel_button = QPushButton("Cancel")
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setRange(0, 1000)
        self.note = Words(viewer, tone="muted")
        self.add_button = QPushButton("Add to training images")
        self.add_button.setToolTip("Puts the image with these labels, as you corrected them, into Finetune")
        self.continue_button = QPushButton("Continue training")
        self.continue_button.setToolTip("Opens Finetune with this model to start from, and old and new pairs")
        self._lay_out()
        self._connect()
        self._mode_changed()
        self._layer_changed()
        self._show_busy(False)

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(8, 6, 8, 6)
        layout.setSpacing(6)
        layout.addWidget(self.guide)
        rows = self._rows = Rows(layout)
        rows.add("Image", self.image)
        rows.add("Part", self.part)
        rows.add("Model", self.model.combo)
        rows.below(self.model.advice)
        rows.add("Mode", self.mode)
        rows.below(self.mode_advice)
        for container in self.forms.values():
            layout.addWidget(container.native)
        layout.addWidget(self.live)
        run = QHBoxLayout()
        run.addWidget(self.button, 1)
        run.addWidget(self.cancel_button)
        layout.addLayout(run)
        layout.addWidget(self.bar)
        layout.addWidget(self.note)
        then = QHBoxLayout()
        then.addWidget(self.add_button)
        then.addWidget(self.continue_button)
        layout.addLayout(then)
        layout.addStretch()
        layout.addWidget(EngineStatus(self.controller))

    def _connect(self) -> None:
        self.button.clicked.connect(self.segment)
        self.cancel_button.clicked.connect(self._cancel)
        self.add_button.clicked.connect(self._add_to_training)
        self.continue_button.clicked.connect(self._continue)
        self.mode.currentIndexChanged.connect(self._mode_changed)
        self.model.value_changed.connect(self._changed)
        self.image.layer_changed.connect(self._layer_changed)
        for container in self.forms.values():
            container.changed.connect(self._changed)

    def end_work(self) -> None:
        """Ask for no result any more; it would come as a surprise."""
        self._timer.stop()
        self._cancel()

    def explain_correcting(self) -> None:
        """Show the steps of correcting and continuing."""
        self.guide.say(CORRECTING)

    def segment(self) -> None:
        """Segment the chosen layer; while that goes on, only the newest request waits."""
        layer = self.image.layer
        if layer is None:
            self.note.say("Open an image first.", "warning")
            return
        self._show_busy(True)
        self.note.say("Starting…", "muted")
        mode = self.mode.currentData()
        parameters = {widget.name: widget.value for widget in self.forms[mode]}
        stack = layer.ndim > 2
        planes = None
        if stack and self.part.currentData() == "slice":
            planes = [shown_slice(self.controller.viewer, layer)]

        def exported(files: Any) -> None:
            if isinstance(files, Exception):
                self._failed([f"The layer cannot be copied: {files}"])
                return
            self._job = self.controller.engine.ask(
                "segment",
                owner=self,
                topic="segment",
                on_result=lambda answer: self._show_result(answer, layer, planes),
                on_error=self._failed,
                on_event=self._progress,
                image=files[id(layer)],
                axes=axes_of(layer),
                planes=planes,
                model=self.model.value(),
                mode=mode,
                parameters=parameters,
                output=str(self.controller.arrays),
            )

        self.controller.exporter.export([layer], exported)

    def _show_result(self, answer: dict[str, Any], image: Any, planes: list[int] | None) -> None:
        self._job = None
        self._show_busy(False)
        viewer = self.controller.viewer
        if image not in viewer.layers:
            self.note.say("The image was removed meanwhile.", "muted")
            return
        name = f"{image.name} segmented"
        if planes is not None:
            name += f" (slice {planes[0]})"
        same = self._image is image and self._planes == planes
        if self._is_edited() or self.result is None or not same or self.result not in viewer.layers:
            # What was corrected by hand is never overwritten.
            name = _free_name(viewer, name)
        else:
            name = self.result.name
        self.result = show_labels(viewer, answer["labels"], name, image)
        self._image, self._planes, self._edited = image, planes, False
        self.result.events.paint.disconnect(self._was_edited)
        self.result.events.paint.connect(self._was_edited)
        self.note.say(f"{counted(answer['objects'], 'object')} in {rough_duration(answer['seconds'])}.", "muted")
        self._show_busy(False)

    def _is_edited(self) -> bool:
        """Whether somebody has painted, or paints now: napari tells of a stroke only when it ends."""
        return self._edited or bool(getattr(self.result, "_block_history", False))

    def _was_edited(self, event: Any = None) -> None:
        self._edited = True

    def _failed(self, problems: list[str]) -> None:
        self._job = None
        self._show_busy(False)
        self.note.say("" if problems == ["stopped"] else self.controller.exporter.in_words("\n".join(problems)), "bad")

    def _progress(self, event: dict[str, Any]) -> None:
        self.bar.setRange(0, 1000 if "done" in event else 0)
        if "done" in event:
            self.bar.setValue(round(1000 * event["done"] / event["total"]))
        self.note.say(f"{event['text'][:1].upper()}{event['text'][1:]}…", "muted")

    def _cancel(self) -> None:
        if self._job is not None:
            self.controller.engine.stop(self._job)

    def _changed(self, value: Any = None) -> None:
        """Follow a change when there is a result to follow it."""
        if self.live.isChecked() and self.result is not None and self._image is self.image.layer:
            self._timer.start()

    def _mode_changed(self, index: int = 0) -> None:
        mode = self.mode.currentData()
        self.mode_advice.say(next(advice for name, _, advice in MODES if name == mode))
        for name, container in self.forms.items():
            container.native.setVisible(name == mode)
        self._changed()

    def _layer_changed(self) -> None:
        layer = self.image.layer
        self._rows.show(self.part, layer is not None and layer.ndim > 2)
        self.button.setEnabled(layer is not None)
        self._show_busy(self._busy)
        self.note.say("" if layer is not None else "Open an image first.", "muted")

    def _show_busy(self, busy: bool) -> None:
        self._busy = busy
        self.bar.setVisible(busy)
        self.cancel_button.setVisible(busy)
        there = self.result is not None and not busy and self._image is self.image.layer
        self.add_button.setVisible(there)
        self.continue_button.setVisible(there)

    def _add_to_training(self) -> None:
        labels = self.result
        if labels not in self.controller.viewer.layers or not isinstance(labels, Labels):
            self.note.say("The result was removed; segment again.", "warning")
            return
        if labels.ndim != self._image.ndim:
            self.note.say("Segment the whole stack to train on it, or correct a single image.", "warning")
            return
        rounds = len(self.controller.draft.rounds) + 1
        before = len(self.controller.draft.pairs)
        changed = self.controller.draft.add([PairItem(self._image, labels, round=rounds)])
        total = len(self.controller.draft.pairs)
        did = "Added" if total > before else "These are its labels now" if changed else "Already there"
        self.note.say(f"{did}: {counted(total, 'training image')} now.", "good")

    def _continue(self) -> None:
        """Open Finetune with this model to start from."""
        self.controller.draft.change_config({"model": self.model.value()})
        self.controller.training.forget()
        self.controller.open("Finetune")


def _form(mode: str) -> Container:
    fields: list[Widget] = [
        FloatSlider(name=name, label=words, min=low, max=high, value=default, step=0.01, tooltip=f"{tip} ({name})")
        for name, words, low, high, default, tip in PARAMETERS[mode]
    ]
    tip = "smaller objects are left out, in pixels (min_size)"
    fields.append(SpinBox(name="min_size", label="Smallest", min=0, max=100_000, value=25, tooltip=tip))
    container = Container(widgets=fields, labels=True)
    container.margins = (0, 0, 0, 0)
    return container


def _free_name(viewer: Any, name: str) -> str:
    taken = {layer.name for layer in viewer.layers}
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{Path(name).name} {number}"
    return free
