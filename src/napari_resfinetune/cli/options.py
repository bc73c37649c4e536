"""Options that several verbs share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from napari_resfinetune.config import FinetuneConfig, make_config, merge, parse_overrides, read_yaml

Images = Annotated[
    list[str] | None,
    typer.Option("--images", "-i", metavar="PATH", help="Folder, glob or files with images; repeat for more."),
]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--labels",
        "-l",
        metavar="PATH",
        help="Folder, glob or files with labels, one id per object; paired by file stem.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any configuration key, as in --set training.epochs=20; repeat for more."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]


def data_values(images: list[str] | None, labels: list[str] | None) -> dict[str, Any]:
    """Return the `data` section that these options mean."""
    named = {"images": images, "labels": labels}
    return {name: value[0] if len(value) == 1 else value for name, value in named.items() if value}


def run_values(
    images: list[str] | None, labels: list[str] | None, model: str | None, strategy: str | None, preset: str | None
) -> dict[str, Any]:
    """Return the configuration that these options mean."""
    values: dict[str, Any] = {"data": data_values(images, labels)}
    if model is not None:
        values["model"] = model
    if strategy is not None:
        values["strategy"] = {"kind": strategy}
    if preset is not None:
        values["resources"] = {"preset": preset}
    return values


def to_config(path: Path | None, options: Mapping[str, Any], overrides: list[str] | None) -> FinetuneConfig:
    """Return the configuration of a file, with options over it, and ``--set`` over both.

    Raises
    ------
    ConfigError
        For everything that is wrong in it, at once.
    """
    values = read_yaml(path) if path is not None else {}
    return make_config(merge(values, options, parse_overrides(overrides or [])), str(path or "options"))
