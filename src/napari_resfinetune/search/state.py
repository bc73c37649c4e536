"""A search while it runs: what is compared, on what, and what is known so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.data.patches import Patch
from napari_resfinetune.errors import ResFinetuneError
from napari_resfinetune.events import Message, OnEvent, StopToken
from napari_resfinetune.models import SamModel
from napari_resfinetune.search.candidates import Candidate, LeftOut
from napari_resfinetune.search.features import SharedEncoder, UnitHashes
from napari_resfinetune.search.measure import Scored, ScoreStore
from napari_resfinetune.search.patches import SearchData
from napari_resfinetune.search.ranking import WEIGHTS, WEIGHTS_WITHOUT_LABELS
from napari_resfinetune.search.shelf import Shelf
from napari_resfinetune.training.prepare import Setup
from napari_resfinetune.training.step import StepSettings
from napari_resfinetune.training.survival import free, is_out_of_memory


@dataclass
class Entry:
    """A model in a search.

    Attributes
    ----------
    candidate
        The model.
    scored
        What is known of it.
    has_decoder
        Whether it brings an instance decoder.
    units
        Hashes of the units of its image encoder.
    cuts
        After how many of them other models part from it.
    """

    candidate: Candidate
    scored: Scored
    has_decoder: bool
    units: UnitHashes
    cuts: tuple[int, ...] = ()


@dataclass
class Search:
    """A search while it runs.

    Attributes
    ----------
    config
        Of the training to come.
    images, labels
        Where the configuration names none.
    data
        The patches that are looked at.
    setup, settings
        How this machine computes.
    folder
        Where files go, for good or for as long as the search lasts.
    encoder, store, shelf
        What was computed and loaded already.
    tell, stop
        Told what happens; asked whether to stop.
    entries
        Models that are compared, by name.
    left_out
        The others.
    notes
        What should be known when the ranking is read.
    compared
        Whether all of them were looked at as far as was planned.
    patch_seconds
        By architecture, what a look at a patch is predicted to take.
    """

    config: FinetuneConfig
    images: Any
    labels: Any
    data: SearchData
    setup: Setup
    settings: StepSettings
    folder: Path
    encoder: SharedEncoder
    store: ScoreStore
    shelf: Shelf
    tell: OnEvent
    stop: StopToken
    entries: dict[str, Entry] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: bool = False
    patch_seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def weights(self) -> Mapping[str, float]:
        """How much each score counts."""
        return WEIGHTS[self.config.training.targets] if self.data.labelled else WEIGHTS_WITHOUT_LABELS

    def say(self, text: str) -> None:
        """Say something in words."""
        self.tell(Message(text))

    def open(self, name: str) -> tuple[SamModel, Callable[[Patch], Tensor]]:
        """Return a model and the function that embeds patches with it."""
        entry = self.entries[name]
        model = self.shelf.get(entry.candidate)
        return model, self.encoder.open(model, entry.cuts)

    @contextlib.contextmanager
    def going_on(self, failed: Callable[[str], None]) -> Iterator[None]:
        """Tell `failed` in words what went wrong with one thing, and go on with the others."""
        try:
            yield
        except ResFinetuneError as error:
            failed("; ".join(error.problems))
        except OSError as error:
            failed(f"{error.filename or 'a file'}: {error.strerror or error}")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            first, _, _ = str(error).partition("\n")
            failed(f"out of memory ({first})")
            free()

    def leaving_out(self, model: str) -> contextlib.AbstractContextManager[None]:
        """Go on without a model that turns out to be unusable."""
        return self.going_on(lambda why: self._leave_out(model, why))

    def _leave_out(self, model: str, reason: str) -> None:
        reason = reason.removeprefix(f"{model}: ")
        self.left_out.append(LeftOut(model, reason))
        self.entries.pop(model, None)
        self.shelf.drop(model)
        self.say(f"{model}: left out ({reason})")
