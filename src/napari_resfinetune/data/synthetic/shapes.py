"""Outlines of cells and nuclei, and the canvas they are placed on.

An outline is a table of radii over `ANGLES` directions, of mean square 1, so that a radius in pixels times the table
has the area of a disc of that radius. Where objects meet, a pixel goes to the one whose normalised radius
(`rho`: 0 in the centre, 1 on the outline) is smaller, which gives contact lines as between touching cells.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from napari_resfinetune.data.synthetic.optics import Field

ANGLES = 512
MIN_AREA_PX = 25
OUTSIDE = np.float32(2.0)

Outline = NDArray[np.float32]
OutlineMaker = Callable[[np.random.Generator], Outline]

_THETA = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
_WAVES = np.exp(1j * np.arange(2, 15)[:, None] * _THETA)
_SHARES = np.linspace(0, 1, 40, endpoint=False)


def round_outline(rng: np.random.Generator, elongation: float = 1.0, wobble: float = 0.03) -> Outline:
    """Draw an ellipse with `elongation` (long over short axis) whose outline wavers by `wobble` of its radius."""
    ratio = np.sqrt(max(elongation, 1.0))
    radius = 1 / np.hypot(np.cos(_THETA) / ratio, np.sin(_THETA) * ratio)
    return _unit_area(radius * _wavering(rng, 2 * wobble / np.arange(2, 9)))


def lobed_outline(rng: np.random.Generator) -> Outline:
    """Draw a concave, kidney or clover-like outline."""
    lobes = int(rng.integers(1, 4))
    radius = round_outline(rng, rng.uniform(1.0, 1.6), 0.06).astype(float)
    for _ in range(lobes):
        width, depth = rng.uniform(0.25, 0.5), rng.uniform(0.15, 0.5)
        away = np.angle(np.exp(1j * (_THETA - rng.uniform(0, 2 * np.pi))))
        radius = radius * (1 - depth * np.exp(-((away / width) ** 2)))
    return _unit_area(radius)


def spread_outline(rng: np.random.Generator) -> Outline:
    """Draw an adherent cell: pointed protrusions with straight or hollow sides between them."""
    tips = int(rng.choice((2, 3, 4, 5, 6), p=(0.36, 0.32, 0.2, 0.09, 0.03)))
    turn = np.sort((np.arange(tips) + rng.uniform(-0.3, 0.3, tips)) * 2 * np.pi / tips)
    reach = np.exp(rng.normal(0, 0.38, tips)) * (rng.uniform(1.2, 2.2) if tips == 2 else 1.0)
    hollow = rng.uniform(0.25, 1.1)
    longer = float(np.exp(abs(rng.normal(0, 0.28))))
    angles: list[NDArray[np.float64]] = []
    radii: list[NDArray[np.float64]] = []
    t = _SHARES
    for k in range(tips):
        first, second = turn[k], turn[(k + 1) % tips] + (2 * np.pi if k == tips - 1 else 0)
        half = (second - first) / 2
        waist = np.sqrt(reach[k] * reach[(k + 1) % tips]) * max(np.cos(half), 0.3)
        waist *= float(np.clip(hollow + rng.normal(0, 0.2), 0.1, 1.3))
        start = reach[k] * np.exp(1j * first)
        middle = waist * np.exp(1j * (first + half))
        end = reach[(k + 1) % tips] * np.exp(1j * second)
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
        curve = curve.real * longer + 1j * curve.imag / longer
        angles.append(np.mod(np.angle(curve), 2 * np.pi))
        radii.append(np.abs(curve))
    radius = np.interp(_THETA, np.concatenate(angles), np.concatenate(radii), period=2 * np.pi)
    radius = ndimage.gaussian_filter1d(radius, rng.uniform(4, 9), mode="wrap")
    return _unit_area(radius * _wavering(rng, 0.05 / np.sqrt(np.arange(2, 15))))


def polygon_outline(rng: np.random.Generator) -> Outline:
    """Draw a plate with corners, like a squamous cell."""
    sides = int(rng.integers(4, 8))
    turn = (np.arange(sides) + rng.uniform(-0.35, 0.35, sides)) * 2 * np.pi / sides
    corner = np.exp(1j * turn) * rng.uniform(0.75, 1.2, sides)
    share = np.linspace(0, 1, 30, endpoint=False)[:, None]
    edge = ((1 - share) * corner + share * np.roll(corner, -1)).T.ravel()
    order = np.argsort(np.mod(np.angle(edge), 2 * np.pi))
    radius = np.interp(_THETA, np.mod(np.angle(edge), 2 * np.pi)[order], np.abs(edge)[order], period=2 * np.pi)
    radius = ndimage.gaussian_filter1d(radius, rng.uniform(6, 14), mode="wrap")
    return _unit_area(radius * round_outline(rng, 1.0, 0.05))


def _wavering(rng: np.random.Generator, sizes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Random factors around 1 along an outline; `sizes` are those of 2, 3, ... waves around it."""
    swing = sizes * (rng.standard_normal(len(sizes)) + 1j * rng.standard_normal(len(sizes))) / np.sqrt(2)
    return np.asarray(np.clip(1 + (swing @ _WAVES[: len(sizes)]).real, 0.3, 2))


