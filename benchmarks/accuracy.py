"""What a setting does to the scores: the same data and computing time, several seeds, held-out images.

    python benchmarks/accuracy.py --images DIR --labels DIR --model start.pt \
        --vary training.update=together,alternating --cpu-seconds 600 --seeds 0 1 2
    python benchmarks/accuracy.py ... --vary strategy.kind=full,frozen,late,lora --set data.max_images=2

Every run has a process of its own and ends once training has taken `--cpu-seconds` of processor time, which, unlike
time on the clock, hardly depends on what else the machine does. The best checkpoint by validation is then scored on
every second image, which no run has seen in any way. Prints a table of means over seeds with the single values; with
`--json`, everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Run all values and seeds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--vary", required=True, metavar="KEY=A,B,...", help="the key to vary, and its values")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="what all runs share")
    parser.add_argument("--cpu-seconds", type=float, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=["ais", "box"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options, json.loads(options.one))))
        return
    key, _, values = options.vary.partition("=")
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:  # seed by seed, so that a broken-off table is still a fair one
        for value in values.split(","):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *sys.argv, "--one", json.dumps([f"{key}={value}", seed])],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode:
                print(f"seed {seed}, {key}={value}: failed", file=sys.stderr)
                continue
            results.setdefault(value, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(f"seed {seed}, {key}={value}: {results[value][-1]}", file=sys.stderr)
    print(json.dumps(results) if options.json else table(results))


def run_one(options: argparse.Namespace, what: tuple[str, int]) -> dict[str, Any]:
    """Train once and score the held-out images."""
    import napari_resfinetune as rf
    from napari_resfinetune.config import make_config, merge, parse_overrides
    from napari_resfinetune.events import Event, Step

    varied, seed = what
    stop, steps, began = rf.StopToken(), 0, 0.0

    def watch(event: Event) -> None:
        nonlocal steps, began
        if isinstance(event, Step):
            steps += 1
            began = began or time.process_time()
            if time.process_time() - began > options.cpu_seconds:
                stop.stop()

    places = (options.images, options.labels)
    files = [sorted(path for path in Path(place).iterdir() if path.is_file()) for place in places]
    named_data = {name: [str(path) for path in of[::2]] for name, of in zip(("images", "labels"), files, strict=True)}
    unseen = [[str(path) for path in of[1::2]] for of in files]
    overrides = parse_overrides([*options.set, varied, f"training.seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        named = {"model": options.model, "output": f"{folder}/run", "data": named_data}
        config = make_config(merge(named, overrides), "benchmark")
        result = rf.train(config, stop=stop, on_event=watch)
        scores = rf.evaluate(*unseen, model=result.run_dir, modes=options.modes).to_dict()
    found = {f"{mode}_{name}": scores[mode][name] for mode in options.modes for name in ("sa50", "msa")}
    return {"steps": steps, "best_epoch": result.best_epoch, "peak_gb": result.peak_memory_gb, **found}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return means, with single values in brackets, as a table in Markdown."""
    columns = list(next(iter(results.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for value, runs in results.items():
        cells = []
        for column in columns:
            single = [run[column] for run in runs]
            digits = 0 if column in ("steps", "best_epoch") else 2
            each = ", ".join(f"{number:.{digits}f}" for number in single)
            cells.append(f"{statistics.mean(single):.{digits}f} ({each})")
        lines.append(f"| {value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
