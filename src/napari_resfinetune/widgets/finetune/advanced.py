"""Settings that few people change, as a form made from the configuration itself."""

from __future__ import annotations

import typing
from typing import Any

from magicgui.widgets import CheckBox, ComboBox, Container, LineEdit, SpinBox
from pydantic.fields import FieldInfo
from qtpy.QtCore import QObject, Signal

from napari_resfinetune.config import DataConfig, ResourcesConfig, TrainingConfig
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.widgets.draft import Draft
from napari_resfinetune.widgets.parts import Words

SECTIONS: dict[str, Any] = {"data": DataConfig, "training": TrainingConfig, "resources": ResourcesConfig}
SHOWN = (
    "training.epochs",
    "training.early_stopping",
    "training.minutes",
    "training.samples_per_epoch",
    "training.learning_rate",
    "training.objects",
    "training.targets",
    "data.patch_px",
    "training.input_px",
    "data.min_object_px",
    "resources.memory_gb",
    "resources.threads",
    "training.seed",
)
WHOLE_NUMBERS = (
    "training.epochs",
    "training.samples_per_epoch",
    "data.patch_px",
    "data.min_object_px",
    "training.seed",
)
AUTOMATIC = "automatic"
EMPTY_MEANS = {"training.early_stopping": "never", "training.minutes": "no limit"}


class AdvancedForm(QObject):
    """A form over some keys of the draft's configuration; tooltips are the descriptions in the docs.

    Parameters
    ----------
    draft
        Is edited.
    complaint
        Shows what is wrong with a value.
    """

    refused_changed = Signal()

    def __init__(self, draft: Draft, complaint: Words) -> None:
        super().__init__(complaint)
        self._draft, self._complaint = draft, complaint
        self._showing = False
        # What was typed and cannot be used, and why.
        self.refused: dict[str, str] = {}
        self.fields: dict[str, Any] = {key: _field(key) for key in SHOWN}
        self.form = Container(widgets=list(self.fields.values()), labels=True)
        self.form.margins = (0, 0, 0, 0)
        self.native = self.form.native
        self.show_config()
        for key, widget in self.fields.items():
            widget.changed.connect(lambda value, key=key: self._changed(key, value))
        draft.config_changed.connect(self.show_config)

    def show_config(self) -> None:
        """Show what the draft says."""
        self._showing = True
        for key, widget in self.fields.items():
            section, _, name = key.partition(".")
            value = getattr(getattr(self._draft.config, section), name)
            if key in self.refused:  # it stays, with its complaint
                continue
            if isinstance(widget, LineEdit):
                value = "" if value is None else f"{value:g}"
            if widget.value != value:
                widget.value = value
        self._showing = False

    def _changed(self, key: str, value: Any) -> None:
        if self._showing:
            return
        section, _, name = key.partition(".")
        self.refused.pop(key, None)
        try:
            self._draft.change_config({section: {name: _meant_by_nothing(key) if value == "" else value}})
        except ConfigError as error:
            self.refused[key] = str(error).removeprefix("settings: ")
        self._complaint.say("\n".join(self.refused.values()), "bad")
        self.refused_changed.emit()


def _field(key: str) -> Any:
    described, name = _described(key), key.partition(".")[2]
    options: dict[str, Any] = {
        "name": name,
        "label": name.replace("_", " "),
        "tooltip": f"{described.description} ({key})",
    }
    choices = typing.get_args(described.annotation)
    if typing.get_origin(described.annotation) is typing.Literal:
        return ComboBox(choices=choices, value=described.default, **options)
    if described.annotation is bool:
        return CheckBox(value=described.default, **options)
    if key in WHOLE_NUMBERS:
        return SpinBox(min=_least(described), max=1_000_000, value=described.default, **options)
    if key == "training.input_px":
        return ComboBox(choices=tuple(range(128, 1025, 64)), value=described.default, **options)
    line = LineEdit(**options)
    empty = _meant_by_nothing(key)
    line.native.setPlaceholderText(f"{empty:g}" if empty is not None else EMPTY_MEANS.get(key, AUTOMATIC))
    return line


def _least(described: FieldInfo) -> int:
    """Return the least whole number that a field takes."""
    for constraint in described.metadata:
        if hasattr(constraint, "ge"):
            return int(constraint.ge)
        if hasattr(constraint, "gt"):
            return int(constraint.gt) + 1
    return 0


def _meant_by_nothing(key: str) -> Any:
    """Return what an empty field stands for: automatic or never where there is such a thing, else the default."""
    described = _described(key)
    return None if type(None) in typing.get_args(described.annotation) else described.default


def _described(key: str) -> FieldInfo:
    section, _, name = key.partition(".")
    found: FieldInfo = SECTIONS[section].model_fields[name]
    return found
