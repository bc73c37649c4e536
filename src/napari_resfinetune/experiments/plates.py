"""Thousands of images through the same executors: the list is cut into chunks, and each is a job of its own.

A job is the very command that one would type for its images. What it has written stays when it is stopped or lost, and
a later call goes on with the chunks that are left. One table holds what all of them found.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from napari_resfinetune.data.pairs import find_images
from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.evaluation import check_modes
from napari_resfinetune.events import StopToken
from napari_resfinetune.experiments.datasets import pairs_to_score
from napari_resfinetune.experiments.grid import DaskSettings, ExecutorSettings, SlurmSettings
from napari_resfinetune.experiments.jobs import Job, Need, job_folder, read_json, read_result, write_json
from napari_resfinetune.experiments.manage import JobState, OnChange, holds_files, run_jobs, working_alone
from napari_resfinetune.experiments.pools import Pool, open_pool
from napari_resfinetune.experiments.results import write_table
from napari_resfinetune.inference import check_mode, label_paths
from napari_resfinetune.models import known_model
from napari_resfinetune.planning import pick_device, probe_hardware
from napari_resfinetune.training.planned import architecture_of
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
    notes
        Which images are left out, and why.
    """

    jobs: tuple[JobState, ...]
    table: Path
    images: int
    done: int
    notes: tuple[str, ...] = ()

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
        A new or empty folder, or that of an earlier call with the same images and arguments. Arguments may change
        as long as no chunk is done.
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
    check_writable(output)
    words = _words_for_all(arguments)
    _check_words(verb, words)
    pairs, notes = _located(verb, images, labels, where or {})
    hardware = probe_hardware()
    device = pick_device("auto", hardware)[0].partition(":")[0]
    if isinstance(executor, SlurmSettings):
        device = "cuda" if executor.gpus else "cpu"
    if isinstance(executor, DaskSettings):
        device = "cuda" if "GPU" in executor.resources else "cpu"
    parts = {
        f"chunk-{number + 1:05}": pairs[first : first + chunk]
        for number, first in enumerate(range(0, len(pairs), chunk))
    }
    jobs = [_job(verb, output, name, part, words, device) for name, part in parts.items()]
    asked = {"verb": verb, "arguments": words, "chunk": chunk, "images": _digest(pairs)}
    pool = open_pool(output, executor, hardware)
    _check_folder(output, asked, jobs, pool)
    with working_alone(output):
        write_json(output / PLATE_FILE, asked)
        states = run_jobs(output, jobs, pool, stop=stop or StopToken(), on_change=on_change, retry=True)
        done = [name for name in parts if "command" in read_result(output, name)]
        table = _join(verb, output, done)
    return PlateResult(tuple(states), table, len(pairs), sum(len(parts[name]) for name in done), notes)


def _words_for_all(arguments: Sequence[str]) -> list[str]:
    """Name models from any working directory, and leave out which images there are, since each chunk has its own."""
    words: list[str] = []
    for before, word in itertools.pairwise(["", *arguments]):
        if before == "--model" and known_model(word) is None and Path(word).exists():
            words.append(str(Path(word).absolute()))
        elif before == "--set" and word.partition("=")[0].strip() in ("data.images", "data.labels"):
            words.pop()
        else:
            words.append(word)
    return words


def _check_words(verb: str, words: Sequence[str]) -> None:
    """Refuse what all chunks would fail at."""
    given: dict[str, list[str]] = {}
    for option, value in itertools.pairwise(words):
        given.setdefault(option, []).append(value)
    if verb == "evaluate":
        check_modes(given.get("--mode", ["ais"]))
    else:
        check_mode(given.get("--mode", ["ais"])[0])
    label_paths((), Path(), given.get("--format", ["tiff"])[0], overwrite=True)
    for model in given.get("--model", []):
        architecture_of(model)


def _located(
    verb: str, images: Any, labels: Any, where: dict[str, Any]
) -> tuple[Sequence[tuple[str, ...]], tuple[str, ...]]:
    """Return the path of each image, with that of its labels, and which are left out."""
    if verb == "segment":
        where = {name: value for name, value in where.items() if name != "label_key"}
        sources = find_images(images, **where)
        return [(str(source.path.absolute()),) for source in sources if source.path is not None], ()
    found = pairs_to_score(images, labels, **where)
    paths = [(pair.image.path, pair.labels.path) for pair in found.pairs]
    absolute = [(str(i.absolute()), str(j.absolute())) for i, j in paths if i is not None and j is not None]
    return absolute, tuple(map(str, found.problems))


def _digest(pairs: Sequence[tuple[str, ...]]) -> str:
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _check_folder(output: Path, asked: dict[str, Any], jobs: Sequence[Job], pool: Pool) -> None:
    if not holds_files(output):
        return
    before = read_json(output / PLATE_FILE)
    if not before:
        raise ConfigError(f"{output}: already holds files, and nothing is overwritten; choose another output folder")
    changed = [name for name, value in asked.items() if before.get(name) != value]
    if changed == ["arguments"] and not pool.alive():
        changed = changed if any("command" in read_result(output, job.name) for job in jobs) else []
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


def _join(verb: str, output: Path, chunks: Sequence[str]) -> Path:
    """Write one table of what chunks found, and return its path."""
    rows: list[dict[str, Any]] = []
    try:
        for name in chunks:
            if verb == "segment":
                rows += [dict(row) for row in read_result(output, name)["command"].get("results", [])]
            else:
                with (job_folder(output, name) / "scores.csv").open(newline="", encoding="utf-8") as file:
                    rows += list(csv.DictReader(file))
        return write_table(output / TABLES[verb], rows)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or output}: cannot be used ({error.strerror}); free disk space, or delete result.json "
            "of a chunk whose files are gone, then give the same command again"
        ) from None
