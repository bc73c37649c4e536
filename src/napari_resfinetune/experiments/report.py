"""Tables of a sweep, and its figures: files directly in its folder."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.experiments.figures import draw_cost, draw_scores
from napari_resfinetune.experiments.results import (
    INITIAL,
    Row,
    mean,
    order_of_images,
    published,
    read_rows,
    write_table,
)

STRATEGIES = {"full": "full finetuning", "lora": "LoRA", "frozen": "image encoder frozen", "late": "last blocks"}


def write_report(output: Path, *, with_published: bool = False) -> list[Path]:
    """Write the tables and figures of what a sweep has so far.

    ``runs.csv`` has every number of every run; ``best-epochs`` and ``best-setting`` are the two tables of the study
    that sweeps began with, as CSV and Markdown; ``scores-PRESET`` is its figure, and ``cost`` shows time and memory,
    each as PNG, SVG and PDF with its numbers as CSV.

    Parameters
    ----------
    output
        The sweep's folder.
    with_published
        Show the study's published values beside ours where it has the same combination.

    Returns
    -------
    list of Path
        What was written; nothing when no job has begun to give numbers.

    Raises
    ------
    ConfigError
        When there is no sweep.
    ResourceError
        When a file cannot be written.
    """
    if not (output / "sweep.yaml").is_file():
        raise ConfigError(f"{output}: not the folder of a sweep (no sweep.yaml in it)")
    rows = read_rows(output)
    if not any(row.scores or row.seconds is not None for row in rows):
        return []
    trained = [row for row in rows if row.strategy != INITIAL and row.seconds is not None]
    try:
        files = [write_table(output / "runs.csv", [row.flat() for row in rows])]
        if trained:
            every = best_epochs(trained, with_published=with_published)
            files += _both_ways(output / "best-epochs", every)
            files += _both_ways(output / "best-setting", best_setting(every))
            files += draw_cost(output / "cost", trained)
        for preset in dict.fromkeys(row.preset for row in rows if row.scores and row.strategy != INITIAL):
            # A start model as it is scores the same whatever the preset.
            mine = [row for row in rows if row.scores and (row.preset == preset or row.strategy == INITIAL)]
            files += draw_scores(output / f"scores-{preset}", mine, preset)
    except OSError as error:
        raise ResourceError(f"{error.filename}: cannot be written ({error.strerror}); free disk space") from None
    return files


def best_epochs(rows: Sequence[Row], *, with_published: bool = False) -> list[dict[str, Any]]:
    """Return best epoch and training time up to its end for every resource, model, strategy and number of images.

    Several seeds are shown as their mean. Rows come in the order resource, model, strategy, images.
    """
    groups: dict[tuple[str, str, str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.preset, row.model, row.strategy, row.n_images), []).append(row)
    table = []
    for key in sorted(groups, key=lambda k: (*k[:3], order_of_images(k[3]))):
        members = groups[key]
        preset, model, strategy, n_images = key
        line: dict[str, Any] = {
            "resource": preset,
            "model": model,
            "strategy": strategy,
            "images": "all" if n_images is None else n_images,
            "seeds": len(members),
            "best_epoch": _round(mean(row.best_epoch for row in members)),
            "train_time": as_time(mean(row.seconds_to_best for row in members)),
            "train_time_in_all": as_time(mean(row.seconds for row in members)),
            "peak_gb": _round(mean(row.peak_gb for row in members), 2),
        }
        if with_published:
            theirs = published(*key)
            line["published_best_epoch"] = "" if theirs is None else theirs.best_epoch
            line["published_train_time"] = "" if theirs is None else as_time(theirs.seconds)
        table.append(line)
    return table


def best_setting(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines with the most images of every resource, model and strategy, as the study's second table has."""
    most: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in table:  # in the order of the number of images
        most[line["resource"], line["model"], line["strategy"]] = line
    return list(most.values())


def as_time(seconds: float | None) -> str:
    """Return hours, minutes and seconds as ``0:05:07``; nothing where there is no time."""
    return "" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def _both_ways(stem: Path, table: Sequence[dict[str, Any]]) -> list[Path]:
    page = stem.with_name(f"{stem.name}.md")
    columns = list(dict.fromkeys(name for line in table for name in line))
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(_cell(name, line.get(name, "")) for name in columns) + " |" for line in table),
    ]
    if any("published_best_epoch" in line for line in table):
        lines += [
            "",
            'Published: the table "Results" of "Resource Efficient Finetuning of Segment Anything" (micro-sam), best '
            "epochs counted from 1, times up to the end of the best epoch.",
        ]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [write_table(stem.with_name(f"{stem.name}.csv"), table), page]


def _cell(name: str, value: Any) -> str:
    if name == "strategy":
        return STRATEGIES.get(value, str(value))
    return "" if value is None else str(value)


def _round(value: float | None, digits: int = 1) -> float | int | None:
    if value is None:
        return None
    rounded = round(value, digits)
    return int(rounded) if rounded == int(rounded) else rounded
