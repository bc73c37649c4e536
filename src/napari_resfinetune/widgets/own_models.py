"""The user's runs, as the window lists them."""

from __future__ import annotations

import datetime
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from napari_resfinetune.config import read_config
from napari_resfinetune.errors import ConfigError


@dataclass(frozen=True)
class OwnModel:
    """A run folder with a model in it."""

    path: Path
    name: str
    created: datetime.datetime
    start_model: str = ""
    strategy: str = ""
    images: int = 0
    comparison: dict[str, Any] = field(default_factory=dict)

    def in_words(self) -> str:
        """Say where it comes from."""
        score = self.comparison.get("after", {}).get("sa50")
        said = f"Yours, of {self.created:%d %b %Y}, from {Path(self.start_model).name}"
        return said + (f"; SA50 {score:.2f} on held-out images." if score is not None else ".")


def own_models(folder: Path) -> list[OwnModel]:
    """Return the runs in a folder that have a model, newest first."""
    found = []
    for model in folder.glob("*/model.pt") if folder.is_dir() else ():
        found.append(_read(model.parent))
    return sorted(found, key=lambda run: run.created, reverse=True)


def _read(path: Path) -> OwnModel:
    created = datetime.datetime.fromtimestamp((path / "model.pt").stat().st_mtime)
    try:
        config = read_config(path / "config.yaml")
    except ConfigError:
        return OwnModel(path, path.name, created)
    images = config.data.images
    return OwnModel(
        path,
        path.name,
        created,
        config.model,
        config.strategy.kind,
        len(images) if isinstance(images, tuple) else 0,
        _json(path / "comparison.json"),
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rename_model(path: Path, name: str) -> Path:
    """Give a run folder another name.

    Raises
    ------
    ConfigError
        When the name cannot be used or is taken.
    """
    target = path.with_name(name.strip())
    if not name.strip() or target.parent != path.parent or Path(name.strip()).name != name.strip():
        raise ConfigError(f"{name!r}: not a name for a folder; use letters, digits, - and _")
    if target.exists():
        raise ConfigError(f"{target.name}: is there already; choose another name")
    path.rename(target)
    return target


def delete_model(path: Path) -> None:
    """Delete a run folder, if it is one.

    Raises
    ------
    ConfigError
        When it is none.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: not a run folder (no config.yaml in it); nothing was deleted")
    shutil.rmtree(path)


def export_model(path: Path, target: Path) -> None:
    """Copy a run's model as a checkpoint that micro-sam reads.

    Raises
    ------
    ConfigError
        When the file is there already or cannot be written.
    """
    if target.exists():
        raise ConfigError(f"{target}: is there already, and nothing is overwritten; choose another name")
    try:
        shutil.copyfile(path / "model.pt", target)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); choose another folder") from None
