"""All models of a search, patch by patch, the worse half dropped while there are many."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence

from napari_resfinetune.errors import ModelError
from napari_resfinetune.events import Searched
from napari_resfinetune.models import SamModel, weights_hash
from napari_resfinetune.search.candidates import Candidate, LeftOut
from napari_resfinetune.search.features import hash_units, shared_cuts
from napari_resfinetune.search.measure import Scored, key_of
from napari_resfinetune.search.ranking import Standing, rank
from napari_resfinetune.search.state import Entry, Search

# More models than this are halved (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943): each round looks at
# twice as many patches with half of the models.
HALVE_FROM = 8
LEAST_PATCHES = 4
UNSEEN = "not looked at: the search was stopped before"


def load_all(search: Search, candidates: Sequence[Candidate], *, share: bool) -> None:
    """Load every model once, leave out those that cannot be used or are there twice, and find what they share."""
    seen: dict[str, str] = {}
    by_quarter = len(search.data.groups) == 1
    for candidate in candidates:
        if search.stop.stopped:
            search.left_out.append(LeftOut(candidate.model, UNSEEN))
            continue
        began = time.perf_counter()
        with search.leaving_out(candidate.model):
            model = search.shelf.get(candidate)
            weights = _hash(model)
            if weights in seen:
                raise ModelError(f"the same weights as {seen[weights]}")
            seen[weights] = candidate.model
            entry = Entry(
                candidate,
                Scored(key_of(weights, search.settings), by_quarter),
                model.instance_decoder is not None,
                hash_units(model, search.settings),
            )
            entry.scored.seconds["load"] = time.perf_counter() - began
            search.entries[candidate.model] = entry
    if share:
        cuts = shared_cuts({name: entry.units for name, entry in search.entries.items()})
        for name, entry in search.entries.items():
            entry.cuts = cuts[name]


def compare(search: Search, *, halving: bool) -> list[Standing]:
    """Look at patches with all models and rank them.

    Parameters
    ----------
    search
        With its models loaded.
    halving
        Drop the worse half of many models after a look at a few patches.

    Raises
    ------
    ModelError
        When none can be used, with the reason for each.
    """
    rounds = plan_rounds(len(search.entries), len(search.data.patches), halving=halving)
    chosen = list(search.entries)
    progress = _Progress(search)
    standings: list[Standing] = []
    search.compared = not any(each.reason == UNSEEN for each in search.left_out)
    for number, (models, patches) in enumerate(rounds):
        chosen, dropped = chosen[:models], chosen[models:]
        for name in dropped:
            search.shelf.drop(name)
        progress.begin(chosen, patches, rounds[number:])
        for name in chosen:
            if not search.stop.stopped:
                _look(search, name, patches, progress)
        standings = _standings(search)
        if any(len(search.entries[name].scored.rows) < patches for name in chosen if name in search.entries):
            search.compared = False
            break
        chosen = [each.model for each in standings]
    for name in [name for name, entry in search.entries.items() if not entry.scored.rows]:
        search.left_out.append(LeftOut(name, UNSEEN))
        search.entries.pop(name)
    if not standings and not search.stop.stopped:
        raise ModelError(*map(str, search.left_out))
    return standings


def plan_rounds(models: int, patches: int, *, halving: bool) -> list[tuple[int, int]]:
    """Return for each round how many models look at how many patches, counted from the first.

    Parameters
    ----------
    models, patches
        How many there are.
    halving
        Whether there may be more than one round.
    """
    halvings = 0
    if halving and models > HALVE_FROM:
        while models >> (halvings + 1) >= HALVE_FROM // 2 and patches >> (halvings + 1) >= LEAST_PATCHES:
            halvings += 1
    return [(-(-models // 2**number), patches >> (halvings - number)) for number in range(halvings + 1)]


def count_looks(rounds: Sequence[tuple[int, int]]) -> int:
    """Return how many patches are looked at in all rounds, with all models."""
    return sum(count * (until - since) for (_, since), (count, until) in itertools.pairwise([(0, 0), *rounds]))


class _Progress:
    """Says how far the search is, and how long the rest of it takes at the pace so far."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.done = 0
        self.todo: dict[str, list[int]] = {}
        # Looks of later rounds, whose models are not known yet, and what one of them is predicted to take.
        self.later, self.later_each = 0, 0.0
        # Of the looks that were taken, and not found in the store: what they took, and were predicted to take.
        self.taken = self.predicted = 0.0

    def begin(self, models: Sequence[str], patches: int, rounds: Sequence[tuple[int, int]]) -> None:
        """Begin the first of some rounds, with these models up to so many patches."""
        self.todo = {name: list(range(len(self.search.entries[name].scored.rows), patches)) for name in models}
        self.later = count_looks(rounds) - count_looks(rounds[:1])
        self.later_each = statistics.fmean(map(self._each, models)) if models else 0.0

    def step(self, name: str, seconds: float) -> None:
        """A patch was looked at with a model in so many seconds, or found in no time."""
        self.done += 1
        self.todo[name].pop(0)
        if seconds:
            self.taken += seconds
            self.predicted += self._each(name)
        left = sum(self._cost(each, number) for each, numbers in self.todo.items() for number in numbers)
        left += self.later * self.later_each
        pace = self.taken / self.predicted if self.predicted else 1.0
        there = sum(map(len, self.todo.values()))
        self.search.tell(Searched(name, self.done, self.done + there + self.later, left * pace))

    def leave_out(self, name: str) -> None:
        """Nothing more is to do with a model."""
        self.todo.pop(name, None)

    def _each(self, name: str) -> float:
        return self.search.patch_seconds[self.search.entries[name].candidate.location.architecture]

    def _cost(self, name: str, index: int) -> float:
        key = self.search.entries[name].scored.key
        return 0.0 if self.search.store.get(key, self.search.data.patches[index].key) else self._each(name)


def _look(search: Search, name: str, patches: int, progress: _Progress) -> None:
    scored = search.entries[name].scored
    with search.leaving_out(name):
        began = time.perf_counter()
        model, embed = search.open(name)
        scored.seconds["load"] += time.perf_counter() - began
        look = scored.look if search.data.labelled else scored.look_unlabelled
        for patch in search.data.patches[len(scored.rows) : patches]:
            if search.stop.stopped:
                break
            kept, began = search.store.get(scored.key, patch.key), time.perf_counter()
            look(patch, model, embed, search.settings, search.store)
            progress.step(name, 0.0 if kept else time.perf_counter() - began)
    if name not in search.entries:
        progress.leave_out(name)
    with search.going_on(lambda why: search.say(f"scores cannot be kept for a later search ({why})")):
        search.store.save()


def _standings(search: Search) -> list[Standing]:
    began = time.perf_counter()
    evidence = {name: entry.scored.evidence() for name, entry in search.entries.items() if entry.scored.rows}
    for name in evidence:
        search.entries[name].scored.seconds["score"] += (time.perf_counter() - began) / len(evidence)
    images = [patch.image for patch in search.data.patches]
    return rank(evidence, images, search.weights, lambda name, patches: search.entries[name].scored.evidence(patches))


def _hash(model: SamModel) -> str:
    state = {f"sam.{name}": tensor for name, tensor in model.sam.state_dict().items()}
    if model.instance_decoder is not None:
        state |= {f"instance_decoder.{name}": value for name, value in model.instance_decoder.state_dict().items()}
    return weights_hash(state)