def _unit_area(radius: NDArray[np.floating]) -> Outline:
    """Scale a table of radii to the area of a unit disc."""
    radius = np.maximum(radius, 0.05)
    return np.asarray(radius / np.sqrt(np.mean(radius**2)), dtype=np.float32)


class Canvas:
    """Objects of one layer, placed one after another.

    Attributes
    ----------
    labels
        "YX" int32; 0 is background.
    rho
        "YX" float32: normalised radius within the own object, `OUTSIDE` in the background.
    gap
        "YX" float32: how much larger the second smallest normalised radius is; small along contact lines.
    centers_px, radii_px
        Per object; index 0 belongs to label 1.
    """

    def __init__(self, shape: tuple[int, int], warp: tuple[Field, Field] | None = None) -> None:
        self.labels = np.zeros(shape, dtype=np.int32)
        self.rho = np.full(shape, OUTSIDE, dtype=np.float32)
        self.second = np.full(shape, OUTSIDE, dtype=np.float32)
        self.warp = warp
        self.centers_px: list[tuple[float, float]] = []
        self.radii_px: list[float] = []

    @property
    def gap(self) -> Field:
        """Distance in rho to the nearest rival or to the background, not below 0."""
        gap = np.minimum(self.second - self.rho, 2 * (1 - self.rho))
        return np.asarray(np.maximum(gap, 0), dtype=np.float32)

    def put(
        self,
        outline: Outline,
        center_px: tuple[float, float],
        radius_px: float,
        *,
        angle: float = 0.0,
        bend: float = 0.0,
        max_overlap: float = 0.3,
        on_top: bool = False,
    ) -> int:
        """Place one object and return how many pixels it got; 0 when it would overlap too much or lies outside.

        `bend` curves it into a banana, `on_top` hides what is below instead of sharing the contact line.
        """
        reach = float(outline.max()) * radius_px * (1 + abs(bend)) + 3
        height, width = self.labels.shape
        y0, y1 = max(int(center_px[0] - reach), 0), min(int(center_px[0] + reach) + 2, height)
        x0, x1 = max(int(center_px[1] - reach), 0), min(int(center_px[1] + reach) + 2, width)
        if y1 - y0 < 2 or x1 - x0 < 2:
            return 0
        here = np.s_[y0:y1, x0:x1]
        rho = self._rho(outline, center_px, radius_px, (here, angle, bend))
        inside = rho < 1
        size = int(np.count_nonzero(inside))
        taken = int(np.count_nonzero(inside & (self.labels[here] > 0)))
        if size < MIN_AREA_PX or taken > max_overlap * size:
            return 0
        before = self.rho[here]
        wins = inside if on_top else inside & (rho < before)
        self.second[here] = np.minimum(self.second[here], np.where(inside, np.maximum(rho, before), OUTSIDE))
        self.rho[here] = np.where(wins, rho, before)
        self.centers_px.append(center_px)
        self.radii_px.append(radius_px)
        self.labels[here][wins] = len(self.radii_px)
        return size - taken

    def _rho(
        self,
        outline: Outline,
        center_px: tuple[float, float],
        radius_px: float,
        pose: tuple[tuple[slice, slice], float, float],
    ) -> Field:
        """Evaluate the normalised radius of one object within a window."""
        here, angle, bend = pose
        y = np.arange(here[0].start, here[0].stop, dtype=np.float32)[:, None] - np.float32(center_px[0])
        x = np.arange(here[1].start, here[1].stop, dtype=np.float32)[None] - np.float32(center_px[1])
        if self.warp is not None:
            y, x = y + self.warp[0][here], x + self.warp[1][here]
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = cos * x + sin * y, cos * y - sin * x
        if bend:
            v = v - np.float32(bend / radius_px) * (u * u - np.float32(0.25 * radius_px**2))
        index = (np.arctan2(v, u) * np.float32(ANGLES / (2 * np.pi))).astype(np.int32) % ANGLES
        return np.asarray(np.sqrt(u * u + v * v) / (outline[index] * np.float32(radius_px)), dtype=np.float32)

    def tidy(self) -> None:
        """Keep one connected piece of at least `MIN_AREA_PX` per object and number the objects 1..n."""
        self.tidy_marked(0)

    def tidy_marked(self, first_marked: int) -> NDArray[np.bool_]:
        """Tidy, and tell for each object left whether it was placed after the first `first_marked` ones."""
        kept = 0
        marked = []
        centers, radii = [], []
        fresh = np.zeros_like(self.labels)
        for index, here in enumerate(ndimage.find_objects(self.labels)):
            if here is None:
                continue
            mask = self.labels[here] == index + 1
            pieces, count = ndimage.label(mask)
            sizes = np.bincount(pieces.ravel())[1:]
            best = int(np.argmax(sizes)) + 1
            if sizes[best - 1] < MIN_AREA_PX:
                continue
            kept += 1
            fresh[here][pieces == best if count > 1 else mask] = kept
            marked.append(index >= first_marked)
            centers.append(self.centers_px[index])
            radii.append(self.radii_px[index])
        self.labels, self.centers_px, self.radii_px = fresh, centers, radii
        self.rho = np.where(fresh > 0, self.rho, OUTSIDE).astype(np.float32)
        return np.asarray(marked, dtype=bool)

    def per_object(self, values: NDArray[np.floating]) -> Field:
        """Paint one value per object (in order of labels) into a "YX" field, 0 outside."""
        table = np.concatenate([np.zeros(1), np.asarray(values, dtype=float)]).astype(np.float32)
        return np.asarray(table[self.labels], dtype=np.float32)


