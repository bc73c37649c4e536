"""A start model for benchmarks where there is no network: `vit_t`, trained for some minutes on generated images.

    python benchmarks/make_start.py start.pt --cpu-seconds 600

It learns both decoders from fluorescence, histology and phase contrast as the generator draws them, and knows just
enough for comparisons of one setting with another to mean something.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import napari_resfinetune as rf
from napari_resfinetune.data.synthetic import make_sample
from napari_resfinetune.events import Event, Step

KINDS = ("fluorescence_nuclei", "histology", "phase_contrast")
IMAGES_PER_KIND, IMAGE_PX = 6, 384


def main() -> None:
    """Make images and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--cpu-seconds", type=float, default=600)
    options = parser.parse_args()
    stop, began = rf.StopToken(), time.process_time()

    def watch(event: Event) -> None:
        if isinstance(event, Step) and time.process_time() - began > options.cpu_seconds:
            stop.stop()

    samples = [
        make_sample(kind, seed=seed, shape=(IMAGE_PX, IMAGE_PX)) for kind in KINDS for seed in range(IMAGES_PER_KIND)
    ]
    settings: dict[str, Any] = {
        "data": {"patch_px": 128},
        "training": {
            "compare": False,
            "report": False,
            "input_px": 256,
            "batch_norm": "measure",
            "learning_rate": 5e-4,
            "objects": 5,
            "sub_iterations": 3,
            "epochs": 1000,
            "early_stopping": None,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        images, labels = [sample.image for sample in samples], [sample.labels for sample in samples]
        result = rf.train(
            images, labels, model="random:vit_t", output=f"{folder}/run", on_event=watch, stop=stop, **settings
        )
        shutil.copyfile(result.run_dir / "model.pt", options.path)
    print(f"{options.path}: {result.seconds:.0f} s, best epoch {result.best_epoch}, metric {result.best_metric}")


if __name__ == "__main__":
    main()
