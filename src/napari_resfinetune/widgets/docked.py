"""What the dock widgets have in common: they wake the engine when they are seen, and go when they are closed."""

from __future__ import annotations

from qtpy.compat import isalive
from qtpy.QtCore import QEvent, QTimer
from qtpy.QtGui import QShowEvent
from qtpy.QtWidgets import QDockWidget, QMainWindow, QWidget

from napari_resfinetune.widgets.controller import Controller


class Docked(QWidget):
    """A widget in a dock of napari's window."""

    controller: Controller
    # Once shown, and once it has its place among the others.
    _shown = _placed = False

    def showEvent(self, event: QShowEvent | None) -> None:
        """Start the engine in the background once the widget is seen."""
        super().showEvent(event)
        self.controller.attach(self)
        if not self._shown:
            self._shown = True
            QTimer.singleShot(0, self._join_others)

    def _join_others(self) -> None:
        """Become a tab beside our widgets that are there: napari stacks what its menu opens, and two do not fit."""
        if not isalive(self):
            return
        self._placed = True
        window, dock = self.window(), _dock_of(self)
        if dock is None or not isinstance(window, QMainWindow) or dock.isFloating():
            return
        others = [_dock_of(each) for each in window.findChildren(Docked) if each._placed and each is not self]
        if any(other in window.tabifiedDockWidgets(dock) for other in others):
            return
        area = window.dockWidgetArea(dock)
        for other in others:
            if other is not None and not other.isFloating() and window.dockWidgetArea(other) == area:
                window.tabifyDockWidget(other, dock)
                dock.raise_()
                return

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


def _dock_of(widget: QWidget) -> QDockWidget | None:
    above = widget.parentWidget()
    while above is not None and not isinstance(above, QDockWidget):
        above = above.parentWidget()
    return above
