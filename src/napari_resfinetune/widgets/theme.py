"""Colours that follow napari's theme, for what is painted by hand."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from napari.utils.theme import get_theme
from qtpy.compat import isalive
from qtpy.QtGui import QColor


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
        # napari's own red is too dark to read on dark.
        bad=QColor("#ec7063" if theme.type == "dark" else "#b3261e"),
    )


def follow_layers(viewer: Any, method: Any) -> None:
    """Call a widget's method when layers come, go or get another name, until the widget is gone."""
    events = viewer.layers.events
    for emitter in (events.inserted, events.removed, events.renamed):
        connect_for_life(emitter, method)


def connect_for_life(emitter: Any, method: Any) -> Any:
    """Connect a widget's method to one of napari's emitters, until the widget is gone; return what was connected."""
    reference = weakref.WeakMethod(method)

    def call(event: Any = None) -> None:
        found = reference()
        if found is None or not isalive(found.__self__):
            emitter.disconnect(call)
        else:
            found(event)

    emitter.connect(call)
    return call


def _colour(value: Any) -> QColor:
    red, green, blue = value.as_rgb_tuple()[:3]
    return QColor(red, green, blue)


def _mix(one: QColor, other: QColor, share: float) -> QColor:
    mixed = [round(a * (1 - share) + b * share) for a, b in zip(one.getRgb()[:3], other.getRgb()[:3], strict=True)]
    return QColor(*mixed)
