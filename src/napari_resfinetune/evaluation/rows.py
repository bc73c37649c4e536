"""What an evaluation found: a row for each plane or volume, mode and round, and what they come to."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from napari_resfinetune.errors import DataError
from napari_resfinetune.evaluation.intervals import interval_of_mean
from napari_resfinetune.evaluation.objects import Objects
from napari_resfinetune.evaluation.scores import COUNTS, METRICS, MORE_METRICS, mean_scores

SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class ImageScore:
    """Scores of one plane or volume in one mode.

    Attributes
    ----------
    image
        Name of the image.
    plane
        Index of the slice or frame; `None` for an image with one plane, and for a volume as a whole.
    mode
        How it was segmented.
    sa50, sa75, msa, dice, precision, recall, pq
        From 0 to 1, see `score`.
    n_true, n_pred
        Number of objects in the labels and in the segmentation.
    missed, extra, merged, split
        Number of objects that are wrong in that way, see `Objects`.
    objects
        One by one.
    round
        Of iterative prompting, from 1; `None` in other modes.
    slices
        Of a volume that was scored as a whole; 1 for planes.
    """

    image: str
    plane: int | None
    mode: str
    sa50: float
    sa75: float
    msa: float
    dice: float
    precision: float
    recall: float
    pq: float
    n_true: int
    n_pred: int
    missed: int
    extra: int
    merged: int
    split: int
    objects: Objects
    round: int | None = None
    slices: int = 1

    @property
    def where(self) -> str:
        """Name of the image, and which of its planes."""
        if self.slices > 1:
            return f"{self.image} [{self.slices} slices]"
        return self.image if self.plane is None else f"{self.image} [{self.plane}]"


@dataclass(frozen=True)
class SizeScore:
    """Scores of the objects in a range of sizes, over all images.

    Attributes
    ----------
    name
        "small", "medium" or "large": thirds of all true objects.
    from_px, to_px
        Sizes of the smallest and the largest true object among them, in pixels or voxels.
    n_true, found, extra
        True objects, those of them that are matched, and predicted objects of such a size that match none.
    sa50, recall
        Over all images together.
    """

    name: str
    from_px: int
    to_px: int
    n_true: int
    found: int
    extra: int
    sa50: float
    recall: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model.

    Attributes
    ----------
    model
        Name of the model.
    rows
        One per plane or volume, mode, and round of iterative prompting.
    """

    model: str
    rows: tuple[ImageScore, ...]

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes in the order in which they were asked for."""
        return tuple(dict.fromkeys(row.mode for row in self.rows))

    def of_mode(self, mode: str) -> tuple[ImageScore, ...]:
        """Return the rows of a mode; of iterative prompting those of the last round."""
        rows = [row for row in self.rows if row.mode == mode]
        last = max((row.round or 0 for row in rows), default=0)
        return tuple(row for row in rows if (row.round or 0) == last)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return ``{"mode": {"sa50": .., "sa75": .., "msa": ..}, ...}``: means over planes."""
        return {mode: mean_scores(dataclasses.asdict(row) for row in self.of_mode(mode)) for mode in self.modes}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return all there is to say about each mode, as plain data.

        Returns
        -------
        dict
            By mode: ``means`` of each metric over planes, ``intervals`` of these (95 %, over images; `None` for one
            image), ``counts`` of objects, ``sizes`` as `by_size` gives them, and ``rounds``, the means after each round
            of iterative prompting.
        """
        return {mode: self._summary_of(mode) for mode in self.modes}

    def by_size(self, mode: str) -> tuple[SizeScore, ...]:
        """Score small, medium and large objects: thirds of all true objects, which are the same for every model."""
        return _by_size([row.objects for row in self.of_mode(mode)])

    def _summary_of(self, mode: str) -> dict[str, Any]:
        rows = self.of_mode(mode)
        metrics = (*METRICS, *MORE_METRICS)
        rounds = sorted({row.round for row in self.rows if row.mode == mode and row.round is not None})
        return {
            "means": {name: float(np.mean([getattr(row, name) for row in rows])) for name in metrics},
            "intervals": {name: interval_of_mean(_by_image(rows, name)) for name in metrics},
            "counts": {name: sum(getattr(row, name) for row in rows) for name in COUNTS},
            "sizes": [dataclasses.asdict(size) for size in self.by_size(mode)],
            "rounds": [
                mean_scores(dataclasses.asdict(row) for row in self.rows if row.mode == mode and row.round == number)
                for number in rounds
            ],
        }


def write_rows(path: Path, evaluations: Mapping[str, Evaluation]) -> None:
    """Write one line per model, image, plane, mode and round as CSV.

    Raises
    ------
    DataError
        When it cannot be written.
    """
    columns = ["image", "plane", "slices", "mode", "round", *METRICS, *MORE_METRICS, *COUNTS]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["model", *columns])
            for name, evaluation in evaluations.items():
                writer.writerows([name, *(getattr(row, column) for column in columns)] for row in evaluation.rows)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); name another file") from None


def _by_image(rows: Sequence[ImageScore], metric: str) -> list[list[float]]:
    grouped: dict[str, list[float]] = {}
    for row in rows:
        grouped.setdefault(row.image, []).append(getattr(row, metric))
    return list(grouped.values())


def _by_size(planes: Sequence[Objects]) -> tuple[SizeScore, ...]:
    true_px = np.array([px for objects in planes for px in objects.true_px])
    found = np.array([iou > 0 for objects in planes for iou in objects.true_iou])
    extra_px = np.array([px for objects in planes for px in objects.extra_px])
    if not true_px.size:
        return ()
    # Objects of equal size stay together, so that few sizes make fewer than three ranges.
    edges = np.unique(np.quantile(true_px, [1 / 3, 2 / 3], method="inverted_cdf"))
    which, which_extra = (np.searchsorted(edges, px, side="left") for px in (true_px, extra_px))
    # Larger than every true object is "large" all the same.
    which_extra = np.minimum(which_extra, which.max())
    scores = []
    for number, name in enumerate(SIZES):
        inside = which == number
        if not inside.any():
            continue
        n_true, n_found = int(inside.sum()), int(found[inside].sum())
        extra = int(np.count_nonzero(which_extra == number))
        scores.append(
            SizeScore(
                name,
                int(true_px[inside].min()),
                int(true_px[inside].max()),
                n_true,
                n_found,
                extra,
                sa50=n_found / (n_true + extra),
                recall=n_found / n_true,
            )
        )
    return tuple(scores)
