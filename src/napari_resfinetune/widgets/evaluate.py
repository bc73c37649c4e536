"""The dock widget "Evaluate": scores of labels, or of a model, against the truth, and where the errors are."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from magicgui.types import FileDialogMode
from magicgui.widgets import FileEdit
from napari.layers import Image, Labels
from napari.utils import CyclicLabelColormap
from napari.viewer import Viewer
from qtpy.QtCore import Qt
from qtpy.QtGui import QKeySequence, QShortcut
from qtpy.QtWidgets import (
    QAbstractItemView,
    QApplication,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QHeaderView,
    QProgressBar,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_resfinetune.widgets.controller import controller_of
from napari_resfinetune.widgets.docked import Docked
from napari_resfinetune.widgets.engine_status import EngineStatus
from napari_resfinetune.widgets.layer_choice import LayerChoice
from napari_resfinetune.widgets.model_choice import ModelChoice
from napari_resfinetune.widgets.parts import Curve, Rows, Words

LAYERS, MODEL, FOLDERS = "layers", "model", "folders"
COLUMNS = ("image", "mode", "sa50", "sa75", "msa", "n_true", "n_pred")
# What is shown of it; a file has all of it.
SHOWN = ("image", "sa50", "sa75", "msa", "n_pred")
TITLES = ("image", "SA50", "SA75", "mSA", "objects")
TIPS = (
    "",
    "share of right objects at an overlap (IoU) of at least 0.5: right / (right + missed + extra)",
    "the same at an overlap of at least 0.75",
    "mean of it over overlaps from 0.5 to 0.95",
    "objects that were found, of those in the truth",
)
MODES = (("ais", "Decoder (AIS)"), ("amg", "Grid of points (AMG)"), ("box", "Box prompts"), ("point", "Point prompts"))
# Value in the error image, from 1 on, colour, words; the colours differ for people who see no red or green too.
ERRORS = (
    (1, "#4daf7c", "right"),
    (2, "#e6ab02", "extra"),
    (3, "#d95f5f", "missed"),
    (4, "#7570b3", "merged"),
    (5, "#1f9ed1", "split"),
)


class EvaluateWidget(Docked):
    """Score a labels layer or a model against labels, image by image.

    Parameters
    ----------
    napari_viewer
        The viewer.
    """

    def __init__(self, napari_viewer: Viewer, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.controller = controller_of(napari_viewer)
        viewer = self.controller.viewer
        self.rows: list[dict[str, Any]] = []
        self.what = QComboBox()
        self.what.addItem("A labels layer", LAYERS)
        self.what.addItem("A model", MODEL)
        self.what.addItem("A model on folders", FOLDERS)
        self.what.setAccessibleName("what to evaluate")
        self.truth = LayerChoice(viewer, Labels, "truth")
        self.prediction = LayerChoice(viewer, Labels, "prediction")
        self.image = LayerChoice(viewer, Image, "image")
        self.images_folder = FileEdit(mode=FileDialogMode.EXISTING_DIRECTORY, nullable=True, name="folder of images")
        self.truth_folder = FileEdit(mode=FileDialogMode.EXISTING_DIRECTORY, nullable=True, name="folder of labels")
        for folder in (self.images_folder, self.truth_folder):
            folder.choose_btn.text = "…"
        self.model = ModelChoice(self.controller, for_training=False, parent=self)
        self.mode = QComboBox()
        for mode, name in MODES:
            self.mode.addItem(name, mode)
        self.button = QPushButton("Evaluate")
        self.button.setMinimumHeight(38)
        self._request: int | None = None
        self._busy = False
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setVisible(False)
        self.note = Words(viewer, tone="muted")
        self.note.say("")
        self.table = QTableWidget(0, len(SHOWN))
        self._set_up_table()
        self.curve = Curve(viewer, 130)
        self.curve.setToolTip("share of right objects over the overlap (IoU) that is asked for")
        self.curve.y_range = (0.0, 1.0)
        self.curve.setVisible(False)
        self.legend = Words(viewer, tone="muted")
        self.legend.say("")
        self.copy_button = QPushButton("Copy")
        self.save_button = QPushButton("Save CSV…")
        self.clear_button = QPushButton("Clear")
        self._lay_out()
        self._connect()
        self._what_changed()
        self._show_rows()

    def _set_up_table(self) -> None:
        self.table.setHorizontalHeaderLabels(TITLES)
        for column, tip in enumerate(TIPS):
            self.table.horizontalHeaderItem(column).setToolTip(tip)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.verticalHeader().setVisible(False)
        self.table.setSortingEnabled(True)
        self.table.setMinimumHeight(120)
        header = self.table.horizontalHeader()
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        header.setMinimumSectionSize(30)

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(8, 6, 8, 6)
        layout.setSpacing(6)
        rows = self._rows = Rows(layout)
        rows.add("Evaluate", self.what)
        rows.add("Truth", self.truth)
        rows.add("Labels", self.prediction)
        rows.add("Image", self.image)
        rows.add("Images in", self.images_folder.native)
        rows.add("Truth in", self.truth_folder.native)
        self._model_row = QWidget()
        of_model = QVBoxLayout(self._model_row)
        of_model.setContentsMargins(0, 0, 0, 0)
        of_model.setSpacing(2)
        of_model.addWidget(self.model.combo)
        of_model.addWidget(self.model.advice)
        rows.add("Model", self._model_row)
        rows.add("Mode", self.mode)
        for widget in (self.button, self.bar, self.note, self.table, self.curve, self.legend):
            layout.addWidget(widget)
        buttons = QHBoxLayout()
        for button in (self.copy_button, self.save_button, self.clear_button):
            buttons.addWidget(button)
        layout.addLayout(buttons)
        layout.addStretch()
        layout.addWidget(EngineStatus(self.controller))

    def _connect(self) -> None:
        self.what.currentIndexChanged.connect(self._what_changed)
        self.button.clicked.connect(self._clicked)
        self.copy_button.clicked.connect(self.copy)
        self.save_button.clicked.connect(self._choose_file)
        self.clear_button.clicked.connect(self._clear)
        copying = QShortcut(QKeySequence.StandardKey.Copy, self.table, self.copy)
        copying.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
        for choice in (self.truth, self.prediction, self.image):
            choice.layer_changed.connect(self._show_what_is_missing)
        for folder in (self.images_folder, self.truth_folder):
            folder.changed.connect(lambda value: self._show_what_is_missing())
        self.model.value_changed.connect(self._model_chosen)

    def end_work(self) -> None:
        """Stop an evaluation."""
        if self._request is not None:
            self.controller.engine.stop(self._request)

    def _clicked(self) -> None:
        if self._request is not None:
            self.controller.engine.stop(self._request)
        else:
            self.evaluate()

    def evaluate(self) -> None:
        """Score what is chosen and add rows to the table."""
        self.legend.say("")  # it is about what was compared before
        if self.what.currentData() == FOLDERS:
            self._show_busy(True)
            self._ask_model(str(self.images_folder.value), str(self.truth_folder.value), None)
            return
        truth, of_model = self.truth.layer, self.what.currentData() == MODEL
        other = self.image.layer if of_model else self.prediction.layer
        self._show_busy(True)

        def exported(files: Any) -> None:
            if isinstance(files, Exception):
                self._failed([f"The layers cannot be copied: {files}"])
            elif of_model:
                self._ask_model(files[id(other)], files[id(truth)], other.name)
            else:
                self._ask_layers(files[id(truth)], files[id(other)], truth, other)

        self.controller.exporter.export([truth, other], exported)

    def _ask_layers(self, truth: str, prediction: str, truth_layer: Any, other: Any) -> None:
        self.controller.engine.ask(
            "compare",
            owner=self,
            on_result=lambda answer: self._compared(answer, truth_layer, other),
            on_error=self._failed,
            truth=truth,
            prediction=prediction,
            name=other.name,
            output=str(self.controller.arrays),
        )

    def _ask_model(self, image: str, truth: str, name: str | None) -> None:
        """Score the model on an image, or on all of a folder; rows are called `name`, or else as their files."""
        model = self.model.value()
        self._request = self.controller.engine.ask(
            "evaluate",
            owner=self,
            on_result=lambda answer: self._evaluated(answer, name, model),
            on_error=self._failed,
            on_event=self._show_progress,
            images=image,
            labels=truth,
            model=model,
            modes=[self.mode.currentData()],
        )
        self.button.setText("Stop")
        self.button.setEnabled(True)

    def _show_progress(self, event: dict[str, Any]) -> None:
        if "total" in event:
            self.bar.setRange(0, event["total"])
            self.bar.setValue(event["done"])
            self.note.say(f"{event['done']} of {event['total']}: {event['text']}", "muted")
        else:
            self.note.say(f"{event['text']}…", "muted")

    def _compared(self, answer: dict[str, Any], truth: Any, other: Any) -> None:
        self._show_busy(False)
        self.rows.append(answer["row"])
        self._show_rows()
        self._show_errors(answer["errors"], truth, f"errors of {other.name}")
        counts = answer["counts"]
        said = ", ".join(f"{counts[words]} {words}" for _, _, words in ERRORS)
        self.legend.say(f"{said}. Colours in the layer “errors of {other.name}”.")
        lines = {**self.curve.lines, other.name: [tuple(point) for point in answer["curve"]]}
        self.curve.set_lines(dict(list(lines.items())[-3:]), "overlap (IoU)")
        self.curve.setVisible(True)

    def _evaluated(self, answer: dict[str, Any], name: str | None, model: str) -> None:
        self._show_busy(False)
        self._clear_curve()  # a model has none
        for row in answer["rows"]:
            plane = "" if row["plane"] is None else f" [{row['plane']}]"
            image = f"{name or row['image']}{plane}"
            self.rows.append({**row, "image": image, "mode": f"{Path(model).stem} {row['mode']}"})
        self._show_rows()

    def _show_errors(self, file: str, truth: Any, name: str) -> None:
        viewer = self.controller.viewer
        data = np.load(file)
        Path(file).unlink(missing_ok=True)
        there = next((layer for layer in viewer.layers if layer.name == name), None)
        if there is not None and there.data.shape == data.shape:
            there.data = data
            return
        chosen = list(viewer.layers.selection)
        # Value n has colour n. A map by value instead would have numba compile for seconds, in this thread.
        colours = CyclicLabelColormap(colors=["transparent", *(colour for _, colour, _ in ERRORS)])
        viewer.add_labels(
            data,
            name=name,
            colormap=colours,
            scale=truth.scale,
            translate=truth.translate,
        )
        viewer.layers.selection = set(chosen)

    def _failed(self, problems: list[str]) -> None:
        self._show_busy(False)
        stopped = problems == ["stopped"]
        said = "Stopped." if stopped else self.controller.exporter.in_words("\n".join(problems))
        self.legend.say("")
        self.note.say(said, "muted" if stopped else "bad")

    # The table

    def text(self, separator: str = "\t") -> str:
        """Return the table as text, with the mean of each mode below."""
        out = io.StringIO()
        writer = csv.writer(out, delimiter=separator, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in [*self.rows, *self._means()]:
            writer.writerow([row.get(name, "") for name in COLUMNS])
        return out.getvalue()

    def copy(self) -> None:
        """Put the table on the clipboard, as a spreadsheet takes it."""
        QApplication.clipboard().setText(self.text())
        self.note.say("Copied.", "muted")

    def save(self, file: str | Path) -> None:
        """Write the table as CSV."""
        try:
            Path(file).write_text(self.text(","), encoding="utf-8")
        except OSError as error:
            self.note.say(f"{file}: cannot be written ({error.strerror}); choose another folder", "bad")
        else:
            self.note.say(f"Saved {Path(file).name}.", "muted")

    def _choose_file(self) -> None:
        file, _ = QFileDialog.getSaveFileName(self, "Save the table", "scores.csv", "CSV (*.csv)")
        if file:
            self.save(file)

    def _means(self) -> list[dict[str, Any]]:
        means = []
        for mode in dict.fromkeys(row["mode"] for row in self.rows):
            rows = [row for row in self.rows if row["mode"] == mode]
            if len(rows) > 1:
                of = {name: float(np.mean([row[name] for row in rows])) for name in ("sa50", "sa75", "msa")}
                means.append({"image": f"mean of {len(rows)}", "mode": mode, **of})
        return means

    def _show_rows(self) -> None:
        rows = [*self.rows, *self._means()]
        self.table.setSortingEnabled(False)
        self.table.setRowCount(len(rows))
        for number, row in enumerate(rows):
            for column, name in enumerate(SHOWN):
                value = row.get(name, "")
                item = QTableWidgetItem(str(value))
                if name == "n_pred" and value != "":
                    item = _Number(value, f"{value} of {row['n_true']}")
                elif isinstance(value, float):
                    item = _Number(value, f"{value:.2f}")
                item.setToolTip(f"{row['image']}: {row['mode']}")
                self.table.setItem(number, column, item)
        self.table.setSortingEnabled(True)
        for widget in (self.table, self.copy_button, self.save_button, self.clear_button):
            widget.setVisible(bool(rows))

    def _clear(self) -> None:
        self.rows = []
        self._clear_curve()
        self.legend.say("")
        self._show_rows()

    def _clear_curve(self) -> None:
        self.curve.set_lines({})
        self.curve.setVisible(False)

    # What is shown

    def _what_changed(self, index: int = 0) -> None:
        what = self.what.currentData()
        for widget in (self._model_row, self.mode):
            self._rows.show(widget, what != LAYERS)
        self._rows.show(self.prediction, what == LAYERS)
        self._rows.show(self.image, what == MODEL)
        self._rows.show(self.truth, what != FOLDERS)
        for folder in (self.images_folder, self.truth_folder):
            self._rows.show(folder.native, what == FOLDERS)
        self._show_what_is_missing()

    def _model_chosen(self, model: str) -> None:
        if self.what.currentData() == LAYERS:
            self.what.setCurrentIndex(self.what.findData(MODEL))

    def _missing(self) -> str:
        if self.what.currentData() == FOLDERS:
            folders = (self.images_folder.value, self.truth_folder.value)
            return "" if all(folders) else "Choose a folder of images and one of labels."
        other = self.image.layer if self.what.currentData() == MODEL else self.prediction.layer
        if self.truth.layer is None:
            return "Open or paint a labels layer as the truth first."
        if other is None:
            return "Open an image first."
        return "Choose two different layers." if other is self.truth.layer else ""

    def _show_what_is_missing(self) -> None:
        if self._busy:
            return
        missing = self._missing()
        self.button.setEnabled(not missing)
        self.note.say(missing, "muted")

    def _show_busy(self, busy: bool) -> None:
        self._request, self._busy = None, busy
        self.button.setText("Evaluate")
        self.button.setEnabled(not busy)
        self.bar.setVisible(busy)
        self.bar.setRange(0, 0 if busy else 1)
        self.note.say("Comparing…" if busy else "", "muted")


class _Number(QTableWidgetItem):
    """A number that sorts as one."""

    def __init__(self, value: float, text: str) -> None:
        super().__init__(text)
        self.value = value

    def __lt__(self, other: Any) -> bool:
        return self.value < other.value if isinstance(other, _Number) else bool(super().__lt__(other))
