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
from napari_resfinetune.errors import ResourceError
from napari_resfinetune.events import Event, Step, StopToken
from napari_resfinetune.models.encoder import run_units
from napari_resfinetune.models.preprocess import to_model_input
from napari_resfinetune.planning import Hardware, Length
from napari_resfinetune.search.candidates import Candidate, LeftOut
from napari_resfinetune.search.compare import count_looks, plan_rounds
from napari_resfinetune.search.pilot import short_training
from napari_resfinetune.search.results import Suggestion
from napari_resfinetune.search.state import Search
from napari_resfinetune.training.planned import plan_run
from napari_resfinetune.training.prepare import with_objects
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
    search: Search, hardware: Hardware, candidates: Sequence[Candidate], *, halving: bool
) -> tuple[tuple[Candidate, ...], float]:
    """Predict from the operations of a model's parts, before any is loaded; leave out what is too large.

    `search.patch_seconds` is filled in.

    Returns
    -------
    candidates
        Without those that this computer could not even train with a frozen image encoder.
    seconds
        That the search of these takes, without short trainings, timing and pictures.
    """
    setup = search.setup
    fitting: list[Candidate] = []
    frozen = search.config.model_copy(update={"strategy": FrozenStrategy()})
    # Scoring a patch is like validating on it with both decoders, whichever of them shall be trained.
    both = frozen.model_copy(update={"training": frozen.training.model_copy(update={"targets": "both"})})
    patches = len(search.data.patches)
    length = Length(epochs=1, steps_per_epoch=0, validation_samples=patches, patches_kept=patches)
    for architecture in dict.fromkeys(each.location.architecture for each in candidates):
        plan = plan_run(with_objects(frozen, setup.preset, architecture), setup, hardware, architecture, length)
        scoring = plan
        if frozen.training.targets != "both":
            scoring = plan_run(with_objects(both, setup.preset, architecture), setup, hardware, architecture, length)
        members = [each for each in candidates if each.location.architecture == architecture]
        if plan.fits:
            fitting += members
            # Without labels, a patch and what a perturbation makes of it are looked at.
            looks = 1 if search.data.labelled else 2
            search.patch_seconds[architecture] = looks * scoring.seconds_first_epoch / patches
            continue
        why = (
            f"too large: even with a frozen image encoder it takes {plan.peak_gb:.1f} GB, and {plan.limit_gb:.1f} GB "
            "may be taken"
        )
        for each in members:
            search.left_out.append(LeftOut(each.model, why))
            search.say(f"{each.model}: left out ({why})")
    if not fitting:
        raise ResourceError(*map(str, search.left_out))
    left = tuple(each for each in candidates if each in fitting)
    per_look = statistics.fmean(search.patch_seconds[each.location.architecture] for each in left)
    return left, per_look * count_looks(plan_rounds(len(left), patches, halving=halving))


def time_finetuning(search: Search, ranked: Sequence[Suggestion]) -> list[Suggestion]:
    """Measure a few steps of each architecture among the models, and add what a whole training takes.

    Steps of models of one architecture take the same time, whatever their weights, so one of them stands for all.

    Returns
    -------
    list of Suggestion
        With `timing` filled in; those of an architecture that could not be measured as they were.
    """
    if not search.data.can_train:
        search.say("finetuning is not timed: it takes labels of enough objects to train on and to hold out")
        return list(ranked)
    times: dict[str, StepTimes] = {}
    for architecture in dict.fromkeys(each.architecture for each in ranked):
        if search.stop.stopped:
            break
        search.say(f"measuring {STEPS} steps of training {architecture}, with a frozen encoder and in full")
        model = next(each.model for each in ranked if each.architecture == architecture)
        # As when training does not fit where a look does.
        with search.going_on(lambda why, name=architecture: search.say(f"training {name} cannot be measured ({why})")):  # type: ignore[misc]
            times[architecture] = _measure(search, model)
    if search.stop.stopped:
        return list(ranked)
    searching = statistics.fmean(sum(each.seconds.values()) for each in ranked) if ranked else 0.0
    return [
        replace(each, timing=whole_times(search.config, times[each.architecture], each, searching))
        if each.architecture in times
        else each
        for each in ranked
    ]


def whole_times(config: FinetuneConfig, times: StepTimes, each: Suggestion, searching: float) -> Mapping[str, float]:
    """Return what search and finetuning of a model take in all, in seconds.

    Parameters
    ----------
    config
        Of the training to come.
    times
        What was measured.
    each
        The model.
    searching
        What the search took for one model, on average.

    Returns
    -------
    dict
        ``epochs``, and ``steps`` of each; ``encode``, ``frozen_step``, ``full_step`` as measured; ``features``,
        ``frozen`` and ``full`` for all samples of
        the training to come; ``search`` as it was for this model; ``break_even_models``, full finetuning over the
        average search: from so many models on, the search takes longer than one full finetuning.
    """
    training = config.training
    steps = training.epochs * training.steps_per_epoch
    bank = training.patch_bank or training.samples_per_epoch
    full = steps * times.full_step
    return {
        "samples": float(bank),
        "epochs": float(training.epochs),
        "steps": float(training.steps_per_epoch),
        "encode": times.encode,
        "frozen_step": times.frozen_step,
        "full_step": times.full_step,
        "features": bank * times.encode,
        "frozen": bank * times.encode + steps * times.frozen_step,
        "full": full,
        "search": sum(each.seconds.values()),
        "break_even_models": full / searching,
    }


def _measure(search: Search, name: str) -> StepTimes:
    epochs = math.ceil((STEPS + 1) / search.config.training.steps_per_epoch)
    frozen = short_training(search, name, epochs, output_name=".timing")
    full = frozen.model_copy(update={"strategy": FullStrategy()})
    encode = _encode(search, name)
    search.shelf.clear()  # training takes all the memory that it may
    _step(search, frozen)  # leaves the features of these patches, which the next time finds
    return StepTimes(encode, _step(search, frozen), _step(search, full))


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
    if search.stop.stopped:
        return 0.0
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
