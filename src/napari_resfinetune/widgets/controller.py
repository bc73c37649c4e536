"""One controller for each viewer: it owns the engine and what outlives a widget."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import psutil
from qtpy.compat import isalive
from qtpy.QtCore import QEvent, QObject, QTimer, Signal
from qtpy.QtWidgets import QApplication, QMainWindow, QMessageBox, QWidget

from napari_resfinetune.config.cache import read_cached, write_cached
from napari_resfinetune.widgets.draft import Draft, Round
from napari_resfinetune.widgets.engine_client import EngineClient
from napari_resfinetune.widgets.exports import Exporter
from napari_resfinetune.widgets.training_run import State, TrainingRun

PLUGIN = "napari-resfinetune"
SETTINGS = "window.json"
SCRATCH = "resfinetune-window-"
RUNS_FOLDER = Path.home() / "resfinetune"
_controllers: dict[int, Controller] = {}


class Controller(QObject):
    """What the widgets of one viewer share.

    Parameters
    ----------
    viewer
        The viewer itself, no proxy.
    """

    computer_changed = Signal()
    models_changed = Signal()

    def __init__(self, viewer: Any) -> None:
        super().__init__(QApplication.instance())
        self._viewer = weakref.ref(viewer)
        _remove_what_dead_windows_left()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self.engine = EngineClient(self.folder, parent=self)
        self.exporter = Exporter(self.folder / "layers", parent=self)
        self.draft = Draft(Path(read_cached(SETTINGS).get("runs_folder", RUNS_FOLDER)), parent=self)
        self.training = TrainingRun(self.engine, parent=self)
        self.computer: dict[str, Any] = {}
        self.last_model = ""
        # The window must not be held on to, or it would never be gone.
        self._window: Any = lambda: None
        self._closed = False
        self.engine.status_changed.connect(self._engine_changed)
        self.training.state_changed.connect(self._training_changed)
        QApplication.instance().aboutToQuit.connect(self.close)

    @property
    def viewer(self) -> Any:
        """The viewer."""
        return self._viewer()

    @property
    def arrays(self) -> Path:
        """Where the engine puts arrays for the window."""
        return self.folder / "arrays"

    def set_runs_folder(self, folder: Path) -> None:
        """Remember where runs are kept."""
        self.draft.runs_folder = folder
        write_cached(SETTINGS, {**read_cached(SETTINGS), "runs_folder": str(folder)})
        self.models_changed.emit()

    def attach(self, widget: QWidget) -> None:
        """Learn which window a widget is in, and start the engine in the background."""
        window = widget.window()
        if self._window() is None and isinstance(window, QMainWindow):
            self._window = weakref.ref(window)
            window.installEventFilter(self)
            window.destroyed.connect(self.close)
        if self.engine.status == "off" and not self.computer:
            self.engine.start()

    def open(self, name: str) -> Any:
        """Open another widget of this plugin, or bring it to the front, and return it."""
        dock, widget = self.viewer.window.add_plugin_dock_widget(PLUGIN, name, tabify=True)
        dock.show()
        dock.raise_()
        return widget

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        """Ask before the window is closed while a training runs."""
        if not self._closed and event.type() == QEvent.Type.Close and watched is self._window():
            if self.training.busy and not self._may_close():
                event.ignore()
                return True
            # napari may still refuse.
            QTimer.singleShot(0, self._close_with_window)
        return False

    def ask_after_closing_finetune(self) -> None:
        """Ask what becomes of a training whose widget was closed."""
        window = self._window()
        if self._closed or not self.training.busy or window is None or not isalive(window) or not window.isVisible():
            return
        answer = QMessageBox.question(
            window,
            "Finetuning is running",
            "Stop it? What was learned so far is saved. Otherwise it goes on in the background; open Finetune again to "
            "see it.",
            QMessageBox.StandardButton.Yes | QMessageBox.StandardButton.No,
            QMessageBox.StandardButton.No,
        )
        if answer == QMessageBox.StandardButton.Yes:
            self.training.stop()

    def close(self, *_: Any) -> None:
        """Stop the engine; a training saves what it has and ends by itself."""
        if self._closed:
            return
        self._closed = True
        for key in [key for key, controller in _controllers.items() if controller is self]:
            del _controllers[key]
        self.engine.close()
        self.exporter.close()
        self._folder.cleanup()
        self.deleteLater()

    def _close_with_window(self) -> None:
        window = self._window()
        if window is None or not isalive(window) or not window.isVisible():
            self.close()

    def _may_close(self) -> bool:
        answer = QMessageBox.question(
            self._window(),
            "Finetuning is running",
            "Stop it and close? What was learned so far is saved, and the run can be continued later.",
            QMessageBox.StandardButton.Close | QMessageBox.StandardButton.Cancel,
            QMessageBox.StandardButton.Cancel,
        )
        return bool(answer == QMessageBox.StandardButton.Close)

    def _training_changed(self) -> None:
        """Keep what a training came to, whatever widgets are open."""
        history = self.training.history
        if self.training.state in (State.RUNNING, State.PAUSED, State.FAILED):
            self.models_changed.emit()
        if self.training.state is not State.DONE:
            return
        if (Path(history.run_dir) / "model.pt").is_file():
            self.last_model = history.run_dir
        others = tuple(each for each in self.draft.rounds if each.run_dir != history.run_dir)
        name = Path(history.run_dir).name
        done = Round(name, history.run_dir, history.images, history.best_metric, history.comparison)
        self.draft.rounds = (*others, done)
        self.models_changed.emit()

    def _know_computer(self, found: dict[str, Any]) -> None:
        self.computer = found
        self.computer_changed.emit()

    def _engine_changed(self, status: str) -> None:
        if status in ("off", "crashed"):
            self.computer_changed.emit()
        elif status == "ready":  # what is free may have changed since it was last asked
            self.engine.ask("computer", owner=self, on_result=self._know_computer)


def controller_of(viewer: Any) -> Controller:
    """Return the controller of a viewer, which may be given as napari's proxy; it is made when there is none."""
    viewer = getattr(viewer, "__wrapped__", viewer)
    key = id(viewer)
    known = _controllers.get(key)
    if known is None or known.viewer is not viewer:
        known = _controllers[key] = Controller(viewer)
    return known


def _remove_what_dead_windows_left() -> None:
    """Remove, in the background, the copies of layers of a napari that was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*-*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            threading.Thread(target=shutil.rmtree, args=(folder, True), name="remove scratch", daemon=True).start()
