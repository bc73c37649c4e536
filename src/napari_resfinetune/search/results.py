"""What a search came to, and what to make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

from napari_resfinetune.search.candidates import Download, LeftOut
from napari_resfinetune.words import short_names


@dataclass(frozen=True)
class Suggestion:
    """A model in the ranking.

    Attributes
    ----------
    model
        What to give as ``model`` to `train`.
    score
        Combined, from 0 to 1; higher is better.
    rank
        From 1.
    low, high
        Of its interval at 95 %; `None` where it cannot be told.
    too_close
        Whether it is too close to the first to call. True for the first when there is such another.
    architecture
        ``"vit_t"`` and so on.
    has_decoder
        Whether it brings an instance decoder.
    scores
        What the combined score is made of.
    patches
        How many patches it was judged on.
    seconds
        What took how long: ``load``, ``encode``, ``score``.
    timing
        With `suggest_models(..., timing=True)` what finetuning takes beside it, in seconds.
    """

    model: str
    score: float
    rank: int
    low: float | None
    high: float | None
    too_close: bool
    architecture: str
    has_decoder: bool
    scores: Mapping[str, float]
    patches: int
    seconds: Mapping[str, float]
    timing: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Suggestions(Sequence[Suggestion]):
    """Models in the order in which they should be tried, and what was found on the way.

    Attributes
    ----------
    ranked
        Best first; this object is itself the sequence of them.
    advice
        What to do, in one sentence.
    notes
        What should be known about images, labels and intervals.
    left_out
        Models that could not be compared, and why.
    downloads
        Known models that were not asked for and are not on this machine.
    images
        Names of the images that were looked at.
    status
        ``"finished"``, or ``"stopped"`` when it was asked to.
    seconds
        How long it took.
    features
        The feature cache, where one stays: for ``resources.feature_cache_dir`` of the training to come.
    report
        The page with tables and pictures, where there is one.
    compared
        Whether every model was looked at as far as was planned; if not, the order means nothing yet.
    """

    ranked: tuple[Suggestion, ...]
    advice: str
    notes: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    downloads: tuple[Download, ...]
    images: tuple[str, ...]
    status: Literal["finished", "stopped"]
    seconds: float
    features: Path | None = None
    report: Path | None = None
    compared: bool = True

    @overload
    def __getitem__(self, index: int) -> Suggestion: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Suggestion, ...]: ...

    def __getitem__(self, index: int | slice) -> Suggestion | tuple[Suggestion, ...]:
        return self.ranked[index]

    def __len__(self) -> int:
        return len(self.ranked)

    def __str__(self) -> str:
        """Say the ranking, one model a line, and the advice."""
        short = short_names([each.model for each in self.ranked])
        lines = [f"{each.rank}{'≈' if each.too_close else '.'} {short[each.model]}: {each.score:.3f}" for each in self]
        return "\n".join([*lines, self.advice, *self.notes, *map(str, self.left_out)])

    @property
    def start_from(self) -> str | None:
        """The model that the advice names; `None` where none was scored, or not all were looked at."""
        chosen = start_from(self.ranked) if self.compared else None
        return None if chosen is None else chosen.model

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the ranking under ``"ranked"``."""
        return {
            "start_from": self.start_from,
            "ranked": [each.to_dict() for each in self.ranked],
            "advice": self.advice,
            "notes": list(self.notes),
            "left_out": [each.to_dict() for each in self.left_out],
            "downloads": [each.to_dict() for each in self.downloads],
            "images": list(self.images),
            "status": self.status,
            "compared": self.compared,
            "seconds": self.seconds,
            "features": None if self.features is None else str(self.features),
            "report": None if self.report is None else str(self.report),
        }


STOPPED_ADVICE = (
    "the search was stopped before every model had seen every patch, so it advises nothing yet; the same search with "
    "the same output folder goes on from there"
)


def start_from(ranked: Sequence[Suggestion]) -> Suggestion | None:
    """Return the model to start from: the first, or of those too close to call a smaller one, which trains faster."""
    if not ranked:
        return None
    first = ranked[0]
    if "pilot" in first.scores:
        return first
    lightest = min([first, *_close(ranked)], key=_size)
    return lightest if _size(lightest) < _size(first) else first


def advise(ranked: Sequence[Suggestion], *, labelled: bool) -> str:
    """Say in one sentence which model to start from."""
    chosen = start_from(ranked)
    if chosen is None:
        return "no model was scored, so there is nothing to suggest yet"
    first, close = ranked[0], _close(ranked)
    if len(ranked) == 1:
        return f"{first.model} is the only model that was compared, with a score of {first.score:.2f} of 1"
    if "pilot" in first.scores:
        return f"start from {first.model}: of the models that were too close to call it did best in a short training"
    why = "it does best on your images" if labelled else "its results are the steadiest on your images"
    if not close:
        return f"start from {first.model}: {why}, and the others are behind"
    names = ", ".join(each.model for each in close[:3]) + (f" and {len(close) - 3} more" if len(close) > 3 else "")
    cannot_tell = f"{names} {'is' if len(close) == 1 else 'are'} too close to call"
    if chosen is not first:
        return (
            f"{first.model} is first, but {cannot_tell}; start from {chosen.model}, which is smaller and trains faster"
        )
    return f"start from {first.model}: {why}, but {cannot_tell}"


def _close(ranked: Sequence[Suggestion]) -> list[Suggestion]:
    return [each for each in ranked[1:] if each.too_close]


def _size(suggestion: Suggestion) -> int:
    return _SIZES.index(suggestion.architecture)


_SIZES = ("vit_t", "vit_b", "vit_l", "vit_h")
