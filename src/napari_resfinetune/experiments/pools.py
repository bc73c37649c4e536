"""Where jobs run: on this computer or on a cluster with SLURM, both through submitit (with dask: `dask_pool`).

submitit pickles what it is given, from one process of ours to another. That is `Command`, which holds nothing but the
words of a command; what comes back is read from the jobs' own folders and never unpickled.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
from submitit import LocalExecutor, SlurmExecutor
from submitit.helpers import Checkpointable, DelayedSubmission

from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.experiments.grid import DaskSettings, ExecutorSettings, LocalSettings, SlurmSettings
from napari_resfinetune.experiments.jobs import Job, last_submitted, note_submitted, steps_left, worker_command
from napari_resfinetune.planning import Hardware, usable_cores

YEAR_MINUTES = 365 * 24 * 60
THREADS_EACH = 2
# What is asked for beyond the prediction.
MEMORY_FACTOR, MEMORY_EXTRA_GB, TIME_FACTOR = 1.2, 2.0, 1.5
# Seconds between questions to a busy SLURM that did not answer.
PAUSES = (2.0, 10.0, 30.0, 60.0)


class Command(Checkpointable):
    """Runs a command; when a cluster's time limit comes near, it is asked to save, and queued again.

    Parameters
    ----------
    words
        Program and arguments. It goes on where it stopped when it is run again.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run it, and end this process with its status when that is not 0."""
        # The warning goes to all processes of a job; only this one knows what it means.
        self.process = subprocess.Popen(self.words, preexec_fn=_ignore_warning)
        status = self.process.wait()
        if status:
            sys.exit(status if status > 0 else 128 - status)

    def checkpoint(self) -> DelayedSubmission:
        """Let the command save and end, and return what to queue again."""
        if self.process is not None:
            self.process.terminate()
            # This interrupts __call__, which holds the lock that wait() would take.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Command(self.words))


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class Pool(Protocol):
    """Takes jobs and says which of them are still there."""

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Begin with as many jobs as there is room for, and return their names."""

    def alive(self) -> dict[str, str]:
        """Return the names of jobs that are not over, each with ``"queued"`` or ``"running"``."""

    def cancel(self, *, running: bool) -> None:
        """Take back what waits, and with `running` also what runs, at once."""


def _still_works(pid: str, output: Path) -> bool:
    """Say whether a process is one that submitit began for a sweep, and not another of the same number."""
    if not pid.isdigit():
        return False
    try:
        words = psutil.Process(int(pid)).cmdline()
    except psutil.Error:
        return False
    return "submitit.local._local" in words and str(output / "logs") in words


