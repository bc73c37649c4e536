"""Thousands of images through the same executors: the list is cut into chunks, and each is a job of its own.

A job is the very command that one would type for its images. What it has written stays when it is stopped or lost, and
a later call goes on with the chunks that are left. One table holds what all of them found.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from napari_resfinetune.data.pairs import find_images, find_pairs
from napari_resfinetune.errors import ConfigError, DataError
from napari_resfinetune.events import StopToken
from napari_resfinetune.experiments.grid import DaskSettings, ExecutorSettings, SlurmSettings
from napari_resfinetune.experiments.jobs import Job, Need, job_folder, read_json, read_result, write_json
from napari_resfinetune.experiments.manage import JobState, OnChange, run_jobs
from napari_resfinetune.experiments.pools import open_pool
from napari_resfinetune.experiments.results import write_table
from napari_resfinetune.planning import pick_device, probe_hardware
from napari_resfinetune.training.run_folder import check_writable

PLATE_FILE = "plate.json"
TABLES = {"segment": "segmented.csv", "evaluate": "scores.csv"}
# Generous, since images differ: what a chunk asks for.
MEMORY_GB = 6.0
START_SECONDS = 60.0
SECONDS_PER_IMAGE = {"cpu": 60.0, "cuda": 10.0, "mps": 20.0}
CORES = 4


@dataclass(frozen=True)
class PlateResult:
    """What became of a list of images.

    Attributes
    ----------
    jobs
        How each chunk ended.
    table
        One line per image (and mode), of all chunks that are done.
    images, done
        Images in all, and in chunks that are done.
    """

    jobs: tuple[JobState, ...]
    table: Path
    images: int
    done: int

    @property
    def stopped(self) -> bool:
        """Whether chunks are left that did not fail."""
        return any(job.state in ("waiting", "stopped", "queued", "running") for job in self.jobs)


def run_plate(
    verb: Literal["segment", "evaluate"],
    images: Any,
    labels: Any,
    output: Path,
    arguments: Sequence[str],
    executor: ExecutorSettings,
    *,
    chunk: int = 100,
    where: dict[str, Any] | None = None,
    on_change: OnChange | None = None,
    stop: StopToken | None = None,
) -> PlateResult:
    """Segment or score many images in chunks; call it again to go on.

    Parameters
    ----------
    verb
        Which command.
    images, labels
        Folders, globs or files; labels for ``"evaluate"`` alone.
    output
        A new or empty folder, or that of an earlier call with the same images and arguments.
    arguments
        Further arguments of the command, the same for all chunks.
    executor
        Where it runs.
    chunk
        Images of a job.
    where
        ``image_key``, ``label_key``, ``axes`` of the files.
    on_change, stop
        As for `manage.run_jobs`.

    Raises
    ------
    ConfigError, DataError, ResourceError
        Before anything is written wherever possible.
    """
    output = output.absolute()
    pairs = _located(verb, images, labels, where or {})
    asked = {"verb": verb, "arguments": list(arguments), "chunk": chunk, "images": _digest(pairs)}
    _check_folder(output, asked)
    hardware = probe_hardware()
    pool = open_pool(output, executor, hardware)
    device = pick_device("auto", hardware)[0].partition(":")[0]
    if isinstance(executor, SlurmSettings):
        device = "cuda" if executor.gpus else "cpu"
    if isinstance(executor, DaskSettings):
        device = "cuda" if "GPU" in executor.resources else "cpu"
    write_json(output / PLATE_FILE, asked)
    jobs = [
        _job(verb, output, f"chunk-{number + 1:05}", pairs[first : first + chunk], arguments, device)
        for number, first in enumerate(range(0, len(pairs), chunk))
    ]
    states = run_jobs(output, jobs, pool, stop=stop or StopToken(), on_change=on_change)
    table, done = _join(verb, output, jobs)
    return PlateResult(tuple(states), table, len(pairs), done)


def _located(verb: str, images: Any, labels: Any, where: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the path of each image, with that of its labels."""
    if verb == "segment":
        where = {name: value for name, value in where.items() if name != "label_key"}
        sources = find_images(images, **where)
        return [(str(source.path.absolute()),) for source in sources if source.path is not None]
    found = find_pairs(images, labels, **where)
    if found.problems:
        raise DataError(*(str(problem) for problem in found.problems))
    paths = [(pair.image.path, pair.labels.path) for pair in found.pairs]
    return [(str(i.absolute()), str(j.absolute())) for i, j in paths if i is not None and j is not None]


def _digest(pairs: Sequence[tuple[str, ...]]) -> str:
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _check_folder(output: Path, asked: dict[str, Any]) -> None:
    check_writable(output)
    if not output.is_dir() or not any(output.iterdir()):
        return
    before = read_json(output / PLATE_FILE)
    if not before:
        raise ConfigError(f"{output}: already holds files, and nothing is overwritten; choose another output folder")
    changed = [name for name, value in asked.items() if before.get(name) != value]
    if changed:
        raise ConfigError(
            f"{output}: was begun with other {', '.join(changed)}; call it as before to go on, or choose another folder"
        )


def _job(
    verb: str, output: Path, name: str, pairs: Sequence[tuple[str, ...]], arguments: Sequence[str], device: str
) -> Job:
    words = [verb, "--json", *arguments]
    for pair in pairs:
        for option, path in zip(("--images", "--labels"), pair, strict=False):
            words += [option, path]
    table = job_folder(output, name) / "scores.csv"
    if verb == "segment":
        # The folder was new when this began, so what is there is our own.
        words += ["--output", str(output / "labels"), "--overwrite"]
        work: dict[str, Any] = {"arguments": words}
    else:
        work = {"arguments": [*words, "--output", str(table)], "replaces": str(table)}
    seconds = START_SECONDS + len(pairs) * SECONDS_PER_IMAGE[device]
    return Job(name, {"command": work}, Need(MEMORY_GB, MEMORY_GB, seconds, "auto", device, CORES))


def _join(verb: str, output: Path, jobs: Sequence[Job]) -> tuple[Path, int]:
    """Write one table of what all chunks found so far, and return its path and the number of images."""
    rows: list[dict[str, Any]] = []
    for job in jobs:
        found = read_result(output, job.name).get("command")
        if found is None:
            continue
        if verb == "segment":
            rows += [dict(row) for row in found.get("results", [])]
        else:
            with (job_folder(output, job.name) / "scores.csv").open(newline="", encoding="utf-8") as file:
                rows += list(csv.DictReader(file))
    return write_table(output / TABLES[verb], rows), len({row["image"] for row in rows})
