"""Training runs that are small enough for tests: three images of bright squares, TinyViT at 128 px."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

import napari_resfinetune as rf
from napari_resfinetune.events import Event
from napari_resfinetune.models import load_model, save_model
from napari_resfinetune.models.weights import load_safetensors

SMALL: dict[str, Any] = {
    "data": {"patch_px": 64},
    "resources": {"precision": "fp32", "device": "cpu"},
}
TRAINING: dict[str, Any] = {
    "input_px": 128,
    "epochs": 3,
    "samples_per_epoch": 4,
    "batch_size": 2,
    "objects": 3,
    "sub_iterations": 2,
    "learning_rate": 1e-3,
    # Both take longer than such a run.
    "compare": False,
    "report": False,
}


def make_cells(folder: Path) -> Path:
    """Make folders with three small images of bright squares and their labels, and a start model."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(3):
        labels = np.zeros((96, 96), np.uint16)
        for j, (y, x) in enumerate(np.ndindex(3, 3)):
            size = rng.integers(8, 20)
            labels[8 + 28 * y : 8 + 28 * y + size, 8 + 28 * x : 8 + 28 * x + size] = j + 1
        image = np.where(labels > 0, 3000, 400) + rng.integers(0, 300, labels.shape)
        tifffile.imwrite(folder / "images" / f"c{i}.tif", image.astype(np.uint16))
        tifffile.imwrite(folder / "labels" / f"c{i}.tif", labels)
    save_model(folder / "start.pt", load_model("random:vit_t", decoder="new", seed=3))
    return folder


def run(cells: Path, output: Path, events: list[Event] | None = None, **changes: Any) -> rf.TrainResult:
    settings = {**SMALL, "training": {**TRAINING, **changes.pop("training", {})}, **changes}
    on_event = events.append if events is not None else None
    return rf.train(
        cells / "images", cells / "labels", model=cells / "start.pt", output=output, on_event=on_event, **settings
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("model", "instance_decoder")
        for key, value in load_safetensors(folder / f"{name}.safetensors").items()
    }
