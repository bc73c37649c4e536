"""One line on the engine: that it starts, is ready, or has crashed."""

from __future__ import annotations

from qtpy.QtWidgets import QWidget

from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.parts import Words
from napari_resfinetune.words import gigabytes


class EngineStatus(Words):
    """Follows the controller's engine."""

    def __init__(self, controller: Controller, parent: QWidget | None = None) -> None:
        super().__init__(controller.viewer, tone="muted", parent=parent)
        self._controller = controller
        self.setToolTip("The engine is a process of its own: it loads models and trains, so that napari stays free")
        controller.engine.status_changed.connect(self.show_status)
        controller.computer_changed.connect(self.show_status)
        self.show_status()

    def show_status(self, status: str = "") -> None:
        """Show how the engine is."""
        engine, computer = self._controller.engine, self._controller.computer
        if engine.status == "starting" or (engine.status == "ready" and not computer):
            self.say("Engine: starting in the background…", "muted")
        elif engine.status == "ready":
            self.say(f"Engine: ready, {computer['name']}, {gigabytes(computer['free_gb'])} GB free", "muted")
        elif engine.status == "off":
            self.say("Engine: off, starts when needed", "muted")
        elif engine.status == "crashed":
            self.say("Engine: ended unexpectedly, starts when needed", "bad")
