"""Looks of transmitted light: phase contrast and brightfield, from optical thickness and absorbance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.data.synthetic import shapes
from napari_resfinetune.data.synthetic.looks import (
    Drawn,
    log_uniform,
    nucleus_maker,
    patchy,
    specks,
    spots,
    warp_fields,
)
from napari_resfinetune.data.synthetic.optics import (
    Field,
    blur,
    digitise,
    expose,
    random_field,
    uneven_light,
)
from napari_resfinetune.data.synthetic.shapes import Canvas, Outline, scatter


def phase_contrast(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> Drawn:
    """Draw adherent and rounded cells with halos.

    The picture is formed as in Zernike's microscope: unscattered light, which is roughly a wide blur of the wave, is
    dimmed and shifted by a quarter wave against the rest. Halos, shading-off and bright round cells follow from that.
    """
    diameter = log_uniform(rng, 40, 175) * field_px / 1024
    canvas = Canvas(shape, warp_fields(rng, shape, diameter, rng.uniform(0.01, 0.035)))
    style = rng.choice(("spread", "mixed", "compact"), p=(0.55, 0.3, 0.15))
    share_spread = {"spread": 0.95, "mixed": 0.6, "compact": 0.1}[str(style)]

    def make(draw: np.random.Generator) -> Outline:
        if draw.random() < share_spread:
            return shapes.spread_outline(draw)
        return shapes.lobed_outline(draw) if draw.random() < 0.3 else shapes.round_outline(draw, 1.5, 0.08)

    where = patchy(rng, shape, field_px)
    crowd: dict[str, Any] = {
        "clustering": rng.uniform(0, 0.5),
        "max_overlap": rng.uniform(0.05, 0.25),
        "allowed": where,
    }
    cover = log_uniform(rng, 0.12, 0.65)
    scatter(rng, canvas, make, diameter_px=diameter, cover=cover, spread=0.27, bend=0.12, **crowd)
    flat = len(canvas.radii_px)
    if rng.random() < 0.6:  # dividing or dying cells: round, thick and bright
        scatter(
            rng,
            canvas,
            lambda draw: shapes.round_outline(draw, 1.08, 0.015),
            diameter_px=diameter * rng.uniform(0.3, 0.5),
            cover=rng.uniform(0.002, 0.03),
            max_overlap=0.6,
            on_top=True,
            max_objects=flat + int(rng.integers(1, 13)),
        )
    shaped = canvas.tidy_marked(flat)
    phase = _thickness(rng, canvas, shaped, diameter)
    picture = _light_up(rng, canvas, shaped, _zernike(rng, phase, diameter))
    picture = picture * uneven_light(rng, shape, rng.uniform(0, 0.25))
    step = rng.choice((1.0, 1.4, 2.0), p=(0.4, 0.2, 0.4)) * max(field_px / 1024, 0.5)
    picture = expose(rng, picture, photons=log_uniform(rng, 800, 15000), read_noise=3, step=float(step))
    gain, base = rng.uniform(0.18, 0.5), rng.uniform(0.2, 0.55)
    return digitise(rng, (picture - 1) * np.float32(gain) + np.float32(base)), canvas.labels


def _thickness(rng: np.random.Generator, canvas: Canvas, rounded: NDArray[np.bool_], diameter: float) -> Field:
    """Optical thickness in radians: flat bodies, humps over nuclei, grains, ruffled rims, spheres, debris."""
    shape, n = canvas.labels.shape, len(canvas.radii_px)
    rho = np.minimum(canvas.rho, 1)
    typical = log_uniform(rng, 0.1, 0.5)
    height = typical * np.exp(rng.normal(0, 0.4, n)) * np.clip(diameter / 2 / np.maximum(canvas.radii_px, 1), 0.6, 1.6)
    # The rim is not equally steep all around, so that the halo is strong on one side and lost on another.
    relief = np.clip(1 + rng.uniform(0.2, 0.6) * random_field(rng, shape, diameter * 0.25), 0.15, 2.5)
    thin = canvas.per_object(np.where(rounded, 0, height)) * relief
    hump = canvas.per_object(np.where(rounded, 0, height * rng.gamma(1.5, rng.uniform(0.2, 0.9), n)))
    sphere = canvas.per_object(np.where(rounded, rng.uniform(0.5, 1.5, n), 0))
    sharp = max(0.5, diameter * 0.008)
    domes = hump * (1 - rho * rho) + sphere * np.sqrt(1 - np.minimum(rho * rho, 1))
    body = blur(np.asarray(thin + domes, dtype=np.float32), sharp)
    dirt = specks(rng, shape, log_uniform(rng, 3, 120), max(diameter * 0.02, 0.7)) * np.float32(rng.uniform(0.05, 0.4))
    rings = blur(specks(rng, shape, rng.uniform(0, 5), diameter * 0.25), diameter * 0.05) * np.float32(0.08)
    ground = random_field(rng, shape, diameter * rng.uniform(0.02, 0.08), roughness=2) * np.float32(
        rng.uniform(0, 0.012)
    )
    soft = blur(canvas.per_object(np.where(rounded, 0.0, 1.0)), sharp) * np.float32(typical)
    return np.asarray(body + soft * _inside_flat_cells(rng, canvas, diameter) + dirt + rings + ground, dtype=np.float32)


def _inside_flat_cells(rng: np.random.Generator, canvas: Canvas, diameter: float) -> Field:
    """Structure relative to the thickness of a flat cell: plasma, grains, adhesions at the rim, nuclei and nucleoli."""
    shape = canvas.labels.shape
    centre = np.exp(-((np.minimum(canvas.rho, 1) / 0.55) ** 2))
    fine = random_field(rng, shape, diameter * rng.uniform(0.015, 0.04), roughness=rng.uniform(2, 3.5))
    coarse = random_field(rng, shape, diameter * rng.uniform(0.06, 0.12), roughness=3)
    inner = np.float32(rng.uniform(0.05, 0.3)) * fine * (0.5 + centre) + np.float32(rng.uniform(0.05, 0.3)) * coarse
    grains = random_field(rng, shape, diameter * rng.uniform(0.012, 0.025), roughness=6)
    dark, bright = np.clip(grains - 1.7, 0, 1.5), np.clip(-1.9 - grains, 0, 1.5)
    around = (0.2 + 1.2 * centre) * np.clip(coarse + 0.7, 0, 2)
    inner = inner + around * (dark * np.float32(rng.uniform(0.3, 2.5)) - bright * np.float32(rng.uniform(0, 3)))
    rim = blur((canvas.labels > 0).astype(np.float32), max(0.8, diameter * 0.02))
    rim = np.clip(4 * rim * (1 - rim), 0, 1) * (canvas.labels > 0)
    inner = (
        inner
        + rim * np.clip(coarse - 0.3, 0, 1.5) * np.float32(rng.uniform(0, 1.2))
        + rim * np.float32(rng.uniform(0, 0.4))
    )
    nuclei = shapes.inner_layer(rng, canvas, nucleus_maker(rng, odd=0), share=rng.uniform(0.32, 0.5))
    disc = blur((nuclei.labels > 0).astype(np.float32), max(0.6, diameter * 0.012))
    # Nuclei look smooth, with a faint envelope and a few dark nucleoli.
    inner = inner * (1 - np.float32(rng.uniform(0.2, 0.8)) * disc)
    inner = inner + np.float32(rng.uniform(-0.25, 0.35)) * disc + np.float32(rng.uniform(0, 1.2)) * disc * (1 - disc)
    middle, radius = np.asarray(nuclei.centers_px).reshape(-1, 2), np.asarray(nuclei.radii_px)
    owner = np.repeat(np.arange(len(radius)), rng.integers(1, 5, len(radius)))
    places = middle[owner] + rng.uniform(-0.5, 0.5, (len(owner), 2)) * radius[owner, None]
    dots = spots(rng, shape, places, np.maximum(radius[owner] * rng.uniform(0.12, 0.27, len(owner)), 0.7))
    return np.asarray(inner + dots * disc * np.float32(rng.uniform(0.5, 3.0)), dtype=np.float32)


def _zernike(rng: np.random.Generator, phase: Field, diameter: float) -> Field:
    """Intensity around 1 of a phase object under phase contrast; mostly dark (positive) contrast."""
    sigma, near = diameter * log_uniform(rng, 0.05, 0.2), np.float32(rng.uniform(0.3, 0.8))
    real, imaginary = np.cos(phase), np.sin(phase)
    # A narrow and a wide part: the halo is brightest right at the edge.
    wide_real, wide_imaginary = (
        near * blur(part, max(1.2, sigma * 0.45)) + (1 - near) * blur(part, sigma) for part in (real, imaginary)
    )
    a = np.float32(rng.uniform(0.45, 0.9))
    sign = np.float32(1.0 if rng.random() < 0.92 else -1.0)
    # (wave - L) + a * exp(-i pi/2) * L, with L the light that passes the ring
    out_real = real - wide_real + sign * a * wide_imaginary
    out_imaginary = imaginary - wide_imaginary - sign * a * wide_real
    picture = (out_real**2 + out_imaginary**2) / (a * a)
    picture = blur(np.asarray(np.minimum(picture, 6), dtype=np.float32), max(0.4, diameter * rng.uniform(0.002, 0.012)))
    if rng.random() < 0.6:  # sharpened, as many cameras and programs do; it lifts the halo at the edge
        crisp = picture - blur(picture, max(1.5, diameter * rng.uniform(0.02, 0.06)))
        picture = np.clip(picture + np.float32(rng.uniform(0.2, 1.5)) * crisp, 0.02, 6)
    return np.asarray(picture, dtype=np.float32)


def _light_up(rng: np.random.Generator, canvas: Canvas, rounded: NDArray[np.bool_], picture: Field) -> Field:
    """Make rounded cells shine: thick spheres collect the light, with a bright ring and a glow around them."""
    if not rounded.any():
        return picture
    n = len(rounded)
    size = float(np.mean(np.asarray(canvas.radii_px)[rounded]))
    mask = canvas.per_object(rounded.astype(float))
    rho = np.minimum(canvas.rho, 1)
    ring = canvas.per_object(rng.uniform(0.4, 1.6, n)) * np.exp(
        -(((rho - rng.uniform(0.6, 0.9)) / rng.uniform(0.2, 0.4)) ** 2)
    )
    core = canvas.per_object(rng.uniform(-0.6, 1.0, n)) * np.exp(-((rho / 0.4) ** 2))
    glow = blur(mask, size * rng.uniform(0.2, 0.4)) * (1 - mask)
    # In a picture of faint cells the round ones are not blinding either.
    power = np.float32(min(1.0, 5 * float(picture.std()) + 0.1))
    shine = power * blur(np.asarray((ring + core) * mask, dtype=np.float32), max(0.6, size * 0.06))
    return np.asarray(
        np.clip(picture + shine + power * np.float32(rng.uniform(0.2, 0.9)) * glow, 0.05, 5), dtype=np.float32
    )


def brightfield(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> Drawn:
    """Draw unstained translucent cells slightly out of focus, or stained cells with labelled nuclei."""
    if rng.random() < 0.4:
        return _cytology(rng, shape, field_px)
    diameter = log_uniform(rng, 25, 180) * field_px / 1024
    canvas = Canvas(shape, warp_fields(rng, shape, diameter, rng.uniform(0, 0.03)))
    kind = rng.choice(("round", "rods", "spread"), p=(0.55, 0.2, 0.25))
    long = rng.uniform(1.8, 3.5) if kind == "rods" else rng.uniform(1.0, 1.5)

    def make(draw: np.random.Generator) -> Outline:
        if kind == "spread":
            return shapes.spread_outline(draw)
        return shapes.lobed_outline(draw) if draw.random() < 0.1 else shapes.round_outline(draw, long, 0.03)

    scatter(
        rng,
        canvas,
        make,
        diameter_px=diameter,
        cover=log_uniform(rng, 0.05, 0.55),
        spread=rng.uniform(0.08, 0.3),
        clustering=rng.uniform(0, 0.7),
        max_overlap=0.12,
        bend=0.1 if kind == "rods" else 0.0,
        allowed=patchy(rng, shape, field_px),
    )
    canvas.tidy()
    n = len(canvas.radii_px)
    rho = np.minimum(canvas.rho, 1)
    lift = canvas.per_object(np.exp(rng.normal(0, 0.25, n)))
    dome = np.sqrt(1 - np.minimum(rho, 1) ** 2 * 0.97) if rng.random() < 0.6 else 1 - rho**6
    grain = random_field(rng, shape, diameter * rng.uniform(0.02, 0.06), roughness=2.5)
    height = lift * dome * (1 + np.float32(rng.uniform(0.02, 0.25)) * grain)
    height = height + specks(rng, shape, rng.uniform(0, 40), max(0.7, diameter * 0.03)) * np.float32(rng.uniform(0, 1))
    height = height + np.float32(rng.uniform(0, 0.05)) * random_field(rng, shape, diameter * 0.1, roughness=2)
    # Defocus shows the curvature of the thickness: a dark line with a bright one beside it.
    sharp = blur(np.asarray(height, dtype=np.float32), max(0.5, diameter * rng.uniform(0.005, 0.03)))
    wide = blur(sharp, max(1.0, diameter * rng.uniform(0.02, 0.08)))
    picture = 1 + np.float32(rng.choice((-1, 1)) * log_uniform(rng, 0.25, 1.2)) * (sharp - wide)
    picture = picture * np.exp(-np.float32(rng.choice((0.0, 0.05, 0.15, 0.35), p=(0.3, 0.3, 0.2, 0.2))) * sharp)
    picture = np.asarray(picture * uneven_light(rng, shape, rng.uniform(0, 0.25)), dtype=np.float32)
    return _bright_camera(rng, picture, field_px), canvas.labels


def _bright_camera(rng: np.random.Generator, picture: Field, field_px: int) -> NDArray[Any]:
    """Expose a scene on a bright background."""
    step = rng.choice((1.0, 1.5, 2.0)) * max(field_px / 1024, 0.5)
    picture = expose(rng, picture, photons=log_uniform(rng, 800, 10000), read_noise=3, step=float(step))
    return digitise(rng, picture, low=rng.uniform(0, 0.1), high=rng.uniform(0.45, 0.9))


def _cytology(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> Drawn:
    """Draw thin overlapping stained cells; the labels are their dark nuclei."""
    diameter = log_uniform(rng, 65, 240) * field_px / 1024
    density = np.zeros(shape, dtype=np.float32)
    nuclei = Canvas(shape)
    share = max(rng.uniform(0.17, 0.4), 14 * field_px / 1024 / diameter)
    maker = nucleus_maker(rng, odd=0.03)
    where = patchy(rng, shape, field_px)
    for _ in range(int(rng.integers(1, 4))):
        layer = Canvas(shape, warp_fields(rng, shape, diameter, 0.02))
        crowd: dict[str, Any] = {"clustering": 0.6, "max_overlap": 0.4, "allowed": where}
        scatter(rng, layer, shapes.polygon_outline, diameter_px=diameter, cover=rng.uniform(0.08, 0.35), **crowd)
        if not layer.radii_px:
            continue
        depth = layer.per_object(rng.uniform(0.1, 0.45, len(layer.radii_px)))
        fold = random_field(rng, shape, diameter * 0.1, roughness=2.5)
        density += depth * np.clip(1 + 0.2 * fold + 0.25 * (np.minimum(layer.rho, 1) > 0.93), 0.2, None)
        for center, radius in zip(layer.centers_px, layer.radii_px, strict=True):
            if rng.random() < 0.93:
                place = (center[0] + rng.normal(0, 0.15) * radius, center[1] + rng.normal(0, 0.15) * radius)
                size = share * diameter / 2 * float(np.exp(rng.normal(0, 0.15)))
                nuclei.put(maker(rng), place, size, angle=rng.uniform(0, 2 * np.pi), max_overlap=0.2)
    nuclei.tidy()
    dark = nuclei.per_object(rng.uniform(0.6, 1.5, len(nuclei.radii_px)))
    grain = random_field(rng, shape, max(1.0, share * diameter * 0.08), roughness=2.5)
    sigma = max(0.6, diameter * rng.uniform(0.004, 0.012))
    dots = specks(rng, shape, rng.uniform(0, 40), max(0.7, diameter * 0.02)) * (density > 0.02)
    total = (
        blur(density, sigma) * np.clip(1 + 0.15 * grain, 0.3, None)
        + blur(dark * (1 + 0.15 * grain), sigma)
        + dots * 0.5
    )
    light = uneven_light(rng, shape, rng.uniform(0, 0.25))
    if rng.random() < 0.65:
        return _bright_camera(rng, np.asarray(np.exp(-total) * light, dtype=np.float32), field_px), nuclei.labels
    body, core = rng.dirichlet((6, 8, 8)) * 3, np.asarray((1.15, 1.05, 0.75)) * rng.uniform(0.9, 1.1, 3)
    absorbed = (total - dark)[..., None] * body.astype(np.float32) + dark[..., None] * core.astype(np.float32)
    picture = np.asarray(np.exp(-absorbed) * light[..., None], dtype=np.float32)
    picture = expose(rng, picture, photons=log_uniform(rng, 500, 6000), read_noise=2)
    return np.clip(np.rint(picture * rng.uniform(200, 250)), 0, 255).astype(np.uint8), nuclei.labels
