"""How the command shows scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from napari_resfinetune.cli.output import print_table, results

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
COUNTS = {"true": "n_true", "found": "n_pred", **{kind: kind for kind in ("missed", "extra", "merged", "split")}}


def scores_as_json(found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return means by mode; for several models those of each, by its name."""
    means = {name: evaluation.to_dict() for name, evaluation in found.items()}
    return means if len(means) > 1 else next(iter(means.values()))


def print_scores(found: Mapping[str, Evaluation]) -> None:
    """Print a line per image for one model, then means and sizes of all models."""
    if len(found) == 1:
        (evaluation,) = found.values()
        rows = [row for mode in evaluation.modes for row in evaluation.of_mode(mode)]
        print_table(
            {"image": "left", "mode": "left", **dict.fromkeys(("SA50", "SA75", "mSA", *COUNTS), "right")},
            [[row.where, row.mode, *_main(row), *_counts(row)] for row in rows],
        )
        results.print()
    summaries = {name: evaluation.summary() for name, evaluation in found.items()}
    lines = [(name, mode, of_mode) for name, summary in summaries.items() for mode, of_mode in summary.items()]
    several = {"model": "left"} if len(found) > 1 else {}
    print_table(
        {**several, "mean": "left", "SA50 (95 % interval)": "left", **dict.fromkeys(list(METRICS)[1:], "right")},
        [[*([name] * len(several)), mode, _with_interval(of_mode), *_means(of_mode)] for name, mode, of_mode in lines],
    )
    results.print()
    print_table(
        {**several, "objects": "left", **dict.fromkeys(COUNTS, "right"), "recall of small, medium, large": "left"},
        [
            [
                *([name] * len(several)),
                mode,
                *(str(of_mode["counts"][key]) for key in COUNTS.values()),
                ", ".join(_size(size) for size in of_mode["sizes"]),
            ]
            for name, mode, of_mode in lines
        ],
    )
    for name, mode, of_mode in lines:
        if of_mode["rounds"]:
            after = " ".join(f"{means['sa50']:.3f}" for means in of_mode["rounds"])
            results.print(f"\n{name}, {mode}: SA50 after each round of prompts: {after}".replace("[", r"\["))


def _main(row: ImageScore) -> list[str]:
    return [f"{getattr(row, key):.3f}" for key in ("sa50", "sa75", "msa")]


def _counts(row: ImageScore) -> list[str]:
    return [str(getattr(row, key)) for key in COUNTS.values()]


def _with_interval(summary: Mapping[str, Any]) -> str:
    interval = summary["intervals"]["sa50"]
    spread = "one image" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return f"{summary['means']['sa50']:.3f} ({spread})"


def _means(summary: Mapping[str, Any]) -> list[str]:
    return [f"{summary['means'][key]:.3f}" for key in list(METRICS.values())[1:]]


def _size(size: Mapping[str, Any]) -> str:
    return f"{size['recall']:.2f} ({size['from_px']}-{size['to_px']} px)"
