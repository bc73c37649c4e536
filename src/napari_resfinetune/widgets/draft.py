"""What the Finetune widget edits: pairs of images and labels, and one configuration."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qtpy.QtCore import QObject, Signal

from napari_resfinetune.config import FinetuneConfig, make_config, merge
from napari_resfinetune.widgets.exports import file_stem


@dataclass(frozen=True)
class PairItem:
    """An image and its labels, each a layer or the path of a file.

    Attributes
    ----------
    held_out
        Whether the user put it aside for validation; `None` leaves it to the split.
    round
        In which round of correcting it came.
    """

    image: Any
    labels: Any
    held_out: bool | None = None
    round: int = 1

    @property
    def image_name(self) -> str:
        """What to call the image."""
        return _name(self.image)

    @property
    def labels_name(self) -> str:
        """What to call the labels."""
        return _name(self.labels)

    @property
    def layers(self) -> list[Any]:
        """Those of both that are layers."""
        return [each for each in (self.image, self.labels) if not isinstance(each, str)]

    def files(self, exported: Mapping[int, str]) -> tuple[str, str]:
        """Return the files of both, where layers were exported to those by ``id(layer)``."""
        image, labels = (each if isinstance(each, str) else exported[id(each)] for each in (self.image, self.labels))
        return image, labels


@dataclass(frozen=True)
class Round:
    """One training of the loop "correct and continue"."""

    name: str
    run_dir: str
    images: int
    metric: float | None
    comparison: dict[str, Any] = field(default_factory=dict)


class Draft(QObject):
    """Pairs and settings of the next run."""

    pairs_changed = Signal()
    config_changed = Signal()

    def __init__(self, runs_folder: Path, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.pairs: tuple[PairItem, ...] = ()
        self.config = FinetuneConfig()
        self.runs_folder = runs_folder
        self.name = ""
        self.rounds: tuple[Round, ...] = ()

    def add(self, items: Iterable[PairItem]) -> int:
        """Add pairs that are not there yet, and return how many those were.

        An image that is there with other labels gets the new ones: twice it would be trained on and held out too.
        """
        pairs = {_key(pair.image): pair for pair in self.pairs}
        new = 0
        for item in items:
            there = pairs.get(_key(item.image))
            if there is not None and _key(there.labels) == _key(item.labels):
                continue
            if there is not None and item.held_out is None:
                item = replace(item, held_out=there.held_out)
            pairs[_key(item.image)] = item
            new += 1
        if new:
            self.set_pairs(pairs.values())
        return new

    def set_pairs(self, pairs: Iterable[PairItem]) -> None:
        """Replace all pairs."""
        self.pairs = tuple(pairs)
        self.pairs_changed.emit()

    def change_pair(self, number: int, **changes: Any) -> None:
        """Replace one pair by a changed one."""
        pairs = list(self.pairs)
        pairs[number] = replace(pairs[number], **changes)
        self.set_pairs(pairs)

    def set_config(self, config: FinetuneConfig) -> None:
        """Replace the settings."""
        if config != self.config:
            self.config = config
            self.config_changed.emit()

    def change_config(self, changes: dict[str, Any]) -> None:
        """Change settings by key, as ``{"training": {"epochs": 20}}``.

        Raises
        ------
        ConfigError
            For values that cannot be used; nothing is changed then.
        """
        self.set_config(make_config(merge(self.config.model_dump(mode="json"), changes), "settings"))

    def free_output(self) -> Path:
        """Return a run folder that is not there yet, named after what was asked for."""
        named = any(letter.isalnum() for letter in self.name)
        wanted = file_stem(self.name) if named else f"run-{datetime.date.today():%Y-%m-%d}"
        taken = (self.runs_folder / wanted, self.runs_folder / f"{wanted}-data")
        number = 1
        while any(path.exists() for path in taken):
            number += 1
            taken = (self.runs_folder / f"{wanted}-{number}", self.runs_folder / f"{wanted}-{number}-data")
        return taken[0]

    def run_config(
        self, pairs: Sequence[PairItem], files: list[tuple[str, str]], output: Path
    ) -> tuple[FinetuneConfig, list[tuple[str, str]]]:
        """Return the configuration of a run over these pairs, and what is copied to where before it.

        Parameters
        ----------
        pairs
            As they were when their layers were copied.
        files
            Image and labels of each pair, as they are on disk now.
        output
            The run folder. Copies of layers go beside it, so that the run can be continued and repeated later.
        """
        copies: list[tuple[str, str]] = []
        placed = []
        # A run pairs files by their stems.
        stems = {(Path(image).stem, Path(labels).stem) for image, labels in files}
        unique = len({image for image, _ in stems}) == len(files) and all(image == labels for image, labels in stems)
        for number, (pair, (image, labels)) in enumerate(zip(pairs, files, strict=True)):
            stem = f"{number + 1:03}-{Path(image).stem}"
            if pair.layers or not unique:
                targets = [output.with_name(f"{output.name}-data") / part / stem for part in ("images", "labels")]
                named = [str(target) + Path(file).suffix for target, file in zip(targets, (image, labels), strict=True)]
                copies += zip((image, labels), named, strict=True)
                image, labels = named
            placed.append((pair.held_out, image, labels))
        train = [(image, labels) for held_out, image, labels in placed if not held_out]
        aside = [(image, labels) for held_out, image, labels in placed if held_out]
        chosen = any(held_out is not None for held_out, _, _ in placed)
        data: dict[str, Any] = {"images": [image for image, _ in train], "labels": [labels for _, labels in train]}
        if chosen:
            data["validation_images"] = [image for image, _ in aside]
            data["validation_labels"] = [labels for _, labels in aside]
        values = merge(self.config.model_dump(mode="json"), {"data": data, "output": str(output)})
        return make_config(values, "settings"), copies


def _name(thing: Any) -> str:
    return Path(thing).name if isinstance(thing, str) else str(thing.name)


def _key(thing: Any) -> Any:
    return thing if isinstance(thing, str) else id(thing)
