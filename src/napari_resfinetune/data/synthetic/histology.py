"""Look of stained tissue and smears: absorbance of two stains after Beer and Lambert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from napari_resfinetune.data.synthetic import shapes
from napari_resfinetune.data.synthetic.looks import (
    Drawn,
    log_uniform,
    nucleus_maker,
    patchy,
    specks,
    warp_fields,
)
from napari_resfinetune.data.synthetic.optics import Field, blur, expose, random_field, uneven_light
from napari_resfinetune.data.synthetic.shapes import Canvas, Outline, scatter


@dataclass(frozen=True)
class Stain:
    """Absorbance per channel (RGB) of nuclei and of the rest, and the strength of the rest."""

    nucleus: tuple[float, float, float]
    ground: tuple[float, float, float]
    strength: float
    tissue: bool


# Absorbances at full stain: haematoxylin and eosin, violet only, blood-like smear.
_STAINS = {
    "he": Stain((1.05, 1.25, 0.5), (0.12, 0.55, 0.3), 1.0, True),
    "violet": Stain((1.05, 1.9, 0.12), (0.3, 0.48, 0.03), 0.8, True),
    "smear": Stain((1.0, 1.9, 0.75), (0.22, 0.24, 0.3), 0.5, False),
}


def histology(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> Drawn:
    """Draw stained nuclei in tissue or a smear as an RGB picture."""
    name = str(rng.choice(("he", "violet", "smear"), p=(0.36, 0.38, 0.26)))
    stain = _STAINS[name]
    diameter = log_uniform(rng, 28, 160) * field_px / 1024
    gaps = _gaps(rng, shape, field_px) if stain.tissue else None
    canvas = _nuclei(rng, shape, diameter, (gaps, field_px, stain.tissue))
    stained = _stained_nuclei(rng, canvas, diameter)
    haze = Canvas(shape)
    if rng.random() < 0.75:  # nuclei of other planes of the section, too blurred for anyone to label
        blurred = nucleus_maker(rng, odd=0.1)
        scatter(rng, haze, blurred, diameter_px=diameter, cover=rng.uniform(0.01, 0.1), max_objects=40)
        depth = haze.per_object(rng.uniform(0.1, 0.5, len(haze.radii_px))) * (canvas.labels == 0)
        stained = stained + blur(depth, diameter * rng.uniform(0.13, 0.28))
    draw_ground = _stroma if stain.tissue else _smear_ground
    ground = draw_ground(rng, canvas, diameter, gaps)
    sigma = max(log_uniform(rng, 0.5, 2.5) * field_px / 1024, diameter * log_uniform(rng, 0.014, 0.06), 0.5)
    stained, ground = blur(np.asarray(stained, dtype=np.float32), sigma), blur(ground, sigma * 0.7)
    return _colour(rng, (stained, ground), stain, field_px), canvas.labels


def _gaps(rng: np.random.Generator, shape: tuple[int, int], field_px: int) -> Field | None:
    """White gaps (fat, vessels, tears) as a soft field from 0 to 1, or None."""
    if rng.random() < 0.6:
        return None
    rough = random_field(rng, shape, field_px * log_uniform(rng, 0.04, 0.15), roughness=4)
    return np.asarray(np.clip((rough - rng.uniform(0.4, 1.6)) * log_uniform(rng, 2, 10), 0, 1), dtype=np.float32)


def _nuclei(
    rng: np.random.Generator, shape: tuple[int, int], diameter: float, place: tuple[Field | None, int, bool]
) -> Canvas:
    """Place nuclei of one or two populations, aligned along the tissue where there is one."""
    gaps, field_px, tissue = place
    canvas = Canvas(shape, warp_fields(rng, shape, diameter, rng.uniform(0.0, 0.03)))
    allowed = patchy(rng, shape, field_px)
    if gaps is not None:
        allowed = (gaps < 0.3) if allowed is None else allowed & (gaps < 0.3)
    odd = rng.uniform(0.0, 0.3) if tissue else rng.uniform(0.2, 0.7)
    cover, overlap = log_uniform(rng, 0.06, 0.5), rng.uniform(0.02, 0.3)
    clustering = rng.uniform(0.0, 0.6)
    for share, size in ((0.75, 1.0), (0.25, log_uniform(rng, 0.6, 1.9))):
        scatter(
            rng,
            canvas,
            nucleus_maker(rng, odd=odd),
            diameter_px=max(diameter * size, 15 * field_px / 1024),
            cover=cover * share,
            spread=rng.uniform(0.1, 0.32),
            clustering=clustering,
            max_overlap=overlap,
            bend=0.12,
            on_top=bool(rng.random() < 0.4),
            allowed=allowed,
        )
    canvas.tidy()
    return canvas


def _stained_nuclei(rng: np.random.Generator, canvas: Canvas, diameter: float) -> Field:
    """Absorbance of nuclear stain: clumped chromatin, dark rims, pale and dense nuclei, some slightly out of focus."""
    shape, n = canvas.labels.shape, len(canvas.radii_px)
    density = np.clip(np.exp(rng.normal(-0.4, rng.uniform(0.15, 0.55), n)), 0.2, 1.6)
    fine = random_field(rng, shape, diameter * rng.uniform(0.025, 0.06), roughness=3)
    clumps = random_field(rng, shape, diameter * rng.uniform(0.08, 0.16), roughness=4)
    # Dense nuclei are smooth, pale ones show their chromatin.
    openness = canvas.per_object(np.clip(1.2 - density, 0.1, 0.8) * rng.uniform(0.4, 1.1))
    texture = np.clip(1 + openness * (0.5 * fine + 0.45 * clumps), 0.1, 2.2)
    if rng.random() < 0.3:  # pale vacuoles or nucleoli
        texture = texture * (1 - 0.6 * openness * (clumps > 1.1))
    rim = 1 + np.float32(rng.uniform(0, 0.5)) * openness * np.exp(-(((1 - np.minimum(canvas.rho, 1)) * 6) ** 2))
    stained = canvas.per_object(density) * texture * rim
    away = canvas.per_object((rng.random(n) < rng.uniform(0, 0.35)).astype(float))
    far = np.asarray(stained * away * np.float32(0.9), dtype=np.float32)
    return np.asarray(stained * (1 - away) + blur(far, diameter * rng.uniform(0.03, 0.08)), dtype=np.float32)


def _lines(rng: np.random.Generator, shape: tuple[int, int], scale_px: float, width: float) -> Field:
    """Wavy strands: the zero crossings of a stretched random field."""
    field = random_field(rng, shape, scale_px, roughness=3, stretch=rng.uniform(1, 4), angle=rng.uniform(0, np.pi))
    return np.asarray(np.exp(-((field / np.float32(width)) ** 2)), dtype=np.float32)


def _stroma(rng: np.random.Generator, canvas: Canvas, diameter: float, gaps: Field | None) -> Field:
    """Absorbance of what lies between nuclei in tissue: fibres, cytoplasm, membranes, holes; around 0.2 to 1."""
    shape = canvas.labels.shape
    angle, stretch = rng.uniform(0, np.pi), log_uniform(rng, 1, 6)
    base = rng.uniform(0.25, 0.9)
    cloud = random_field(rng, shape, diameter * rng.uniform(0.6, 2), roughness=2.5)
    fibre = random_field(rng, shape, diameter * rng.uniform(0.08, 0.3), roughness=2.2, stretch=stretch, angle=angle)
    amount = rng.uniform(0.02, 0.22, 2)
    ground = base * (1 + np.float32(amount[0]) * cloud + np.float32(amount[1]) * fibre)
    for _ in range(int(rng.integers(0, 4))):
        strength = rng.uniform(0.08, 0.5) * rng.choice((-0.8, 1))
        strands = _lines(rng, shape, diameter * rng.uniform(0.5, 1.8), rng.uniform(0.04, 0.12))
        mask = np.clip(cloud + rng.uniform(-0.3, 1), 0, 1)
        ground = ground + np.float32(strength) * base * strands * mask
    if rng.random() < 0.5:
        around = blur((canvas.labels > 0).astype(np.float32), diameter * rng.uniform(0.3, 0.7))
        ground = ground + np.float32(rng.uniform(-0.25, 0.5)) * around
    if gaps is not None:
        rim = gaps * (1 - gaps) * 4
        ground = ground * (1 - np.float32(rng.uniform(0.5, 1.0)) * gaps) + np.float32(rng.uniform(0, 0.35)) * rim
    return np.asarray(np.clip(ground, 0.0, 2.5), dtype=np.float32)


def _smear_ground(rng: np.random.Generator, canvas: Canvas, diameter: float, gaps: Field | None) -> Field:
    """Absorbance of a smear's background: nearly clear, with pale unlabelled ghosts, rims and smudges."""
    shape = canvas.labels.shape
    ghosts = Canvas(shape)

    def make(draw: np.random.Generator) -> Outline:
        return shapes.round_outline(draw, 1.15, 0.06)

    size, cover = diameter * rng.uniform(0.7, 1.1), rng.choice((0.02, 0.1, 0.3))
    scatter(rng, ghosts, make, diameter_px=size, cover=cover, clustering=0.5, max_overlap=0.2, max_objects=150)
    pale = ghosts.per_object(rng.uniform(0.2, 1.0, len(ghosts.radii_px))) * np.float32(rng.uniform(0.2, 1.3))
    edge = np.exp(-(((1 - np.minimum(ghosts.rho, 1)) * 5) ** 2)) * (ghosts.labels > 0)
    ground = 0.12 + pale * (0.6 + 0.6 * edge)
    cloud = random_field(rng, shape, diameter * 0.8, roughness=2)
    ground = ground + np.float32(rng.uniform(0.01, 0.05)) * cloud
    ground = ground + np.float32(rng.uniform(0, 0.25)) * _lines(rng, shape, diameter, 0.08) * np.clip(cloud - 0.3, 0, 1)
    plasm = blur((canvas.labels > 0).astype(np.float32), diameter * rng.uniform(0.08, 0.25))
    return np.asarray(np.clip(ground + np.float32(rng.uniform(0, 0.6)) * plasm, 0, 2.5), dtype=np.float32)


