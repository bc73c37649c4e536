"""Peak memory and time of segmenting one image that is larger than memory, and whether tiles leave seams.

    python benchmarks/large_image.py                             20,000 x 20,000 px with a model whose answers are known
    python benchmarks/large_image.py --model runs/cells          the same with a real network
    python benchmarks/large_image.py --side 5000 --mode apg

The image is made on the fly, a zarr of cells in a pattern that repeats, and so is the output, an OME-Zarr with
pyramid. The known model is the one of `tests/see_through.py`: it sees the objects exactly, so that whatever is cut or
lost is the tiling's doing. A part of the image, 3,000 px wide and across several tiles, is segmented once more in one
piece; objects that lie in it as a whole should be the same to the pixel (windows lie elsewhere there, so a real network
gives nearly the same). Memory is the most that this process ever held, with Python, torch and the model.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from napari_resfinetune.data.sources import open_array
from napari_resfinetune.data.synthetic import make_sample
from napari_resfinetune.inference import segment_files, segment_source
from napari_resfinetune.models import SamModel, load_model

PATTERN_PX = 1000
PART_PX = 3000
KNOWN = "see-through"


def make_image(path: Path, side: int, model: str) -> int:
    """Write the image, "YXC" or "YX", and return how many objects there are (0: not known)."""
    if model == KNOWN:
        from see_through import disks, paint

        labels = disks((PATTERN_PX, PATTERN_PX), step=80, radius=30, border=60)
        # Every object lies in one copy of the pattern, so that there are as many as copies times objects.
        pattern, objects = paint(labels).astype(np.uint8), int(labels.max())
    else:
        sample = make_sample("fluorescence_nuclei", seed=1, shape=(PATTERN_PX // 4,) * 2).image
        pattern, objects = np.kron(sample, np.ones((4, 4), sample.dtype)), 0
    shape = (side, side, *pattern.shape[2:])
    names = list("yxc"[: len(shape)])
    chunks = (PATTERN_PX, PATTERN_PX, *pattern.shape[2:])
    array: Any = zarr.create_array(path, shape=shape, chunks=chunks, dtype=pattern.dtype, dimension_names=names)
    for y in range(0, side, PATTERN_PX):
        for x in range(0, side, PATTERN_PX):
            block = array[y : y + PATTERN_PX, x : x + PATTERN_PX].shape
            array[y : y + PATTERN_PX, x : x + PATTERN_PX] = pattern[: block[0], : block[1]]
    return objects * (side // PATTERN_PX) ** 2 if side % PATTERN_PX == 0 else 0


def same_objects(whole: np.ndarray, part: np.ndarray, margin: int) -> tuple[int, int]:
    """Count objects of `whole` inside of a margin, and those that `part` has to the pixel."""
    inner = np.unique(whole[margin:-margin, margin:-margin])
    frame = np.ones(whole.shape, bool)
    frame[margin:-margin, margin:-margin] = False
    inner = np.setdiff1d(inner, np.append(np.unique(whole[frame]), 0))
    pairs, counts = np.unique(np.stack([whole.ravel(), part.ravel()]), axis=1, return_counts=True)
    in_whole, in_part = np.bincount(whole.ravel()), np.bincount(part.ravel())
    equal = sum(
        int(count == in_whole[one] == in_part[other])
        for (one, other), count in zip(pairs.T, counts, strict=True)
        if other and np.isin(one, inner)
    )
    return len(inner), equal


def measure(side: int, model_name: str, mode: str, patch_px: int, folder: Path) -> dict[str, Any]:
    """Make the image, segment it, and look at the result."""
    if model_name == KNOWN:
        from see_through import see_through_model

        model: SamModel = see_through_model(point_px=30 * 1024 / patch_px)
        model.sam.image_encoder.calls = collections.deque(maxlen=1)  # it keeps what it was shown
    else:
        model = load_model(model_name, decoder="required")
    expected = make_image(folder / "image.zarr", side, model_name)
    source = open_array(folder / "image.zarr")
    settings: dict[str, Any] = {"mode": mode, "patch_px": patch_px}
    settings["percentiles"] = (0.0, 100.0) if model_name == KNOWN else (0.1, 99.9)
    windows = 0

    def count(name: str, done: int, total: int) -> None:
        nonlocal windows
        windows = total
        if done % max(1, total // 20) == 0:
            sys.stderr.write(f"{done} of {total} windows, {peak_gb():.2f} GB\n")

    before, start = peak_gb(), time.perf_counter()
    (file,) = segment_files(model, [source], folder / "out", form="zarr", on_progress=count, **settings)
    seconds = time.perf_counter() - start
    peak = peak_gb()
    at = slice((side - PART_PX) // 2, (side + PART_PX) // 2)
    found = open_array(file.labels).read((at, at))
    one_piece = segment_source(model, open_array(np.asarray(source.read((at, at))), axes=source.axes), **settings)
    inner, equal = same_objects(np.asarray(one_piece), found, margin=min(512, PART_PX // 6))
    return {
        "side_px": side,
        "model": model_name,
        "mode": mode,
        "windows": windows,
        "seconds": round(seconds),
        "peak_gb": round(peak, 2),
        "peak_gb_before": round(before, 2),
        "objects": file.objects,
        "objects_expected": expected or None,
        "objects_compared": inner,
        "objects_equal": equal,
    }


def peak_gb() -> float:
    """Return the most memory that this process has held, in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000, metavar="PX")
    parser.add_argument("--model", default=KNOWN)
    parser.add_argument("--mode", default="ais")
    parser.add_argument("--patch", type=int, default=1024, metavar="PX")
    parser.add_argument("--folder", type=Path, help="where to put image and result; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        print(json.dumps(measure(options.side, options.model, options.mode, options.patch, Path(temporary))))
