"""What the dock widgets have in common: they wake the engine when they are seen, and go when they are closed."""

from __future__ import annotations

from qtpy.compat import isalive
from qtpy.QtCore import QEvent, QTimer
from qtpy.QtGui import QShowEvent
from qtpy.QtWidgets import QWidget

from napari_resfinetune.widgets.controller import Controller


class Docked(QWidget):
    """A widget in a dock of napari's window."""

    controller: Controller

    def showEvent(self, event: QShowEvent | None) -> None:
        """Start the engine in the background once the widget is seen."""
        super().showEvent(event)
        self.controller.attach(self)

    def changeEvent(self, event: QEvent | None) -> None:
        """Go when napari takes the widget out of its closed dock: it is not shown again, but would go on listening."""
        super().changeEvent(event)
        if event is not None and event.type() == QEvent.Type.ParentChange and self.parentWidget() is None:
            self.end_work()
            QTimer.singleShot(0, self._delete_without_parent)

    def end_work(self) -> None:
        """End what is under way for a widget that was closed."""

    def _delete_without_parent(self) -> None:
        if isalive(self) and self.parentWidget() is None:
            self.deleteLater()
