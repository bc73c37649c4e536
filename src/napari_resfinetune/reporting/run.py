"""What a report says about a run, read from its folder."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.events import Finished
from napari_resfinetune.reporting.citations import Citation, citations_for
from napari_resfinetune.training.run_folder import METRICS, SESSION_EVENTS, RunFolder, open_run
from napari_resfinetune.words import duration

STATUS_WORDS = {
    "finished": "finished",
    "early_stopped": "ended early, since it no longer improved",
    "stopped": "stopped on request; it can be resumed",
    "failed": "failed",
    "unknown": "not finished",
}


@dataclass(frozen=True)
class RunView:
    """A run as the report shows it.

    Attributes
    ----------
    path
        The run folder.
    config
        As it was run.
    plan, split, environment, comparison
        From the JSON files of the same names; empty when there is none.
    epochs
        Rows of ``metrics.csv``, as numbers.
    levers
        What was switched on when memory ran out.
    status
        A key of `STATUS_WORDS`.
    seconds, peak_memory_gb, best_epoch
        From the end of the run, or how far it got; `None` when unknown.
    seconds_per_step
        Median of the steps' times.
    """

    path: Path
    config: FinetuneConfig
    plan: Mapping[str, Any]
    split: Mapping[str, Any]
    environment: Mapping[str, Any]
    comparison: Mapping[str, Any]
    epochs: Sequence[Mapping[str, float]]
    levers: Sequence[Mapping[str, Any]]
    status: str
    seconds: float | None
    peak_memory_gb: float | None
    best_epoch: int | None
    seconds_per_step: float | None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.absolute().name

    @property
    def status_words(self) -> str:
        """How it ended."""
        return STATUS_WORDS[self.status]

    @property
    def architecture(self) -> str:
        """Of the model, as the plan has it."""
        return str(self.plan.get("architecture", "vit_b"))

    @property
    def model_name(self) -> str:
        """The start model's name, or the file name of its checkpoint."""
        return Path(self.config.model).name or self.config.model

    @property
    def best(self) -> Mapping[str, float] | None:
        """The row of the best epoch."""
        return next((row for row in self.epochs if row["epoch"] == self.best_epoch), None)

    @property
    def images(self) -> dict[str, list[str]]:
        """Names of images to train on and held out."""
        return {
            part: list(dict.fromkeys(str(region.get("image", "")) for region in self.split.get(part, ())))
            for part in ("train", "validation")
        }

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Every setting that has a value, as ``section.key`` and its YAML value."""
        return list(_flat(self.config.model_dump(mode="json")))

    @property
    def packages(self) -> list[tuple[str, str]]:
        """Packages and their versions."""
        return [(str(name), str(found)) for name, found in self.environment.get("packages", {}).items() if found]

    @property
    def prediction(self) -> list[tuple[str, str, str]]:
        """What was predicted and what was measured, in words."""
        times = [
            ("a step", self.plan.get("seconds_per_step"), self.seconds_per_step),
            ("an epoch", self.plan.get("seconds_per_epoch"), self._seconds_per_epoch),
            ("all of it, at most", self.plan.get("seconds_at_most"), self.seconds),
        ]
        planned_gb, measured_gb = (
            _or_dash(gb, "{:.2f} GB".format) for gb in (self.plan.get("peak_gb"), self.peak_memory_gb)
        )
        rows = [(name, _or_dash(planned, duration), _or_dash(measured, duration)) for name, planned, measured in times]
        return [("peak memory", planned_gb, measured_gb), *rows]

    @property
    def _seconds_per_epoch(self) -> float | None:
        return self.epochs[-1]["seconds"] / (self.epochs[-1]["epoch"] + 1) if self.epochs else None

    @property
    def citations(self) -> tuple[Citation, ...]:
        """What to cite."""
        return citations_for(self.config, self.architecture, compared=bool(self.comparison))

    @property
    def commands(self) -> list[tuple[str, str, str]]:
        """How to use the model: where, a sentence, and what to type."""
        run = self.path.absolute()
        model = run / "model.pt"
        mode = "amg" if self.config.training.targets == "masks" else "ais"
        typed, typed_model = shlex.quote(str(run)), shlex.quote(str(model))
        # micro-sam has its vit_t from a package that it does not install.
        tiny = " (vit_t needs the package mobile_sam there)" if self.architecture == "vit_t" else ""
        return [
            (
                "The command",
                "One label image for each image, or scores on images with labels:",
                f"resfinetune segment --model {typed} --mode {mode} --images FOLDER --output FOLDER\n"
                f"resfinetune evaluate --model {typed} --mode {mode} --images FOLDER --labels FOLDER",
            ),
            (
                "Python",
                "",
                "import napari_resfinetune as rf\n\n"
                f'labels = rf.segment("image.tif", model={str(run)!r}, mode="{mode}")',
            ),
            (
                "napari",
                "Plugins, Segment Anything for Microscopy, Annotator 2d; under embedding settings give the model type "
                f"{self.architecture} and this file as custom weights{tiny}. Or from a terminal:",
                f"micro_sam.annotator_2d -i image.tif -m {self.architecture} -c {typed_model}",
            ),
            (
                "micro-sam",
                f"From a terminal, and in Python{tiny}:",
                f"micro_sam.automatic_segmentation -i image.tif -o labels.tif -m {self.architecture} -c {typed_model} "
                f"--mode {mode}\n\n"
                "from micro_sam.automatic_segmentation import get_predictor_and_segmenter\n"
                f'predictor, segmenter = get_predictor_and_segmenter("{self.architecture}", '
                f"checkpoint={str(model)!r})",
            ),
        ]


def view_run(path: Path, finished: Finished | None = None) -> RunView:
    """Read a run folder.

    Parameters
    ----------
    path
        The folder; the run may be unfinished.
    finished
        The end of the run, where the log does not have it yet.

    Raises
    ------
    ConfigError
        When there is no run, or a file of it is damaged.
    """
    run, config = open_run(path)
    events = _read_events(run)
    # A session that began and did not end counts, not the one before it.
    sessions = [event for event in events if event["event"] in SESSION_EVENTS]
    end: Mapping[str, Any] = finished.to_dict() if finished is not None else (sessions[-1] if sessions else {})
    epochs = _read_epochs(run) or [_numbers(event) for event in events if event["event"] == "EpochEnded"]
    steps = sorted(event["seconds"] for event in events if event["event"] == "Step")
    failed = end.get("event") == "Failed"
    last: Mapping[str, float] = epochs[-1] if epochs else {}
    best = min(epochs, key=lambda row: row["metric"])["epoch"] if epochs else None
    return RunView(
        path=path,
        config=config,
        plan=_mapping(run, "plan.json"),
        split=_mapping(run, "split.json"),
        environment=_mapping(run, "environment.json"),
        comparison=_mapping(run, "comparison.json"),
        epochs=epochs,
        levers=[event for event in events if event["event"] == "MemoryLever"],
        status="failed" if failed else str(end.get("status", "unknown")),
        seconds=end.get("seconds", last.get("seconds")),
        peak_memory_gb=end.get("peak_memory_gb", last.get("peak_memory_gb")),
        best_epoch=None if best is None else int(best),
        seconds_per_step=steps[len(steps) // 2] if steps else None,
    )


def _mapping(run: RunFolder, name: str) -> Mapping[str, Any]:
    content = run.read_json(name)
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{run.path / name}: holds a {type(content).__name__}; restore it, or start a new run")
    return content or {}


def _read_events(run: RunFolder) -> list[dict[str, Any]]:
    """Read the log; a line that a crash tore is left out."""
    events = []
    try:
        lines = run.events.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def _read_epochs(run: RunFolder) -> list[dict[str, float]]:
    try:
        with run.metrics.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
            return [row for row in rows if "epoch" in row and "metric" in row]  # others were torn by a crash
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run.metrics}: cannot be read ({error}); restore it, or start a new run") from None


def _numbers(event: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(event[name]) for name in METRICS if isinstance(event.get(name), int | float)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def _or_dash(value: float | None, words: Callable[[float], str]) -> str:
    return "–" if value is None else words(value)
