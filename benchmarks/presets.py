"""Train under presets with their limits kept by the system, and say what it came to.

    python benchmarks/presets.py --steps 20 --presets cpu-8gb cpu-16gb
    python benchmarks/presets.py --steps 20 --presets gtx1080 rtx5000 rtx3090 v100 a100 --device cuda

Both models of each preset, all layers, in a child process that Linux or the card's driver refuses more memory than the
preset allows. Weights are random, images are made up; neither changes what a step takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Run presets and models one after the other."""
    import napari_resfinetune as rf
    from napari_resfinetune.data.synthetic import make_sample
    from napari_resfinetune.events import Event

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["cpu-8gb", "cpu-16gb", "cpu-32gb", "cpu-64gb"])
    parser.add_argument("--models", nargs="+", default=["vit_t", "vit_b"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    samples = [make_sample("fluorescence_nuclei", seed=seed, shape=(640, 640), field_px=512) for seed in range(3)]
    images, labels = [s.image for s in samples], [s.labels.astype(np.int32) for s in samples]
    print(
        "| preset | model | objects | levers of the plan | pulled later | limit GB | planned GB | peak GB | s a step |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for preset in options.presets:
        for model in options.models:
            events: list[Event] = []
            with tempfile.TemporaryDirectory() as folder:
                try:
                    rf.train(
                        images,
                        labels,
                        model=f"random:{model}",
                        preset=preset,
                        output=Path(folder) / "run",
                        isolate=True,
                        on_event=events.append,
                        training={"epochs": 1, "samples_per_epoch": options.steps, "compare": False, "report": False},
                        resources={"device": options.device},
                    )
                except rf.ResFinetuneError as error:
                    print(f"{preset}, {model}: {error}", file=sys.stderr)
                _report(preset, model, events, Path(folder) / "run")
            sys.stdout.flush()


def _report(preset: str, model: str, events: list[Any], run: Path) -> None:
    from napari_resfinetune.events import MemoryLever, Step

    steps = [event for event in events if isinstance(event, Step)]
    if not steps:
        print(f"| {preset} | {model} | | | | | | failed | |")
        return
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    named = [lever["lever"].partition(".")[2] for lever in plan["levers"]]
    later = [event.lever.partition(".")[2] for event in events if isinstance(event, MemoryLever)]
    peak = max(event.peak_memory_gb for event in steps)
    seconds = statistics.median(event.seconds for event in steps[1:]) if len(steps) > 1 else steps[0].seconds
    print(
        f"| {preset} | {model} | {plan['objects']} | {', '.join(named) or '-'} | {', '.join(later) or '-'} | "
        f"{plan['limit_gb']:.1f} | {plan['peak_gb']:.1f} | {peak:.1f} | {seconds:.1f} |"
    )


if __name__ == "__main__":
    main()