class LocalPool:
    """Jobs as processes of this computer, as many at once as fit by prediction.

    Parameters
    ----------
    output
        The sweep's folder.
    settings
        Limits for all of them together.
    hardware
        This computer.
    """

    def __init__(self, output: Path, settings: LocalSettings, hardware: Hardware) -> None:
        if sys.platform == "win32":
            raise ConfigError("sweeps do not run on Windows, since submitit does not; use WSL, or train one by one")
        self.output, self.settings, self.hardware = output, settings, hardware
        self.room_gb = settings.memory_gb or 0.9 * hardware.memory_free_gb
        self.cards = _cards(hardware)
        self._running: dict[str, tuple[Any, Job, str | None]] = {}
        self._threads: int | None = None

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Begin with as many jobs as there is room for; one that is larger than all there is runs alone."""
        left = len(set(self.alive()) - set(self._running))
        if self._threads is None and jobs:
            # The same for all, so that runs of equal minutes stay comparable.
            at_once = min(self._at_once(jobs[0]), len(jobs))
            self._threads = max(1, usable_cores(self.hardware) // at_once)
        begun: list[str] = []
        for job in jobs:
            card = next((c for c in self.cards if c not in self._taken_cards()), None)
            if not self._fits(job, left) or (job.need.device == "cuda" and card is None):
                break
            self._begin(job, card if job.need.device == "cuda" else None)
            begun.append(job.name)
        return begun

    def alive(self) -> dict[str, str]:
        """Return the names of jobs whose process has not ended, also of those that an earlier sweep left alone."""
        self._running = {name: entry for name, entry in self._running.items() if not entry[0].done()}
        known = last_submitted(self.output)
        left = [name for name, ids in known.items() if any(_still_works(pid, self.output) for pid in ids)]
        return dict.fromkeys([*self._running, *left], "running")

    def cancel(self, *, running: bool) -> None:
        """End what runs, with `running`; nothing waits here."""
        for handle, _, _ in self._running.values() if running else ():
            handle.cancel()

    def _fits(self, job: Job, left: int) -> bool:
        """Say whether there is room beside what runs and what an earlier call left running, whose memory is in use."""
        busy = len(self._running) + left
        if not busy:
            return True
        taken = sum(other.need.ram_gb for _, other, _ in self._running.values())
        return busy < self._at_once(job) and taken + job.need.ram_gb <= self.room_gb

    def _at_once(self, job: Job) -> int:
        """Return how many jobs like this one may run at a time."""
        at_once = self.settings.at_once
        if at_once is None:
            at_once = len(self.cards) if job.need.device == "cuda" else self.hardware.physical_cores // THREADS_EACH
        return max(1, at_once)

    def _taken_cards(self) -> list[str | None]:
        return [card for _, _, card in self._running.values()]

    def _begin(self, job: Job, card: str | None) -> None:
        executor = LocalExecutor(self.output / "logs")
        cards: dict[str, Any] = {"gpus_per_node": 1, "visible_gpus": (int(card),)} if card is not None else {}
        executor.update_parameters(timeout_min=YEAR_MINUTES, **cards)
        command = Command(worker_command(self.output, job, steps_left(self.output, job)))
        with _interrupts_left_to_us(), _threads_for_children(self._threads):
            handle = executor.submit(command)
        self._running[job.name] = (handle, job, card)
        note_submitted(self.output, job.name, [handle.job_id])


@contextlib.contextmanager
def _interrupts_left_to_us() -> Iterator[None]:
    """Begin processes that Ctrl-C in this terminal does not reach: they are asked to save and stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _threads_for_children(threads: int | None) -> Iterator[None]:
    """Begin processes that take so many threads; with more than there are cores, all would wait for each other."""
    before = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _cards(hardware: Hardware) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [name.strip() for name in visible.split(",") if name.strip().isdigit()]
    return named or [str(gpu.index) for gpu in hardware.gpus if gpu.has_kernels]


