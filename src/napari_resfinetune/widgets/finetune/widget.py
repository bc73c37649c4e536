"""The dock widget "Finetune"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from napari.viewer import Viewer
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import QFrame, QPushButton, QScrollArea, QStackedWidget, QStyle, QVBoxLayout, QWidget

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.widgets.controller import controller_of
from napari_resfinetune.widgets.docked import Docked
from napari_resfinetune.widgets.draft import PairItem
from napari_resfinetune.widgets.engine_status import EngineStatus
from napari_resfinetune.widgets.finetune.computer import ComputerSection
from napari_resfinetune.widgets.finetune.images import ImagesSection
from napari_resfinetune.widgets.finetune.model import ModelSection
from napari_resfinetune.widgets.finetune.outcome import OutcomePage
from napari_resfinetune.widgets.finetune.running import RunningPage
from napari_resfinetune.widgets.parts import Words
from napari_resfinetune.widgets.training_run import State

WIDTH = 360


class FinetuneWidget(Docked):
    """Finetune Segment Anything on the layers of a viewer.

    It edits one `FinetuneConfig`, the draft of the viewer's controller, and shows the controller's training; both stay
    when the widget is closed.

    Parameters
    ----------
    napari_viewer
        The viewer.
    """

    def __init__(self, napari_viewer: Viewer, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.controller = controller_of(napari_viewer)
        self._draft, self._training = self.controller.draft, self.controller.training
        self.images = ImagesSection(self.controller)
        self.model = ModelSection(self.controller)
        self.computer = ComputerSection(self.controller)
        self.reason = Words(self.controller.viewer, tone="muted")
        self.start_button = QPushButton("Start finetuning")
        self.start_button.setMinimumHeight(38)
        self.start_button.setToolTip("Trains in a process of its own; napari stays free")
        self.running = RunningPage(self.controller)
        self.outcome = OutcomePage(self.controller)
        self.pages = QStackedWidget()
        self._copying = False
        self._lay_out()
        self.start_button.clicked.connect(self.start)
        self.images.checked.connect(self._checked)
        self.images.failed.connect(self._show_start)
        self.computer.planned.connect(self._show_start)
        self.computer.advanced.refused_changed.connect(self._show_start)
        self._draft.pairs_changed.connect(self._show_start)
        self._draft.config_changed.connect(self.images.check_again)
        self._training.state_changed.connect(self._show_page)
        self.outcome.wants_new_run.connect(self._new_run)
        self._show_page()
        self._show_start()

    def _lay_out(self) -> None:
        setup = QWidget()
        column = QVBoxLayout(setup)
        column.setContentsMargins(0, 0, 0, 0)
        column.setSpacing(10)
        for section in (self.images, self.model, self.computer):
            column.addWidget(section)
        column.addStretch()
        whole = QWidget()
        layout = QVBoxLayout(whole)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(_scrolled(setup), 1)
        layout.addWidget(self.reason)
        layout.addWidget(self.start_button)
        for page in (whole, _scrolled(self.running), _scrolled(self.outcome)):
            self.pages.addWidget(page)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(8, 6, 8, 6)
        outer.addWidget(self.pages, 1)
        outer.addWidget(EngineStatus(self.controller))
        scroll_bar = self.style().pixelMetric(QStyle.PixelMetric.PM_ScrollBarExtent)
        self.setMinimumWidth(WIDTH + scroll_bar)

    def value(self) -> FinetuneConfig:
        """Return the configuration, without data and output folder, which a start adds."""
        return self._draft.config

    def set_value(self, config: FinetuneConfig) -> None:
        """Show a configuration."""
        self._draft.set_config(config)

    def end_work(self) -> None:
        """Ask what becomes of a training that runs."""
        QTimer.singleShot(0, self.controller.ask_after_closing_finetune)

    def start(self) -> None:
        """Copy the layers as they are now, and train."""
        if self._copying or self._training.busy:
            return
        self._copying = True
        self._show_start()
        pairs = self._draft.pairs

        def exported(files: Any) -> None:
            self._copying = False
            self._show_start()
            if isinstance(files, Exception):
                self.reason.say(f"The layers cannot be copied: {files}", "bad")
                return
            self._start_with(pairs, [pair.files(files) for pair in pairs])

        self.controller.exporter.export([layer for pair in pairs for layer in pair.layers], exported)

    def _start_with(self, pairs: Sequence[PairItem], files: list[tuple[str, str]]) -> None:
        try:
            config, copies = self._draft.run_config(pairs, files, self._draft.free_output())
        except ConfigError as error:
            self.reason.say(str(error), "bad")
            return
        self._training.start(config.model_dump(mode="json"), copies, len(files))

    def _checked(self, report: dict[str, Any]) -> None:
        self.computer.set_held_out(report["held_out_regions"])
        self._show_start()

    def _show_start(self, *_: Any) -> None:
        """Let the button be pressed when that makes sense, and say what is missing when it does not."""
        plan = self.computer.current_plan
        missing, tone = "", "muted"
        if self._copying:
            missing = "Copying the layers…"
        elif not self._draft.pairs:
            missing = "Next: add images."
        elif self.images.problem:
            missing, tone = self.images.problem, "bad"
        elif self.images.report is None:
            missing = "Looking at the images…"
        elif self.images.has_errors():
            missing, tone = "Next: mend what is marked above.", "warning"
        elif self.computer.advanced.refused:
            missing, tone = f"Next: correct in Advanced: {', '.join(self.computer.advanced.refused)}.", "warning"
        elif plan is not None and not plan["fits"]:
            missing, tone = "Next: choose something that fits.", "warning"
        self.reason.say(missing, tone)
        self.start_button.setEnabled(not missing)

    def _show_page(self) -> None:
        state = self._training.state
        page = 0 if state is State.NONE else 1 if self._training.busy else 2
        self.outcome.show_outcome()
        self.pages.setCurrentIndex(page)

    def _new_run(self) -> None:
        """Go back to the images, and train on from the last model unless it is worse than what it started from."""
        self._training.forget()
        self._draft.name = ""
        self.model.name.clear()
        self.model.refresh_name()
        self._show_start()


def _scrolled(widget: QWidget) -> QScrollArea:
    area = QScrollArea()
    area.setWidgetResizable(True)
    area.setFrameShape(QFrame.Shape.NoFrame)
    area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    area.setWidget(widget)
    return area
