"""Small parts that several widgets are made of: a gauge, a curve, a line of words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QPainter, QPaintEvent, QPen, QPolygonF
from qtpy.QtWidgets import QHBoxLayout, QLabel, QSizePolicy, QVBoxLayout, QWidget

from napari_resfinetune.widgets.theme import Colours, colours_of, connect_for_life
from napari_resfinetune.words import gigabytes

# Of a limit: from here on a prediction is amber; beyond the limit it is red.
TIGHT = 0.8
MOST_POINTS = 600
NAME_PX = 90
MIN_WORDS_PX = 60
# Where a line may break: after these, by a space that has no width.
BREAKING, BREAK = "/\\_", "\u200b"


class Painted(QWidget):
    """Something painted by hand, which follows the theme."""

    def __init__(self, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._viewer = viewer
        self.colours: Colours = colours_of(viewer)
        connect_for_life(viewer.events.theme, self._follow_theme)

    def _follow_theme(self, event: Any = None) -> None:
        self.colours = colours_of(self._viewer)
        self.update()


class Gauge(Painted):
    """A bar of what is taken against what is allowed, in GB."""

    def __init__(self, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(viewer, parent)
        self.taken_gb: float | None = None
        self.limit_gb: float | None = None
        self.peak_gb: float | None = None
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAccessibleName("memory")

    def sizeHint(self) -> QSize:
        """As high as a line of text."""
        return QSize(160, self.fontMetrics().height() + 6)

    minimumSizeHint = sizeHint

    def set_values(self, taken_gb: float | None, limit_gb: float | None, peak_gb: float | None = None) -> None:
        """Show new values; `None` for what is not known."""
        self.taken_gb, self.limit_gb, self.peak_gb = taken_gb, limit_gb, peak_gb
        self.setAccessibleDescription(self.text)
        self.update()

    @property
    def text(self) -> str:
        """What the bar says in words."""
        if self.taken_gb is None:
            return ""
        of = f" of {gigabytes(self.limit_gb)}" if self.limit_gb else ""
        return f"{gigabytes(self.taken_gb)}{of} GB"

    @property
    def level(self) -> str:
        """Return "good", "warning" or "bad"."""
        highest = max(self.taken_gb or 0, self.peak_gb or 0)
        if not self.limit_gb or highest <= TIGHT * self.limit_gb:
            return "good"
        return "warning" if highest <= self.limit_gb else "bad"

    def paintEvent(self, event: QPaintEvent) -> None:
        """Paint the bar, its peak and its words."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        metrics = self.fontMetrics()
        room = metrics.horizontalAdvance("88.8 of 88.8 GB") + 8
        bar = QRectF(0, self.height() / 2 - 5, max(20, self.width() - room), 10)
        _rounded(painter, bar, self.colours.track)
        if self.taken_gb is not None:
            whole = self.limit_gb or max(self.taken_gb, self.peak_gb or 0) or 1
            fill = QRectF(bar)
            fill.setWidth(max(10.0, bar.width() * min(1.0, self.taken_gb / whole)))
            _rounded(painter, fill, getattr(self.colours, self.level))
            if self.peak_gb:
                x = bar.left() + bar.width() * min(1.0, self.peak_gb / whole)
                painter.setPen(QPen(self.colours.text, 2))
                painter.drawLine(QPointF(x, bar.top() - 2), QPointF(x, bar.bottom() + 2))
        painter.setPen(self.colours.text)
        words = QRectF(self.width() - room + 8, 0, room - 8, self.height())
        painter.drawText(words, Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter, self.text)


