"""A short training of the first few models, to settle what is too close to call."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from napari_resfinetune.config import FinetuneConfig, FrozenStrategy
from napari_resfinetune.events import Event, OnEvent, Searched, Step
from napari_resfinetune.models import load_model
from napari_resfinetune.search.ranking import Standing
from napari_resfinetune.search.state import Search
from napari_resfinetune.search.zero_shot import score_patch
from napari_resfinetune.training.session import run_training
from napari_resfinetune.words import counted

MOST_PILOTS = 4


def run_pilots(search: Search, standings: Sequence[Standing], epochs: int) -> list[Standing]:
    """Train the first model, and those that are too close to it to call, for a few epochs, and put the best first.

    The image encoder stays frozen, so that its embeddings come from the cache; it is the ordinary trainer. What the
    trained models score on held-out patches, without any part that training does not change, decides.

    Parameters
    ----------
    search
        After its comparison.
    standings
        What it came to.
    epochs
        0 trains nothing.

    Returns
    -------
    list of Standing
        With ``scores["pilot"]`` for those that were trained.
    """
    leading = [each for each in standings if each.close or each is standings[0]][:MOST_PILOTS]
    if not epochs or not search.compared:
        return list(standings)
    if not search.data.can_train:
        search.say("no short training: it takes labels of enough objects to train on and to hold out")
        return list(standings)
    if len(leading) < 2:
        search.say("no short training: no model is too close to the first to call")
        return list(standings)
    found: dict[str, float] = {}
    search.shelf.clear()  # training takes all the memory that it may
    for each in leading:
        if search.stop.stopped:
            break
        search.say(
            f"{each.model}: trained for {counted(epochs, 'epoch')} with a frozen image encoder, to settle a close call"
        )
        with search.going_on(lambda why, name=each.model: search.say(f"{name}: its short training failed ({why})")):  # type: ignore[misc]
            found[each.model] = _pilot(search, each.model, epochs)
    if search.stop.stopped:
        search.notes.append("the search was stopped before its short trainings had ended, so they settle nothing")
        return list(standings)
    if len(found) < 2:
        search.say("fewer than two short trainings came to their end, so they change nothing")
        return list(standings)
    known = [
        replace(each, close=True, scores={**each.scores, "pilot": found[each.model]}) if each.model in found else each
        for each in standings
    ]
    first = sorted((each for each in known if "pilot" in each.scores), key=lambda each: -each.scores["pilot"])
    rest = [each for each in known if "pilot" not in each.scores]
    return [*first, *rest]


def _pilot(search: Search, name: str, epochs: int) -> float:
    output = search.folder / ".pilot"
    shutil.rmtree(output, ignore_errors=True)
    try:
        config = short_training(search, name, epochs, output_name=".pilot")
        result = run_training(
            config, search.images, search.labels, on_event=_progress(search, name, config), stop=search.stop
        )
        if search.stop.stopped:
            return 0.0
        model = load_model(result.run_dir, decoder="none" if config.training.targets == "masks" else "required")
        model = model.to(search.setup.device)
        embed = search.encoder.open(model, ())
        rows = [
            score_patch(model, patch.patch, embed(patch.patch), search.settings)
            for patch in search.data.patches
            if patch.held_out
        ]
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return mean_score(rows, search.weights)


def _progress(search: Search, name: str, config: FinetuneConfig) -> OnEvent:
    """Say how far a short training is."""
    total = config.training.epochs * config.training.steps_per_epoch
    seconds: list[float] = []

    def watch(event: Event) -> None:
        if isinstance(event, Step):
            seconds.append(event.seconds)
            left = statistics.fmean(seconds) * (total - len(seconds))
            search.tell(Searched(name, len(seconds), total, left))

    return watch


def mean_score(rows: Sequence[Mapping[str, tuple[float, float]]], weights: Mapping[str, float]) -> float:
    """Return the weighted mean of zero-shot scores over patches."""
    names = [name for name in weights if any(name in row for row in rows)]
    values = {name: np.sum([row[name] for row in rows if name in row], axis=0) for name in names}
    total = sum(weights[name] for name in names)
    return float(sum(weights[name] * above / below for name, (above, below) in values.items() if below) / total)


def short_training(search: Search, name: str, epochs: int, *, output_name: str) -> FinetuneConfig:
    """Return the configuration of a training of a model with a frozen image encoder, on the features of the search."""
    config = search.config
    training = config.training.model_copy(update={"epochs": epochs, "early_stopping": None})
    cache = {"feature_cache": "auto", "feature_cache_dir": search.encoder.folder.absolute()}
    resources = config.resources.model_copy(update=cache)
    return config.model_copy(
        update={
            "model": name,
            "output": search.folder / output_name,
            "strategy": FrozenStrategy(),
            "training": training,
            "resources": resources,
        }
    )
