"""The button "Suggest": which model does best on these images before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtpy.QtCore import QObject, Signal
from qtpy.QtWidgets import QPushButton, QWidget

from napari_resfinetune.models.names import KNOWN_MODELS, is_downloaded
from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.own_models import own_models
from napari_resfinetune.widgets.parts import Words
from napari_resfinetune.words import rough_duration

# Own runs that are compared, newest first.
MOST_OWN_MODELS = 5
SHOWN = 3


class Suggestion(QObject):
    """Compares the models that are on this computer on the pairs of the draft.

    Parameters
    ----------
    controller
        Of the viewer.
    parent
        Lays out `button` and `words`.
    """

    suggested = Signal(str)
    """What to start from."""

    def __init__(self, controller: Controller, *, parent: QWidget) -> None:
        super().__init__(parent)
        self._controller = controller
        self._request: int | None = None
        self._copying = False
        self.button = QPushButton("Suggest")
        self.button.setToolTip(
            "Compares the models on this computer on your images, before any training, and chooses the best"
        )
        self.words = Words(controller.viewer, tone="muted")
        self.words.say("")
        self.button.clicked.connect(self._clicked)
        controller.draft.pairs_changed.connect(self._show_button)
        self._show_button()

    @property
    def busy(self) -> bool:
        """Whether models are being compared."""
        return self._request is not None

    def _clicked(self) -> None:
        if self._request is not None:
            self._controller.engine.stop(self._request)
            self.words.say("Stopping…", "muted")
            return
        pairs = self._controller.draft.pairs
        layers = [layer for pair in pairs for layer in pair.layers]
        self._copying = True
        self._show_button()
        self.words.say("Copying the layers…", "muted")

        def exported(files: Any) -> None:
            self._copying = False
            if isinstance(files, Exception):
                self._failed([f"The layers cannot be copied: {files}"])
            else:
                self._ask([pair.files(files) for pair in pairs])

        self._controller.exporter.export(layers, exported)

    def _ask(self, files: Sequence[tuple[str, str]]) -> None:
        draft = self._controller.draft
        self.words.say("Opening the models…", "muted")
        self._request = self._controller.engine.ask(
            "suggest",
            owner=self,
            on_event=self._show_progress,
            on_result=self._answered,
            on_error=self._failed,
            images=[image for image, _ in files],
            labels=[labels for _, labels in files],
            candidates=self._candidates(),
            config=draft.config.model_dump(mode="json"),
        )
        self._show_button()

    def _candidates(self) -> list[str]:
        own = [str(entry.path) for entry in own_models(self._controller.draft.runs_folder)[:MOST_OWN_MODELS]]
        return [*own, *(known.name for known in KNOWN_MODELS if is_downloaded(known.name))]

    def _show_progress(self, event: dict[str, Any]) -> None:
        if event["event"] != "Searched":
            return
        share = round(100 * event["done"] / max(1, event["total"]))
        left = f"{rough_duration(event['seconds_left'])} left"
        self.words.say(f"Comparing models, now {_short(event['model'])}: {share} %, {left}", "muted")

    def _answered(self, found: dict[str, Any]) -> None:
        self._ended()
        if found["status"] == "stopped":
            self.words.say("Stopped; nothing was changed.", "muted")
            return
        scores = ", ".join(f"{_short(each['model'])} {each['score']:.2f}" for each in found["ranked"][:SHOWN])
        missing = [each["model"] for each in found["downloads"] if each["model"].endswith("_lm")]
        further = f" Not on this computer yet: {', '.join(missing)}." if missing else ""
        failed = ", ".join(_short(each["model"]) for each in found["left_out"])
        left_out = f" Left out: {failed} ({found['left_out'][0]['brief']})." if failed else ""
        advice = found["advice"]
        for each in found["ranked"]:
            advice = advice.replace(each["model"], _short(each["model"]))
        self.words.say(f"{advice[:1].upper()}{advice[1:]} ({scores}).{left_out}{further}", "good")
        reasons = [f"{each['model']}: {each['reason']}" for each in found["left_out"]]
        self.words.setToolTip("\n".join([*found["notes"], *reasons]))
        if found["start_from"]:
            self.suggested.emit(found["start_from"])

    def _failed(self, problems: list[str]) -> None:
        self._ended()
        self.words.say("; ".join(problems), "bad")

    def _ended(self) -> None:
        self._request = None
        self._show_button()

    def _show_button(self) -> None:
        self.button.setText("Stop" if self.busy else "Suggest")
        self.button.setEnabled(not self._copying and (self.busy or bool(self._controller.draft.pairs)))


def _short(model: str) -> str:
    return Path(model).name
