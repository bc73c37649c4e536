"""A sweep from its grid to its tables and figures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from napari_resfinetune.config import read_yaml, write_config
from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.events import StopToken
from napari_resfinetune.experiments.expand import Expansion, expand
from napari_resfinetune.experiments.grid import GridConfig, LocalSettings, make_grid
from napari_resfinetune.experiments.jobs import (
    PLAN_FILE,
    has_checkpoint,
    job_folder,
    log_files,
    read_json,
    read_result,
    write_json,
    write_whole,
)
from napari_resfinetune.experiments.manage import JobState, OnChange, holds_files, run_jobs, working_alone
from napari_resfinetune.experiments.pools import open_pool
from napari_resfinetune.experiments.report import write_report
from napari_resfinetune.experiments.results import published as published_value
from napari_resfinetune.planning import probe_hardware
from napari_resfinetune.training.run_folder import check_writable

GRID_FILE = "sweep.yaml"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    Attributes
    ----------
    output
        Its folder, with tables and figures in it.
    jobs
        How each job ended.
    left_out
        Combinations that were not run, with reasons.
    files
        Tables and figures.
    stopped
        Whether it was stopped before its end.
    """

    output: Path
    jobs: tuple[JobState, ...]
    left_out: tuple[tuple[str, str], ...]
    files: tuple[Path, ...]
    stopped: bool

    def count(self, state: str) -> int:
        """Return the number of jobs in a state."""
        return sum(job.state == state for job in self.jobs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "output": str(self.output),
            "jobs": [{"name": job.name, "state": job.state, "note": job.note} for job in self.jobs],
            "done": self.count("done"),
            "failed": self.count("failed"),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "files": [str(path) for path in self.files],
            "stopped": self.stopped,
        }


def run_sweep(
    grid: GridConfig,
    *,
    on_change: OnChange | None = None,
    stop: StopToken | None = None,
    retry: bool = False,
    wait: bool = True,
    download: bool = False,
    published: bool = False,
    expansion: Expansion | None = None,
) -> SweepResult:
    """Train and score every combination of a grid; what an earlier call finished is not done again.

    Parameters
    ----------
    grid
        Validated.
    on_change, stop, retry, wait
        As for `manage.run_jobs`.
    download
        Whether data by name may be fetched.
    published
        Show the values of the published study in the tables.
    expansion
        What `expand` gave for the grid, if it was called before.

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError
        Before anything is written wherever possible.
    """
    output = grid.output.absolute()
    if not wait and isinstance(grid.executor, LocalSettings):
        raise ConfigError(
            "--no-wait: on this computer jobs begin one after another, which takes somebody who waits; leave it out"
        )
    check_folder(output, grid)
    hardware = probe_hardware()
    found = expansion or expand(grid, download=download, hardware=hardware)
    if not found.runs:
        reasons = [f"{name}: {reason}" for name, reason in found.left_out]
        raise ConfigError("nothing is left to run:", *reasons)
    _check_results(output, found)
    pool = open_pool(output, grid.executor, hardware)
    with working_alone(output):
        _write(output, grid, found)
        stop = stop or StopToken()
        states = run_jobs(output, found.jobs, pool, stop=stop, on_change=on_change, retry=retry, wait=wait)
        files = write_report(output, with_published=published)
    stopped = any(state.state in ("waiting", "stopped") for state in states)
    return SweepResult(output, tuple(states), found.left_out, tuple(files), stopped)


def check_folder(output: Path, grid: GridConfig) -> None:
    """Refuse a folder that holds something else than this sweep.

    Raises
    ------
    ConfigError
        With what is there, and what to do.
    """
    check_writable(output)
    written = output / GRID_FILE
    if not written.is_file():
        if holds_files(output):
            raise ConfigError(f"{output}: already holds files that are no sweep; choose another output folder")
        return
    before = read_sweep(output)
    # Lists may grow and shrink, and the place may change; what all runs share may not.
    fixed = ("images", "labels", "dataset", "test_images", "test_labels", "modes", "set", "config")
    now, then = grid.model_dump(mode="json"), before.model_dump(mode="json")
    changed = [name for name in fixed if now[name] != then[name]]
    if changed:
        raise ConfigError(
            f"{output}: holds a sweep with other {', '.join(changed)}, and its runs would not compare; choose another "
            "output folder, or put those back"
        )


