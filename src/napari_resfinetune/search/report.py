"""The page of a search: ranking, pictures of what each model finds before training, times, and advice."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from napari_resfinetune.evaluation.prompted import prompts_from_labels
from napari_resfinetune.search.patches import SearchPatch
from napari_resfinetune.search.results import Suggestion, Suggestions
from napari_resfinetune.search.state import Search
from napari_resfinetune.search.zero_shot import (
    MOST_OBJECTS,
    automatic,
    box_prompts,
    grid_points,
    point_prompts,
    prompted_masks,
    some_objects,
)
from napari_resfinetune.words import duration, rough_duration

REPORT, PICTURES, TIMES = "report.html", "pictures", "times.png"
MOST_PICTURES, MOST_PATCHES = 24, 3
# Column heads of scores, in the order in which they are shown.
SCORES: Mapping[str, str] = {
    "ais_sa50": "automatic SA50",
    "box_iou": "box IoU",
    "point_iou": "point IoU",
    "probe_r2": "probe R²",
    "logme": "LogME",
    "logme_share": "LogME share",
    "ais_steadiness": "automatic, steadiness",
    "point_steadiness": "points, steadiness",
    "pilot": "pilot",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, td:nth-child(2), th { text-align: left } img { max-width: 100% }
.advice { background: #eef5ee; padding: .8rem 1rem; border-radius: .4rem; font-size: 1.1rem }
"""


def draw_models(search: Search, ranked: Sequence[Suggestion]) -> dict[str, str]:
    """Draw what each model makes of a patch of up to three images before training.

    Returns
    -------
    dict
        By model, the path of its picture inside the folder of the search.
    """
    # Held-out ones first, and of each image the one with the most objects, where models differ most.
    by_use = sorted(search.data.patches, key=lambda each: (not each.held_out, -len(np.unique(each.patch.labels))))
    patches = list({each.image: each for each in reversed(by_use)}.values())[::-1][:MOST_PATCHES]
    folder = search.folder / PICTURES
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9][0-9].png"):  # of an earlier ranking
        old.unlink()
    drawn = {}
    for each in ranked[:MOST_PICTURES]:
        with search.going_on(lambda why, name=each.model: search.say(f"{name}: no picture ({why})")):  # type: ignore[misc]
            name = f"{PICTURES}/{each.rank:02}.png"
            _draw(search.folder / name, [(patch, _panels(search, each.model, patch)) for patch in patches])
            drawn[each.model] = name
    return drawn


def write_report(search: Search, found: Suggestions, pictures: Mapping[str, str]) -> Suggestions:
    """Write ``report.html`` into the folder of the search, and return what was found with its path."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Which model to start from</title>",
        f"<style>{STYLE}</style><h1>Which model to start from</h1>",
        f"<p class='advice'>{_text(_sentence(found.advice))}</p>",
        _list(found.notes),
        "<h2>Ranking</h2>",
        _table(*_ranking(found)),
        "<p>The score is a weighted mean; docs/search.md says of what, and explains each. In brackets: 95 % interval. "
        "≈ marks models that are too close to the first to call.</p>",
    ]
    if found.features is not None:
        parts.append(
            f"<p>What the image encoders made of the patches is kept; a training with strategy frozen uses it with "
            f"<code>--set resources.feature_cache_dir={_text(str(found.features))}</code></p>"
        )
    if pictures:
        parts.append("<h2>Before any training</h2>")
        parts += [
            f"<h3>{each.rank}. {_text(each.model)}</h3><img src='{pictures[each.model]}' alt='{_text(each.model)}'>"
            for each in found
            if each.model in pictures
        ]
    parts += ["<h2>Times</h2>", _table(*_times(found))]
    (search.folder / TIMES).unlink(missing_ok=True)
    if any(each.timing for each in found):
        draw_times(search.folder / TIMES, found.ranked)
        parts.append(f"<p>{_text(break_even_in_words(found.ranked))}</p><img src='{TIMES}' alt='times'>")
    if found.left_out:
        rows = [[each.model, each.reason] for each in found.left_out]
        parts += ["<h2>Left out</h2>", _table(["model", "why"], rows)]
    if found.downloads:
        rows = [[each.model, f"{each.size_mb} MB", each.advice] for each in found.downloads]
        parts += ["<h2>What a download would add</h2>", _table(["model", "size", "for"], rows)]
    path = search.folder / REPORT
    path.write_text("\n".join(parts) + "</html>\n", encoding="utf-8")
    return replace(found, report=path)


def break_even_in_words(ranked: Sequence[Suggestion]) -> str:
    """Say from how many models on the search takes longer than training the first one."""
    first = next((each for each in ranked if each.timing), None)
    if first is None or first.timing is None:
        return ""
    times = first.timing
    each = times["full"] / times["break_even_models"]
    return (
        f"Training {first.model} in full for {times['epochs']:.0f} epochs of {times['steps']:.0f} steps takes about "
        f"{rough_duration(times['full'])} by the steps that were measured, with a frozen image encoder "
        f"{rough_duration(times['frozen'])}; searching took {duration(each)} a model on average. So searching takes "
        f"longer than training in full from about {_roughly(times['full'] / each)} models on, and longer than training "
        f"with a frozen encoder from {_roughly(times['frozen'] / each)} on."
    )


def _roughly(number: float) -> str:
    """Round to two digits, as times of a few steps are not known better."""
    return f"{max(1, int(float(f'{number:.2g}')))}"


def draw_times(path: Path, ranked: Sequence[Suggestion]) -> None:
    """Draw search, frozen and full finetuning of each model, in seconds on a logarithmic axis."""
    from matplotlib.figure import Figure

    timed = [(each, each.timing) for each in ranked if each.timing]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(timed)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(timed))
    for shift, name, label in ((-0.27, "search", "search"), (0, "frozen", "frozen"), (0.27, "full", "full")):
        axes.barh(rows + shift, [times[name] for _, times in timed], height=0.25, label=label)
    axes.set_yticks(rows, [Path(each.model).name for each, _ in timed])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    figure.legend(loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=110)


def _panels(search: Search, name: str, patch: SearchPatch) -> dict[str, NDArray[Any]]:
    """Return label images "YX" by title."""
    model, embed = search.open(name)
    embedding = embed(patch.patch)
    size = (int(patch.patch.image.shape[-2]), int(patch.patch.image.shape[-1]))
    panels: dict[str, NDArray[Any]] = {}
    with torch.no_grad():
        if search.data.labelled:
            prompts = some_objects(prompts_from_labels(patch.labels), MOST_OBJECTS)
            panels["labels"] = patch.labels
            given, title = box_prompts(prompts), "from boxes of the labels"
        else:
            given, title = point_prompts(grid_points(size)), "from a grid of points"
        masks = prompted_masks(model, embedding, given, size, search.settings)
        panels[title] = _joined(masks)
        if model.instance_decoder is not None:
            panels["automatic"] = automatic(model, embedding, size, search.settings)
    return panels


def _joined(masks: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Join masks "NYX" into one label image, small ones on top."""
    labels = np.zeros(masks.shape[1:], np.int64)
    for index in np.argsort([-int(mask.sum()) for mask in masks]):
        labels[masks[index]] = index + 1
    return labels


