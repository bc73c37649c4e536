"""Kill training at random moments again and again, resume each time, and compare with an undisturbed run.

    python benchmarks/kill.py --times 20

A child trains a small run; this process kills it (SIGKILL) after a random time from its first step on, so in the middle
of steps, validations and checkpoints alike. In the end the weights must be those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil


def main() -> None:
    """Run undisturbed, then with kills, then compare."""
    import napari_resfinetune as rf
    from napari_resfinetune.data.synthetic import make_sample
    from napari_resfinetune.events import Event, Failed, Step

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within-seconds", type=float, default=6.0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    samples = [make_sample("fluorescence_nuclei", seed=seed, shape=(160, 160), field_px=512) for seed in range(3)]
    images, labels = [s.image for s in samples], [s.labels.astype(np.int32) for s in samples]
    settings: dict[str, Any] = {
        "data": {"patch_px": 64},
        "training": {
            "compare": False,
            "report": False,
            "epochs": 2 * options.times,
            "samples_per_epoch": 4,
            "input_px": 128,
            "objects": 3,
            "sub_iterations": 2,
            "early_stopping": None,
            "save_minutes": 0.02,
        },
        "resources": {"device": "cpu", "precision": "fp32", "threads": 1},  # so that it may run beside other work
    }
    with tempfile.TemporaryDirectory() as folder:
        calm, run = Path(folder) / "calm", Path(folder) / "run"
        rf.train(images, labels, model="random:vit_t", output=calm, isolate=True, **settings)
        kills = finished = 0
        all_said = True
        while not finished:
            reported: list[Event] = []

            def watch(event: Event, reported: list[Event] = reported, more: bool = kills < options.times) -> None:
                first_step = isinstance(event, Step) and not any(isinstance(each, Step) for each in reported)
                reported.append(event)
                if first_step and more:
                    child = psutil.Process().children()[-1]
                    threading.Timer(rng.uniform(0, options.within_seconds), child.kill).start()

            try:
                if (run / "config.yaml").is_file():
                    rf.resume(run, images, labels, isolate=True, on_event=watch)
                else:
                    rf.train(images, labels, model="random:vit_t", output=run, isolate=True, on_event=watch, **settings)
                finished = 1
            except rf.TrainingError as error:
                if "was killed" not in str(error):
                    raise
                kills += 1
                said = isinstance(reported[-1], Failed)
                all_said = all_said and said
                at = next((e for e in reversed(reported[:-1]) if hasattr(e, "epoch")), None)
                where = f"after {type(at).__name__} of epoch {at.epoch + 1}" if at is not None else "at the start"
                print(f"kill {kills}: {where}; reported: {said}; {str(error)[-60:]}", flush=True)
        same = _weights(calm) == _weights(run) != {}
        print(f"{kills} kills, all reported: {all_said}, all resumed; weights at the end are equal: {same}")
        if not (same and all_said):
            raise SystemExit(1)


def _weights(run: Path) -> dict[str, bytes]:
    latest = run / "checkpoints" / "latest"
    return {path.name: path.read_bytes() for path in sorted(latest.glob("*.safetensors"))}


if __name__ == "__main__":
    main()
