"""Configurations from YAML, options and keyword arguments, and back; every problem in one message."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from napari_resfinetune.config.schema import FinetuneConfig
from napari_resfinetune.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def make_config(values: Mapping[str, Any], where: str = "config") -> FinetuneConfig:
    """Validate nested plain values.

    Parameters
    ----------
    values
        Nested mapping with the keys of `FinetuneConfig`.
    where
        Named in messages as the place the values came from.

    Raises
    ------
    ConfigError
        With one problem per wrong value, all at once.
    """
    return validated(FinetuneConfig, values, where)


def validated(model: type[Model], values: Mapping[str, Any], where: str) -> Model:
    """Validate nested plain values as a model of settings.

    Parameters
    ----------
    model
        Such as `FinetuneConfig`.
    values, where
        As for `make_config`.

    Raises
    ------
    ConfigError
        With one problem per wrong value, all at once.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*(_say(problem, where, model) for problem in error.errors())) from None


def read_config(
    path: str | Path, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> FinetuneConfig:
    """Read a YAML file, lay `base` and then ``section.key=value`` overrides over it, and validate the whole.

    Raises
    ------
    ConfigError
        When the file cannot be read, is not a mapping, or holds wrong values.
    """
    return make_config(merge(read_yaml(path), base or {}, parse_overrides(overrides)), str(path))


def write_config(config: FinetuneConfig, path: str | Path) -> None:
    """Write a configuration as YAML that `read_config` gives back equal."""
    content = config.model_dump(mode="json")
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    # Some line breaks of Unicode are written as they are, and read as a space; escaped they come back.
    if yaml.safe_load(text) != content:
        text = yaml.safe_dump(content, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises
    ------
    ConfigError
        When it is missing, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a day that is none is a ValueError
        detail = str(error).replace("\n", " ")
        raise ConfigError(f"{path}: not valid YAML ({detail}); expected keys such as 'model: vit_b_lm'") from None
    if values is None:
        return {}
    if _holds_itself(values):
        raise ConfigError(f"{path}: a value holds itself through an alias (*); write the value out")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: found {type(values).__name__}; expected a mapping with keys such as 'model: vit_b_lm'"
        )
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Turn ``["training.epochs=20"]`` into ``{"training": {"epochs": 20}}``; values are read as YAML.

    Raises
    ------
    ConfigError
        For entries that are not ``key=value``.
    """
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {override}: expected section.key=value, as in --set training.epochs=20")
            continue
        try:
            value = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, ValueError, RecursionError):
            problems.append(f"--set {override}: the value is not valid YAML; quote it")
            continue
        *outer, last = key.strip().split(".")
        nested: dict[str, Any] = {last: value}
        for part in reversed(outer):
            nested = {part: nested}
        values = merge(values, nested)
    if problems:
        raise ConfigError(*problems)
    return values


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested mappings over each other; later ones win. A strategy of another kind replaces the whole section."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = result.get(key)
            if isinstance(value, Mapping) and isinstance(before, Mapping):
                changed_kind = "kind" in value and "kind" in before and value["kind"] != before["kind"]
                result[key] = dict(value) if changed_kind else merge(before, value)
            else:
                result[key] = merge(value) if isinstance(value, Mapping) else value
    return result


def _holds_itself(value: Any, outer: tuple[int, ...] = ()) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return id(value) in outer or any(_holds_itself(item, (*outer, id(value))) for item in inner)


def _say(problem: Any, where: str, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    found = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key '{location}'{_suggestion(problem['loc'], model)}"
    shown = "" if isinstance(found, dict) else f" found {found!r};"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {location or 'configuration'}:{shown} {message[:1].lower()}{message[1:]}"


def _suggestion(location: Sequence[int | str], model: type[BaseModel]) -> str:
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return "; see docs/config.md for the keys"
        model = inner
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1)
    if near:
        return f"; did you mean '{'.'.join([*map(str, location[:-1]), near[0]])}'?"
    return f"; the keys here are {', '.join(model.model_fields)}"
