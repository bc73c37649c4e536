"""What the command says of a search."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from napari_resfinetune.cli.output import errors, escape, print_table, results
from napari_resfinetune.events import Event, Message, Searched
from napari_resfinetune.words import duration, short_names

# Column heads of scores: short, since a terminal is narrow; the report has the long ones, and LogME itself.
SCORES = {
    "ais_sa50": "SA50",
    "box_iou": "box",
    "point_iou": "point",
    "probe_r2": "probe",
    "logme_share": "LogME",
    "ais_steadiness": "AIS steady",
    "point_steadiness": "points steady",
    "pilot": "pilot",
}


class SearchProgress:
    """Progress bar over patches and models."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
            console=errors,
            transient=True,
        )
        self._task = self._bar.add_task("preparing", total=None, detail="")

    def __enter__(self) -> SearchProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Message):
            self._bar.console.print(escape(event.text))
        elif isinstance(event, Searched):
            self._bar.update(
                self._task,
                total=event.total,
                completed=event.done,
                description=escape(event.model),
                detail=f"{duration(event.seconds_left)} left",
            )


def print_remarks(found: Any, console: Console) -> None:
    """Print what should be known, and what was left out and why."""
    for note in found.notes:
        console.print(f"note    {escape(note)}")
    for each in found.left_out:
        console.print(f"left out  {escape(each.model)}: {escape(each.reason)}")


def print_suggestions(found: Any) -> None:
    """Print the ranking, what it means, and what to do."""
    from napari_resfinetune.search.report import break_even_in_words

    names = [name for name in SCORES if any(name in each.scores for each in found)]
    columns = {"": "right", "model": "left", "score": "right", "95 %": "right"}
    columns |= {SCORES[name]: "right" for name in names} | {"time": "right"}
    rows = []
    short = short_names([each.model for each in found])
    for each in found:
        interval = "" if each.low is None else f"{each.low:.2f}-{each.high:.2f}"
        scores = [f"{each.scores[name]:.2f}" if name in each.scores else "" for name in names]
        rank = f"{each.rank}{' ≈' if each.too_close else ''}"
        spent = duration(sum(each.seconds.values()))
        rows.append([rank, short[each.model], f"{each.score:.3f}", interval, *scores, spent])
    print_table(columns, rows)
    if any(each.too_close for each in found):
        results.print("≈ too close to the first to call")
    results.print(f"advice  {escape(found.advice)}")
    print_remarks(found, results)
    if found.downloads:
        for_cells = [each for each in found.downloads if each.model.endswith("_lm")] or found.downloads
        names = [f"{each.model} ({each.size_mb} MB)" for each in for_cells]
        more = f" and {len(found.downloads) - len(names)} others" if len(found.downloads) > len(names) else ""
        results.print(f"a download would add {', '.join(names)}{more}; name them as candidates")
    words = break_even_in_words(found.ranked)
    if words:
        results.print(escape(words))
    if found.report is not None:
        results.print(f"report  {escape(found.report)}")
    if found.features is not None:
        results.print(f"the features stay: --set resources.feature_cache_dir={escape(found.features)}")
