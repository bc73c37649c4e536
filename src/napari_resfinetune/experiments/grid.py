"""What a sweep is: lists of models, strategies, presets, numbers of images and seeds, and where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from napari_resfinetune.config import FullStrategy, Strategy, merge, parse_overrides, read_yaml, validated
from napari_resfinetune.config.schema import Locations, PresetName
from napari_resfinetune.errors import ConfigError

AXES = ("preset", "model", "strategy", "n_images", "seed")
# Keys of a run's configuration that an axis or the grid itself decides.
TAKEN = ("model", "output", "strategy", "training.seed", "resources.preset", "data.max_images", "data.images")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class LocalSettings(_Frozen):
    """Runs on this computer."""

    kind: Literal["local"] = "local"
    at_once: PositiveInt | None = Field(
        None, description="most runs at the same time; if unset, as many as the planner says fit"
    )
    memory_gb: PositiveFloat | None = Field(
        None, description="most memory that they take together, by prediction; what is free if unset"
    )


class SlurmRequest(_Frozen):
    """What a job asks of SLURM; unset memory, time and cores come from the planner."""

    partition: str | None = Field(None, description="sbatch --partition")
    account: str | None = Field(None, description="sbatch --account")
    qos: str | None = Field(None, description="sbatch --qos")
    constraint: str | None = Field(None, description="sbatch --constraint, as a kind of node")
    gpus: str | int | None = Field(
        None, description="cards of a job as 1 or 'v100:1'; one for presets with a card if unset"
    )
    cpus: PositiveInt | None = Field(None, description="cores of a job; the preset's if unset")
    memory_gb: PositiveFloat | None = Field(None, description="RAM of a job; from the planner if unset")
    minutes: PositiveInt | None = Field(
        None,
        description="time limit of a job; from the planner if unset. A run that meets it is saved and queued again",
    )


class SlurmSettings(SlurmRequest):
    """Runs on a cluster with SLURM."""

    kind: Literal["slurm"] = "slurm"
    longest_minutes: PositiveInt | None = Field(None, description="most that the partition allows, if it is known")
    setup: tuple[str, ...] = Field((), description="lines of shell before a job starts, as 'module load cuda'")
    at_once: PositiveInt = Field(256, description="most jobs of an array at the same time")
    requeues: PositiveInt = Field(20, description="how often a run that meets its time limit is queued again")
    warn_seconds: PositiveInt = Field(120, description="time before the limit in which a run saves itself")
    options: dict[str, str | int | bool] = Field({}, description="further sbatch options, as {nice: 100}")
    presets: dict[PresetName, SlurmRequest] = Field({}, description="what differs for the runs of a preset")

    def request(self, preset: str) -> SlurmRequest:
        """Return what a job of a preset asks for."""
        names = set(SlurmRequest.model_fields)
        changes = self.presets[preset].model_dump(exclude_unset=True) if preset in self.presets else {}
        return SlurmRequest(**{**self.model_dump(include=names), **changes})


class DaskSettings(_Frozen):
    """Runs on the workers of a dask cluster that is there already."""

    kind: Literal["dask"] = "dask"
    scheduler: str = Field(description="address of its scheduler, as 'tcp://node1:8786'")
    resources: dict[str, PositiveFloat] = Field(
        {}, description="what a job takes of the resources that workers were begun with, as {GPU: 1}"
    )


ExecutorSettings = LocalSettings | SlurmSettings | DaskSettings
Executor = Annotated[ExecutorSettings, Field(discriminator="kind")]


class GridConfig(_Frozen):
    """One sweep, whole. Every combination of the lists is a run; a list may be a single value."""

    images: Locations | None = Field(None, description="as data.images of a run")
    labels: Locations | None = Field(None, description="as data.labels of a run")
    dataset: Literal["covid_if"] | None = Field(None, description="data by name, instead of images and labels")
    dataset_dir: Path = Field(Path("datasets"), description="where data by name lies, or is downloaded to on request")
    test_images: Locations | None = Field(None, description="images to score on; the run's held-out ones if unset")
    test_labels: Locations | None = Field(None, description="their labels")
    output: Path = Field(description="the sweep's folder")
    model: tuple[str, ...] = Field(("vit_b_lm",), description="start models")
    strategy: tuple[Strategy, ...] = Field(
        (FullStrategy(),),
        description="names of strategies, or sections as {kind: lora, rank: 8}",
    )
    preset: tuple[PresetName, ...] = Field(("auto",), description="hardware presets")
    n_images: tuple[PositiveInt | None, ...] = Field(
        (None,), description="how many images to train on; null is all of them"
    )
    seed: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), description="seeds")
    exclude: tuple[dict[str, Any], ...] = Field(
        (), description="combinations to leave out, as {preset: gtx1080, strategy: [full, lora]}"
    )
    config: Path | None = Field(None, description="a run's configuration that all of them start from")
    set: dict[str, Any] = Field({}, description="keys over it, as in --set: {training.epochs: 20}")
    modes: tuple[str, ...] = Field(("ais", "amg", "point", "box"), description="how to score")
    initial: bool = Field(True, description="also score each start model as it is")
    executor: Executor = LocalSettings()

    @field_validator("model", "strategy", "preset", "n_images", "seed", "modes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if value is None or isinstance(value, str | int | Mapping) else value

    @field_validator("strategy", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return tuple({"kind": item} if isinstance(item, str) else item for item in value)

    @field_validator("set", mode="before")
    @classmethod
    def _set_as_mapping(cls, value: Any) -> Any:
        """Also take a list of ``key=value``, as the command line has it."""
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            parsed = [item.partition("=") for item in value]
            values = parse_overrides(value)
            return {key.strip(): _at(values, key.strip()) for key, _, _ in parsed}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> GridConfig:
        problems = [f"{name}: an empty list" for name in (*AXES, "modes") if not getattr(self, name)]
        given = (self.images is not None, self.labels is not None)
        if self.dataset is None and not all(given):
            problems.append("images and labels: both are needed, or dataset")
        if self.dataset is not None and any(given):
            problems.append(f"dataset {self.dataset}: brings its own images and labels; leave those out")
        if (self.test_images is None) != (self.test_labels is None):
            problems.append("test_images and test_labels: only one of them is set; set both or neither")
        axis_of = {"strategy": "strategy", "training.seed": "seed", "resources.preset": "preset"}
        axis_of |= {"data.max_images": "n_images", "model": "model", "output": "output", "data.images": "images"}
        for key in _keys(self.set):
            if key in TAKEN or key.partition(".")[0] in ("model", "output", "strategy"):
                name = axis_of.get(key, axis_of.get(key.partition(".")[0], key))
                problems.append(f"set: {key} is what the key {name} of the grid is for")
        for entry in self.exclude:
            unknown = sorted(set(entry) - set(AXES))
            if unknown or not entry:
                problems.append(f"exclude: found {unknown or entry}; expected some of {', '.join(AXES)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def run_values(self) -> dict[str, Any]:
        """Return what all runs share, as nested plain values of a run's configuration."""
        base = read_yaml(self.config) if self.config is not None else {}
        nested: dict[str, Any] = {}
        for key, value in self.set.items():
            *outer, last = key.split(".")
            inner: dict[str, Any] = {last: value}
            for part in reversed(outer):
                inner = {part: inner}
            nested = merge(nested, inner)
        data = {name: getattr(self, name) for name in ("images", "labels") if getattr(self, name) is not None}
        return merge(base, nested, {"data": data})


