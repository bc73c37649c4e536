"""The dock widget "Models": the user's runs, where they came from, how good they are, and what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from napari.viewer import Viewer
from qtpy.QtCore import Qt
from qtpy.QtGui import QKeySequence, QShortcut, QShowEvent
from qtpy.QtWidgets import (
    QAbstractItemView,
    QFileDialog,
    QGridLayout,
    QHBoxLayout,
    QHeaderView,
    QLineEdit,
    QMessageBox,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_resfinetune.config import read_config
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.library import ModelEntry, delete_model, rename_model, set_note
from napari_resfinetune.widgets.controller import controller_of
from napari_resfinetune.widgets.docked import Docked
from napari_resfinetune.widgets.own_models import can_go_on, has_model, in_words, own_runs, score_of
from napari_resfinetune.widgets.parts import Words

TITLES = ("name", "date", "SA50", "verdict")
EMPTY = "No model yet. Finetune one, and it appears here."


class ModelsWidget(Docked):
    """List the runs in the folder of runs.

    Parameters
    ----------
    napari_viewer
        The viewer.
    """

    def __init__(self, napari_viewer: Viewer, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.controller = controller_of(napari_viewer)
        self.runs: list[ModelEntry] = []
        viewer = self.controller.viewer
        self.folder = QLineEdit()
        self.folder.setReadOnly(True)
        self.folder.setAccessibleName("folder of runs")
        self.choose_button = QPushButton("Folder…")
        self.hint = Words(viewer, EMPTY)
        self.table = QTableWidget(0, len(TITLES))
        self.table.setHorizontalHeaderLabels(TITLES)
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.table.verticalHeader().setVisible(False)
        self.table.setToolTip("Double-click a name to change it; choose several to compare them")
        header = self.table.horizontalHeader()
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(0, QHeaderView.ResizeMode.Stretch)
        self.details = Words(viewer)
        self.remark = QLineEdit()
        self.remark.setPlaceholderText("a note on this model")
        self.remark.setAccessibleName("note")
        self.import_button = QPushButton("Import…")
        self.import_button.setToolTip("Copies a checkpoint or a bioimage.io package into the list")
        self.note = Words(viewer, tone="muted")
        self.buttons = {name: QPushButton(text) for name, text in _BUTTONS.items()}
        for name, tip in _TIPS.items():
            self.buttons[name].setToolTip(tip)
        self._showing = False
        self._remarked: Path | None = None
        self._lay_out()
        self._connect()
        self.refresh()

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(8, 6, 8, 6)
        layout.setSpacing(6)
        top = QHBoxLayout()
        top.addWidget(self.folder, 1)
        top.addWidget(self.choose_button)
        layout.addLayout(top)
        layout.addWidget(self.hint)
        layout.addWidget(self.table, 3)
        layout.addWidget(self.details)
        layout.addWidget(self.remark)
        grid = QGridLayout()
        grid.setSpacing(4)
        for number, button in enumerate([*self.buttons.values(), self.import_button]):
            grid.addWidget(button, number // 2, number % 2)
        layout.addLayout(grid)
        layout.addWidget(self.note)
        layout.addStretch(1)

    def _connect(self) -> None:
        self.choose_button.clicked.connect(self._choose_folder)
        self.import_button.clicked.connect(self._choose_import)
        self.remark.editingFinished.connect(self._write_note)
        self.table.itemSelectionChanged.connect(self._show_chosen)
        self.table.itemChanged.connect(self._renamed)
        self.controller.models_changed.connect(self.refresh)
        self.controller.training.state_changed.connect(self._show_chosen)
        actions = {
            "segment": lambda run: self.controller.open("Segment").model.set_value(str(run.path)),
            "resume": self._resume,
            "continue": self._continue,
            "evaluate": lambda run: self.controller.open("Evaluate").model.set_value(str(run.path)),
            "export": self._choose_export,
            "delete": self._delete,
        }
        for name, action in actions.items():
            self.buttons[name].clicked.connect(lambda checked=False, action=action: self._with_chosen(action))
        # Delete and Backspace mean something else in the layer list and in other widgets.
        delete = QShortcut(QKeySequence.StandardKey.Delete, self.table, lambda: self._with_chosen(self._delete))
        delete.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)

    def showEvent(self, event: QShowEvent | None) -> None:
        """Read the folder again once the widget is seen."""
        super().showEvent(event)
        self.refresh()

    def refresh(self) -> None:
        """Read the folder of runs."""
        self._showing = True
        chosen = {run.path for run in self.chosen()}
        folder = self.controller.draft.runs_folder
        self.folder.setText(str(folder))
        self.runs = own_runs(folder)
        self.table.setRowCount(len(self.runs))
        for number, run in enumerate(self.runs):
            said = (run.name, run.created[:10], score_of(run), run.verdict or "–")
            for column, text in enumerate(said):
                item = QTableWidgetItem(text)
                if column:
                    item.setFlags(item.flags() & ~Qt.ItemFlag.ItemIsEditable)
                item.setToolTip(in_words(run))
                self.table.setItem(number, column, item)
        # Rows move when a run is added; what was chosen stays chosen.
        self.table.clearSelection()
        for number, run in enumerate(self.runs):
            if run.path in chosen:
                for column in range(len(TITLES)):
                    self.table.item(number, column).setSelected(True)
        self._showing = False
        self.hint.setVisible(not self.runs)
        self.table.setVisible(bool(self.runs))
        self._show_chosen()

    def chosen(self) -> list[ModelEntry]:
        """Return the runs that are selected."""
        rows = sorted({index.row() for index in self.table.selectionModel().selectedRows()})
        return [self.runs[row] for row in rows if row < len(self.runs)]

    def _show_chosen(self) -> None:
        if self._showing:
            return
        chosen = self.chosen()
        one = chosen[0] if len(chosen) == 1 else None
        training = self.controller.training
        for name, button in self.buttons.items():
            if name == "resume":
                possible = one is not None and can_go_on(one) and not training.busy
            else:
                possible = one is not None and (name == "delete" or has_model(one))
            button.setEnabled(possible)
        self.remark.setVisible(len(chosen) == 1)
        same = [run.path for run in chosen] == [self._remarked]
        if not (same and self.remark.isModified()):  # a note that is being typed stays
            self.remark.setText(chosen[0].note if len(chosen) == 1 else "")
        self._remarked = chosen[0].path if len(chosen) == 1 else None
        self.details.say("\n".join(_described(run) for run in chosen))

    def _with_chosen(self, action: object) -> None:
        chosen = self.chosen()
        if len(chosen) == 1 and callable(action):
            action(chosen[0])

    def _renamed(self, item: QTableWidgetItem) -> None:
        if self._showing:
            return
        run = self.runs[item.row()]
        try:
            rename_model(self.controller.draft.runs_folder, run.name, item.text())
            self.note.say("")
        except ConfigError as error:
            self.note.say(str(error), "bad")
        self.controller.models_changed.emit()

    def _resume(self, run: ModelEntry) -> None:
        """Go on with a run that was paused, stopped or cut off."""
        try:
            config = read_config(run.path / "config.yaml")
        except ConfigError as error:
            self.note.say(str(error), "bad")
            return
        images = config.data.images or ()
        self.controller.training.go_on_with(
            str(run.path), config.model_dump(mode="json"), 1 if isinstance(images, str) else len(images)
        )
        self.controller.open("Finetune")

    def _continue(self, run: ModelEntry) -> None:
        """Start the next run from this model."""
        self.controller.draft.change_config({"model": str(run.path)})
        self.controller.training.forget()
        self.controller.open("Finetune")

    def _choose_export(self, run: ModelEntry) -> None:
        kinds = "micro-sam checkpoint (*.pt);;bioimage.io package (*.zip)"
        file, _ = QFileDialog.getSaveFileName(self, "Export", f"{Path(run.name).name}.pt", kinds)
        if file:
            tried = " A package is tried out first, which takes a minute or two." if file.endswith(".zip") else ""
            self.note.say(f"Exporting…{tried}", "muted")
            self._ask("export_model", f"Exported to {Path(file).name}.", model=str(run.path), path=file)

    def _choose_import(self) -> None:
        file, _ = QFileDialog.getOpenFileName(self, "Import", "", "Models (*.pt *.pth *.zip);;All files (*)")
        if file:
            self.note.say("Importing…", "muted")
            folder = str(self.controller.draft.runs_folder)
            self._ask("import_model", f"Imported {Path(file).name}.", folder=folder, source=file)

    def _ask(self, verb: str, said: str, **request: Any) -> None:
        def done(answer: dict[str, Any]) -> None:
            self.controller.models_changed.emit()
            self.note.say(said, "good")

        self.controller.engine.ask(
            verb,
            owner=self,
            on_result=done,
            on_error=lambda problems: self.note.say("\n".join(problems), "bad"),
            **request,
        )

    def _write_note(self) -> None:
        chosen = self.chosen()
        if len(chosen) == 1 and chosen[0].note != self.remark.text().strip():
            try:
                set_note(self.controller.draft.runs_folder, chosen[0].name, self.remark.text())
                self.remark.setModified(False)
            except ConfigError as error:
                self.note.say(str(error), "bad")
            self.controller.models_changed.emit()

    def _delete(self, run: ModelEntry) -> None:
        answer = QMessageBox.question(
            self,
            "Delete",
            f"Delete {run.name} and its checkpoints? This cannot be undone.",
            QMessageBox.StandardButton.Yes | QMessageBox.StandardButton.No,
            QMessageBox.StandardButton.No,
        )
        if answer != QMessageBox.StandardButton.Yes:
            return
        try:
            delete_model(self.controller.draft.runs_folder, run.name)
            self.note.say(f"Deleted {run.name}.", "muted")
        except ConfigError as error:
            self.note.say(str(error), "bad")
        self.controller.models_changed.emit()

    def _choose_folder(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Folder of runs", self.folder.text())
        if folder:
            self.controller.set_runs_folder(Path(folder))


def _described(run: ModelEntry) -> str:
    said = [run.continued_from or Path(run.start_model).name or "imported", run.strategy, run.status]
    by = f"continued by {', '.join(run.continued_by)}" if run.continued_by else ""
    return f"{run.name}: from " + ", ".join(each for each in (*said, by) if each)


_BUTTONS = {
    "segment": "Segment with it",
    "resume": "Go on",
    "continue": "Train on from it",
    "evaluate": "Evaluate",
    "export": "Export…",
    "delete": "Delete…",
}
_TIPS = {
    "segment": "Opens Segment with this model chosen",
    "resume": "Continues a run that was paused, stopped or cut off, from its last checkpoint",
    "continue": "Opens Finetune for a new run that starts from this model",
    "evaluate": "Opens Evaluate with this model chosen",
    "export": "A checkpoint that micro-sam opens, or a bioimage.io package",
    "delete": "Deletes the run folder, after a question",
}
