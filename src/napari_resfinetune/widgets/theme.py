"""Colours that follow napari's theme, for what is painted by hand."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from napari.utils.theme import get_theme
from qtpy.QtGui import QColor
from qtpy.QtWidgets import QWidget


@dataclass(frozen=True)
class Colours:
    """What each colour means."""

    text: QColor
    muted: QColor
    track: QColor
    accent: QColor
    good: QColor
    warning: QColor
    bad: QColor


def colours_of(viewer: Any) -> Colours:
    """Return the colours of a viewer's theme. napari has none for "good", so that is ours, for dark and for light."""
    theme = get_theme(viewer.theme)
    good = "#5fb363" if theme.type == "dark" else "#2e7d32"
    muted = _mix(_colour(theme.text), _colour(theme.background), 0.35)
    return Colours(
        text=_colour(theme.text),
        muted=muted,
        track=_colour(theme.foreground),
        accent=_colour(theme.current),
        good=QColor(good),
        warning=_colour(theme.warning) if theme.type == "dark" else QColor("#b26a00"),
        bad=_colour(theme.error) if theme.type == "dark" else QColor("#b3261e"),
    )


def connect_for_life(emitter: Any, callback: Callable[..., None], widget: QWidget) -> None:
    """Connect a method to one of napari's emitters, until the widget is gone."""
    emitter.connect(callback)
    widget.destroyed.connect(_Disconnect(emitter, callback))


class _Disconnect:
    """Undoes a connection without holding on to the widget."""

    def __init__(self, emitter: Any, callback: Any) -> None:
        self._emitter, self._callback = emitter, weakref.WeakMethod(callback)

    def __call__(self, *_: Any) -> None:
        callback = self._callback()
        if callback is not None:
            self._emitter.disconnect(callback)


def _colour(value: Any) -> QColor:
    red, green, blue = value.as_rgb_tuple()[:3]
    return QColor(red, green, blue)


def _mix(one: QColor, other: QColor, share: float) -> QColor:
    mixed = [round(a * (1 - share) + b * share) for a, b in zip(one.getRgb()[:3], other.getRgb()[:3], strict=True)]
    return QColor(*mixed)
