"""The numbers of a sweep, gathered from the folders of its jobs."""

from __future__ import annotations

import csv
import functools
import importlib.resources
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from napari_resfinetune.experiments.jobs import PLAN_FILE, job_folder, read_json, read_result

SCORES = ("sa50", "sa75", "msa")
INITIAL = "initial"


@dataclass(frozen=True)
class Row:
    """One trained run, or one start model as it is.

    Attributes
    ----------
    name, preset, model, strategy, n_images, seed
        The combination; the strategy of a start model is ``"initial"``, its `n_images` 0. `None` is all images.
    done
        Whether all of it is done.
    best_epoch
        From 1; `None` where there is none.
    seconds_to_best, seconds
        Training time up to the end of the best epoch, and in all.
    epochs
        Epochs that were trained.
    peak_gb
        Most memory that the training took.
    predicted_gb, predicted_seconds_per_epoch
        What the planner said before.
    scores
        ``{"mode": {"sa50": .., "sa75": .., "msa": ..}}``.
    """

    name: str
    preset: str
    model: str
    strategy: str
    n_images: int | None
    seed: int
    done: bool
    best_epoch: int | None
    seconds_to_best: float | None
    seconds: float | None
    epochs: int | None
    peak_gb: float | None
    predicted_gb: float | None
    predicted_seconds_per_epoch: float | None
    scores: dict[str, dict[str, float]]

    def flat(self) -> dict[str, Any]:
        """Return one level of values, for a table."""
        values = {name: value for name, value in vars(self).items() if name != "scores"}
        scores = {f"{mode}_{name}": each[name] for mode, each in self.scores.items() for name in SCORES}
        return {**values, **scores}


@dataclass(frozen=True)
class Published:
    """One line of the study's table; `best_epoch` from 1, `seconds` up to its end."""

    preset: str
    model: str
    strategy: str
    n_images: int
    best_epoch: int
    seconds: float


def read_rows(output: Path) -> list[Row]:
    """Return what a sweep has so far, by the name of the job."""
    return [_row(output, path.parent.name) for path in sorted((output / "jobs").glob(f"*/{PLAN_FILE}"))]


def _row(output: Path, name: str) -> Row:
    written = read_json(job_folder(output, name) / PLAN_FILE)
    work, result = read_json(job_folder(output, name) / "job.json"), read_result(output, name)
    values, plan, trained = written["combination"], written["plan"], result.get("train", {})
    best = trained.get("best_epoch", -1)
    is_initial = values["strategy"] == INITIAL
    return Row(
        name=name,
        **values,
        done=bool(work) and all(step in result for step in work),
        best_epoch=best + 1 if best >= 0 else None,
        seconds_to_best=trained.get("seconds_to_best"),
        seconds=trained.get("seconds"),
        epochs=trained.get("epochs"),
        peak_gb=trained.get("peak_memory_gb"),
        predicted_gb=None if is_initial else plan["peak_gb"],
        predicted_seconds_per_epoch=None if is_initial else plan["seconds_per_epoch"],
        scores=result.get("evaluate", {}).get("scores", {}),
    )


@functools.cache
def published_rows() -> tuple[Published, ...]:
    """Return the table "Results" of the study "Resource Efficient Finetuning of Segment Anything" (micro-sam).

    Its best epochs count from 0, as its times show (best epoch 3 takes four epochs' time); here they count from 1.
    """
    text = importlib.resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(
        Published(
            row["preset"],
            row["model"],
            row["strategy"],
            int(row["n_images"]),
            int(row["best_epoch"]) + 1,
            float(row["seconds"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


def published(preset: str, model: str, strategy: str, n_images: int | None) -> Published | None:
    """Return what the study has for a combination."""
    wanted = (preset, model, strategy, n_images)
    return next((r for r in published_rows() if (r.preset, r.model, r.strategy, r.n_images) == wanted), None)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as CSV; columns are all that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is there."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def order_of_images(n_images: int | None) -> float:
    """Return what sorts numbers of images, all of them last."""
    return float("inf") if n_images is None else n_images
