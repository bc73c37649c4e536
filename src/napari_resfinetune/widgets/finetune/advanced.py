"""Settings that few people change, as a form made from the configuration itself."""

from __future__ import annotations

import typing
from typing import Any

from magicgui.widgets import CheckBox, ComboBox, Container, LineEdit, SpinBox
from pydantic.fields import FieldInfo
from qtpy.QtCore import QObject

from napari_resfinetune.config import DataConfig, ResourcesConfig, TrainingConfig
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.widgets.draft import Draft
from napari_resfinetune.widgets.parts import Words

SECTIONS: dict[str, Any] = {"data": DataConfig, "training": TrainingConfig, "resources": ResourcesConfig}
SHOWN = (
    "training.epochs",
    "training.early_stopping",
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


class AdvancedForm(QObject):
    """A form over some keys of the draft's configuration; tooltips are the descriptions in the docs.

    Parameters
    ----------
    draft
        Is edited.
    complaint
        Shows what is wrong with a value.
    """

    def __init__(self, draft: Draft, complaint: Words) -> None:
        super().__init__(complaint)
        self._draft, self._complaint = draft, complaint
        self._showing = False
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
            if isinstance(widget, LineEdit):
                value = "" if value is None else f"{value:g}"
            if widget.value != value:
                widget.value = value
        self._showing = False

    def _changed(self, key: str, value: Any) -> None:
        if self._showing:
            return
        section, _, name = key.partition(".")
        try:
            self._draft.change_config({section: {name: None if value == "" else value}})
        except ConfigError as error:
            self._complaint.say(str(error).removeprefix("settings: "), "bad")
        else:
            self._complaint.say("")


def _field(key: str) -> Any:
    section, _, name = key.partition(".")
    described: FieldInfo = SECTIONS[section].model_fields[name]
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
        return SpinBox(min=0, max=1_000_000, value=described.default, **options)
    if key == "training.input_px":
        return ComboBox(choices=tuple(range(128, 1025, 64)), value=described.default, **options)
    line = LineEdit(**options)
    line.native.setPlaceholderText(AUTOMATIC if described.default is None else "never")
    return line
