"""``resfinetune demo``: the main job on sample cells, in a few minutes, without network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from skimage.measure import label
from skimage.segmentation import find_boundaries, relabel_sequential

from napari_resfinetune import api
from napari_resfinetune.cli.output import TrainingProgress
from napari_resfinetune.config import DataConfig
from napari_resfinetune.data.synthetic import Sample, make_sample
from napari_resfinetune.evaluation.scores import mean_scores, score
from napari_resfinetune.events import StopToken
from napari_resfinetune.models.names import STARTER
from napari_resfinetune.training.run_folder import check_output

# Cells that touch, of which the start model makes lumps, and which it learns to tell apart in minutes.
MODALITY = "crowded_cytoplasm"
SEED = 24
# One scene, cut into fields of view: small ones to learn from, large ones, which the model never sees, to be judged on.
SCENE_SHAPE, FIELD_PX = (1024, 1280), 512
TRAINING_PX, TRAINING_WIDTH, HELD_OUT_PX = 256, 768, 512
MIN_OBJECT_PX = DataConfig().min_object_px
SCORES = {"SA50": "sa50", "SA75": "sa75", "mSA": "msa"}
# A quarter of SAM's field of view at the usual scale, and the instance decoder alone: what makes minutes out of hours.
SETTINGS: dict[str, Any] = {
    "strategy": "full",
    "data": {"patch_px": 128},
    "training": {
        "input_px": 256,
        "targets": "instances",
        "learning_rate": 3e-4,
        "epochs": 2,
        "samples_per_epoch": 48,
        "batch_size": 2,
        "early_stopping": None,
        "compare": False,  # the demo does so itself, on more of the scene
    },
}


def run_demo(output: Path, stop: StopToken, say: Callable[[str], None]) -> dict[str, Any]:
    """Make samples, finetune, and compare before with after on images that were not trained on.

    Parameters
    ----------
    output
        New or empty folder for images, run and picture.
    stop
        Ends the training early; the best model so far is compared.
    say
        Called with each line for the person who watches.

    Returns
    -------
    dict
        ``status``, ``run_dir``, ``seconds``, and once there is a model ``before`` and ``after`` (SA50, SA75, mSA of the
        automatic segmentation) and ``picture``.
    """
    check_output(output)
    training, held_out = cut_scene()
    _write(output / "samples" / "train", training)
    _write(output / "samples" / "held_out", held_out)
    say(f"made {len(training)} sample images to learn from and {len(held_out)} to be judged on")
    say(f"the start model is {STARTER!r}, which comes with this package")
    images, labels = (output / "samples" / "train" / kind for kind in ("images", "labels"))
    with TrainingProgress() as progress:
        result = api.train(
            images, labels, model=STARTER, output=output / "run", on_event=progress, stop=stop, **SETTINGS
        )
    outcome: dict[str, Any] = {"status": result.status, "run_dir": str(result.run_dir), "seconds": result.seconds}
    if result.best_epoch < 0:
        return outcome
    say("\non images that it has not seen:")
    found = {}
    for when, model in (("before", STARTER), ("after", result.run_dir)):
        found[when] = [labels for _, labels in api.segment_many([sample.image for sample in held_out], model=model)]
        outcome[when] = mean_scores(
            score(sample.labels, one) for sample, one in zip(held_out, found[when], strict=True)
        )
        say(f"{when:>8}: " + ", ".join(f"{name} {outcome[when][key]:.2f}" for name, key in SCORES.items()))
    picture = output / "before-after.png"
    _draw(picture, held_out, found["before"], found["after"])
    outcome["picture"] = str(picture)
    say(f"\npicture: {picture}\nmodel:   {result.run_dir / 'model.pt'}\n\nnext, on your own images:")
    say("  resfinetune check --images IMAGES --labels LABELS")
    say("  resfinetune train --images IMAGES --labels LABELS --model vit_b_lm --output runs/my-cells")
    return outcome


def cut_scene() -> tuple[list[Sample], list[Sample]]:
    """Return samples to learn from and samples to be judged on, from different parts of one scene."""
    scene = make_sample(MODALITY, seed=SEED, shape=SCENE_SHAPE, field_px=FIELD_PX)

    def cut(y: int, x: int, size: int) -> Sample:
        where = np.s_[y : y + size, x : x + size]
        # What the cut leaves of a cell may be in pieces, or too little to learn from.
        cells = label(scene.labels[where])
        cells[np.bincount(cells.ravel())[cells] < MIN_OBJECT_PX] = 0
        return Sample(scene.image[where], relabel_sequential(cells.astype(np.int32))[0], MODALITY)

    height, width = SCENE_SHAPE
    training = [
        cut(y, x, TRAINING_PX) for y in range(0, height, TRAINING_PX) for x in range(0, TRAINING_WIDTH, TRAINING_PX)
    ]
    return training, [cut(y, width - HELD_OUT_PX, HELD_OUT_PX) for y in range(0, height, HELD_OUT_PX)]


def _write(folder: Path, samples: list[Sample]) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i, sample in enumerate(samples):
        tifffile.imwrite(folder / "images" / f"cells_{i:02}.tif", sample.image, compression="zlib")
        tifffile.imwrite(folder / "labels" / f"cells_{i:02}.tif", sample.labels.astype(np.uint16), compression="zlib")


def _draw(path: Path, samples: list[Sample], before: list[NDArray[np.uint32]], after: list[NDArray[np.uint32]]) -> None:
    from matplotlib.figure import Figure

    titles = ("image", "labels", "before", "after")
    figure = Figure(figsize=(3 * len(titles), 3.2 * len(samples)), layout="constrained")
    axes = figure.subplots(len(samples), len(titles), squeeze=False)
    for row, sample, *predictions in zip(axes, samples, before, after, strict=True):
        for axis, title, labels in zip(row, titles, (None, sample.labels, *predictions), strict=True):
            axis.imshow(sample.image, cmap="gray", vmax=np.percentile(sample.image, 99.8))
            if labels is not None:
                edges = np.ma.masked_equal(find_boundaries(labels, mode="inner"), False)
                axis.imshow(edges, cmap="autumn", interpolation="nearest")
                title += f": {len(np.unique(labels[labels > 0]))} objects"
            axis.set_title(title)
            axis.set_axis_off()
    figure.savefig(path, dpi=110)
