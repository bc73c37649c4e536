"""Has the engine look at the pairs of the draft, and again when somebody paints on their labels."""

from __future__ import annotations

from typing import Any

from napari.layers import Labels
from qtpy.compat import isalive
from qtpy.QtCore import QObject, QTimer, Signal

from napari_resfinetune.widgets.controller import Controller
from napari_resfinetune.widgets.draft import PairItem
from napari_resfinetune.widgets.theme import connect_for_life

CHECK_MS = 300
NOTHING_FOUND: dict[str, Any] = {"pairs": [], "problems": [], "note": "", "held_out_regions": 2}


class PairCheck(QObject):
    """Copies layers to files where they have changed, and asks for what is wrong with the pairs.

    Parameters
    ----------
    controller
        Of the viewer.
    parent
        With it the check ends.
    """

    answered = Signal(object)
    """What the engine said about the pairs of the draft: see `check` of the engine."""
    failed = Signal(list)
    """Why they could not be looked at."""

    def __init__(self, controller: Controller, parent: QObject) -> None:
        super().__init__(parent)
        self._controller, self._draft = controller, controller.draft
        # Of the pairs that were last asked about.
        self.files: list[tuple[str, str]] = []
        # Where layers were copied to, by id, and those that were painted on since.
        self._copies: dict[int, str] = {}
        self._changed: set[int] = set()
        self._checked_with: Any = None
        self._watched: list[tuple[Any, list[Any]]] = []
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(CHECK_MS)
        self._timer.timeout.connect(self._copy)

    def pairs_changed(self) -> None:
        """Look at the new pairs soon."""
        for layer, called in self._watched:
            for emitter, call in zip(_edits_of(layer), called, strict=True):
                emitter.disconnect(call)
        layers = {id(layer): layer for pair in self._draft.pairs for layer in pair.layers}
        # What is not watched may change unseen, or its id may become that of another layer.
        before = {id(layer) for layer, _ in self._watched}
        self._copies = {key: path for key, path in self._copies.items() if key in layers and key in before}
        self._watched = [
            (layer, [connect_for_life(emitter, self._edited) for emitter in _edits_of(layer)])
            for layer in layers.values()
        ]
        self._timer.start()

    def settings_changed(self) -> None:
        """Look again soon, if the settings that matter are others."""
        if self._draft.pairs and self._settings() != self._checked_with:
            self._timer.start()

    def _edited(self, event: Any = None) -> None:
        self._changed.add(id(event.source))
        self._timer.start()

    def _settings(self) -> tuple[Any, int]:
        return self._draft.config.data, self._draft.config.training.seed

    def _copy(self) -> None:
        pairs = self._draft.pairs
        if not pairs:
            self.answered.emit(NOTHING_FOUND)
            return
        layers = [layer for pair in pairs for layer in pair.layers]
        # Others are as they were when they were last copied. (A start copies all of them.)
        layers = [layer for layer in layers if id(layer) not in self._copies or id(layer) in self._changed]
        for layer in layers:
            self._copies.pop(id(layer), None)
        self._changed.clear()

        def copied(files: Any) -> None:
            if not isalive(self):
                return
            if isinstance(files, Exception):
                self._fail([f"The layers cannot be copied: {files}"])
                return
            self._copies.update(files)
            if pairs == self._draft.pairs and all(id(layer) in self._copies for p in pairs for layer in p.layers):
                self.files = [pair.files(self._copies) for pair in pairs]
                self._ask(pairs)

        self._controller.exporter.export(layers, copied)

    def _ask(self, pairs: tuple[PairItem, ...]) -> None:
        asked = [
            {"image": image, "labels": labels, "held_out": pair.held_out}
            for pair, (image, labels) in zip(pairs, self.files, strict=True)
        ]
        config, self._checked_with = self._draft.config, self._settings()
        self._controller.engine.ask(
            "check",
            owner=self,
            topic="check",
            on_result=lambda report: self.answered.emit(report) if pairs == self._draft.pairs else None,
            on_error=self._fail,
            pairs=asked,
            data=config.data.model_dump(mode="json"),
            seed=config.training.seed,
        )

    def _fail(self, problems: list[str]) -> None:
        self._copies.clear()  # another look begins with new ones
        self.failed.emit(problems)


def _edits_of(layer: Any) -> list[Any]:
    """Return the events that tell that a layer's pixels have changed."""
    return [layer.events.data, *([layer.events.paint] if isinstance(layer, Labels) else [])]