def _colour(rng: np.random.Generator, layers: tuple[Field, Field], stain: Stain, field_px: int) -> NDArray[np.uint8]:
    """Let light pass both stains and record it as uint8 "YXC"."""
    stained, ground = layers
    shape = stained.shape
    nucleus = np.asarray(stain.nucleus) * np.exp(rng.normal(0, 0.14, 3)) * log_uniform(rng, 0.6, 1.25)
    rest = np.asarray(stain.ground) * np.exp(rng.normal(0, 0.18, 3)) * stain.strength * log_uniform(rng, 0.5, 1.3)
    dust = specks(rng, shape, rng.choice((0.0, 3.0)), 4 * field_px / 1024) * np.float32(rng.uniform(0.3, 1.5))
    absorbed = (
        stained[..., None] * nucleus.astype(np.float32)
        + ground[..., None] * rest.astype(np.float32)
        + dust[..., None] * np.asarray((0.8, 0.8, 0.9), dtype=np.float32)
    )
    picture = np.exp(-absorbed) * uneven_light(rng, (shape[0], shape[1]), rng.uniform(0, 0.2))[..., None]
    fate = rng.random()
    if fate < 0.07:  # scanned as grey, or as grey tinted
        grey = picture.mean(axis=2, keepdims=True)
        tint = np.asarray((0.85, 0.75, 1.0)) if fate < 0.04 else np.ones(3)
        picture = np.asarray(grey ** (1 / tint.astype(np.float32)), dtype=np.float32)
    step = rng.choice((1.0, 1.5, 2.0, 3.0), p=(0.3, 0.2, 0.25, 0.25)) * max(field_px / 1024, 0.5)
    photons = log_uniform(rng, 800, 20000)
    picture = expose(rng, np.asarray(picture, dtype=np.float32), photons=photons, read_noise=2, step=float(step))
    white = rng.uniform(215, 252) * (1 - np.abs(rng.normal(0, 0.03, 3)))
    return np.asarray(np.clip(np.rint(picture * white.astype(np.float32)), 0, 255), dtype=np.uint8)