def scatter(
    rng: np.random.Generator,
    canvas: Canvas,
    maker: OutlineMaker,
    *,
    diameter_px: float,
    cover: float,
    spread: float = 0.2,
    clustering: float = 0.2,
    max_overlap: float = 0.15,
    bend: float = 0.0,
    on_top: bool = False,
    allowed: NDArray[np.bool_] | None = None,
    max_objects: int = 400,
) -> None:
    """Place objects until they cover the share `cover` of the canvas or no place is found any more.

    Parameters
    ----------
    maker
        Draws one outline.
    diameter_px, spread
        Median diameter, and the standard deviation of its logarithm.
    clustering
        Share of the objects that are put against an earlier one.
    allowed
        "YX" bool; centres stay where it is true.
    """
    height, width = canvas.labels.shape
    wanted, covered, misses = cover * height * width, 0, 0
    for _ in range(3 * max_objects):
        if covered >= wanted or len(canvas.radii_px) >= max_objects or misses > 60:
            return
        radius = float(diameter_px * np.exp(np.clip(rng.normal(0, spread), -1.2, 0.9)) / 2)
        if canvas.radii_px and rng.random() < clustering:
            near = int(rng.integers(len(canvas.radii_px)))
            away = (radius + canvas.radii_px[near]) * rng.uniform(0.75, 1.2)
            turn = rng.uniform(0, 2 * np.pi)
            y, x = canvas.centers_px[near][0] + away * np.sin(turn), canvas.centers_px[near][1] + away * np.cos(turn)
        else:
            y, x = rng.uniform(-0.7 * radius, height + 0.7 * radius), rng.uniform(-0.7 * radius, width + 0.7 * radius)
        row, col = int(np.clip(y, 0, height - 1)), int(np.clip(x, 0, width - 1))
        if canvas.labels[row, col] and canvas.rho[row, col] < 0.7:
            continue
        if allowed is not None and not allowed[row, col]:
            continue
        gained = canvas.put(
            maker(rng),
            (y, x),
            radius,
            angle=rng.uniform(0, 2 * np.pi),
            bend=float(rng.normal(0, bend)) if bend else 0.0,
            max_overlap=max_overlap,
            on_top=on_top,
        )
        covered, misses = covered + gained, 0 if gained else misses + 1


