"""The section "Model": what to start from, what learns, and where the run is kept."""

from __future__ import annotations

from pathlib import Path

from qtpy.QtCore import QSignalBlocker
from qtpy.QtWidgets import (
    QComboBox,
    QFileDialog,
    QLineEdit,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.finetune.suggestion import Suggestion
from napari_resfinetune.widgets.model_choice import ModelChoice
from napari_resfinetune.widgets.parts import Rows, Words, heading

# kind, name, when to take it
STRATEGIES = (
    ("full", "All of it", "All weights learn: the most accurate, if memory and time allow."),
    ("lora", "LoRA", "Small additions learn and the rest stays: nearly as good, less memory, small files."),
    ("late", "Last blocks", "Only the end of the encoder learns; its start is computed once. Fast on a CPU."),
    (
        "late_lora",
        "LoRA in last blocks",
        "Small additions in the last blocks: a learning encoder in the least memory.",
    ),
    ("frozen", "Decoders only", "The encoder stays as it is: fastest, for images like those the model knows."),
)


class ModelSection(QWidget):
    """Edits model, strategy and the name of the run.

    Parameters
    ----------
    controller
        Of the viewer.
    """

    def __init__(self, controller: Controller, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._controller, self._draft = controller, controller.draft
        self.model = ModelChoice(controller, for_training=True, parent=self)
        self.model.combo.setToolTip("the model to start from")
        self.suggestion = Suggestion(controller, parent=self)
        self.strategy = QComboBox()
        self.strategy.setAccessibleName("what learns")
        for kind, name, advice in STRATEGIES:
            self.strategy.addItem(name, kind)
            self.strategy.setItemData(self.strategy.count() - 1, f"{advice} (strategy: {kind})", 3)
        self.advice = Words(controller.viewer, tone="muted")
        self.name = QLineEdit(self._draft.name)
        self.name.setPlaceholderText(self._draft.free_output().name)
        self.name.setAccessibleName("name of the run")
        self.folder = QPushButton("…")
        self.folder.setFixedWidth(30)
        self.folder.setAccessibleName("folder of runs")
        self._show_folder()
        self._lay_out()
        self.show_config()
        self.model.value_changed.connect(lambda model: self._draft.change_config({"model": model}))
        self.suggestion.suggested.connect(self.model.set_value)
        self.strategy.activated.connect(self._strategy_chosen)
        self.name.textEdited.connect(lambda text: setattr(self._draft, "name", text))
        self.folder.clicked.connect(self._choose_folder)
        self._draft.config_changed.connect(self.show_config)

    def _lay_out(self) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addWidget(heading("Model"))
        rows = Rows(layout)
        rows.add("Start from", self.model.combo, self.suggestion.button)
        rows.below(self.model.advice)
        rows.below(self.suggestion.words)
        rows.add("What learns", self.strategy)
        rows.below(self.advice)
        rows.add("Name", self.name, self.folder)

    def show_config(self) -> None:
        """Show what the draft says."""
        config = self._draft.config
        with QSignalBlocker(self.model):
            self.model.set_value(config.model)
        self.strategy.setCurrentIndex(self.strategy.findData(config.strategy.kind))
        self.advice.say(next(advice for kind, _, advice in STRATEGIES if kind == config.strategy.kind))

    def refresh_name(self) -> None:
        """Offer a name that is still free."""
        self.name.setPlaceholderText(self._draft.free_output().name)

    def _strategy_chosen(self, index: int) -> None:
        self._draft.change_config({"strategy": {"kind": self.strategy.itemData(index)}})

    def _choose_folder(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Keep runs in", str(self._draft.runs_folder))
        if folder:
            self._controller.set_runs_folder(Path(folder))
            self._show_folder()

    def _show_folder(self) -> None:
        self.folder.setToolTip(f"runs are kept in {self._draft.runs_folder}; click to choose another folder")
        self.name.setToolTip(f"the run becomes a folder of this name in {self._draft.runs_folder}")
