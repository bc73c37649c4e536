"""Curves as SVG inside the page: text and axes take the page's own colour, lines are readable on white and on black."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from napari_resfinetune.reporting.run import RunView

P = ParamSpec("P")
# Okabe and Ito 2008, those with contrast on white and on black.
BLUE, ORANGE, GREEN = "#0e86d4", "#d55e00", "#009e73"
LINES = (BLUE, ORANGE, GREEN, "#cc79a7", "#b38600", "#7d6bd6", "#2a9d9d", "#b5533c")
# Stands for the page's colour until the drawing is text.
_INK = "#010203"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}


def _styled(draw: Callable[P, Markup]) -> Callable[P, Markup]:
    """Let a function draw in the page's style, whatever matplotlib is set to outside."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Markup:
        import matplotlib

        with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return styled


@_styled
def draw_curves(run: RunView) -> Markup:
    """Draw training loss, validation metric and its parts by epoch; empty before the first validation."""
    if not run.epochs:
        return Markup("")
    epochs = [row["epoch"] + 1 for row in run.epochs]
    figure, (left, right) = _panels(2)
    _line(left, epochs, [row["train_loss"] for row in run.epochs], BLUE, "training loss")
    left.set_title("Training loss", loc="left")
    _line(right, epochs, [row["metric"] for row in run.epochs], ORANGE, "validation")
    parts = {"mask_metric": ("masks", GREEN), "instance_metric": ("instances", BLUE)}
    if all(part in row for part in parts for row in run.epochs):  # else the one that there is is the metric itself
        for part, (name, color) in parts.items():
            _line(right, epochs, [row[part] for row in run.epochs], color, name, width=1.0)
    right.set_title("Validation metric (lower is better)", loc="left")
    if run.best_epoch is not None:
        right.axvline(run.best_epoch + 1, color=_INK, linewidth=0.8, linestyle=":", label="best epoch")
    right.legend()
    return _svg(figure)


@_styled
def draw_comparison(runs: Sequence[RunView]) -> Markup:
    """Draw the validation metric of several runs by time; empty where none has any."""
    if not any(run.epochs for run in runs):
        return Markup("")
    figure, (left, right) = _panels(2)
    for number, run in enumerate(runs):
        metric = [row["metric"] for row in run.epochs]
        color = LINES[number % len(LINES)]
        _line(left, [row["epoch"] + 1 for row in run.epochs], metric, color, run.name)
        _line(right, [row["seconds"] / 60 for row in run.epochs], metric, color, run.name)
    left.set_title("Validation metric (lower is better)", loc="left")
    right.set_title("The same by time", loc="left")
    right.set_xlabel("minutes")
    left.legend()
    return _svg(figure)


def _panels(count: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6 * count, 2.9), layout="constrained")
    axes = figure.subplots(1, count)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, axes


def _line(axis: Any, x: Sequence[float], y: Sequence[Any], color: str, label: str, width: float = 1.8) -> None:
    # One point alone makes no line.
    marker = "o" if len(x) < 12 else None
    # A label that begins with "_" would be left out of the legend, and "$" would begin a formula.
    label = label.replace("$", r"\$")
    axis.plot(x, y, color=color, linewidth=width, marker=marker, markersize=3, label=f" {label}")


def _svg(figure: Figure) -> Markup:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # The page decides about the size; names of groups would come twice with two drawings.
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return Markup(re.sub(r' id="[a-zA-Z]+[\w.]*_\d+"', "", text))
