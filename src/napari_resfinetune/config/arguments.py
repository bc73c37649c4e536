"""Keyword arguments of the Python API as a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from napari_resfinetune.config.files import make_config, merge
from napari_resfinetune.config.schema import FinetuneConfig
from napari_resfinetune.errors import ConfigError


def as_config(
    images: Any, labels: Any, output: str | Path | None, settings: Mapping[str, Any]
) -> tuple[FinetuneConfig, Any, Any]:
    """Bring the two ways of calling `train` together.

    Parameters
    ----------
    images, labels
        Paths or arrays; or a configuration and `None`.
    output
        Goes over the configuration's.
    settings
        ``model``, ``strategy``, ``preset`` and the sections of the configuration.

    Returns
    -------
    config
        With the paths in it.
    images, labels
        Only where they are arrays, else `None`.

    Raises
    ------
    ConfigError
        With everything that is wrong.
    """
    if isinstance(images, FinetuneConfig):
        if labels is not None or settings:
            raise ConfigError("a FinetuneConfig was given together with other settings; put them into the config")
        config = images if output is None else images.model_copy(update={"output": Path(output)})
        return config, None, None
    values: dict[str, Any] = dict(settings)
    if "preset" in values:
        values = merge(values, {"resources": {"preset": values.pop("preset")}})
    if isinstance(values.get("strategy"), str):
        values["strategy"] = {"kind": values["strategy"]}
    if isinstance(values.get("model"), Path):
        values["model"] = str(values["model"])
    if output is not None:
        values["output"] = str(output)
    named = {}
    for name, value in (("images", images), ("labels", labels)):
        location = _location(value)
        if location is not None:
            named[name] = location
    config = make_config(merge(values, {"data": named}), "settings")
    return config, None if "images" in named else images, None if "labels" in named else labels


def not_given(config: FinetuneConfig, images: Any, labels: Any) -> list[str]:
    """Return a problem for each of images and labels that neither the configuration nor an argument names."""
    given = {
        "images": config.data.images if images is None else images,
        "labels": config.data.labels if labels is None else labels,
    }
    return [
        f"{name}: not given; name a folder, a glob or files, as in --images cells/ --labels masks/"
        for name, value in given.items()
        if value is None
    ]


def _location(value: Any) -> Any:
    """Return paths as strings for the configuration, and `None` for arrays."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, str | Path) for item in value):
        return tuple(str(item) for item in value)
    return None
