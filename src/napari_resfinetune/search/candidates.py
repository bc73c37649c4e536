"""Which models are compared: names, checkpoints, run folders, folders of runs, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from napari_resfinetune.errors import ModelError, ResFinetuneError
from napari_resfinetune.models import ModelLocation, is_downloaded, known_model, resolve_model
from napari_resfinetune.models.adapter_files import is_adapter
from napari_resfinetune.models.names import KNOWN_MODELS
from napari_resfinetune.models.resolve import MODEL_SUFFIXES


@dataclass(frozen=True)
class Candidate:
    """A model that can be compared.

    Attributes
    ----------
    model
        As it was asked for, so what to give as ``model``.
    location
        Its files.
    """

    model: str
    location: ModelLocation


@dataclass(frozen=True)
class LeftOut:
    """A model that could not be compared, and why."""

    model: str
    reason: str

    def __str__(self) -> str:
        """Say both, the model once."""
        return self.reason if self.model in self.reason else f"{self.model}: {self.reason}"

    @property
    def brief(self) -> str:
        """What is wrong, without the file, numbers, internals and what to do."""
        first = self.reason.partition(";")[0].partition(". ")[0].partition(" (")[0]
        file, _, wrong = first.partition(": ")
        return wrong if wrong and " " not in file else first

    def to_dict(self) -> dict[str, str]:
        """Return plain data."""
        return {"model": self.model, "reason": self.reason, "brief": self.brief}


@dataclass(frozen=True)
class Download:
    """A model that was not asked for and is not on this machine."""

    model: str
    size_mb: int
    advice: str

    def to_dict(self) -> dict[str, str | int]:
        """Return plain data."""
        return {"model": self.model, "size_mb": self.size_mb, "advice": self.advice}


def find_candidates(
    asked: Sequence[str | Path] | str | Path | None,
) -> tuple[tuple[Candidate, ...], tuple[LeftOut, ...]]:
    """Find the models to compare; names that are not on this machine yet are downloaded.

    Parameters
    ----------
    asked
        Names, paths of checkpoints, run folders, adapters, or folders that hold some of these; `None` for everything
        that is downloaded already, and the start model that comes with the package.

    Returns
    -------
    found
        Those that can be opened, each once.
    left_out
        The others.

    Raises
    ------
    ModelError
        When none can be opened, with the reason for each.
    """
    models: dict[str, None] = {}
    found: list[Candidate] = []
    left_out: list[LeftOut] = []
    for item in _items(asked):
        try:
            models |= dict.fromkeys(_expand(item))
        except OSError as error:
            left_out.append(LeftOut(item, f"cannot be read ({error.strerror}); name another folder"))
    for model in models:
        try:
            found.append(Candidate(model, resolve_model(model)))
        except ResFinetuneError as error:
            reason = "; ".join(error.problems)
            for named in (model, str(Path(model)), f"model '{model}'"):
                reason = reason.removeprefix(f"{named}: ")
            left_out.append(LeftOut(model, reason))
    if not found:
        hint = () if left_out else ("candidates: none given; name models, checkpoints, or folders of runs",)
        raise ModelError(*map(str, left_out), *hint)
    return tuple(found), tuple(left_out)


def possible_downloads(asked: Sequence[str]) -> tuple[Download, ...]:
    """Return the known models that are neither compared nor on this machine, smallest first."""
    missing = [known for known in KNOWN_MODELS if known.name not in asked and not is_downloaded(known.name)]
    return tuple(Download(m.name, m.size_mb, m.advice) for m in sorted(missing, key=lambda m: m.size_mb))


def _items(asked: Sequence[str | Path] | str | Path | None) -> list[str]:
    if asked is None:
        return [known.name for known in KNOWN_MODELS if is_downloaded(known.name)]
    return [str(asked)] if isinstance(asked, str | Path) else [str(item) for item in asked]


def _expand(item: str) -> list[str]:
    """Return the models of a folder that is none itself, so run folders, adapters and checkpoints; else the item."""
    folder = Path(item).expanduser()
    # A known name is that model, as everywhere, also where a folder is called like it.
    if known_model(item) is not None or not folder.is_dir() or _is_model(folder):
        return [item]
    inside = [
        str(entry)
        for entry in sorted(folder.iterdir())
        if (entry.is_dir() and _is_model(entry)) or (entry.suffix.lower() in MODEL_SUFFIXES and entry.is_file())
    ]
    return inside or [item]


def _is_model(folder: Path) -> bool:
    marks = ("model.pt", "state.json", "config.yaml")
    return is_adapter(folder) or any((folder / name).is_file() for name in marks)
