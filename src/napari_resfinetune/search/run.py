"""A search from candidates to a ranking."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from napari_resfinetune.config import FinetuneConfig
from napari_resfinetune.errors import ConfigError
from napari_resfinetune.events import Event, Message, OnEvent, StopToken
from napari_resfinetune.planning import probe_hardware, within_limits
from napari_resfinetune.planning.precision import tf32_as_chosen
from napari_resfinetune.search.candidates import Candidate, find_candidates, possible_downloads
from napari_resfinetune.search.compare import compare, load_all
from napari_resfinetune.search.features import SharedEncoder
from napari_resfinetune.search.measure import ScoreStore
from napari_resfinetune.search.patches import SearchData, search_patches
from napari_resfinetune.search.pilot import run_pilots
from napari_resfinetune.search.ranking import Standing, uncertainty_in_words
from napari_resfinetune.search.report import draw_models, write_report
from napari_resfinetune.search.results import STOPPED_ADVICE, Suggestion, Suggestions, advise
from napari_resfinetune.search.shelf import Shelf
from napari_resfinetune.search.state import Search
from napari_resfinetune.search.timing import predict_search, time_finetuning
from napari_resfinetune.training.prepare import choose_setup
from napari_resfinetune.training.run_folder import RunFolder, check_writable, holding
from napari_resfinetune.training.step import DTYPES, StepSettings
from napari_resfinetune.words import counted, duration

SCORES, FEATURES, RESULT, LOCK = "scores.json", "features", "search.json", ".search.lock"
# Of the RAM that may be taken, for models that are not in use.
SHELF_SHARE = 0.4


@dataclass(frozen=True)
class SearchOptions:
    """How a search is done.

    Attributes
    ----------
    candidates
        As for `find_candidates`.
    output
        A folder for report, scores and features; a search that was stopped goes on from them.
    patches
        At most so many are looked at.
    pilot_epochs
        Train the first models that are too close to call for so many epochs, with a frozen image encoder.
    timing
        Measure what finetuning takes, beside the search.
    share
        Compute what image encoders have in common once.
    halving
        Drop the worse half of many models after a look at a few patches.
    """

    candidates: Sequence[str | Path] | str | Path | None = None
    output: Path | None = None
    patches: int = 16
    pilot_epochs: int = 0
    timing: bool = False
    share: bool = True
    halving: bool = True


def suggest(
    config: FinetuneConfig,
    images: Any = None,
    labels: Any = None,
    options: SearchOptions | None = None,
    *,
    on_event: OnEvent | None = None,
    stop: StopToken | None = None,
) -> Suggestions:
    """Rank models on labelled images, or on images alone, before any training.

    Parameters
    ----------
    config
        Of the training to come: data, input size, what shall be trained, resources.
    images, labels
        Where the configuration names none.
    options
        How the search is done.
    on_event, stop
        Told what happens; asked whether to stop.

    Raises
    ------
    ConfigError, DataError, ModelError, ResourceError
        When there is nothing to compare, or nothing to compare it on.
    """
    options = options or SearchOptions()
    if options.output is not None:
        check_folder(options.output)
    for name, number, least in (("patches", options.patches, 1), ("pilot epochs", options.pilot_epochs, 0)):
        if not isinstance(number, int) or number < least:
            raise ConfigError(f"{name}: found {number}; expected a whole number, {least} or more")
    with contextlib.ExitStack() as stack:
        folder = options.output
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resfinetune-search-")))
        search = _prepare(
            config,
            images,
            labels,
            options,
            folder=folder,
            tell=on_event or _unheard,
            stop=stop or StopToken(),
            stack=stack,
        )
        standings = compare(search, halving=options.halving)
        standings = run_pilots(search, standings, options.pilot_epochs)
        ranked = _suggestions(search, standings)
        if options.timing:
            ranked = time_finetuning(search, ranked)
        return _finish(search, ranked, options)


def check_folder(output: Path) -> None:
    """Refuse an output folder that holds something else than a search.

    Raises
    ------
    ConfigError
        With what is there, and what to do.
    """
    check_writable(output)
    is_own = (output / SCORES).is_file() and not RunFolder(output).config.exists()
    if output.is_dir() and any(path.name != LOCK for path in output.iterdir()) and not is_own:
        raise ConfigError(
            f"{output}: already holds files that are not of a search, and nothing is overwritten; choose another "
            "output folder"
        )


def _prepare(
    config: FinetuneConfig,
    images: Any,
    labels: Any,
    options: SearchOptions,
    *,
    folder: Path,
    tell: OnEvent,
    stop: StopToken,
    stack: contextlib.ExitStack,
) -> Search:
    """Look at data and candidates, say what is coming, and load all models; locks and limits go onto the stack."""
    data = search_patches(config, images, labels, options.patches)
    found, left_out = find_candidates(options.candidates)
    hardware = probe_hardware()
    setup = choose_setup(config, hardware)
    settings = StepSettings(
        autocast=DTYPES[setup.precision.name], input_px=config.training.input_px, positions=config.training.positions
    )
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another search is at work there; wait until it has ended, or choose another output folder"
    stack.enter_context(holding(folder / LOCK, busy))
    cache = config.resources.feature_cache_dir or folder / FEATURES
    search = Search(
        config=config,
        images=images,
        labels=labels,
        data=data,
        setup=setup,
        settings=settings,
        folder=folder,
        encoder=SharedEncoder(cache, settings, config.resources.feature_cache_gb, lambda text: tell(Message(text))),
        store=ScoreStore(folder / SCORES),
        shelf=Shelf(SHELF_SHARE * setup.limits.memory_gb, setup.device),
        tell=tell,
        stop=stop,
        left_out=list(left_out),
        notes=[*data.notes, *_who_learned_here(found, data)],
    )
    search.store.save()  # marks the folder as one of a search
    _say_what_is_replaced(search, found)
    for text in (*setup.notes, *(f"{each.model}: left out ({each.brief})" for each in left_out)):
        search.say(text)
    stack.enter_context(tf32_as_chosen(setup.precision, setup.device))
    found, seconds = predict_search(search, hardware, found, halving=options.halving)
    behind = [name for name, asked in (("short trainings", options.pilot_epochs), ("timing", options.timing)) if asked]
    without = f", without {' and '.join(behind)}" if behind else ""
    search.say(
        f"{counted(len(found), 'model')} on {len(data.patches)} patches of {counted(len(data.images), 'image')}: "
        f"about {duration(seconds)} if nothing is shared or kept from before{without}"
    )
    stack.enter_context(within_limits(setup.limits, setup.device, hardware, enforce=False))
    load_all(search, found, share=options.share)
    return search


def _unheard(event: Event) -> None:
    """Tell nobody."""


def _who_learned_here(found: Sequence[Candidate], data: SearchData) -> list[str]:
    """Say which models are of runs that were trained on images of the same names."""
    names = {name for _, _, name in (image.partition(" ") for image in data.images)}
    learned = [each.model for each in found if names & _trained_on(Path(each.model).expanduser())]
    if not learned:
        return []
    return [
        f"{', '.join(learned)}: trained on images of the same names as some of these, so a part of the scores is for "
        "what was learned by heart"
    ]


def _trained_on(run: Path) -> set[str]:
    try:
        split = RunFolder(run).read_json("split.json")
        return {str(region["image"]) for region in split["train"]}
    except (ConfigError, KeyError, TypeError):  # no run folder, or nothing to be read in it
        return set()


def _say_what_is_replaced(search: Search, found: Sequence[Candidate]) -> None:
    try:
        before = RunFolder(search.folder).read_json(RESULT)
        ranked = [each["model"] for each in before["ranked"]]
    except (ConfigError, KeyError, TypeError):  # none there, or damaged; it is only an output
        return
    gone = [model for model in ranked if model not in {each.model for each in found}]
    if before.get("images") != list(search.data.images):
        search.say(f"{search.folder}: the ranking there was of other images, and is replaced by this one")
    elif gone:
        search.say(f"{search.folder}: the ranking there also had {', '.join(gone)}, and is replaced by this one")


def _suggestions(search: Search, standings: Sequence[Standing]) -> list[Suggestion]:
    ranked = []
    several = any(each.close for each in standings)
    for rank, each in enumerate(standings, 1):
        entry = search.entries[each.model]
        ranked.append(
            Suggestion(
                model=each.model,
                score=each.score,
                rank=rank,
                low=each.low,
                high=each.high,
                too_close=each.close or (rank == 1 and several),
                architecture=entry.candidate.location.architecture,
                has_decoder=entry.has_decoder,
                scores=dict(each.scores),
                patches=len(entry.scored.rows),
                seconds=dict(entry.scored.seconds),
            )
        )
    return ranked


def _finish(search: Search, ranked: Sequence[Suggestion], options: SearchOptions) -> Suggestions:
    lasting = options.output is not None or search.config.resources.feature_cache_dir is not None
    result = Suggestions(
        ranked=tuple(ranked),
        advice=advise(ranked, labelled=search.data.labelled) if search.compared else STOPPED_ADVICE,
        notes=(*search.notes, uncertainty_in_words([patch.image for patch in search.data.patches])),
        left_out=tuple(search.left_out),
        downloads=possible_downloads([each.model for each in ranked] + [each.model for each in search.left_out]),
        images=search.data.images,
        status="stopped" if search.stop.stopped else "finished",
        seconds=time.monotonic() - search.began,
        features=search.encoder.folder if lasting else None,
        compared=search.compared,
    )
    if options.output is None:
        return result
    with search.going_on(lambda why: search.say(f"{options.output}: the result cannot be written there ({why})")):
        RunFolder(options.output).write_json(RESULT, result.to_dict())  # before the pictures, which may fail
        pictures = {} if search.stop.stopped else draw_models(search, ranked)
        result = write_report(search, result, pictures)
        RunFolder(options.output).write_json(RESULT, result.to_dict())
    return result
