"""Pictures of held-out images with outlines of what was found, found wrongly and missed."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.segmentation import find_boundaries

from napari_resfinetune.errors import ConfigError
from napari_resfinetune.evaluation.scores import matched_ids

if TYPE_CHECKING:
    from napari_resfinetune.reporting.run import RunView

# Told apart with every kind of colour vision, and from gray: Okabe and Ito 2008.
FOUND, EXTRA, MISSED, TRUTH = (0, 158, 115), (230, 159, 0), (213, 50, 190), (86, 180, 233)
SIDE_PX, LINE_PX = 640, 3
_ARRAYS = ("image", "labels", "before", "after")


@dataclass(frozen=True)
class Picture:
    """One held-out window: the truth, and what both models made of it.

    Attributes
    ----------
    name
        Of the image.
    panels
        By title, a picture as a data URL.
    facts
        As ``comparison.json`` has them.
    """

    name: str
    panels: Mapping[str, str]
    facts: Mapping[str, Any]


def draw_pictures(run: RunView) -> list[Picture]:
    """Draw the windows that changed most, as far as their arrays are there.

    Raises
    ------
    ConfigError
        When a file holds something else than a run wrote.
    """
    pictures = []
    for number, facts in enumerate(run.comparison.get("pictures", ())):
        # The name is ours; what the file says about itself is not followed out of the folder.
        path = run.path / "comparison" / f"{number}.npz"
        if not path.is_file():
            continue
        try:
            # numpy leaves a file open that turns out to be damaged.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                image, labels, before, after = (file[name] for name in _ARRAYS)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); delete it, or start a new run") from None
        panels = {"labels": _outlined(image, [(labels, TRUTH)])}
        for title, found in (("before", before), ("after", after)):
            panels[title] = _judged(image, labels, found)
        pictures.append(Picture(str(facts.get("name", "")), panels, facts))
    return pictures


def _judged(image: NDArray[np.uint8], labels: NDArray[Any], found: NDArray[Any]) -> str:
    true_ids, found_ids = matched_ids(labels, found)
    right = np.where(np.isin(found, found_ids), found, 0)
    extra = np.where(np.isin(found, found_ids), 0, found)
    missed = np.where(np.isin(labels, true_ids), 0, labels)
    return _outlined(image, [(missed, MISSED), (extra, EXTRA), (right, FOUND)])


def _outlined(image: NDArray[np.uint8], layers: list[tuple[NDArray[Any], tuple[int, int, int]]]) -> str:
    """Return a PNG as data URL; small images are enlarged first, so that outlines are thin beside objects."""
    factor = max(1, SIDE_PX // max(image.shape[:2]))
    width = max(1, round(factor * max(image.shape[:2]) / SIDE_PX * LINE_PX))
    canvas = np.repeat(np.repeat(image, factor, 0), factor, 1)
    for labels, color in layers:
        large = np.repeat(np.repeat(labels, factor, 0), factor, 1)
        edges = find_boundaries(large, mode="inner")
        if width > 1:
            edges = binary_dilation(edges, iterations=width - 1) & (large > 0)
        canvas[edges] = color
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
