"""From a grid to jobs with their predicted memory and time, and what was left out for what reason."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from napari_resfinetune.config import FinetuneConfig, Strategy, make_config, merge
from napari_resfinetune.errors import ConfigError, ResFinetuneError
from napari_resfinetune.evaluation import check_modes
from napari_resfinetune.experiments.datasets import dataset_values, pairs_to_score
from napari_resfinetune.experiments.grid import AXES, GridConfig, LocalSettings, SlurmSettings
from napari_resfinetune.experiments.jobs import Job, Need, job_folder
from napari_resfinetune.models import known_model
from napari_resfinetune.models.names import RANDOM_PREFIX
from napari_resfinetune.planning import Hardware, Plan, get_preset, pick_device, probe_hardware
from napari_resfinetune.training.planned import TRIED_SHARE, architecture_of, length_of, plan_anywhere
from napari_resfinetune.training.prepare import open_data
from napari_resfinetune.words import counted

# What comes on top of the steps of a training, in seconds, generously: loading libraries and the model, and scoring an
# image in one mode.
START_SECONDS = 60.0
SCORE_SECONDS = {"cpu": 20.0, "cuda": 4.0, "mps": 8.0}


@dataclass(frozen=True)
class Combination:
    """One value from each list of the grid."""

    preset: str
    model: str
    strategy: Strategy
    n_images: int | None
    seed: int

    @property
    def strategy_name(self) -> str:
        """The strategy in a word, with what differs from its defaults."""
        return strategy_name(self.strategy)

    @property
    def name(self) -> str:
        """A name for the folder."""
        count = "all" if self.n_images is None else self.n_images
        parts = (self.preset, model_name(self.model), self.strategy_name, f"n{count}", f"s{self.seed}")
        return _plain("_".join(map(str, parts)))

    def values(self) -> dict[str, Any]:
        """Return the value of each axis, in words and numbers."""
        return {
            "preset": self.preset,
            "model": model_name(self.model),
            "strategy": self.strategy_name,
            "n_images": self.n_images,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Run:
    """A combination that will be trained and scored.

    Attributes
    ----------
    combination, config, plan, job
        What it is, in words, whole, and in memory and time, and its job.
    digest
        Tells it from a run of the same name with other settings or another model.
    """

    combination: Combination
    config: FinetuneConfig
    plan: Plan
    job: Job
    digest: str


@dataclass(frozen=True)
class Expansion:
    """What a grid comes to.

    Attributes
    ----------
    runs
        To train and score.
    initial
        To score start models as they are, each with the settings of one of its runs.
    left_out
        Names and reasons.
    notes
        What somebody may have meant otherwise.
    """

    runs: tuple[Run, ...]
    initial: tuple[Run, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs, scores of start models first."""
        return tuple(run.job for run in (*self.initial, *self.runs))


@dataclass(frozen=True)
class _Scoring:
    """How models are scored: on which images (`None`: those held out), how many they are, and in which modes."""

    test: Mapping[str, Any] | None
    images: int
    modes: tuple[str, ...]

    def work(self, model: str) -> dict[str, Any]:
        return {"model": model, "modes": list(self.modes), "config": "config.yaml", "test": self.test}

    def seconds(self, plan: Plan) -> float:
        return SCORE_SECONDS[plan.work.device] * self.images * len(self.modes)


def strategy_name(strategy: Strategy) -> str:
    """Return a strategy in a word: its kind, and settings that are not the default."""
    default = type(strategy)().model_dump()
    changes = {name: value for name, value in strategy.model_dump().items() if value != default[name]}
    return "-".join([strategy.kind, *(f"{name}{_short(value)}" for name, value in changes.items())])


def model_name(model: str) -> str:
    """Return a model's name, or the stem of its path."""
    if known_model(model) is not None or model.startswith(RANDOM_PREFIX):
        return model
    return Path(model).stem


def combinations(grid: GridConfig) -> tuple[list[Combination], list[tuple[str, str]]]:
    """Return all combinations of a grid's lists, each once, and those that it excludes."""
    chosen: dict[Combination, None] = {}
    left_out: list[tuple[str, str]] = []
    for values in itertools.product(grid.preset, grid.model, grid.strategy, grid.n_images, grid.seed):
        combination = Combination(*values)
        if combination in chosen:
            continue
        if any(_matches(combination, entry) for entry in grid.exclude):
            left_out.append((combination.name, "excluded"))
        else:
            chosen[combination] = None
    names = [combination.name for combination in chosen]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(*(f"{name}: two combinations have this name; name model files differently" for name in twice))
    return list(chosen), left_out


