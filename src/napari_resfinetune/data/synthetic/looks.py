"""Looks of unstained cells and of fluorescence: one function per modality draws an image and its labels.

Lengths are drawn relative to `field_px`, the longest side of the whole field of view, so that a small window of a large
field and a small picture of the same field both come out at the right scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.data.synthetic import shapes
from napari_resfinetune.data.synthetic.optics import (
    Field,
    blur,
    digitise,
    expose,
    random_field,
    uneven_light,
)
from napari_resfinetune.data.synthetic.shapes import Canvas, Outline, scatter

Drawn = tuple[NDArray[Any], NDArray[np.int32]]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def warp_fields(
    rng: np.random.Generator, shape: tuple[int, int], diameter_px: float, size: float
) -> tuple[Field, Field]:
    """Displacements that make outlines waver by `size` of the diameter."""
    scale, reach = diameter_px * rng.uniform(0.18, 0.4), np.float32(diameter_px * size)
    return random_field(rng, shape, scale) * reach, random_field(rng, shape, scale) * reach


def patchy(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> NDArray[np.bool_] | None:
    """Where objects may lie: everywhere, or only in part of the field."""
    if rng.random() < 0.6:
        return None
    return np.asarray(random_field(rng, shape, field_px / 8, roughness=3) > rng.normal(-0.2, 0.5))


def specks(rng: np.random.Generator, shape: tuple[int, int], number: float, radius_px: float) -> Field:
    """Dust and debris that nobody labels: soft specks of height up to 1."""
    count = int(rng.poisson(number))
    places = rng.uniform(0, 1, (count, 2)) * shape
    return spots(rng, shape, places, radius_px * np.exp(rng.uniform(np.log(0.4), np.log(1.5), count)))


def spots(rng: np.random.Generator, shape: tuple[int, int], places_px: NDArray[Any], radii_px: NDArray[Any]) -> Field:
    """Soft slightly oval spots of heights from 0.2 to 1 at the given (y, x) places."""
    field = np.zeros(shape, dtype=np.float32)
    for (y, x), radius in zip(places_px, radii_px, strict=True):
        reach = int(2.5 * radius) + 1
        y0, x0 = max(int(y) - reach, 0), max(int(x) - reach, 0)
        y1, x1 = min(int(y) + reach + 1, shape[0]), min(int(x) + reach + 1, shape[1])
        if y1 <= y0 or x1 <= x0:
            continue
        rows = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(y)
        cols = np.arange(x0, x1, dtype=np.float32)[None] - np.float32(x)
        oval = np.float32(rng.uniform(0.6, 1.7) / radius**2)
        spot = np.exp(-oval * rows * rows) * np.exp(-cols * cols / (oval * np.float32(radius**4)))
        field[y0:y1, x0:x1] += spot * np.float32(rng.uniform(0.2, 1))
    return field


def nucleus_maker(rng: np.random.Generator, *, odd: float) -> shapes.OutlineMaker:
    """A maker of nuclei of one population: alike in elongation, a share `odd` of them lobed or bean-like."""
    typical, wobble = 1 + rng.gamma(1.5, 0.28), log_uniform(rng, 0.012, 0.05)

    def make(draw: np.random.Generator) -> Outline:
        if draw.random() < odd:
            return shapes.lobed_outline(draw)
        return shapes.round_outline(draw, typical * float(np.exp(draw.normal(0, 0.18))), wobble)

    return make


def fluorescence_nuclei(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> Drawn:
    """Draw stained nuclei on a dark background."""
    diameter = log_uniform(rng, 20, 165) * field_px / 1024
    canvas = Canvas(shape, warp_fields(rng, shape, diameter, rng.uniform(0.0, 0.02)))
    crowd: dict[str, Any] = {
        "diameter_px": diameter,
        "spread": rng.uniform(0.1, 0.3),
        "clustering": rng.choice((0.1, 0.3, 0.7)),
        "max_overlap": rng.uniform(0.02, 0.3),
        "bend": 0.06,
        "on_top": bool(rng.random() < 0.4),
        "allowed": patchy(rng, shape, field_px),
    }
    scatter(rng, canvas, nucleus_maker(rng, odd=rng.uniform(0, 0.35)), cover=log_uniform(rng, 0.03, 0.5), **crowd)
    if rng.random() < 0.4:  # condensed ones: small and bright
        scatter(
            rng,
            canvas,
            nucleus_maker(rng, odd=0.1),
            diameter_px=max(diameter * 0.55, 8 * field_px / 1024),
            cover=rng.uniform(0, 0.02),
            max_overlap=0.05,
            max_objects=len(canvas.radii_px) + 30,
        )
    canvas.tidy()
    n = len(canvas.radii_px)
    brightness = np.exp(rng.normal(0, rng.uniform(0.1, 0.55), n))
    small = np.asarray(canvas.radii_px) < 0.35 * diameter
    brightness = np.where(small, brightness * rng.uniform(1.0, 2.5), brightness) / 1.6
    dim = rng.random(n) < rng.uniform(0, 0.2)
    brightness = np.clip(np.where(dim, brightness * 0.4, brightness), 0.1, None)
    signal = canvas.per_object(brightness) * _chromatin(rng, canvas, diameter)
    signal = blur(signal, max(rng.uniform(0.5, 1.5) * field_px / 1024, diameter * log_uniform(rng, 0.01, 0.09)))
    signal = _surroundings(rng, canvas, signal, diameter)
    return _dark_field_camera(rng, signal, field_px), canvas.labels


def _chromatin(rng: np.random.Generator, canvas: Canvas, diameter: float) -> Field:
    """Relative brightness within nuclei: dome, chromatin, nucleoli or chromocentres."""
    dome = 1 - np.float32(rng.uniform(0.05, 0.6)) * np.minimum(canvas.rho, 1) ** 2
    fine = random_field(rng, canvas.labels.shape, diameter * rng.uniform(0.03, 0.09), roughness=rng.uniform(2, 4))
    inner = 1 + np.float32(rng.uniform(0.03, 0.25)) * fine
    if rng.random() < 0.6:
        spots = random_field(rng, canvas.labels.shape, diameter * rng.uniform(0.07, 0.14), roughness=5)
        spots = np.clip(spots - np.float32(rng.uniform(0.9, 1.6)), 0, 1)
        inner = inner + spots * np.float32(rng.choice((-0.7, -0.4, 0.7, 1.5)))
    return np.asarray(dome * np.clip(inner, 0.15, None), dtype=np.float32)


def _surroundings(rng: np.random.Generator, canvas: Canvas, signal: Field, diameter: float) -> Field:
    """Add glow, out-of-focus nuclei, faint cytoplasm and unlabelled specks."""
    shape = canvas.labels.shape
    if rng.random() < 0.8:
        signal = signal + np.float32(rng.uniform(0.02, 0.3)) * blur(signal, diameter * rng.uniform(0.3, 1.2))
    if rng.random() < 0.3:
        haze = Canvas(shape)
        scatter(rng, haze, nucleus_maker(rng, odd=0), diameter_px=diameter * 1.2, cover=0.08, max_objects=40)
        depth = diameter * rng.uniform(0.25, 0.6)
        signal = signal + np.float32(rng.uniform(0.03, 0.12)) * blur((haze.labels > 0).astype(np.float32), depth)
    if rng.random() < 0.4:
        cloud = random_field(rng, shape, diameter * rng.uniform(0.5, 2), roughness=2.5)
        signal = signal + np.float32(rng.uniform(0.005, 0.06)) * np.clip(cloud + 0.5, 0, None)
    if rng.random() < 0.5:
        dust = specks(rng, shape, rng.uniform(2, 40), max(diameter * 0.04, 0.7))
        signal = signal + np.float32(rng.uniform(0.1, 0.7)) * dust
    return np.asarray(signal, dtype=np.float32)


def _dark_field_camera(rng: np.random.Generator, signal: Field, field_px: int) -> NDArray[Any]:
    """Expose a bright-on-dark scene; some pictures are enlarged, dim, noisy or inverted."""
    signal = signal * uneven_light(rng, signal.shape, rng.uniform(0, 0.7))
    signal = signal + np.float32(log_uniform(rng, 0.003, 0.12))
    step = rng.choice((1.0, 1.5, 2.0, 3.0), p=(0.4, 0.2, 0.25, 0.15)) * max(field_px / 1024, 0.5)
    signal = expose(rng, signal, photons=log_uniform(rng, 40, 4000), read_noise=rng.uniform(0, 6), step=float(step))
    if rng.random() < 0.03:
        return digitise(rng, 1 - signal / max(float(signal.max()), 1e-3), low=0.05, high=0.95)
    offset = rng.uniform(0.0, 0.05)
    return digitise(rng, signal, low=offset, high=offset + log_uniform(rng, 0.08, 0.75))


def crowded_cytoplasm(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> Drawn:
    """Draw a layer of touching cells with membrane or cytoplasm signal, with or without nuclei."""
    diameter = log_uniform(rng, 45, 190) * field_px / 1024
    canvas = Canvas(shape, warp_fields(rng, shape, diameter, rng.uniform(0.01, 0.06)))
    stretch = 1 + rng.gamma(1.2, 0.25)

    def make(draw: np.random.Generator) -> Outline:
        if draw.random() < 0.15:
            return shapes.lobed_outline(draw)
        return shapes.round_outline(draw, stretch * float(np.exp(draw.normal(0, 0.15))), 0.07)

    shapes.tile(rng, canvas, make, diameter_px=diameter, filled=rng.uniform(0.35, 1.0))
    canvas.tidy()
    cell = canvas.labels > 0
    level = canvas.per_object(np.exp(rng.normal(-0.6, rng.uniform(0.1, 0.5), len(canvas.radii_px))))
    style = rng.choice(("membrane", "cytoplasm", "both"))
    membrane = np.float32(rng.uniform(0.35, 1.2) if style != "cytoplasm" else rng.uniform(0, 0.1))
    body = np.float32(rng.uniform(0.4, 1.0) if style != "membrane" else rng.uniform(0.02, 0.2))
    grain = random_field(rng, shape, diameter * rng.uniform(0.02, 0.08), roughness=rng.uniform(1.5, 3))
    signal = body * level * np.clip(1 + np.float32(rng.uniform(0.05, 0.4)) * grain, 0.1, None)
    # Cells in contact leave a thin darker or brighter line, as wide as a membrane seen through a microscope.
    edge = np.exp(-canvas.gap * np.float32(diameter / log_uniform(rng, 1.5, 5.0)))
    patch = np.clip(1 + 0.35 * random_field(rng, shape, diameter * 0.3), 0.2, None)
    signal = signal * (1 - np.float32(rng.uniform(0.2, 0.9)) * edge) + membrane * edge * cell * patch * (0.4 + level)
    nucleus = shapes.inner_layer(rng, canvas, nucleus_maker(rng, odd=0.05), share=rng.uniform(0.3, 0.55))
    inside = blur(((nucleus.labels > 0) & cell).astype(np.float32), 0.6 + diameter * 0.01)
    change = np.float32(rng.choice((-0.8, -0.5, 0.0, 0.6, 1.0)))
    signal = signal * (1 + change * inside) if change <= 0 else signal + change * inside * rng.uniform(0.4, 1)
    signal = blur(np.asarray(signal, dtype=np.float32), max(0.5, diameter * rng.uniform(0.006, 0.025)))
    signal = signal + np.float32(rng.uniform(0, 0.2)) * blur(signal, diameter * 0.5)
    signal = signal + np.float32(rng.uniform(0, 0.5)) * specks(rng, shape, rng.uniform(0, 12), diameter * 0.04)
    return _dark_field_camera(rng, np.asarray(signal, dtype=np.float32), field_px), canvas.labels
