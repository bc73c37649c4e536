"""``resfinetune demo``: the main job on sample cells, in a few minutes, without network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from napari_resfinetune import api
from napari_resfinetune.cli.output import TrainingProgress, results
from napari_resfinetune.data.synthetic import Sample, make_samples
from napari_resfinetune.events import StopToken
from napari_resfinetune.models import load_model, save_model
from napari_resfinetune.training.run_folder import check_output

MODALITY = "fluorescence_nuclei"
SHAPE = (256, 256)
# Objects of the size that they have in an image of 512 px.
FIELD_PX = 512
TRAINING_IMAGES, HELD_OUT_IMAGES = 8, 2
SEED = 7
# A quarter of SAM's field of view at the usual scale, and the instance decoder alone: what makes minutes out of hours.
SETTINGS: dict[str, Any] = {
    "strategy": "full",
    "data": {"patch_px": 128},
    "training": {
        "input_px": 256,
        "targets": "instances",
        "batch_norm": "measure",
        "learning_rate": 3e-4,
        "epochs": 8,
        "samples_per_epoch": 48,
        "batch_size": 2,
        "early_stopping": None,
    },
}


def run_demo(output: Path, stop: StopToken) -> dict[str, Any]:
    """Make samples, finetune, and compare before with after on images that were not trained on.

    Parameters
    ----------
    output
        New or empty folder for images, run and picture.
    stop
        Ends the training early; the comparison is still made.

    Returns
    -------
    dict
        ``before`` and ``after`` (SA50, SA75, mSA of the automatic segmentation), ``picture``, ``run_dir``, ``seconds``.
    """
    check_output(output)
    samples = list(
        make_samples(MODALITY, n=TRAINING_IMAGES + HELD_OUT_IMAGES, seed=SEED, shape=SHAPE, field_px=FIELD_PX)
    )
    for part, chosen in (("train", samples[:TRAINING_IMAGES]), ("held_out", samples[TRAINING_IMAGES:])):
        _write(output / "samples" / part, chosen)
    results.print(f"made {TRAINING_IMAGES} sample images to learn from and {HELD_OUT_IMAGES} to be judged on")
    results.print("the start model is made on the spot, with random weights: it knows nothing yet")
    start = output / "start.pt"
    save_model(start, load_model("random:vit_t", decoder="new", seed=SEED))
    training, held_out = output / "samples" / "train", output / "samples" / "held_out"
    with TrainingProgress() as progress:
        result = api.train(
            training / "images",
            training / "labels",
            model=str(start),
            output=output / "run",
            on_event=progress,
            stop=stop,
            **SETTINGS,
        )
    models = {"before": start, "after": result.run_dir}
    outcome: dict[str, Any] = {"run_dir": str(result.run_dir), "seconds": result.seconds}
    found = {}
    for when, model in models.items():
        loaded = api.load_model(model, decoder="required")
        scores = api.evaluate(held_out / "images", held_out / "labels", model=loaded).to_dict()["ais"]
        outcome[when] = scores
        found[when] = [labels for _, labels in api.segment_many(held_out / "images", model=loaded)]
        results.print(f"{when:>6}: SA50 {scores['sa50']:.2f}, SA75 {scores['sa75']:.2f}, mSA {scores['msa']:.2f}")
    picture = output / "before-after.png"
    _draw(picture, samples[TRAINING_IMAGES:], found["before"], found["after"])
    outcome["picture"] = str(picture)
    results.print(f"picture: {picture}")
    results.print(f"model:   {result.run_dir / 'model.pt'}")
    results.print("next, on your own images:")
    results.print("  resfinetune check --images IMAGES --labels LABELS")
    results.print("  resfinetune train --images IMAGES --labels LABELS --model vit_b_lm --output runs/my-cells")
    return outcome


def _write(folder: Path, samples: list[Sample]) -> None:
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i, sample in enumerate(samples):
        tifffile.imwrite(folder / "images" / f"cells_{i:02}.tif", sample.image, compression="zlib")
        tifffile.imwrite(folder / "labels" / f"cells_{i:02}.tif", sample.labels.astype(np.uint16), compression="zlib")


def _draw(path: Path, samples: list[Sample], before: list[NDArray[np.uint32]], after: list[NDArray[np.uint32]]) -> None:
    from matplotlib.figure import Figure
    from skimage.segmentation import find_boundaries

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
