"""Figures of a sweep: scores over the number of images, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_resfinetune.experiments.results import INITIAL, Row, mean, order_of_images, write_table
from napari_resfinetune.models import known_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with any kind of colour vision tell apart (Okabe and Ito 2008).
MODE_COLOURS = {
    "box": "#D55E00",
    "iterative_box": "#F0E442",
    "ais": "#0072B2",
    "amg": "#009E73",
    "point": "#CC79A7",
    "apg": "#E69F00",
    "iterative_point": "#56B4E9",
}
PRESET_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Line style, marker, and place beside the tick of a strategy, so that their bars do not hide each other.
STYLES: dict[str, tuple[Any, str, float]] = {
    "full": ("-", "o", -0.12),
    "lora": (":", "o", -0.06),
    "frozen": ("--", "X", 0.0),
    "late": ("-.", "s", 0.06),
    "late_lora": ((0, (1, 3)), "s", 0.12),
}
FORMATS = ("png", "svg", "pdf")
SCORE, SCORE_NAME = "msa", "mean segmentation accuracy"


def draw_scores(stem: Path, rows: Sequence[Row], preset: str) -> list[Path]:
    """Draw scores over the number of images: a column for each start model, boxes above and the other modes below.

    Parameters
    ----------
    stem
        Where to, without suffix.
    rows
        Of one preset, with scores, and those of the start models as they are.
    preset
        Named in the title.

    Returns
    -------
    list of Path
        The figure as PNG, SVG and PDF, and its numbers as CSV.
    """
    models = list(dict.fromkeys(row.model for row in rows if row.strategy != INITIAL))
    modes = [mode for mode in MODE_COLOURS if any(mode in row.scores for row in rows)]
    above, below = [mode for mode in modes if "box" in mode], [mode for mode in modes if "box" not in mode]
    groups = [group for group in (above, below) if group]
    ticks = _ticks(rows)
    figure = _figure(len(models), len(groups))
    axes = figure.subplots(len(groups), len(models), sharex=True, sharey="row", squeeze=False)
    numbers: list[dict[str, Any]] = []
    for column, model in enumerate(models):
        axes[0][column].set_title(_titled(model))
        for line, group in enumerate(groups):
            for mode in group:
                numbers += _draw_mode(axes[line][column], rows, model, mode, ticks)
            _label_images(axes[line][column], ticks, last=line == len(groups) - 1)
    for line in range(len(groups)):
        axes[line][0].set_ylabel(SCORE_NAME)
    strategies = [name for name in _strategies(rows) if name != INITIAL]
    figure.suptitle(f"{preset}: after finetuning on few images")
    _legend(figure, [(mode.upper() if mode in ("ais", "amg", "apg") else mode, MODE_COLOURS[mode]) for mode in modes],
            strategies)  # fmt: skip
    return [*_save(figure, stem), write_table(stem.with_name(f"{stem.name}.csv"), numbers)]


def draw_cost(stem: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw training time up to the best epoch, and memory, over the number of images, one column for each model."""
    models = list(dict.fromkeys(row.model for row in rows))
    presets = list(dict.fromkeys(row.preset for row in rows))
    colours = {preset: PRESET_COLOURS[i % len(PRESET_COLOURS)] for i, preset in enumerate(presets)}
    parts: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("minutes to the best epoch", lambda row: None if row.seconds_to_best is None else row.seconds_to_best / 60),
        ("peak memory in GB", lambda row: row.peak_gb),
    )
    ticks = _ticks(rows)
    figure = _figure(len(models), len(parts))
    axes = figure.subplots(len(parts), len(models), sharex=True, sharey="row", squeeze=False)
    numbers: list[dict[str, Any]] = []
    for column, model in enumerate(models):
        axes[0][column].set_title(_titled(model))
        for line, (name, value_of) in enumerate(parts):
            for preset in presets:
                for strategy in _strategies(rows):
                    mine = [r for r in rows if (r.model, r.preset, r.strategy) == (model, preset, strategy)]
                    found = _line(axes[line][column], mine, ticks, value_of, colours[preset], strategy)
                    numbers += [{"model": model, "preset": preset, "strategy": strategy, "what": name, **n}
                                for n in found]  # fmt: skip
            axes[line][column].set_ylim(bottom=0)
            _label_images(axes[line][column], ticks, last=line == len(parts) - 1)
    for line, (name, _) in enumerate(parts):
        axes[line][0].set_ylabel(name)
    figure.suptitle("cost of finetuning")
    _legend(figure, list(colours.items()), _strategies(rows))
    return [*_save(figure, stem), write_table(stem.with_name(f"{stem.name}.csv"), numbers)]