def read_sweep(output: Path) -> GridConfig:
    """Read the grid of a sweep's folder.

    Raises
    ------
    ConfigError
        When there is none.
    """
    path = output / GRID_FILE
    if not path.is_file():
        raise ConfigError(f"{output}: not the folder of a sweep (no {GRID_FILE} in it)")
    return make_grid(read_yaml(path), str(path))


def read_log(output: Path, name: str) -> str:
    """Return what a job's processes wrote.

    Raises
    ------
    ConfigError
        When there is no such job, or it has written nothing yet.
    """
    if not job_folder(output, name).is_dir():
        there = sorted(path.name for path in (output / "jobs").glob("*"))
        raise ConfigError(f"{name}: no such job in {output}; there are {', '.join(there) or 'none'}")
    files = log_files(output, name)
    if not files:
        raise ConfigError(f"{name}: has no log yet; it has not begun")
    return "".join(f"== {file}\n{file.read_text(encoding='utf-8', errors='replace')}" for file in files)


def _check_results(output: Path, found: Expansion) -> None:
    """Refuse to take what another model or other settings gave for what is asked now."""
    other = []
    for run in (*found.initial, *found.runs):
        name = run.job.name
        begun = bool(read_result(output, name).keys() - {"error"}) or has_checkpoint(output, name)
        if begun and read_json(job_folder(output, name) / PLAN_FILE).get("digest", run.digest) != run.digest:
            other.append(f"{job_folder(output, name)}: was begun with another model file or other settings")
    if other:
        raise ConfigError(*other, "put those back, choose another output folder, or delete these folders")


def _write(output: Path, grid: GridConfig, found: Expansion) -> None:
    """Write the grid, and for every run its configuration and its plan."""
    try:
        text = yaml.safe_dump(grid.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_whole(output / GRID_FILE, text)
        for run in (*found.initial, *found.runs):
            folder = job_folder(output, run.job.name)
            folder.mkdir(parents=True, exist_ok=True)
            write_config(run.config, folder / "config.yaml")
            values = run.combination.values()
            if "train" not in run.job.work:
                values |= {"strategy": "initial", "n_images": 0}
            write_json(folder / PLAN_FILE, {"combination": values, "plan": run.plan.to_dict(), "digest": run.digest})
    except OSError as error:
        raise ResourceError(f"{output}: cannot be written ({error.strerror}); free disk space") from None


def describe(found: Expansion, grid: GridConfig, *, with_published: bool = False) -> dict[str, Any]:
    """Return what a sweep would take, as plain data: every job, the totals, and what is left out."""
    rows = []
    for run in found.runs:
        row = {
            "name": run.job.name,
            **run.combination.values(),
            "peak_gb": round(run.plan.peak_gb, 2),
            "limit_gb": round(run.plan.limit_gb, 2),
            "fits": run.plan.fits,
            "seconds_per_epoch": round(run.plan.seconds_per_epoch, 1),
            "seconds": round(run.job.need.seconds),
            "levers": [pulled.lever for pulled in run.plan.levers],
        }
        values = run.combination.values()
        theirs = published_value(values["preset"], values["model"], values["strategy"], values["n_images"])
        if with_published and theirs is not None:
            row["published_seconds_per_epoch"] = round(theirs.seconds / theirs.best_epoch, 1)
        rows.append(row)
    initial = [{"name": run.job.name, "seconds": round(run.job.need.seconds)} for run in found.initial]
    return {
        "jobs": rows,
        "initial": initial,
        "left_out": [{"name": name, "reason": reason} for name, reason in found.left_out],
        "notes": list(found.notes),
        "count": len(rows) + len(initial),
        "seconds": sum(row["seconds"] for row in [*rows, *initial]),
        "peak_gb": max((row["peak_gb"] for row in rows), default=0.0),
        "executor": grid.executor.kind,
    }


__all__ = ["SweepResult", "check_folder", "describe", "read_log", "read_sweep", "run_sweep"]
