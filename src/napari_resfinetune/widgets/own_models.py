"""The user's models, as the window shows them."""

from __future__ import annotations

from pathlib import Path

from napari_resfinetune.errors import ConfigError
from napari_resfinetune.library import ModelEntry, list_models
from napari_resfinetune.training.run_folder import RunFolder


def own_models(folder: Path) -> list[ModelEntry]:
    """Return the models in the folder of runs that can be used, newest first; none where there is no folder."""
    return [entry for entry in own_runs(folder) if has_model(entry)]


def own_runs(folder: Path) -> list[ModelEntry]:
    """Return the same and, beside them, runs that have no model yet and can be gone on with."""
    try:
        return [entry for entry in list_models(folder) if has_model(entry) or can_go_on(entry)]
    except ConfigError:
        return []


def has_model(entry: ModelEntry) -> bool:
    """Whether there is something to segment with."""
    return (entry.path / "model.pt").is_file()


def can_go_on(entry: ModelEntry) -> bool:
    """Whether a run was paused, stopped or cut off, and its checkpoint is there."""
    ended_or_runs = entry.status in ("finished", "early_stopped", "in training")
    return not ended_or_runs and RunFolder(entry.path).can_resume


def score_of(entry: ModelEntry) -> str:
    """Say how good a model is on held-out images, as far as that is known."""
    if "sa50" in entry.scores:
        return f"{entry.scores['sa50']:.2f}"
    return "–"


def in_words(entry: ModelEntry) -> str:
    """Say where a model comes from."""
    origin = entry.continued_from or Path(entry.start_model).name
    said = f"Yours, of {entry.created[:10]}" + (f", from {origin}" if origin else "")
    return said + (f"; SA50 {score_of(entry)} on held-out images." if "sa50" in entry.scores else ".")
