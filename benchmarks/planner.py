"""Predicted against measured peak memory: models, strategies, objects and levers, each in a process of its own.

    python benchmarks/planner.py                     the whole table, about 25 minutes on two cores
    python benchmarks/planner.py --only vit_t        rows whose name holds the text
    python benchmarks/planner.py --json

Each row runs two steps on a made-up patch of 512 px through `benchmarks/step.py`; its peak is that of the process. The
prediction is what `resfinetune plan` says on a machine that has not learned from any run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SMALL = "checkpoint-encoder,checkpoint-instance-decoder,return-memory"
ROWS = [
    ("vit_t", "full", 1, ""),
    ("vit_t", "full", 10, ""),
    ("vit_t", "full", 35, ""),
    ("vit_t", "full", 10, "checkpoint-instance-decoder"),
    ("vit_t", "full", 5, f"{SMALL},chunk=1"),
    ("vit_t", "full", 10, "input=512"),
    ("vit_t", "frozen", 10, ""),
    ("vit_t", "lora", 10, ""),
    ("vit_t", "late", 10, ""),
    ("vit_t", "full", 10, "targets=masks"),
    ("vit_t", "full", 10, "targets=instances"),
    ("vit_b", "full", 1, ""),
    ("vit_b", "full", 10, ""),
    ("vit_b", "full", 35, ""),
    ("vit_b", "full", 10, "checkpoint-instance-decoder"),
    ("vit_b", "full", 10, "checkpoint-encoder,checkpoint-instance-decoder"),
    ("vit_b", "full", 35, SMALL),
    ("vit_b", "full", 5, f"{SMALL},chunk=1"),
    ("vit_b", "full", 10, "input=512"),
    ("vit_b", "frozen", 10, ""),
    ("vit_b", "late", 10, ""),
    ("vit_b", "lora", 10, ""),
    ("vit_b", "late_lora", 10, ""),
]


def main() -> None:
    """Measure and predict every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    if not options.json:
        print("| model | strategy | objects | levers | predicted GB | measured GB | error |", flush=True)
        print("|---|---|---|---|---|---|---|", flush=True)
    for row in ROWS:
        if options.only not in " ".join(str(part) for part in row):
            continue
        predicted, measured = predict(*row), measure(*row, options.iterations)
        error = predicted / measured - 1
        results.append({"row": row, "predicted_gb": predicted, "measured_gb": measured, "error": error})
        if not options.json:
            model, strategy, objects, levers = row
            print(
                f"| {model} | {strategy} | {objects} | {levers or '-'} | {predicted:.1f} | {measured:.1f} | "
                f"{error:+.0%} |",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))
    else:
        errors = [result["error"] for result in results]
        print(f"\n{len(errors)} rows, error from {min(errors):+.1%} to {max(errors):+.1%}")


def predict(model: str, strategy: str, objects: int, levers: str) -> float:
    """Return what the planner says, in GB."""
    from napari_resfinetune.config import make_config
    from napari_resfinetune.planning import Length, Rates, Work, choose_precision, make_plan, probe_hardware
    from napari_resfinetune.training.dry_run import step_cost

    chosen = dict(lever.partition("=")[::2] for lever in levers.split(",") if lever)
    input_px = int(chosen.get("input", 1024))
    settings: dict[str, Any] = {"kind": strategy, **({"blocks": 3} if strategy.startswith("late") else {})}
    work = Work(
        model,
        strategy=make_config({"strategy": settings}).strategy,
        targets=chosen.get("targets", "both"),  # type: ignore[arg-type]
        precision=choose_precision("auto", "cpu", probe_hardware()).name,
        patch_px=512 * input_px // 1024,
        input_px=input_px,
        objects=objects,
        object_chunk=int(chosen["chunk"]) if "chunk" in chosen else None,
        checkpoint_encoder="checkpoint-encoder" in chosen,
        checkpoint_instance_decoder="checkpoint-instance-decoder" in chosen,
        freed_memory="return" if "return-memory" in chosen else "keep",
        keep_features=strategy in ("frozen", "late", "late_lora"),
    )
    length = Length(epochs=1, steps_per_epoch=50, validation_samples=1)
    return make_plan(work, float("inf"), length, step_cost, lambda _: Rates(1.0), pull_levers=False).peak_gb


def measure(model: str, strategy: str, objects: int, levers: str, iterations: int) -> float:
    """Return what a process that does it takes at most, in GB."""
    command = [sys.executable, "-W", "ignore", str(HERE / "step.py"), "--ours-only", "--json", "--model", model]
    command += ["--strategy", strategy, "--objects", str(objects), "--levers", levers, "--iterations", str(iterations)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["ours"]["peak_gb"])


if __name__ == "__main__":
    main()
