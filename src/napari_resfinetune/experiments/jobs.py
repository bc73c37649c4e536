"""One piece of a sweep, as a folder: what is to be done, how far it is, and what came out.

A job has steps that are done one after another. What each of them needs stands in ``job.json``, what came out of it in
``result.json``, so that whoever looks at the folder, now or after a crash, sees the same.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.training.run_folder import RunFolder

# As preexec_fn: the system ends a process with the one that began it, which on Linux alone can be asked for
# (PR_SET_PDEATHSIG). A job that is begun again elsewhere then has no forerunner that still writes.
WITH_PARENT = functools.partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL) if sys.platform == "linux" else None
STOP_FILE = "stop"
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Need:
    """What a job takes, by prediction.

    Attributes
    ----------
    memory_gb, ram_gb
        Of the memory that decides, and of RAM.
    seconds
        At most, all steps together.
    preset
        Name of a hardware preset, or ``"auto"``.
    device
        ``"cpu"``, ``"cuda"`` or ``"mps"``.
    cores
        CPU cores.
    """

    memory_gb: float
    ram_gb: float
    seconds: float
    preset: str
    device: str
    cores: int


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes
    ----------
    name
        Of its folder in ``jobs``.
    work
        For each step, in their order, what it needs, as plain values for `worker.STEPS`.
    need
        What it takes.
    """

    name: str
    work: Mapping[str, Mapping[str, Any]]
    need: Need


def job_folder(output: Path, name: str) -> Path:
    """Return the folder of a job."""
    return output / "jobs" / name


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all.

    Raises
    ------
    ResourceError
        When it cannot be written.
    """
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises
    ------
    ResourceError
        When it cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written ({error.strerror}); free disk space, then go on") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file; an empty mapping when it is not there.

    Raises
    ------
    ConfigError
        When it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); delete it, and its job is done again") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; delete it, and its job is done again")
    return content


def read_result(output: Path, name: str) -> dict[str, Any]:
    """Return what came out of a job so far: a mapping of its finished steps, and ``"error"`` where it failed."""
    return read_json(job_folder(output, name) / "result.json")


def steps_left(output: Path, job: Job) -> list[str]:
    """Return the steps that are not done, in their order."""
    done = read_result(output, job.name)
    return [step for step in job.work if step not in done]


def forget_error(output: Path, name: str) -> None:
    """Let a failed job be tried again; what it finished stays."""
    result = read_result(output, name)
    if result.pop("error", None) is not None:
        write_json(job_folder(output, name) / "result.json", result)


def has_checkpoint(output: Path, name: str) -> bool:
    """Say whether there is a training to go on with."""
    return RunFolder(job_folder(output, name) / "run").can_resume


def worker_command(output: Path, job: Job, steps: Sequence[str]) -> list[str]:
    """Return the command that does steps of a job."""
    return [sys.executable, "-P", "-m", "napari_resfinetune.experiments.worker", str(output), job.name, *steps]


def note_submitted(output: Path, name: str, ids: Sequence[str]) -> None:
    """Write down under which ids a job was handed over, so that it and its logs are found."""
    path = job_folder(output, name) / "submitted.json"
    before = read_json(path).get("ids", [])
    write_json(path, {"ids": [*before, *(number for number in ids if number not in before)], "now": list(ids)})


def last_submitted(output: Path) -> dict[str, list[str]]:
    """Return the ids under which each job was handed over last."""
    files = (output / "jobs").glob("*/submitted.json")
    return {file.parent.name: read_json(file).get("now", []) for file in files}


def log_file(output: Path, number: str, kind: str) -> Path:
    """Return where what a job writes to ``"out"`` or ``"err"`` goes: submitit's names, the same for all executors."""
    return output / "logs" / f"{number}_0_log.{kind}"


def log_files(output: Path, name: str) -> list[Path]:
    """Return what a job's processes wrote, the oldest first."""
    ids = read_json(job_folder(output, name) / "submitted.json").get("ids", [])
    paths = [log_file(output, number, kind) for number in ids for kind in ("out", "err")]
    return [path for path in paths if path.is_file() and path.stat().st_size]