def _draw_mode(
    axes: Axes, rows: Sequence[Row], model: str, mode: str, ticks: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Draw one mode of one model, each strategy from the start model on, and return the numbers drawn."""

    def score(row: Row) -> float | None:
        return row.scores.get(mode, {}).get(SCORE)

    numbers = []
    initial = [row for row in rows if row.model == model and row.strategy == INITIAL]
    for strategy in _strategies(rows):
        mine = [row for row in rows if row.model == model and row.strategy == strategy]
        if strategy != INITIAL and mine:
            found = _line(axes, [*initial, *mine], ticks, score, MODE_COLOURS[mode], strategy)
            numbers += [{"model": model, "mode": mode, "strategy": strategy, **number} for number in found]
    return numbers


def _line(
    axes: Axes,
    rows: Sequence[Row],
    ticks: Sequence[int | None],
    value_of: Callable[[Row], float | None],
    colour: str,
    strategy: str,
) -> list[dict[str, Any]]:
    """Draw the mean over seeds with a bar from the least to the most."""
    numbers: list[dict[str, Any]] = []
    for position, n_images in enumerate(ticks):
        values = [v for row in rows if row.n_images == n_images and (v := value_of(row)) is not None]
        if values:
            number = {"mean": mean(values), "least": min(values), "most": max(values), "seeds": len(values)}
            numbers.append({"images": _tick_name(n_images), "position": position, **number})
    if numbers:
        style, marker, shift = _style(strategy)
        x = [n["position"] + (0 if n["images"] == "initial" else shift) for n in numbers]
        y = [n["mean"] for n in numbers]
        axes.plot(x, y, linestyle=style, marker=marker, color=colour, markersize=5, linewidth=1.6)
        axes.vlines(x, [n["least"] for n in numbers], [n["most"] for n in numbers], color=colour, linewidth=1)
    return [{name: value for name, value in number.items() if name != "position"} for number in numbers]


def _ticks(rows: Sequence[Row]) -> list[int | None]:
    """Return the numbers of images on the x axis; 0 is the start model as it is."""
    return sorted({row.n_images for row in rows}, key=order_of_images)


def _tick_name(n_images: int | None) -> str:
    return "all" if n_images is None else "initial" if n_images == 0 else str(n_images)


def _label_images(axes: Axes, ticks: Sequence[int | None], *, last: bool) -> None:
    axes.set_xticks(range(len(ticks)), [_tick_name(tick) for tick in ticks])
    axes.set_xlim(-0.3, len(ticks) - 0.7)
    axes.grid(alpha=0.3)
    if last:
        axes.set_xlabel("training images")


def _titled(model: str) -> str:
    known = known_model(model)
    if known is None:
        return model
    return f"{model} ({'generalist' if known.has_decoder else 'default'})"


def _style(strategy: str) -> tuple[Any, str, float]:
    return STYLES.get(strategy.partition("-")[0], ("-", "o", 0.0))


def _strategies(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.strategy for row in rows))


def _figure(columns: int, lines: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(2.2 + 3.6 * columns, 1.2 + 2.9 * lines), layout="constrained")


def _legend(figure: Figure, colours: Sequence[tuple[str, str]], strategies: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name, linewidth=3) for name, colour in colours]
    for strategy in strategies:
        style, marker, _ = _style(strategy)
        handles.append(Line2D([], [], color="#555555", linestyle=style, marker=marker, label=strategy))
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def _save(figure: Figure, stem: Path) -> list[Path]:
    import matplotlib

    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in FORMATS]
    with matplotlib.rc_context({"svg.hashsalt": "resfinetune", "svg.fonttype": "none"}):
        for path in paths:
            # No date in it: the same numbers give the same file.
            date = {} if path.suffix == ".png" else {"Date" if path.suffix == ".svg" else "CreationDate": None}
            figure.savefig(path, dpi=150, metadata=date)
    return paths
