"""The models that one has: a folder of runs is the database, read anew each time and without torch.

A name and a note lie in ``library.json`` inside of each run folder. The folder itself keeps its name, so that a
training that runs, a model that is open and what was continued from it do not lose their paths.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from napari_resfinetune.config import read_config
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.training.run_folder import (
    COPIES_MARK,
    SESSION_EVENTS,
    RunFolder,
    check_writable,
    is_in_training,
)

RECORD = "library.json"
LOCK = ".resfinetune.lock"
_LOCK_SECONDS = 30
_DEPTH = 3
_TAIL_BYTES = 200_000
_MAX_NAME = 100
# A training says something at every step; one that has been silent for so long is taken for dead.


@dataclass(frozen=True)
class ModelEntry:
    """A model in the list.

    Attributes
    ----------
    path
        Its folder.
    name, note
        What its owner calls it (at first the folder's path in the list), and says of it.
    created
        When, ISO 8601.
    start_model, strategy
        What was trained from, and how; empty for an imported model.
    scores
        After training, on held-out images: ``sa50``, ``sa75``, ``msa``; or ``metric``, the best validation metric
        (lower is better), where there was no comparison.
    verdict
        Compared with the start model: "better", "no clear difference", "worse", or empty.
    continued_from, continued_by
        Names of the models in the list that it was started from, and that were started from it.
    status
        "in training", "finished", "early_stopped", "stopped", "failed", "unfinished", "imported", or "damaged".
    """

    path: Path
    name: str
    note: str = ""
    created: str = ""
    start_model: str = ""
    strategy: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""
    continued_from: str | None = None
    continued_by: tuple[str, ...] = ()
    status: str = "unfinished"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "path": str(self.path), "continued_by": list(self.continued_by)}


def list_models(folder: str | Path) -> list[ModelEntry]:
    """List the models in a folder and in its folders, newest first.

    Raises
    ------
    ConfigError
        When there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder that your runs are in, as in --folder runs")
    entries = [_read(path, folder) for path in _find(folder, _DEPTH)]
    by_path = {entry.path.resolve(): entry for entry in entries}
    origins = {entry.path: _origin(entry, by_path) for entry in entries}
    linked = []
    for entry in entries:
        origin = origins[entry.path]
        by = tuple(sorted(other.name for other in entries if origins[other.path] is entry))
        linked.append(replace(entry, continued_from=origin.name if origin else None, continued_by=by))
    return sorted(linked, key=lambda entry: (entry.created, entry.name), reverse=True)


def find_model(folder: str | Path, name: str) -> ModelEntry:
    """Return the model in a folder, given by its path, or of a name, or in a folder of that name.

    Raises
    ------
    ConfigError
        When there is none, or several are meant.
    """
    folder = Path(folder)
    entries = list_models(folder)
    named = [entry for entry in entries if len(Path(name).parts) > 1 and entry.path.resolve() == Path(name).resolve()]
    named = named or [entry for entry in entries if name == entry.name or entry.path == folder / name]
    if len(named) > 1:
        paths = ", ".join(str(entry.path) for entry in named)
        raise ConfigError(f"{name}: several models are called so; give the folder of the one that is meant: {paths}")
    if not named:
        known = ", ".join(f'"{entry.name}"' for entry in entries[:10]) or "none"
        raise ConfigError(f"{name}: no such model in {folder}; there are {known}")
    return named[0]


def rename_model(folder: str | Path, name: str, new_name: str) -> ModelEntry:
    """Call a model something else; its folder stays.

    Raises
    ------
    ConfigError
        When there is no such model, or the name is taken or cannot be used.
    """
    with _locked(Path(folder)):
        entry = find_model(folder, name)
        _check_name(Path(folder), new_name, besides=entry)
        _update(entry.path, name=new_name.strip())
        return find_model(folder, new_name.strip())


def set_note(folder: str | Path, name: str, note: str) -> ModelEntry:
    """Write down something about a model.

    Raises
    ------
    ConfigError
        When there is no such model.
    """
    with _locked(Path(folder)):
        entry = find_model(folder, name)
        _update(entry.path, note=note.strip())
        return find_model(folder, name)


def delete_model(folder: str | Path, name: str) -> Path:
    """Delete the folder of a model, with all that is in it, and the copies of layers that the window put beside it.

    Returns
    -------
    Path
        What is gone.

    Raises
    ------
    ConfigError
        When there is no such model; when it is a link, or has other models inside; when it is in training.
    """
    folder = Path(folder)
    with _locked(folder):
        path = find_model(folder, name).path
        inside = [other for other in _find(path, _DEPTH) if other != path]
        if path.is_symlink() or path.resolve() == folder.resolve() or folder.resolve() not in path.resolve().parents:
            raise ConfigError(f"{path}: leads out of {folder}, and is not deleted; delete it where it lies")
        if inside:
            raise ConfigError(f"{path}: has another model inside ({inside[0].name}); move or delete that first")
        if is_in_training(path):
            raise ConfigError(f"{path}: is in training; stop it first")
        # Out of the list in one step; whatever stops the rest leaves no half of a model in it.
        gone = path.with_name(f".deleted-{path.name}-{os.getpid()}")
        try:
            os.replace(path, gone)
            shutil.rmtree(gone)
            copies = path.with_name(f"{path.name}-data")
            if (copies / COPIES_MARK).is_file():
                shutil.rmtree(copies)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be deleted ({error.strerror or error})") from None
    return path


def import_model(folder: str | Path, source: str | Path, *, name: str | None = None, note: str = "") -> ModelEntry:
    """Take a model into the list: a run folder, a checkpoint, an adapter, or a bioimage.io package.

    Parameters
    ----------
    folder
        The list; made if it is not there.
    source
        What to copy. It is left as it is, and no code in it is run.
    name
        What to call it; by default as the file or folder is called.
    note
        What to say of it.

    Raises
    ------
    ConfigError, ModelError
        When the name is taken, or it is no model that can be used.
    """
    folder, source = Path(folder), Path(source)
    name = (name or (source.resolve().name if source.is_dir() else source.stem)).strip()
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(f"{source}: lies in {folder} already")
    with _locked(folder):
        target = _new_folder(folder, name)
    new = folder / f".importing-{os.getpid()}"
    try:
        _copy(source, new)  # may take minutes, in which others may change the list
        record = {"name": name, "note": note.strip(), "imported_from": str(source), "created": _now()}
        RunFolder(new).write_json(RECORD, record)
        with _locked(folder):
            os.replace(new, _new_folder(folder, name))
            return find_model(folder, name)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _new_folder(folder: Path, name: str) -> Path:
    _check_name(folder, name)
    target = folder / name
    if target.exists() or target.name.startswith(".") or target.parent != folder:
        raise ConfigError(f"{target}: cannot be a new folder; give another name")
    return target


def _copy(source: Path, new: Path) -> None:
    from napari_resfinetune.library.export import export_model
    from napari_resfinetune.models import resolve_model
    from napari_resfinetune.models.adapter_files import is_adapter

    if (source / "config.yaml").is_file():
        resolve_model(source)  # refuses one without a model, or with one that cannot be opened
        shutil.copytree(source, new, ignore=shutil.ignore_patterns("features", ".*"))
        return
    export_model(source, new / "model.pt")
    if is_adapter(source):
        shutil.copytree(source, new / "adapter")


def _find(folder: Path, depth: int) -> Iterator[Path]:
    if _is_model(folder):
        yield folder
    if depth == 0:
        return
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith(".") and path.name not in ("checkpoints", "tensorboard"):
                yield from _find(path, 0 if path.is_symlink() else depth - 1)


def _is_model(folder: Path) -> bool:
    if (folder / "config.yaml").is_file():
        return (folder / "events.jsonl").is_file() or (folder / "checkpoints").is_dir()
    return (folder / RECORD).is_file() and (folder / "model.pt").is_file()


def _read(path: Path, folder: Path) -> ModelEntry:
    run = RunFolder(path)
    own_name = path.name if path == folder else path.relative_to(folder).as_posix()
    try:
        record = run.read_json(RECORD) or {}
        comparison = run.read_json("comparison.json") or {}
        config = read_config(run.config) if run.config.is_file() else None
        entry = ModelEntry(path, str(record.get("name") or own_name), str(record.get("note") or ""))
        created = datetime.datetime.fromtimestamp((run.config if config else path / RECORD).stat().st_mtime)
        entry = replace(entry, created=str(record.get("created") or created.isoformat(timespec="seconds")))
        entry = replace(entry, scores=_scores(comparison, run), verdict=str(comparison.get("verdict") or ""))
        if config is None:
            return replace(entry, status="imported", start_model=str(record.get("imported_from") or ""))
        return replace(entry, start_model=config.model, strategy=config.strategy.kind, status=_status(run))
    except (ConfigError, OSError, AttributeError, TypeError) as error:
        said = str(error) if isinstance(error, ConfigError | OSError) else f"{path}: a file in it holds something else"
        return ModelEntry(path, own_name, note=said, status="damaged")


def _scores(comparison: Mapping[str, Any], run: RunFolder) -> dict[str, float]:
    after = comparison.get("after")
    if isinstance(after, dict):
        return {key: float(after[key]) for key in ("sa50", "sa75", "msa") if isinstance(after.get(key), int | float)}
    try:
        with run.metrics.open(newline="", encoding="utf-8") as file:
            metrics = [float(row["metric"]) for row in csv.DictReader(file) if row.get("metric")]
    except (OSError, ValueError):
        metrics = []
    return {"metric": min(metrics)} if metrics else {}


def _status(run: RunFolder) -> str:
    if is_in_training(run.path):
        return "in training"
    last = _last_event(run.events)
    if last.get("event") == "Finished":
        return str(last.get("status") or "finished")
    return "failed" if last.get("event") == "Failed" else "unfinished"


def _last_event(events: Path) -> Mapping[str, Any]:
    """Return the last event that begins or ends a session."""
    try:
        with events.open("rb") as file:
            file.seek(max(0, events.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        if any(f'"{name}"' in line for name in SESSION_EVENTS):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") in SESSION_EVENTS:
                    return event
    return {}


def _origin(entry: ModelEntry, by_path: Mapping[Path, ModelEntry]) -> ModelEntry | None:
    """Return the entry that another one was started from; `by_path` has all entries by their resolved paths."""
    if not entry.start_model:
        return None
    start = Path(entry.start_model)
    resolved = start.resolve()
    for place in (resolved, *resolved.parents):
        if by_path.get(place, entry) is not entry:
            return by_path[place]
    if start.exists() or len(start.parts) < 2:
        return None
    # The whole list may have been moved: then the folder's name still tells.
    return next(
        (other for other in by_path.values() if other is not entry and other.path.name in start.parts[1:]), None
    )


def _check_name(folder: Path, name: str, besides: ModelEntry | None = None) -> None:
    name = name.strip()
    known_as_folders = not name.strip(".")
    signs = any(sign in name for sign in '/\\:*?"<>|')
    if known_as_folders or len(name.encode()) > _MAX_NAME or not name.isprintable() or signs:
        raise ConfigError(
            f"name: found {name[:_MAX_NAME]!r}; expected 1 to {_MAX_NAME} printable characters (fewer of other "
            'scripts), none of / \\ : * ? " < > |, and not dots alone'
        )
    for entry in list_models(folder):
        if (besides is None or entry.path != besides.path) and name in (entry.name, entry.path.name):
            what = "a model is called so" if name == entry.name else "the folder of a model is called so"
            raise ConfigError(f"{name}: {what} ({entry.path}); give another name")


def _update(path: Path, **changes: str) -> None:
    run = RunFolder(path)
    run.write_json(RECORD, {**(run.read_json(RECORD) or {}), **changes})


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time change the list."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the folder that your runs are in, as in --folder runs")
    try:
        with FileLock(folder / LOCK, timeout=_LOCK_SECONDS):
            yield
    except Timeout:
        raise ConfigError(f"{folder}: another process is changing the list; try again when it has ended") from None
    except PermissionError as error:
        raise ConfigError(f"{folder}: cannot be changed ({error.strerror})") from None


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")
