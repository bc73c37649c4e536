"""A choice among a viewer's layers of one kind."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import QSignalBlocker, Signal
from qtpy.QtWidgets import QComboBox, QWidget

from napari_resfinetune.widgets.theme import follow_layers


class LayerChoice(QComboBox):
    """Lists the layers of one type, and follows the viewer.

    Parameters
    ----------
    viewer
        The viewer.
    kind
        Type of the layers.
    name
        For people who hear the screen read.
    """

    layer_changed = Signal()

    def __init__(self, viewer: Any, kind: type[Any], name: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._viewer, self._kind = viewer, kind
        self.setAccessibleName(name)
        self.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.setMinimumContentsLength(10)
        follow_layers(viewer, self.refresh)
        self.currentIndexChanged.connect(self._changed)
        self.refresh()

    @property
    def layer(self) -> Any:
        """The chosen layer, or `None`."""
        return self.currentData()

    def set_layer(self, layer: Any) -> None:
        """Choose a layer that is in the viewer."""
        self.setCurrentIndex(self.findData(layer))

    def refresh(self, event: Any = None) -> None:
        """List the layers again, and keep the chosen one."""
        chosen = self.layer
        with QSignalBlocker(self):
            self.clear()
            for layer in (each for each in self._viewer.layers if type(each) is self._kind):
                self.addItem(layer.name, layer)
            index = self.findData(chosen) if chosen is not None else -1
            self.setCurrentIndex(index if index >= 0 else self.count() - 1)
        if self.layer is not chosen:
            self.layer_changed.emit()

    def _changed(self, index: int) -> None:
        self.layer_changed.emit()
