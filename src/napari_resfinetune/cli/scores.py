"""How the command shows scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from napari_resfinetune.cli.output import print_table, results
from napari_resfinetune.words import short_names

if TYPE_CHECKING:
    from napari_resfinetune.evaluation import Evaluation, ImageScore

METRICS = {
    "SA50": "sa50",
    "SA75": "sa75",
    "mSA": "msa",
    "Dice": "dice",
    "precision": "precision",
    "recall": "recall",
    "PQ": "pq",
}
COUNTS = {"true": "n_true", "predicted": "n_pred", **{kind: kind for kind in ("missed", "extra", "merged", "split")}}


def scores_as_json(found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return means by mode; for several models those of each, by its name."""
    means = {name: evaluation.to_dict() for name, evaluation in found.items()}
    return means if len(means) > 1 else next(iter(means.values()))


def print_scores(found: Mapping[str, Evaluation]) -> None:
    """Print a line per image for one model, then means and sizes of all models."""
    if len(found) == 1:
        (evaluation,) = found.values()
        rows = [row for mode in evaluation.modes for row in evaluation.of_mode(mode)]
        by_mode = {"mode": "left"} if len(evaluation.modes) > 1 else {}
        print_table(
            {"image": "left", **by_mode, **dict.fromkeys(("SA50", "SA75", "mSA", *COUNTS), "right")},
            [[row.where, *([row.mode] * len(by_mode)), *_main(row), *_counts(row)] for row in rows],
        )
        results.print()
    summaries = {name: evaluation.summary() for name, evaluation in found.items()}
    lines = [(name, mode, of_mode) for name, summary in summaries.items() for mode, of_mode in summary.items()]
    several = {"model": "left"} if len(found) > 1 else {}
    short = short_names(found)
    first, *others = METRICS

    def table(columns: Sequence[str], cells: Callable[[Mapping[str, Any]], Sequence[str]]) -> None:
        rows = [[*([short[name]] * len(several)), mode, *cells(of_mode)] for name, mode, of_mode in lines]
        print_table({**several, "mode": "left", **dict.fromkeys(columns, "right")}, rows)

    results.print("means over images, with the 95 % interval of SA50:")
    table([first, "", *others], lambda of_mode: [_mean(of_mode, first), _interval(of_mode), *_means(of_mode, others)])
    results.print("\nobjects:")
    table(list(COUNTS), lambda of_mode: [str(of_mode["counts"][key]) for key in COUNTS.values()])
    if any(of_mode["sizes"] for _, _, of_mode in lines):
        results.print("\nrecall of thirds of the objects by size, in px:")
        table(["small", "medium", "large"], lambda of_mode: _sizes(of_mode["sizes"]))
    for name, mode, of_mode in lines:
        if of_mode["rounds"]:
            after = " ".join(f"{means['sa50']:.3f}" for means in of_mode["rounds"])
            results.print(f"\n{name}, {mode}: SA50 after each round of prompts: {after}".replace("[", r"\["))


def _main(row: ImageScore) -> list[str]:
    return [f"{getattr(row, key):.2f}" for key in ("sa50", "sa75", "msa")]


def _counts(row: ImageScore) -> list[str]:
    return [str(getattr(row, key)) for key in COUNTS.values()]


def _interval(summary: Mapping[str, Any]) -> str:
    interval = summary["intervals"]["sa50"]
    return "one image" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}"


def _mean(summary: Mapping[str, Any], metric: str) -> str:
    return f"{summary['means'][METRICS[metric]]:.2f}"


def _means(summary: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    return [_mean(summary, metric) for metric in metrics]


def _sizes(sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    by_name = {size["name"]: f"{size['recall']:.2f} ({size['from_px']}-{size['to_px']})" for size in sizes}
    return [by_name.get(name, "") for name in ("small", "medium", "large")]
