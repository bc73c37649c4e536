"""A choice of model, own runs first, and one line on when to take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtpy.QtCore import QObject, QSignalBlocker, Qt, Signal
from qtpy.QtWidgets import QComboBox, QFileDialog, QWidget

from napari_resfinetune.models.names import KNOWN_MODELS, KnownModel, is_downloaded
from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.own_models import in_words, own_models
from napari_resfinetune.widgets.parts import Words

BROWSE = "browse"


class ModelChoice(QObject):
    """A list of own runs, micro-sam's models, and any file.

    Parameters
    ----------
    controller
        Knows where runs are.
    for_training
        Offer models without decoder too.
    parent
        Lays out `combo` and `advice`.
    """

    value_changed = Signal(str)

    def __init__(self, controller: Controller, *, for_training: bool, parent: QWidget) -> None:
        super().__init__(parent)
        self._controller, self._for_training = controller, for_training
        self.combo = QComboBox()
        self.combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.combo.setMinimumContentsLength(12)
        self.combo.setAccessibleName("model")
        self.advice = Words(controller.viewer, tone="muted")
        self._value = ""
        self.refresh()
        self.combo.activated.connect(self._chosen)
        controller.models_changed.connect(self.refresh)

    def value(self) -> str:
        """Return a model's name, or the path of a run folder or checkpoint."""
        return self._value

    def set_value(self, model: str) -> None:
        """Choose a model, also one that is not in the list yet."""
        if self.combo.findData(model) < 0:
            with QSignalBlocker(self.combo):
                self.combo.insertItem(0, Path(model).stem or model, model)
        self.combo.setCurrentIndex(self.combo.findData(model))
        self._set(model)

    def refresh(self) -> None:
        """Read the list of runs again, and keep what is chosen."""
        with QSignalBlocker(self.combo):
            self.combo.clear()
            for run in own_models(self._controller.draft.runs_folder):
                self.combo.addItem(f"{run.name}  (yours)", str(run.path))
            if self.combo.count():
                self.combo.insertSeparator(self.combo.count())
            for known in KNOWN_MODELS:
                if self._for_training or known.has_decoder:
                    self._add_known(known)
            self.combo.insertSeparator(self.combo.count())
            self.combo.addItem("Another file…", BROWSE)
        deleted = Path(self._value).is_absolute() and not Path(self._value).exists()
        if self._value and not deleted:
            self.set_value(self._value)
        else:
            first = self.combo.itemData(0)
            self.set_value(first if not self._for_training and first else "vit_b_lm")

    def _add_known(self, known: KnownModel) -> None:
        self.combo.addItem(known.name, known.name)
        self.combo.setItemData(self.combo.count() - 1, known.advice, Qt.ItemDataRole.ToolTipRole)

    def _chosen(self, index: int) -> None:
        model = self.combo.itemData(index)
        if model == BROWSE:
            file, _ = QFileDialog.getOpenFileName(
                self.combo, "A model", "", "Models (*.pt *.pth *.safetensors);;All files (*)"
            )
            self.set_value(file or self._value)
        else:
            self._set(model)

    def _set(self, model: str) -> None:
        changed, self._value = model != self._value, model
        self.advice.say(self._advice(model))
        if changed:
            self.value_changed.emit(model)

    def _advice(self, model: str) -> str:
        known: Any = next((known for known in KNOWN_MODELS if known.name == model), None)
        if known is not None:
            load = "" if is_downloaded(known.name) else f" {known.size_mb} MB to download."
            return f"{known.advice[:1].upper()}{known.advice[1:]}.{load}"
        run = next((run for run in own_models(self._controller.draft.runs_folder) if str(run.path) == model), None)
        return in_words(run) if run is not None else model