def expand(grid: GridConfig, *, download: bool = False, hardware: Hardware | None = None) -> Expansion:
    """Plan every combination of a grid, and leave out what makes no sense, with a reason.

    Parameters
    ----------
    grid
        Validated.
    download
        Whether data by name may be fetched.
    hardware
        This computer, if it was probed already.

    Raises
    ------
    ConfigError, DataError, ModelError
        For what no run of the grid could work with, all of it at once.
    """
    hardware = hardware or probe_hardware()
    shared, test = _shared_values(grid, download)
    check_modes(grid.modes)
    base = make_config(shared, "grid")
    architectures = _architectures(grid.model)
    data = open_data(base)
    if data.split.kind == "by region" and test is None:
        raise ConfigError("images: only one image, so none is left to score on; add images, or set test_images")
    available = len({region.pair for region in data.split.train})
    held_out = len(data.split.validation)
    notes: list[str] = []
    if test is None:
        scored = len({region.pair for region in data.split.validation})
    else:
        keys: dict[str, Any] = base.data.model_dump(include={"image_key", "label_key", "axes"})
        found = pairs_to_score(test["images"], test["labels"], **keys)
        scored, notes = len(found.pairs), [str(problem) for problem in found.problems]
    scoring = _Scoring(test, scored, grid.modes)
    chosen, left_out = combinations(grid)
    runs: list[Run] = []
    plan_once = functools.cache(
        lambda text, architecture: plan_anywhere(
            FinetuneConfig.model_validate_json(text),
            hardware,
            architecture,
            length_of(FinetuneConfig.model_validate_json(text), held_out),
        )
    )
    for combination in chosen:
        config = _config(grid, shared, combination)
        reason = _nonsense(grid, combination, available, hardware)
        if reason is None:
            # Neither the images nor the seed change what a step takes.
            same = merge(config.model_dump(mode="json"), {"output": None, "data": {"max_images": None}})
            text = make_config(merge(same, {"training": {"seed": 0}})).model_dump_json()
            try:
                plan = plan_once(text, architectures[combination.model])
                reason = _too_large(plan)
            except ResFinetuneError as error:
                reason = "; ".join(error.problems)
        if reason is not None:
            left_out.append((combination.name, reason))
            continue
        digest = _digest(config)
        # What a preset allows, and "auto" most of all, would be settled by each run anew: all train alike.
        training = config.training.model_copy(update={"objects": plan.work.objects})
        config = config.model_copy(update={"training": training})
        runs.append(Run(combination, config, plan, _job(combination, config, plan, scoring), digest))
    return Expansion(tuple(runs), _initial(grid, runs, scoring), tuple(left_out), (*notes, *_notes(grid, runs)))


