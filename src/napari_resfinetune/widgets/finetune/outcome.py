"""The page of a training that has ended: what happened, in plain words, and what to do next."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QGridLayout, QLabel, QPushButton, QVBoxLayout, QWidget

from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.draft import Round
from napari_resfinetune.widgets.finetune.running import summary_of
from napari_resfinetune.widgets.parts import Curve, Words
from napari_resfinetune.widgets.training_run import History, State
from napari_resfinetune.words import counted, gigabytes, rough_duration

REASONS = "Usual reasons: few or inconsistent labels, objects much larger than the patch, or too few epochs."
MORE_EPOCHS = 50


class OutcomePage(QWidget):
    """Says how the controller's training ended.

    Parameters
    ----------
    controller
        Of the viewer.
    """

    wants_new_run = Signal()
    """The user is done with this run."""

    def __init__(self, controller: Controller, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._controller, self._training = controller, controller.training
        viewer = controller.viewer
        self.summary = Words(viewer, tone="muted")
        self.headline = Words(viewer)
        self.details = Words(viewer)
        self.curve = Curve(viewer, 140)
        self.rounds = QWidget()
        self.rounds_grid = QGridLayout(self.rounds)
        self.rounds_grid.setContentsMargins(0, 0, 0, 0)
        self.buttons = {name: QPushButton(text, self) for name, text in _BUTTONS}
        for name, tip in _TIPS.items():
            self.buttons[name].setToolTip(tip)
        font = self.headline.font()
        font.setBold(True)
        self.headline.setFont(font)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(6)
        for widget in (self.summary, self.headline, self.details, self.curve, self.rounds):
            layout.addWidget(widget)
        grid = QGridLayout()
        grid.setSpacing(4)
        self._grid = grid
        layout.addLayout(grid)
        layout.addStretch()
        self._connect()
        self._training.state_changed.connect(self.show_outcome)
        self.show_outcome()

    def _connect(self) -> None:
        actions = {
            "segment": self._segment,
            "evaluate": self._evaluate,
            "correct": self._correct,
            "resume": lambda: self._training.go_on(),
            "longer": self._train_longer,
            "report": self._open_report,
            "new": self.wants_new_run.emit,
        }
        for name, action in actions.items():
            self.buttons[name].clicked.connect(lambda checked=False, action=action: action())

    def show_outcome(self) -> None:
        """Show how the training ended; the most likely next step comes first."""
        state, history = self._training.state, self._training.history
        if state not in (State.DONE, State.PAUSED, State.FAILED):
            return
        self.summary.say(summary_of(history.config, history.images))
        headline, tone, details = in_words(state, history)
        self.headline.say(headline, tone)
        self.details.say(details)
        self.curve.setVisible(len(history.metrics) > 1)
        self.curve.set_lines({"training": history.train_losses, "validation": history.metrics}, "epoch")
        self._show_buttons(state, history)
        self._show_rounds(self._controller.draft.rounds)

    def _show_buttons(self, state: State, history: History) -> None:
        has_model = (Path(history.run_dir) / "model.pt").is_file()
        wanted = ["resume"] if state is State.PAUSED or (state is State.FAILED and history.resumable) else []
        if has_model and state is State.DONE:
            wanted += ["segment", "correct", "evaluate", "longer"]
            if history.verdict == "worse":  # then another try is the next step
                wanted = ["new", "longer", "correct", "evaluate", "segment"]
        elif state is State.DONE:
            wanted += ["resume"]
        elif has_model:
            wanted += ["segment", "evaluate"]
        if (Path(history.run_dir) / "report.html").is_file():
            wanted.append("report")
        wanted = [*dict.fromkeys([*wanted, "new"])]
        for name, button in self.buttons.items():
            self._grid.removeWidget(button)
            button.setVisible(name in wanted)
            button.setDefault(bool(wanted) and name == wanted[0])
        for number, name in enumerate(wanted):
            # The first one has a row of its own.
            place = (0, 0, 1, 2) if number == 0 else (1 + (number - 1) // 2, (number - 1) % 2, 1, 1)
            self._grid.addWidget(self.buttons[name], *place)
            self.buttons[name].setMinimumHeight(34 if number == 0 else 0)

    def _show_rounds(self, rounds: tuple[Round, ...]) -> None:
        while self.rounds_grid.count():
            self.rounds_grid.takeAt(0).widget().deleteLater()
        self.rounds.setVisible(len(rounds) > 1)
        if len(rounds) < 2:
            return
        for column, text in enumerate(("round", "images", "SA50", "validation")):
            self.rounds_grid.addWidget(QLabel(text), 0, column)
        for number, each in enumerate(rounds, 1):
            after = each.comparison.get("after", {}).get("sa50")
            said = (
                f"{number}  {each.name}",
                str(each.images),
                f"{after:.2f}" if after is not None else "–",
                f"{each.metric:.3f}" if each.metric is not None else "–",
            )
            for column, text in enumerate(said):
                self.rounds_grid.addWidget(QLabel(text), number, column)

    def _segment(self) -> Any:
        widget = self._controller.open("Segment")
        widget.model.set_value(self._training.history.run_dir)
        return widget

    def _evaluate(self) -> None:
        self._controller.open("Evaluate").model.set_value(self._training.history.run_dir)

    def _correct(self) -> None:
        self._segment().explain_correcting()

    def _train_longer(self) -> None:
        self._training.go_on(epochs=self._training.history.epochs + MORE_EPOCHS)

    def _open_report(self) -> None:
        webbrowser.open((Path(self._training.history.run_dir) / "report.html").as_uri())


def in_words(state: State, history: History) -> tuple[str, str, str]:
    """Say what happened: a headline, its tone, and what else is worth knowing."""
    if state is State.FAILED:
        saved = "Everything up to the last checkpoint is saved." if history.resumable else "Nothing was saved yet."
        headline = "It could not go on." if history.epochs else "It could not start."
        return headline, "bad", "\n".join([*history.problems, saved])
    where = f"epoch {history.epoch + 1} of up to {history.epochs}"
    if state is State.PAUSED:
        return f"Paused in {where}.", "text", "Saved, and the memory is free. It goes on from the same step."
    result = history.result
    if result.get("best_epoch", -1) < 0:
        return "Stopped before the first epoch ended.", "warning", "There is no model yet. It can go on where it was."
    ran = f"{rough_duration(result['seconds'])}, at most {gigabytes(result['peak_memory_gb'])} GB."
    how = {
        "early_stopped": f"Stopped by itself: no better since epoch {result['best_epoch'] + 1}.",
        "stopped": f"Stopped by you in {where}.",
        "finished": f"All {history.epochs} epochs are done.",
    }.get(result["status"], "")
    kept = f"{how} The model of epoch {result['best_epoch'] + 1} is kept. {ran}"
    comparison = history.comparison
    if not comparison:
        return f"The model is ready: {Path(history.run_dir).name}.", "good", kept
    sentence = str(comparison.get("sentence", ""))
    tone = {"better": "good", "worse": "bad"}.get(history.verdict, "warning")
    before, after = (comparison.get(name, {}).get("sa50") for name in ("before", "after"))
    scores = ""
    if before is not None and after is not None:
        on = counted(len(comparison.get("images", ())), "held-out image")
        scores = f": SA50 {before:.2f} → {after:.2f} on {on}"
    words = {"better": "Better", "worse": "Not better"}.get(history.verdict, "No clear difference")
    why = f"\n{REASONS}" if history.verdict != "better" else ""
    return f"{words}{scores}.", tone, f"{sentence}\n{kept}{why}".strip()


_BUTTONS = (
    ("resume", "Go on"),
    ("segment", "Segment with it"),
    ("correct", "Correct and continue"),
    ("evaluate", "Evaluate"),
    ("longer", "Train longer"),
    ("report", "Open the report"),
    ("new", "New run"),
)
_TIPS = {
    "resume": "Continues from the last checkpoint",
    "segment": "Opens Segment with this model chosen",
    "correct": "Segment an image, correct what is wrong, add it to the training images, train on",
    "evaluate": "Opens Evaluate with this model chosen",
    "longer": f"Continues the same run for up to {MORE_EPOCHS} more epochs",
    "report": "Curves, pictures, scores and settings on one page, in the browser",
    "new": "Back to images, model and computer; this run stays on disk",
}