def _draw(path: Path, rows: Sequence[tuple[SearchPatch, Mapping[str, NDArray[Any]]]]) -> None:
    """Draw a row for each patch: the image, and the outlines of each panel on it."""
    from matplotlib.figure import Figure

    # As many columns for a model without automatic segmentation, so that pictures of models can be compared.
    columns = 4 if "labels" in rows[0][1] else 3
    figure = Figure(figsize=(3 * columns, 3.2 * len(rows)), layout="constrained")
    for axes, (patch, panels) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        image = patch.patch.image.numpy().transpose(1, 2, 0).clip(0, 255).astype(np.uint8)
        for axis in axes:
            axis.set_axis_off()
        shown = {patch.image.partition(" ")[2] or patch.image: None, **panels}
        for axis, (title, labels) in zip(axes, shown.items(), strict=False):
            axis.imshow(image)
            if labels is not None:
                edges = np.ma.masked_equal(find_boundaries(labels, mode="inner"), False)
                axis.imshow(edges, cmap="autumn", interpolation="nearest")
                title += f": {len(np.unique(labels[labels > 0]))}"
            axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def _ranking(found: Suggestions) -> tuple[list[str], list[list[str]]]:
    names = [name for name in SCORES if any(name in each.scores for each in found)]
    rows = []
    for each in found:
        interval = "" if each.low is None or each.high is None else f" [{each.low:.2f}, {each.high:.2f}]"
        scores = [f"{each.scores[name]:.2f}" if name in each.scores else "" for name in names]
        mark = "≈" if each.too_close else ""
        rows.append([f"{each.rank}", each.model, mark, f"{each.score:.3f}{interval}", *scores, str(each.patches)])
    return ["", "model", "", "score", *(SCORES[name] for name in names), "patches"], rows


def _times(found: Suggestions) -> tuple[list[str], list[list[str]]]:
    columns = {"load": "load", "encode": "encode", "score": "score"}
    timings = ("features", "frozen", "full", "break_even_models")
    with_timing = any(each.timing for each in found)
    rows = []
    for each in found:
        row = [str(each.rank), each.model, *(duration(each.seconds.get(name, 0.0)) for name in columns)]
        if with_timing:
            times = each.timing or {}
            row += [duration(times[name]) if name in times else "" for name in timings[:3]]
            row.append(f"{times[timings[3]]:.0f}" if times else "")
        rows.append(row)
    head = ["", "model", *columns.values()]
    if with_timing:
        head += ["features of all samples", "frozen finetuning", "full finetuning", "models at break-even"]
    return head, rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _list(items: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(_sentence(item))}</li>" for item in items) + "</ul>" if items else ""


def _sentence(text: str) -> str:
    first, _, _ = text.partition(" ")
    is_path = "/" in first or "." in first
    return (text if is_path else text[:1].upper() + text[1:]) + ("" if text.endswith(".") else ".")


def _text(text: str) -> str:
    return html.escape(text, quote=True)
