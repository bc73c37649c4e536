"""Jobs as tasks of a dask cluster that somebody has begun already.

Only the words of a command go there, and only the state of a task comes back; what a job found is read from its folder,
which all workers must see, as with SLURM. A task is published under its name, so that it outlives the process that
handed it over, and a later one finds it.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.experiments.grid import DaskSettings
from napari_resfinetune.experiments.jobs import (
    STOP_FILE,
    WITH_PARENT,
    Job,
    last_submitted,
    log_file,
    note_submitted,
    steps_left,
    worker_command,
)

if TYPE_CHECKING:
    from distributed import Client, Future

CONNECT_SECONDS = 10
# The other states, "cancelled" and "lost", say that our connection broke, and nothing of the task.
OVER = ("finished", "error")


def run_logged(words: Sequence[str], out_file: str, err_file: str) -> int:
    """Run a command of Python on a worker, with the worker's own, and add what it writes to files; return its status.

    Dask begins a task again elsewhere when a worker is lost, so the command ends with the worker.
    """
    Path(out_file).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *words[1:]]
    with open(out_file, "ab") as out, open(err_file, "ab") as err:
        return subprocess.run(command, stdout=out, stderr=err, check=False, preexec_fn=WITH_PARENT).returncode


class DaskPool:
    """Jobs of a dask cluster, as many at once as its workers have threads, or as their declared resources allow.

    Parameters
    ----------
    output
        The sweep's folder, which all workers see.
    settings
        Where the scheduler is, and what a job takes.

    Raises
    ------
    ConfigError
        When dask.distributed is not installed.
    ResourceError
        When no scheduler answers there.
    """

    def __init__(self, output: Path, settings: DaskSettings) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise ConfigError(
                'executor: kind dask needs dask.distributed: pip install "napari-resfinetune[dask]"'
            ) from None
        self.output, self.settings = output, settings
        # A task that was just asked for is pending until the scheduler answers: each is asked for once.
        self._tasks: dict[str, Future] = {}
        try:
            self.client = Client(settings.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError) as error:
            raise ResourceError(
                f"executor: no dask scheduler at {settings.scheduler} ({error}); correct the address, or begin one "
                "with: dask scheduler"
            ) from None

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Hand all jobs over."""
        with _answers(self.client):
            for job in jobs:
                name = f"resfinetune-{job.name}-{secrets.token_hex(4)}"
                words = worker_command(self.output, job, steps_left(self.output, job))
                note_submitted(self.output, job.name, [name])
                logs = [str(log_file(self.output, name, kind)) for kind in ("out", "err")]
                self._tasks[name] = self.client.submit(
                    run_logged, words, *logs, key=name, resources=self.settings.resources
                )
                self.client.publish_dataset(self._tasks[name], name=name)
        return [job.name for job in jobs]

    def alive(self) -> dict[str, str]:
        """Return jobs whose task is not over, also those that an earlier process of ours handed over."""
        found = {}
        with _answers(self.client):
            published = set(self.client.list_datasets())
            for job, names in last_submitted(self.output).items():
                for name in published.intersection(names):
                    task = self._task(name)
                    if task is not None and task.status in OVER:
                        self._note_error(name, task)
                        self._forget(name)
                    else:
                        found[job] = "running" if self._has_begun(name) else "queued"
        return found

    def cancel(self, *, running: bool) -> None:
        """Take back what waits; what runs, `running`, is asked to save and end, since dask cannot end it."""
        if running:
            (self.output / STOP_FILE).touch()
        with _answers(self.client):
            published = set(self.client.list_datasets())
            ours = {name for names in last_submitted(self.output).values() for name in names}
            for name in published & ours:
                if not self._has_begun(name):
                    task = self._task(name)
                    if task is not None:
                        task.cancel()
                    self._forget(name)

    def _task(self, name: str) -> Future | None:
        """Return a published task; `None` when another process has just taken it back."""
        if name not in self._tasks or self._tasks[name].status in ("cancelled", "lost"):
            task = self.client.get_dataset(name, default=None)
            if task is None:
                return None
            self._tasks[name] = task
        return self._tasks[name]

    def _forget(self, name: str) -> None:
        self.client.unpublish_dataset(name)
        self._tasks.pop(name, None)

    def _note_error(self, name: str, task: Future) -> None:
        """Add to a job's log why dask could not run it."""
        if task.status == "error":
            path = log_file(self.output, name, "err")
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as log:
                    log.write(f"dask: {task.exception()!r}\n")

    def _has_begun(self, name: str) -> bool:
        return log_file(self.output, name, "err").exists()


@contextlib.contextmanager
def _answers(client: Client) -> Iterator[None]:
    """Say in words that the scheduler is gone."""
    from distributed.comm import CommClosedError

    try:
        if client.status == "closed":
            raise OSError("the connection was closed")
        yield
    except (CommClosedError, TimeoutError, OSError) as error:
        raise ResourceError(
            f"the dask scheduler does not answer ({error}); what runs goes on, call again when it is back"
        ) from None
