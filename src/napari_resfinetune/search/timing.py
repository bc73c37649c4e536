"""Finetuning beside the search: how much longer it takes, and from how many models on the search takes longer.

As in the work on searching through stores of models (SHiFT: Renggli et al. 2022, https://arxiv.org/abs/2204.01457):
features alone, training with a frozen image encoder, and training of everything, on the same samples.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from napari_resfinetune.config import FinetuneConfig, FrozenStrategy, FullStrategy
from napari_resfinetune.errors import ResFinetuneError
from napari_resfinetune.events import Event, Step, StopToken
from napari_resfinetune.models.encoder import run_units
from napari_resfinetune.models.preprocess import to_model_input
from napari_resfinetune.planning import Hardware, Length
from napari_resfinetune.search.candidates import Candidate
from napari_resfinetune.search.pilot import short_training
from napari_resfinetune.search.results import Suggestion
from napari_resfinetune.search.state import Search
from napari_resfinetune.training.planned import plan_run
from napari_resfinetune.training.prepare import Setup, with_objects
from napari_resfinetune.training.session import run_training
from napari_resfinetune.training.step import autocast, encoder_units_of

# Steps that are measured, after one that warms up.
STEPS = 3


@dataclass(frozen=True)
class StepTimes:
    """Seconds of what finetuning and search consist of, for one architecture on this machine.

    Attributes
    ----------
    encode
        The image encoder on one patch, forward only.
    frozen_step, full_step
        An optimizer step with a frozen image encoder whose features are there, and of everything.
    """

    encode: float
    frozen_step: float
    full_step: float


def predict_search(
    config: FinetuneConfig, setup: Setup, hardware: Hardware, candidates: Sequence[Candidate], patches: int
) -> float:
    """Predict the seconds of a search from the operations of the image encoders, before any model is loaded.

    Parameters
    ----------
    config
        Of the training to come.
    setup, hardware
        The machine.
    candidates
        The models.
    patches
        How many each looks at.
    """
    seconds = 0.0
    frozen = config.model_copy(update={"strategy": FrozenStrategy()})
    # Scoring a patch is like validating on it: decoders forward, once or twice.
    length = Length(epochs=1, steps_per_epoch=0, validation_samples=patches, patches_kept=patches)
    for architecture in {each.location.architecture for each in candidates}:
        settled = with_objects(frozen, setup.preset, architecture)
        plan = plan_run(settled, setup, hardware, architecture, length)
        count = sum(each.location.architecture == architecture for each in candidates)
        seconds += plan.seconds_first_epoch * count
    return seconds


def time_finetuning(search: Search, ranked: Sequence[Suggestion]) -> list[Suggestion]:
    """Measure a few steps of each architecture among the models, and add what a whole training takes.

    Steps of models of one architecture take the same time, whatever their weights, so one of them stands for all.

    Returns
    -------
    list of Suggestion
        With `timing` filled in; those of an architecture that could not be measured as they were.
    """
    times: dict[str, StepTimes] = {}
    timed = []
    for each in ranked:
        if each.architecture not in times and not search.stop.stopped:
            search.say(f"{each.architecture}: measuring {STEPS} steps of training, with a frozen encoder and in full")
            try:
                times[each.architecture] = _measure(search, each.model)
            except ResFinetuneError as error:  # as when training does not fit where a look does
                search.say(f"{each.architecture}: training cannot be measured ({'; '.join(error.problems)})")
        known = times.get(each.architecture)
        timed.append(replace(each, timing=None if known is None else whole_times(search.config, known, each)))
    return timed


def whole_times(config: FinetuneConfig, times: StepTimes, each: Suggestion) -> Mapping[str, float]:
    """Return what search and finetuning of a model take in all, in seconds.

    Returns
    -------
    dict
        ``encode``, ``frozen_step``, ``full_step`` as measured; ``features``, ``frozen`` and ``full`` for all samples of
        the training to come; ``search`` as it was for this model; ``break_even_models``, full finetuning over the
        search: from so many such models on, the search takes longer than one full finetuning.
    """
    training = config.training
    steps = training.epochs * training.steps_per_epoch
    bank = training.patch_bank or training.samples_per_epoch
    found = sum(each.seconds.values())
    full = steps * times.full_step
    return {
        "samples": float(bank),
        "epochs": float(training.epochs),
        "encode": times.encode,
        "frozen_step": times.frozen_step,
        "full_step": times.full_step,
        "features": bank * times.encode,
        "frozen": bank * times.encode + steps * times.frozen_step,
        "full": full,
        "search": found,
        "break_even_models": full / found,
    }


def _measure(search: Search, name: str) -> StepTimes:
    epochs = math.ceil((STEPS + 1) / search.config.training.steps_per_epoch)
    frozen = short_training(search, name, epochs, output_name=".timing")
    full = frozen.model_copy(update={"strategy": FullStrategy()})
    return StepTimes(_encode(search, name), _step(search, frozen), _step(search, full))


def _encode(search: Search, name: str) -> float:
    model = search.shelf.get(search.entries[name].candidate)
    units = encoder_units_of(model, search.settings)
    seconds = []
    for patch in (search.data.patches * 2)[: STEPS + 1]:
        began = time.perf_counter()
        with torch.no_grad(), autocast(model.device, search.settings):
            images, _ = to_model_input(patch.patch.image[None].to(model.device), search.settings.input_px)
            run_units(units, images).float().cpu()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:] or seconds)


def _step(search: Search, config: FinetuneConfig) -> float:
    """Run a few steps of a training and stop it."""
    output = search.folder / ".timing"
    seconds: list[float] = []
    stop = StopToken()

    def watch(event: Event) -> None:
        if isinstance(event, Step):
            seconds.append(event.seconds)
            if len(seconds) > STEPS or search.stop.stopped:
                stop.stop()

    shutil.rmtree(output, ignore_errors=True)
    try:
        run_training(config, search.images, search.labels, on_event=watch, stop=stop)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return statistics.median(seconds[1:] or seconds)