class Curve(Painted):
    """Lines over one axis, with a legend; made for a loss that falls."""

    def __init__(self, viewer: Any, height: int = 130, parent: QWidget | None = None) -> None:
        super().__init__(viewer, parent)
        self.lines: dict[str, list[tuple[float, float]]] = {}
        self.x_label = ""
        self.x_start = math.inf
        self.marked_x: float | None = None
        self.y_range: tuple[float, float] | None = None
        self._height = height
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def sizeHint(self) -> QSize:
        """A wide picture."""
        return QSize(260, self._height)

    minimumSizeHint = sizeHint

    def set_lines(
        self, lines: dict[str, Sequence[tuple[float, float]]], x_label: str = "", marked_x: float | None = None
    ) -> None:
        """Show lines by name; the first is thin, others have dots. `marked_x` gets a vertical line."""
        self.lines = {name: _thinned(points) for name, points in lines.items()}
        self.x_label, self.marked_x = x_label, marked_x
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:
        """Paint frame, lines and legend."""
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        line_height = self.fontMetrics().height()
        points = [point for line in self.lines.values() for point in line]
        frame = QRectF(self.rect()).adjusted(38, line_height + 4, -6, -line_height - 4)
        painter.setPen(QPen(self.colours.track, 1))
        painter.drawLine(frame.bottomLeft(), frame.bottomRight())
        painter.drawLine(frame.bottomLeft(), frame.topLeft())
        self._paint_legend(painter, line_height)
        if not points:
            return
        x0, x1 = min(self.x_start, min(x for x, _ in points)), max(x for x, _ in points)
        y0, y1 = self.y_range or (min(y for _, y in points), max(y for _, y in points))
        x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1e-6)

        def place(point: tuple[float, float]) -> QPointF:
            x = frame.left() + (point[0] - x0) / (x1 - x0) * frame.width()
            return QPointF(x, frame.bottom() - (point[1] - y0) / (y1 - y0) * frame.height())

        painter.setPen(self.colours.muted)
        right, left = Qt.AlignmentFlag.AlignRight, Qt.AlignmentFlag.AlignLeft
        painter.drawText(QRectF(0, frame.top() - 6, 34, line_height), right, f"{y1:.2g}")
        painter.drawText(QRectF(0, frame.bottom() - line_height + 4, 34, line_height), right, f"{y0:.2g}")
        below = QRectF(frame.left(), frame.bottom() + 3, frame.width(), line_height)
        painter.drawText(below, left, f"{x0:g}")
        painter.drawText(below, right, f"{x1:.3g}")
        painter.drawText(below, Qt.AlignmentFlag.AlignHCenter, self.x_label)
        if self.marked_x is not None:
            painter.setPen(QPen(self.colours.muted, 1, Qt.PenStyle.DashLine))
            x = place((self.marked_x, y0)).x()
            painter.drawLine(QPointF(x, frame.top()), QPointF(x, frame.bottom()))
        for number, line in enumerate(self.lines.values()):
            placed = [place(point) for point in line if math.isfinite(point[1])]
            colour = self._colour(number)
            painter.setPen(QPen(colour, 1.2 if number == 0 else 2))
            painter.drawPolyline(QPolygonF(placed))
            if number > 0:
                painter.setBrush(colour)
                for point in placed:
                    painter.drawEllipse(point, 2.5, 2.5)
                painter.setBrush(Qt.BrushStyle.NoBrush)

    def _colour(self, number: int) -> QColor:
        return (self.colours.accent, self.colours.good, self.colours.warning, self.colours.text)[number % 4]

    def _paint_legend(self, painter: QPainter, line_height: int) -> None:
        x = 40.0
        for number, name in enumerate(self.lines):
            painter.setPen(QPen(self._colour(number), 3))
            painter.drawLine(QPointF(x, line_height / 2), QPointF(x + 12, line_height / 2))
            painter.setPen(self.colours.muted)
            width = self.fontMetrics().horizontalAdvance(name)
            painter.drawText(QRectF(x + 16, 0, width + 4, line_height), Qt.AlignmentFlag.AlignLeft, name)
            x += width + 32


class Words(QLabel):
    """A paragraph that wraps, can be selected, and has one of the theme's colours."""

    def __init__(self, viewer: Any, text: str = "", tone: str = "text", parent: QWidget | None = None) -> None:
        super().__init__(text, parent)
        self._viewer, self._tone = viewer, tone
        self.setWordWrap(True)
        self.setTextFormat(Qt.TextFormat.PlainText)
        self.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        connect_for_life(viewer.events.theme, self._follow_theme)
        self._follow_theme()

    def say(self, text: str, tone: str | None = None) -> None:
        """Show a text; an empty one takes no room."""
        # A long path may wrap after any of its parts.
        self.setText("".join(f"{letter}{BREAK}" if letter in BREAKING else letter for letter in text))
        if not text:
            self.hide()
        elif self.parentWidget() is not None:  # by itself it would become a window
            self.show()
        if tone is not None and tone != self._tone:
            self._tone = tone
            self._follow_theme()

    def text(self) -> str:
        """Return what was said."""
        return super().text().replace(BREAK, "")

    def minimumSizeHint(self) -> QSize:
        """Give way: one long word must not widen the dock."""
        return QSize(MIN_WORDS_PX, super().minimumSizeHint().height())

    def _follow_theme(self, event: Any = None) -> None:
        colour: QColor = getattr(colours_of(self._viewer), self._tone)
        self.setStyleSheet(f"color: {colour.name()}")


class Rows:
    """Names on the left, fields on the right, and lines below that take the whole width.

    (In a `QFormLayout` lines that wrap are cut off.)

    Parameters
    ----------
    layout
        Rows are added to it.
    """

    def __init__(self, layout: QVBoxLayout) -> None:
        self._layout = layout
        self._holders: dict[int, QWidget] = {}

    def add(self, name: str, field: QWidget, *more: QWidget) -> None:
        """Add a row."""
        holder = QWidget()
        row = QHBoxLayout(holder)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(4)
        label = QLabel(name)
        label.setBuddy(field)
        label.setMinimumWidth(NAME_PX)
        row.addWidget(label)
        row.addWidget(field, 1)
        field.setSizePolicy(QSizePolicy.Policy.Expanding, field.sizePolicy().verticalPolicy())
        for each in more:
            row.addWidget(each)
        self._holders[id(field)] = holder
        self._layout.addWidget(holder)

    def below(self, words: QWidget) -> None:
        """Add a line that belongs to the row above."""
        self._layout.addWidget(words)

    def show(self, field: QWidget, visible: bool) -> None:
        """Show or hide a row."""
        self._holders[id(field)].setVisible(visible)


def heading(text: str) -> QLabel:
    """Return the name of a section."""
    label = QLabel(text)
    font = label.font()
    font.setBold(True)
    label.setFont(font)
    return label


def _rounded(painter: QPainter, area: QRectF, colour: QColor) -> None:
    painter.setPen(Qt.PenStyle.NoPen)
    painter.setBrush(colour)
    painter.drawRoundedRect(area, 4, 4)
    painter.setBrush(Qt.BrushStyle.NoBrush)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep so many points that each pixel has one, as means of neighbours."""
    each = -(-len(points) // MOST_POINTS)
    if each <= 1:
        return list(points)
    groups = (points[first : first + each] for first in range(0, len(points), each))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