class SlurmPool:
    """Jobs of a cluster: one array for each step of jobs that ask for the same, the later waiting for the earlier.

    Parameters
    ----------
    output
        The sweep's folder, which all nodes see.
    settings
        What to ask for.

    Raises
    ------
    ConfigError
        When this computer has no SLURM.
    """

    def __init__(self, output: Path, settings: SlurmSettings) -> None:
        self.output, self.settings = output, settings
        try:
            SlurmExecutor(output / "logs")
        except RuntimeError:
            raise ConfigError(
                "executor: there is no SLURM here (no srun); run the sweep on a login node, or use 'kind: local'"
            ) from None

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Hand all jobs over."""
        groups: dict[tuple[Any, ...], list[Job]] = {}
        for job in jobs:
            parameters = self._parameters(job)
            key = (tuple(steps_left(self.output, job)), repr(parameters))
            groups.setdefault(key, []).append(job)
        for (steps, _), members in groups.items():
            self._submit_group(members, steps, self._parameters(members[0]))
        return [job.name for job in jobs]

    def alive(self) -> dict[str, str]:
        """Return jobs that SLURM still has, also those that an earlier process of ours handed over."""
        known = self._queue()
        found = {}
        for name, ids in last_submitted(self.output).items():
            states = [known[number] for number in ids if number in known]
            if states:
                found[name] = "running" if "running" in states else "queued"
        return found

    def cancel(self, *, running: bool) -> None:
        """Take back what waits, and with `running` also what runs, at once."""
        known = self._queue()
        ours = {number for ids in last_submitted(self.output).values() for number in ids}
        ids = [number for number, state in known.items() if number in ours and (running or state == "queued")]
        if ids:
            subprocess.run(["scancel", *ids], check=False, capture_output=True)

    def _submit_group(self, jobs: Sequence[Job], steps: Sequence[str], parameters: Mapping[str, Any]) -> None:
        before: str | None = None
        ids: dict[str, list[str]] = {job.name: [] for job in jobs}
        for step in steps:
            executor = SlurmExecutor(self.output / "logs", max_num_timeout=self.settings.requeues)
            extra = dict(parameters["additional_parameters"])
            if before is not None:
                # Each task waits for the task of the same number; one whose forerunner failed is taken away.
                extra |= {"dependency": f"{'aftercorr' if len(jobs) > 1 else 'afterok'}:{before}"}
                extra |= {"kill-on-invalid-dep": "yes"}
            executor.update_parameters(**{**parameters, "job_name": step, "additional_parameters": extra})
            try:
                with executor.batch():
                    handles = [executor.submit(Command(worker_command(self.output, job, [step]))) for job in jobs]
            except Exception as error:  # submitit has several of its own
                # Earlier steps without this one would be done again when the jobs are handed over anew.
                if before is not None:
                    arrays = {number.partition("_")[0] for numbers in ids.values() for number in numbers}
                    subprocess.run(["scancel", *sorted(arrays)], check=False, capture_output=True)
                raise ResourceError(f"sbatch refused a job ({_first_line(error)}); see the section executor") from None
            for job, handle in zip(jobs, handles, strict=True):
                ids[job.name].append(handle.job_id)
                note_submitted(self.output, job.name, ids[job.name])
            before = handles[0].job_id.partition("_")[0]

    def _parameters(self, job: Job) -> dict[str, Any]:
        """Return what a job asks SLURM for, in submitit's words."""
        settings, request, need = self.settings, self.settings.request(job.need.preset), job.need
        minutes = request.minutes or math.ceil(TIME_FACTOR * need.seconds / 60)
        if settings.longest_minutes is not None:
            minutes = min(minutes, settings.longest_minutes)
        memory_gb = request.memory_gb or math.ceil(MEMORY_FACTOR * need.ram_gb + MEMORY_EXTRA_GB)
        gpus = request.gpus if request.gpus is not None else (1 if need.device == "cuda" else None)
        parameters = {
            "partition": request.partition,
            "account": request.account,
            "qos": request.qos,
            "constraint": request.constraint,
            "gres": f"gpu:{gpus}" if gpus else None,
            "cpus_per_task": request.cpus or need.cores,
            "mem": f"{math.ceil(memory_gb * 1024)}MB",
            "time": minutes,
            "signal_delay_s": settings.warn_seconds,
            "array_parallelism": settings.at_once,
            "setup": list(settings.setup) or None,
        }
        given = {name: value for name, value in parameters.items() if value is not None}
        return {**given, "additional_parameters": dict(settings.options)}

    def _queue(self) -> dict[str, str]:
        """Return SLURM's numbers of this user's jobs that are not over, with ``"queued"`` or ``"running"``."""
        command = ["squeue", "--me", "--noheader", "--array", "--format=%F|%K|%A|%T"]
        for pause in (*PAUSES, None):
            asked = subprocess.run(command, check=False, capture_output=True, text=True)
            if not asked.returncode:
                break
            if pause is None:
                raise ResourceError(f"squeue does not answer ({asked.stderr.strip()}); jobs go on, call again later")
            time.sleep(pause)
        known = {}
        for line in asked.stdout.split():
            array, task, number, state = line.split("|")
            name = f"{array}_{task}" if task.isdigit() else number
            known[name] = "running" if state in ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED") else "queued"
        return known


def open_pool(output: Path, settings: ExecutorSettings, hardware: Hardware) -> Pool:
    """Return the place that a section ``executor`` names.

    Raises
    ------
    ConfigError, ResourceError
        When it is not to be had here.
    """
    if isinstance(settings, DaskSettings):
        from napari_resfinetune.experiments.dask_pool import DaskPool

        return DaskPool(output, settings)
    if isinstance(settings, SlurmSettings):
        return SlurmPool(output, settings)
    return LocalPool(output, settings, hardware)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