def make_grid(values: Mapping[str, Any], where: str = "grid") -> GridConfig:
    """Validate a grid; `executor` may be the path of a YAML file that holds that section alone.

    Raises
    ------
    ConfigError
        With every problem, all at once.
    """
    values = dict(values)
    executor = values.get("executor")
    if isinstance(executor, str):
        values["executor"] = _executor_of(executor)
    if isinstance(values.get("executor"), dict) and "kind" not in values["executor"]:
        raise ConfigError(f"{where}: executor: has no kind; add 'kind: local', 'kind: slurm' or 'kind: dask'")
    return validated(GridConfig, values, where)


def read_grid(path: str | Path, executor: str | None = None, output: str | Path | None = None) -> GridConfig:
    """Read a grid from a YAML file; `executor` and `output` go over the file's.

    Raises
    ------
    ConfigError
        When it cannot be read, or holds wrong values.
    """
    changes = {"executor": executor, "output": str(output) if output is not None else None}
    values = {**read_yaml(path), **{name: value for name, value in changes.items() if value is not None}}
    return make_grid(values, str(path))


def read_executor(text: str) -> ExecutorSettings:
    """Return where to run.

    Parameters
    ----------
    text
        ``"local"``, the address of a dask scheduler, or the path of a YAML file that holds a section
        ``executor`` alone.

    Raises
    ------
    ConfigError
        When it cannot be read, or holds wrong values.
    """
    return validated(_Place, {"executor": _executor_of(text)}, text).executor


def _executor_of(text: str) -> dict[str, Any]:
    if text == "local":
        return {"kind": "local"}
    if "://" in text:
        return {"kind": "dask", "scheduler": text}
    if not Path(text).exists():
        raise ConfigError(
            f"executor: found '{text}'; expected local, the path of a YAML file, or the address of a dask scheduler as "
            "in tcp://node1:8786"
        )
    return read_yaml(text)


class _Place(_Frozen):
    executor: Executor


def _at(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _keys(values: Mapping[str, Any], above: str = "") -> list[str]:
    """Return dotted names of everything that nested values set."""
    found: list[str] = []
    for key, value in values.items():
        name = f"{above}{key}"
        found += _keys(value, f"{name}.") if isinstance(value, Mapping) and value else [name]
    return found
