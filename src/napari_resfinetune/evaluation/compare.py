"""Whether a run's model is better than the one that it started from, on images that it was not trained on.

Both segment the same few windows of held-out images. The verdict comes from the interval of how much the mean mSA has
changed (`intervals.interval_of_difference`), and says in words on how many images it rests.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from napari_resfinetune.data.patches import Window
from napari_resfinetune.errors import ModelError
from napari_resfinetune.evaluation.evaluate import segment_in_mode
from napari_resfinetune.evaluation.intervals import PlanePair, interval_of_difference
from napari_resfinetune.evaluation.objects import Objects
from napari_resfinetune.evaluation.scores import mean_scores, score_objects
from napari_resfinetune.events import Compared, StopToken
from napari_resfinetune.inference.segment import Labels, evaluating
from napari_resfinetune.inference.tiling import embed_plane
from napari_resfinetune.models import SamModel, load_model, resolve_model
from napari_resfinetune.training.job import TrainingJob
from napari_resfinetune.training.run_folder import RunFolder
from napari_resfinetune.training.step import DTYPES

FILE, FOLDER = "comparison.json", "comparison"
# A handful, since this is time on top of training.
WINDOWS = 8
PICTURES = 4
# Fewer objects that all change one way are no proof: a sign test gives p = 2 / 2**5 > 0.05.
LEAST_OBJECTS = 6
RANDOM = "the start model has random weights and counts as one that finds nothing"
NO_DECODER = "the start model has no instance decoder and counts as one that finds nothing"


class Stopped(Exception):
    """A stop was asked for in the middle of a comparison."""


@dataclass(frozen=True)
class Result:
    """One window as one model segmented it."""

    labels: Labels
    scores: Mapping[str, float]
    objects: Objects


def compare_run(job: TrainingJob, best_epoch: int, stop: StopToken) -> Compared:
    """Compare the model of a finished run with its start model, and write ``comparison.json`` and pictures' data.

    Parameters
    ----------
    job
        With the best weights in its model.
    best_epoch
        Which those are; a comparison of the same weights that is there already is taken as it is.
    stop
        Asked between windows.

    Raises
    ------
    Stopped
        When a stop was asked for.
    ModelError
        When the start model cannot be loaded any more.
    OSError
        When the result cannot be written.
    """
    written = job.run.read_json(FILE)
    if isinstance(written, dict) and written.get("best_epoch") == best_epoch:
        return compared_from_dict(written)
    mode = "box" if job.model.instance_decoder is None else "ais"
    windows = choose_windows(job.validation.windows, job.inference_patch_px)
    read = [job.validation.read(window) for window in windows]
    names = [job.validation.pairs[window.region.pair].name for window in windows]
    segment = functools.partial(_segment_all, planes=read, mode=mode, job=job, stop=stop)
    after = segment(job.model)
    start, reason = _start_model(job, mode)
    before = segment(start) if start is not None else [_result(labels, np.zeros_like(labels)) for _, labels in read]
    del start
    content = {
        **judge(names, before, after, mode=mode, single_image=_is_split_by_region(job.run), reason=reason),
        "best_epoch": best_epoch,
        "reason": reason,
        "pictures": _write_pictures(job.run, names, read, before, after),
    }
    job.run.write_json(FILE, content)
    return compared_from_dict(content)


def judge(
    names: Sequence[str],
    before: Sequence[Result],
    after: Sequence[Result],
    *,
    mode: str,
    single_image: bool = False,
    reason: str = "",
) -> dict[str, Any]:
    """Return scores, verdict and sentence as plain data.

    Parameters
    ----------
    names
        Name of the image of each window.
    before, after
        The same windows by both models.
    mode
        How they were segmented.
    single_image
        The held-out part is of the image that was trained on.
    reason
        Why there is no segmentation from before, if so.
    """
    pairs = [PlanePair(name, b.objects, a.objects) for name, b, a in zip(names, before, after, strict=True)]
    low, high = interval_of_difference(pairs)
    objects = sum(len(pair.before.true_px) for pair in pairs)
    verdict = "no clear difference"
    if objects >= LEAST_OBJECTS and (low > 0 or high < 0):
        verdict = "better" if low > 0 else "worse"
    means = [mean_scores(result.scores for result in results) for results in (before, after)]
    by_image = [
        {
            "name": name,
            **{when: _mean_of(name, names, results) for when, results in (("before", before), ("after", after))},
        }
        for name in dict.fromkeys(names)
    ]
    return {
        "verdict": verdict,
        "sentence": _sentence(
            verdict,
            means,
            (low, high),
            images=len(by_image),
            objects=objects,
            mode=mode,
            single_image=single_image,
            reason=reason,
        ),
        "mode": mode,
        "before": means[0],
        "after": means[1],
        "images": by_image,
        "interval": [low, high],
        "objects": objects,
        "windows": len(names),
    }


def compared_from_dict(content: Mapping[str, Any]) -> Compared:
    """Return the event that ``comparison.json`` stands for."""
    return Compared(**{name: content[name] for name in ("verdict", "sentence", "mode", "before", "after", "images")})


def choose_windows(windows: Sequence[Window], patch_px: int, most: int = WINDOWS) -> list[Window]:
    """Choose windows of `patch_px` around those of validation, none over another, taking turns between images."""
    by_image: dict[int, list[Window]] = {}
    for window in windows:
        by_image.setdefault(window.region.pair, []).append(window)
    turns = max(len(group) for group in by_image.values())
    chosen: list[Window] = []
    for window in (group[turn] for turn in range(turns) for group in by_image.values() if turn < len(group)):
        wide = Window(window.region, *(_widened(*spans, patch_px) for spans in _spans(window)))
        if len(chosen) < most and not any(_overlap(wide, other) for other in chosen):
            chosen.append(wide)
    return chosen


def _spans(window: Window) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    return (window.y, window.region.y), (window.x, window.region.x)


def _widened(span: tuple[int, int], inside: tuple[int, int], size: int) -> tuple[int, int]:
    size = min(size, inside[1] - inside[0])
    first = min(max(inside[0], (span[0] + span[1] - size) // 2), inside[1] - size)
    return first, first + size


def _overlap(one: Window, other: Window) -> bool:
    if one.region != other.region:
        return False
    return all(a[0] < b[1] and b[0] < a[1] for a, b in ((one.y, other.y), (one.x, other.x)))


def _start_model(job: TrainingJob, mode: str) -> tuple[SamModel | None, str]:
    """Load the start model, or say why it counts as one that finds nothing."""
    location = resolve_model(job.config.model)
    if location.path is None:
        return None, RANDOM
    if mode == "box":
        return load_model(location, decoder="none", device=job.model.device), ""
    try:
        return load_model(location, decoder="required", device=job.model.device), ""
    except ModelError:
        load_model(location, decoder="none")  # raises again where more than the decoder is amiss
        return None, NO_DECODER


@torch.no_grad()
def _segment_all(
    model: SamModel,
    planes: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]],
    mode: str,
    job: TrainingJob,
    stop: StopToken,
) -> list[Result]:
    precision, patch_px = DTYPES[job.work.precision], job.inference_patch_px
    results = []
    with evaluating(model):
        for image, labels in planes:
            if stop.stopped:
                raise Stopped
            embeddings = list(embed_plane(model, image, patch_px=patch_px, precision=precision))
            results.append(_result(labels, segment_in_mode(model, image, labels, embeddings, mode, precision)[-1]))
    return results


def _result(labels: NDArray[np.int64], found: NDArray[Any]) -> Result:
    scores, objects = score_objects(labels, found)
    return Result(found.astype(np.uint32), scores, objects)


def _is_split_by_region(run: RunFolder) -> bool:
    split = run.read_json("split.json")
    return isinstance(split, dict) and split.get("kind") == "by region"


def _mean_of(name: str, names: Sequence[str], results: Sequence[Result], metric: str = "sa50") -> float:
    return float(np.mean([result.scores[metric] for own, result in zip(names, results, strict=True) if own == name]))


def _sentence(
    verdict: str,
    means: Sequence[Mapping[str, float]],
    interval: tuple[float, float],
    *,
    images: int,
    objects: int,
    mode: str,
    single_image: bool,
    reason: str,
) -> str:
    words = {
        "better": "Better than the start model",
        "worse": "Worse than the start model",
        "no clear difference": "No clear difference from the start model",
    }
    scores = ", ".join(f"{name} {means[0][key]:.2f} before, {means[1][key]:.2f} after" for name, key in _SHOWN)
    where = f"{images} held-out image{'s' * (images != 1)}"
    if single_image:
        where = "the held-out part of the only image"
    how = "segmented automatically" if mode == "ais" else "each object prompted with its box"
    text = (
        f"{words[verdict]}: {scores}, on {where} with {objects} objects, {how}; the change of mSA lies between "
        f"{interval[0]:+.2f} and {interval[1]:+.2f} (95 % interval)."
    )
    if objects < LEAST_OBJECTS:
        text += f" Fewer than {LEAST_OBJECTS} objects show no difference for sure."
    if images == 1:
        text += " One image does not tell how it is on others."
    if reason:
        text += f" Note that {reason}."
    if verdict == "worse":
        text += " Keep the start model, or train again with more images or a lower training.learning_rate."
    return text


_SHOWN = (("mSA", "msa"), ("SA50", "sa50"))


def _write_pictures(
    run: RunFolder,
    names: Sequence[str],
    planes: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]],
    before: Sequence[Result],
    after: Sequence[Result],
) -> list[dict[str, Any]]:
    """Keep the windows that changed most, as arrays that the report draws; return which they are."""
    changes = [a.scores["msa"] - b.scores["msa"] for b, a in zip(before, after, strict=True)]
    most = sorted(range(len(changes)), key=lambda index: -abs(changes[index]))[:PICTURES]
    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    kept = []
    for number, index in enumerate(most):
        image, labels = planes[index]
        arrays: dict[str, NDArray[Any]] = {
            "image": image.astype(np.uint8),
            "labels": labels.astype(np.uint32),
            "before": before[index].labels,
            "after": after[index].labels,
        }
        file = folder / f"{number}.npz"
        _write_arrays(file, arrays)
        scores = {
            f"{when}_{name}": results[index].scores[name]
            for when, results in (("before", before), ("after", after))
            for name in ("sa50", "msa", "missed", "extra", "merged", "split")
        }
        kept.append({"name": names[index], "objects": len(after[index].objects.true_px), **scores})
    return kept


def _write_arrays(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    new = file.with_name(f".{file.name}.new.npz")
    np.savez_compressed(new, allow_pickle=False, **arrays)
    os.replace(new, file)