def tile(rng: np.random.Generator, canvas: Canvas, maker: OutlineMaker, *, diameter_px: float, filled: float) -> None:
    """Cover the canvas with touching cells on a shaken grid, leaving out some of them at random."""
    height, width = canvas.labels.shape
    step = diameter_px * 0.95
    jitter = rng.uniform(0.15, 0.38)
    holes = rng.random() < 0.6
    loose = rng.uniform(0.5, 0.9) if rng.random() < 0.35 else 1.0
    for row in range(-1, int(height / (step * 0.87)) + 2):
        for col in range(-1, int(width / step) + 2):
            if rng.random() > filled and holes:
                continue
            y = (row + rng.normal(0, jitter)) * step * 0.87
            x = (col + 0.5 * (row % 2) + rng.normal(0, jitter)) * step
            radius = diameter_px * loose * rng.uniform(0.62, 0.85)
            canvas.put(maker(rng), (y, x), radius, angle=rng.uniform(0, 2 * np.pi), max_overlap=0.85)


def inner_layer(rng: np.random.Generator, parents: Canvas, maker: OutlineMaker, *, share: float) -> Canvas:
    """Draw one nucleus of `share` of the diameter inside each object of `parents`."""
    canvas = Canvas(parents.labels.shape)
    coarse = parents.labels[::2, ::2]  # enough for centres and areas
    ids = coarse.ravel()
    count = len(parents.radii_px) + 1
    area = np.maximum(np.bincount(ids, minlength=count), 1)
    sides = np.ogrid[: coarse.shape[0], : coarse.shape[1]]
    where = [np.broadcast_to(side.astype(np.float64), coarse.shape).ravel() for side in sides]
    middle = 2 * np.stack([np.bincount(ids, along, count) / area for along in where], axis=1)
    owner = [0]
    for parent in range(1, count):
        radius = float(np.sqrt(4 * area[parent] / np.pi))
        place = (middle[parent, 0] + rng.normal(0, 0.1) * radius, middle[parent, 1] + rng.normal(0, 0.1) * radius)
        size = radius * share * float(np.exp(rng.normal(0, 0.12)))
        before = len(canvas.radii_px)
        canvas.put(maker(rng), place, size, angle=rng.uniform(0, 2 * np.pi), max_overlap=1.0)
        owner.extend([parent] * (len(canvas.radii_px) - before))
    canvas.labels[np.asarray(owner, dtype=np.int32)[canvas.labels] != parents.labels] = 0
    return canvas
