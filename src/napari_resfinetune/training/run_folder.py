"""The folder of a run: what was asked, what happened, and what came out of it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from napari_resfinetune.config import FinetuneConfig, read_config, write_config
from napari_resfinetune.errors import ConfigError, ResourceError
from napari_resfinetune.events import EpochEnded, Event

# In a folder of copies of layers, which belong to the run beside it and go with it.
COPIES_MARK = ".copies-of-layers"
# What begins and ends a session in the log of a run.
SESSION_EVENTS = ("Started", "Finished", "Failed")
_LOCK = ".training.lock"
# Longer than somebody takes who only looks whether it is held.
_LOCK_SECONDS = 2.0
METRICS = (
    "epoch",
    "train_loss",
    "metric",
    "mask_metric",
    "instance_metric",
    "learning_rate",
    "seconds",
    "peak_memory_gb",
    "memory_limit_gb",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration as it was run."""
        return self.path / "config.yaml"

    @property
    def latest(self) -> Path:
        """The checkpoint to continue from."""
        return self.path / "checkpoints" / "latest"

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return self.latest.is_dir() and self.config.is_file()

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation metric."""
        return self.path / "checkpoints" / "best"

    @property
    def model(self) -> Path:
        """The best model as micro-sam reads it."""
        return self.path / "model.pt"

    @property
    def adapter(self) -> Path:
        """The best model as an adapter, of runs with strategy ``lora`` or ``late_lora``."""
        return self.path / "adapter"

    @property
    def features(self) -> Path:
        """What the frozen part of the image encoder computed, while the run lasts."""
        return self.path / "features"

    @property
    def events(self) -> Path:
        """Everything that happened, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """One line an epoch."""
        return self.path / "metrics.csv"

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        new = self.path / f".{name}.new"
        new.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(new, self.path / name)

    def read_json(self, name: str) -> Any:
        """Read a JSON file; `None` when it is not there.

        Raises
        ------
        ConfigError
            When it is damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); restore it, or start a new run") from None


def check_output(output: Path) -> None:
    """Refuse an output folder that holds something, or cannot be written.

    Raises
    ------
    ConfigError
        With what is there, and what to do.
    """
    check_writable(output)
    if output.is_dir() and any(output.iterdir()):
        hint = f" or go on with: resfinetune resume {output}" if (output / "config.yaml").is_file() else ""
        raise ConfigError(
            f"{output}: already holds files, and nothing is overwritten; choose another output folder{hint}"
        )


def check_writable(folder: Path) -> None:
    """Refuse a folder that is not there and cannot be made, or that cannot be written to.

    Raises
    ------
    ConfigError
        With what is in the way.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            what = "is a file" if existing == folder else f"{existing.name} is a file, not a folder"
            raise ConfigError(f"{folder}: {what}; output must be a new or empty folder")
        # Rights alone do not tell: the file system may be read-only, and the superuser has all of them.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{folder}: cannot be written to ({reason}); choose another output folder") from None


def create_run(output: Path, config: FinetuneConfig) -> RunFolder:
    """Make the folder and write the configuration.

    Raises
    ------
    ConfigError
        When the folder holds something already.
    ResourceError
        When it cannot be made.
    """
    check_output(output)
    run = RunFolder(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_config(config, run.config)
    except OSError as error:
        raise ResourceError(f"{output}: cannot be written ({error.strerror}); choose another output folder") from None
    return run


def open_run(path: Path) -> tuple[RunFolder, FinetuneConfig]:
    """Open an existing run folder.

    Raises
    ------
    ConfigError
        When there is no run, or its configuration cannot be read.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        raise ConfigError(f"{path}: not a run folder (no config.yaml in it); give the folder that train wrote")
    return run, read_config(run.config)


def training_alone(run: RunFolder) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from training in an existing run folder, as `holding` does."""
    busy = f"{run.path}: another process is training here; stop it, or wait until it has ended"
    return holding(run.path / _LOCK, busy, wait_seconds=_LOCK_SECONDS)


@contextlib.contextmanager
def holding(lock_file: Path, busy: str, *, wait_seconds: float = 0) -> Iterator[None]:
    """Hold a lock in an existing folder; the system ends this with the process.

    Parameters
    ----------
    lock_file
        Its file.
    busy
        What to say when another process holds it.
    wait_seconds
        How long to wait for that.

    Raises
    ------
    ConfigError
        When another process holds it.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise ConfigError(busy) from None
    except (OSError, NotImplementedError):  # a file system without locks, or a folder that can't be written to
        pass
    try:
        yield
    finally:
        lock.release()


def is_in_training(path: Path) -> bool:
    """Whether a process is training in a run folder."""
    if not (path / _LOCK).is_file():
        return False
    try:
        with FileLock(path / _LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


class RunLog:
    """Writes events as they come: ``events.jsonl``, ``metrics.csv`` and TensorBoard.

    Parameters
    ----------
    run
        Where to.
    first_epoch
        Rows of this epoch and later are dropped from ``metrics.csv``, since a resumed run writes them again.
    """

    def __init__(self, run: RunFolder, first_epoch: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = run.events.open("a", encoding="utf-8")
        self._metrics_path = run.metrics
        rows = [row for row in _read_rows(run.metrics) if int(row["epoch"]) < first_epoch]
        _write_rows(run.metrics, rows)
        self._tensorboard = SummaryWriter(run.path / "tensorboard")

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._events.write(json.dumps(event.to_dict(), ensure_ascii=False, allow_nan=False) + "\n")
        self._events.flush()
        if isinstance(event, EpochEnded):
            row = {name: getattr(event, name) for name in METRICS}
            with self._metrics_path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, METRICS).writerow(row)
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self._tensorboard.add_scalar(name, value, event.epoch)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the files."""
        self._events.close()
        self._tensorboard.close()


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdigit()]


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, METRICS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
