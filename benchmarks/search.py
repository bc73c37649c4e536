"""Searching against finetuning: features alone, a frozen image encoder, and everything, on the same samples.

    python benchmarks/search.py --models random:vit_t random:vit_b --samples 50 200 --epochs 10 --plot search.png
    python benchmarks/search.py --images cells/ --labels masks/ --models vit_t_lm vit_b_lm

Steps and passes through the image encoder are measured on this machine, a few of each, and multiplied. Without images
it generates some. The table says for each model and number of samples what each way takes, how many times faster
features are than finetuning in full, and from how many models on a search takes longer than the one training that
follows it: for one training (S1), and for the 2.5 trainings of twice the epochs that a search for hyperparameters with
pruning takes (S2). The plot shows where the lines cross.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import napari_resfinetune as rf
from napari_resfinetune.data.synthetic import make_sample

S2_FACTOR = 5.0  # 2.5 trainings of twice the epochs


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["random:vit_t"])
    parser.add_argument("--images")
    parser.add_argument("--labels")
    parser.add_argument("--samples", nargs="+", type=int, default=[50, 200])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--patches", type=int, default=8, help="that the search looks at")
    parser.add_argument("--patch-px", type=int, default=512)
    parser.add_argument("--input-px", type=int, default=1024)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON instead")
    options = parser.parse_args()
    if options.images and not options.labels:
        parser.error("--images: --labels is needed too, since training is measured")
    images: Any = options.images
    labels: Any = options.labels
    if images is None:
        side = max(256, options.patch_px)
        samples = [make_sample("fluorescence_nuclei", seed=seed, shape=(side, side)) for seed in range(4)]
        images, labels = [sample.image for sample in samples], [sample.labels for sample in samples]
    found = rf.suggest_models(
        images,
        labels,
        candidates=options.models,
        patches=options.patches,
        timing=True,
        data={"patch_px": options.patch_px},
        training={"input_px": options.input_px, "epochs": options.epochs},
    )
    rows = [row for each in found if each.timing for row in compare(each, options)]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(table(rows))
    if options.plot is not None:
        draw(options.plot, rows)


def compare(each: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Multiply what was measured by samples and epochs."""
    times = each.timing
    rows = []
    for samples in options.samples:
        features, steps = samples * times["encode"], samples * options.epochs
        full = steps * times["full_step"]
        rows.append(
            {
                "model": each.model,
                "samples": samples,
                "encode": times["encode"],
                "features": features,
                "frozen": features + steps * times["frozen_step"],
                "full": full,
                "times_faster": full / features,
                "break_even_s1": full / times["search"],
                "break_even_s2": S2_FACTOR * full / times["search"],
                "search": times["search"],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as markdown."""
    lines = [
        "| model | samples | features s | frozen s | full s | full / features | search s | break-even, S1 | S2 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['samples']} | {row['features']:.1f} | {row['frozen']:.1f} | {row['full']:.1f} | "
        f"{row['times_faster']:.1f} | {row['search']:.1f} | {row['break_even_s1']:.0f} | {row['break_even_s2']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw the time of a search over the number of models, and that of the training that follows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    most = max(row["break_even_s1"] for row in rows) * 3
    counts = np.geomspace(1, max(most, 10), 50)
    for index, row in enumerate(rows):
        colour = f"C{index}"
        name = f"{Path(row['model']).name}, {row['samples']} samples"
        axes.plot(counts, counts * row["search"], color=colour, label=f"search, {name}")
        axes.axhline(row["full"], color=colour, linestyle="--", label=f"full finetuning, {name}")
    axes.set(xscale="log", yscale="log", xlabel="models", ylabel="seconds")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
