"""Brings jobs to their end: begins them, looks after them, tries lost ones again, and stops them on request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from napari_resfinetune.errors import ResourceError
from napari_resfinetune.events import StopToken
from napari_resfinetune.experiments.jobs import (
    STOP_FILE,
    Job,
    forget_error,
    has_checkpoint,
    job_folder,
    log_files,
    read_result,
    steps_left,
    write_json,
)
from napari_resfinetune.experiments.pools import Pool
from napari_resfinetune.experiments.worker import read_metrics
from napari_resfinetune.training.run_folder import holding

State = Literal["waiting", "queued", "running", "stopped", "failed", "done"]
# A process that was killed, or a node that was lost, says nothing; its job is begun again so often.
TRIES = 3
LOCK_FILE = ".at-work.lock"
LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class JobState:
    """How far a job is.

    Attributes
    ----------
    name
        Of the job.
    state
        ``"waiting"`` for room, ``"queued"`` on a cluster, ``"running"``, ``"stopped"`` and may go on, ``"failed"`` with
        a reason, ``"done"``.
    note
        The reason of a failure, or how far a training is.
    tries
        How often it was begun by this process.
    """

    name: str
    state: State
    note: str = ""
    tries: int = 0


OnChange = Callable[[Sequence[JobState]], None]


@contextlib.contextmanager
def working_alone(output: Path) -> Iterator[None]:
    """Keep other calls from working in a folder, which is made; the system ends this with the process.

    Raises
    ------
    ConfigError
        When another call works there.
    ResourceError
        When the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{output}: cannot be made ({error.strerror}); choose another output folder") from None
    busy = f"{output}: another call is at work here; wait until it has ended, or stop it"
    with holding(output / LOCK_FILE, busy):
        yield


def holds_files(folder: Path) -> bool:
    """Whether a folder is there and holds anything; what is hidden, such as our lock, does not count."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def run_jobs(
    output: Path,
    jobs: Sequence[Job],
    pool: Pool,
    *,
    stop: StopToken,
    on_change: OnChange | None = None,
    retry: bool = False,
    wait: bool = True,
    look_seconds: float = LOOK_SECONDS,
) -> list[JobState]:
    """Do what is left of jobs, until all of them are done or failed.

    Parameters
    ----------
    output
        The sweep's folder.
    jobs
        In the order to begin with them.
    pool
        Where they run.
    stop
        Once set, nothing more begins, what waits on a cluster is taken back, and what runs saves itself and ends.
    on_change
        Told the states of all jobs, time and again.
    retry
        Also try those again that failed before.
    wait
        Without it, hand them over and return; for clusters.
    look_seconds
        Time between two looks.

    Returns
    -------
    list of JobState
        In the order of `jobs`.
    """
    (output / STOP_FILE).unlink(missing_ok=True)
    for job in jobs:
        write_json(job_folder(output, job.name) / "job.json", job.work)
        if retry:
            forget_error(output, job.name)
    tries: dict[str, int] = {}
    stopping = False
    while True:
        alive = pool.alive()
        states = [_state(output, job, alive, tries.get(job.name, 0)) for job in jobs]
        if on_change is not None:
            on_change(states)
        if stop.stopped and not stopping:
            stopping = True
            (output / STOP_FILE).touch()
            pool.cancel(running=False)
        left = [job for job, state in zip(jobs, states, strict=True) if state.state in ("waiting", "stopped")]
        busy = any(state.state in ("queued", "running") for state in states)
        if not busy and (stopping or not left):
            return states
        if left and not stopping:
            for name in pool.submit(left):
                tries[name] = tries.get(name, 0) + 1
        if not wait:
            alive = pool.alive()
            return [_state(output, job, alive, tries.get(job.name, 0)) for job in jobs]
        _wait(look_seconds, stop if not stopping else None)


def _state(output: Path, job: Job, alive: dict[str, str], tries: int) -> JobState:
    result = read_result(output, job.name)
    error = result.get("error")
    if job.name in alive:
        state: State = "running" if alive[job.name] == "running" else "queued"
        return JobState(job.name, state, _how_far(output, job), tries)
    if not steps_left(output, job):
        return JobState(job.name, "done", "", tries)
    if error:
        return JobState(job.name, "failed", f"{error['step']}: {'; '.join(error['problems'])}", tries)
    if tries >= TRIES:
        logs = ", ".join(str(path) for path in log_files(output, job.name)[-2:]) or output / "logs"
        return JobState(job.name, "failed", f"ended {tries} times without saying why; its log tells: {logs}", tries)
    begun = has_checkpoint(output, job.name)
    return JobState(job.name, "stopped" if begun else "waiting", _how_far(output, job) if begun else "", tries)


def _how_far(output: Path, job: Job) -> str:
    left = steps_left(output, job)
    if not left:
        return ""
    if left[0] != "train":
        return left[0]
    rows = read_metrics(job_folder(output, job.name) / "run" / "metrics.csv")
    return f"epoch {int(rows[-1]['epoch']) + 2}, validation {float(rows[-1]['metric']):.3f}" if rows else "train"


def _wait(seconds: float, stop: StopToken | None) -> None:
    """Wait, but not beyond a request to stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (stop is not None and stop.stopped):
        time.sleep(min(0.1, seconds))
