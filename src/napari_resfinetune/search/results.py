"""What a search came to, and what to make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

from napari_resfinetune.search.candidates import Download, LeftOut


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
    status
        ``"finished"``, or ``"stopped"`` when it was asked to.
    seconds
        How long it took.
    features
        The feature cache, where one stays: for ``resources.feature_cache_dir`` of the training to come.
    report
        The page with tables and pictures, where there is one.
    """

    ranked: tuple[Suggestion, ...]
    advice: str
    notes: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    downloads: tuple[Download, ...]
    status: Literal["finished", "stopped"]
    seconds: float
    features: Path | None = None
    report: Path | None = None

    @overload
    def __getitem__(self, index: int) -> Suggestion: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Suggestion, ...]: ...

    def __getitem__(self, index: int | slice) -> Suggestion | tuple[Suggestion, ...]:
        return self.ranked[index]

    def __len__(self) -> int:
        return len(self.ranked)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the ranking under ``"ranked"``."""
        return {
            "ranked": [each.to_dict() for each in self.ranked],
            "advice": self.advice,
            "notes": list(self.notes),
            "left_out": [each.to_dict() for each in self.left_out],
            "downloads": [each.to_dict() for each in self.downloads],
            "status": self.status,
            "seconds": self.seconds,
            "features": None if self.features is None else str(self.features),
            "report": None if self.report is None else str(self.report),
        }


def advise(ranked: Sequence[Suggestion], *, labelled: bool) -> str:
    """Say in one sentence which model to start from."""
    if not ranked:
        return "no model was scored, so there is nothing to suggest yet"
    first = ranked[0]
    if "pilot" in first.scores:
        return f"start from {first.model}: of the models that were too close to call it did best in a short training"
    close = [each for each in ranked[1:] if each.too_close]
    why = "it does best on your images" if labelled else "its results are the steadiest on your images"
    if not close:
        return (
            f"start from {first.model}: {why}, and the others are clearly behind"
            if len(ranked) > 1
            else (f"{first.model} is the only model that was compared, so start from it")
        )
    names = ", ".join(each.model for each in close[:3]) + (f" and {len(close) - 3} more" if len(close) > 3 else "")
    lightest = min([first, *close], key=lambda each: _SIZES.index(each.architecture))
    if _SIZES.index(lightest.architecture) < _SIZES.index(first.architecture):
        return (
            f"{first.model} is first, but {names} {'is' if len(close) == 1 else 'are'} too close to call; start from "
            f"{lightest.model}, which is smaller and trains faster"
        )
    return f"start from {first.model}: {why}, but {names} {'is' if len(close) == 1 else 'are'} too close to call"


_SIZES = ("vit_t", "vit_b", "vit_l", "vit_h")
