"""Draw docs/images/synthetic.png: samples of each synthetic modality, the outlines of the labels in the lower rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from napari_resfinetune.data.synthetic import MODALITIES, Sample, make_sample

TILE_PX = 224


def to_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Stretch an image's contrast and return it as uint8 "YXC"."""
    low, high = np.percentile(image, (0.5, 99.8))
    grey = np.clip((image.astype(np.float32) - low) / max(float(high - low), 1e-6), 0, 1)
    rgb = grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=2)
    return np.asarray(np.rint(rgb * 255), dtype=np.uint8)


def tile(sample: Sample, outlined: bool) -> NDArray[np.uint8]:
    """One picture of the sheet, framed in white."""
    rgb = to_rgb(sample.image)
    if outlined:
        edges = ndimage.minimum_filter(sample.labels, 3) != sample.labels
        rgb[edges] = (255, 220, 0)
    return np.pad(rgb, ((2, 2), (2, 2), (0, 0)), constant_values=255)


def sheet(columns: int, seed: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """All modalities below each other, each as one row of pictures and one with outlines."""
    rows = []
    for modality in MODALITIES:
        # A window of a field twice as wide: large enough to see the texture.
        samples = [make_sample(modality, seed=seed + k, shape=shape, field_px=2 * max(shape)) for k in range(columns)]
        rows += [np.concatenate([tile(sample, outlined) for sample in samples], axis=1) for outlined in (False, True)]
    return np.concatenate(rows, axis=0)


def main() -> None:
    """Read the options and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[1] / "docs" / "images" / "synthetic.png"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(sheet(options.columns, options.seed, (TILE_PX, TILE_PX)))
    # 256 colours are enough to judge by and keep the file small.
    picture.quantize(128).save(options.output, optimize=True)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