def _shared_values(grid: GridConfig, download: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return what all runs share, with absolute paths, and the images to score on, if they are apart."""
    values = grid.run_values()
    test: dict[str, Any] | None = None
    if grid.test_images is not None:
        test = {"images": grid.test_images, "labels": grid.test_labels}
    if grid.dataset is not None:
        section, files = dataset_values(grid.dataset, grid.dataset_dir, download=download)
        values = merge(values, {"data": section})
        if test is None:
            test = {"images": files, "labels": files}
    data = make_config({"data": values["data"]}, "grid").data.with_absolute_paths()
    if test is not None:
        as_data = make_config({"data": test}, "grid").data.with_absolute_paths()
        test = {"images": as_data.images, "labels": as_data.labels}
    return {**values, "data": data.model_dump(mode="json")}, test


def _architectures(models: Iterable[str]) -> dict[str, str]:
    """Find out what each model is; all that cannot be used are named at once."""
    found, problems = {}, []
    for model in models:
        try:
            found[model] = architecture_of(model)
        except ResFinetuneError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])(*(text for error in problems for text in error.problems))
    return found


def _config(grid: GridConfig, shared: Mapping[str, Any], combination: Combination) -> FinetuneConfig:
    model = combination.model
    if known_model(model) is None and Path(model).exists():
        model = str(Path(model).absolute())
    return make_config(
        merge(
            shared,
            {
                "model": model,
                "output": str(job_folder(grid.output.absolute(), combination.name) / "run"),
                "strategy": combination.strategy.model_dump(mode="json"),
                "training": {"seed": combination.seed},
                "resources": {"preset": combination.preset},
                "data": {"max_images": combination.n_images},
            },
        ),
        combination.name,
    )


def _nonsense(grid: GridConfig, combination: Combination, available: int, hardware: Hardware) -> str | None:
    """Say why a combination makes no sense, if it does not."""
    if combination.n_images is not None and combination.n_images > available:
        return f"only {counted(available, 'image')} left to train on"
    if combination.preset != "auto" and isinstance(grid.executor, LocalSettings):
        kind = pick_device("auto", hardware)[0].partition(":")[0]
        wanted = get_preset(combination.preset).device
        if wanted != "cpu" and wanted != kind:
            return f"preset {combination.preset} is for {wanted}, and this computer has none; run it on a cluster"
    return None


def _too_large(plan: Plan) -> str | None:
    if plan.peak_gb <= TRIED_SHARE * plan.limit_gb:
        return None
    return f"would take {plan.peak_gb:.1f} of {plan.limit_gb:.1f} GB with everything that saves memory"


def _job(combination: Combination, config: FinetuneConfig, plan: Plan, scoring: _Scoring) -> Job:
    seconds = plan.seconds_at_most + START_SECONDS + scoring.seconds(plan)
    return Job(
        combination.name,
        {"train": {"config": "config.yaml"}, "evaluate": scoring.work(str(config.output))},
        _need(plan, config, seconds),
    )


def _need(plan: Plan, config: FinetuneConfig, seconds: float) -> Need:
    preset = config.resources.preset
    cores = config.resources.threads or (get_preset(preset).cores if preset != "auto" else 4)
    return Need(plan.peak_gb, plan.ram_gb, seconds, preset, plan.work.device, cores)


def _initial(grid: GridConfig, runs: Sequence[Run], scoring: _Scoring) -> tuple[Run, ...]:
    """Make one job for each start model and seed; the split, and so what is scored, depends on the seed."""
    if not grid.initial:
        return ()
    found: dict[str, Run] = {}
    for run in runs:
        model, seed = run.combination.model, run.combination.seed
        name = _plain(f"initial_{model_name(model)}_s{seed}")
        if name not in found:
            need = _need(run.plan, run.config, START_SECONDS + scoring.seconds(run.plan))
            job = Job(name, {"evaluate": scoring.work(run.config.model)}, need)
            found[name] = replace(run, job=job, digest=_digest(run.config, initial=True))
    return tuple(found.values())


def _digest(config: FinetuneConfig, *, initial: bool = False) -> str:
    """Return what tells runs of the same name from each other.

    Images are not in it, since no folder of a sweep takes others, nor is where it runs.
    """
    places = {"images", "labels", "validation_images", "validation_labels"}
    values = config.model_dump(mode="json", exclude={"output": True, "resources": True, "data": places})
    if initial:
        del values["strategy"], values["data"]["max_images"], values["training"]["objects"]
    path = Path(config.model).expanduser()
    if known_model(config.model) is None and path.exists():
        # Of a folder: a checkpoint or an adapter; of a run, its model.
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("model.pt"))
        values["model"] = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _notes(grid: GridConfig, runs: Sequence[Run]) -> Iterator[str]:
    every = [Combination(*values) for values in itertools.product(*(getattr(grid, axis) for axis in AXES))]
    for entry in grid.exclude:
        if not any(_matches(combination, entry) for combination in every):
            yield f"exclude: {entry} matches no combination"
    slurm = grid.executor if isinstance(grid.executor, SlurmSettings) else None
    if slurm is not None and slurm.request("auto").gpus is None:
        asked = [run for run in runs if (run.combination.preset, run.config.resources.device) == ("auto", "auto")]
        if any(run.plan.work.device == "cpu" for run in asked):
            yield (
                "preset auto was planned for this computer, which has no card, so no card is asked for; set gpus: 1 in "
                "the section executor, or name a preset with a card"
            )


def _matches(combination: Combination, entry: Mapping[str, Any]) -> bool:
    for axis in entry:
        wanted = entry[axis] if isinstance(entry[axis], list) else [entry[axis]]
        if not any(_is(combination, axis, value) for value in wanted):
            return False
    return True


def _is(combination: Combination, axis: str, wanted: Any) -> bool:
    """Say whether a combination has a value on an axis, in any of the ways to write it."""
    if axis == "strategy" and isinstance(wanted, Mapping):
        found = combination.strategy.model_dump(mode="json")
        return all(name in found and found[name] == value for name, value in wanted.items())
    if axis == "strategy":
        return wanted in (combination.strategy.kind, combination.strategy_name)
    if axis == "model":
        return wanted in (combination.model, model_name(combination.model))
    return bool(wanted == combination.values()[axis])


def _short(value: Any) -> str:
    return "".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "-", name)
