"""Random fields, blur and cameras: what light and a sensor do to a drawn scene."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Field = NDArray[np.float32]


def random_field(
    rng: np.random.Generator,
    shape: tuple[int, int],
    scale_px: float,
    *,
    roughness: float = 4.0,
    stretch: float = 1.0,
    angle: float = 0.0,
) -> Field:
    """Draw a smooth random field by filtering white noise.

    Parameters
    ----------
    shape
        Height and width in pixels.
    scale_px
        Correlation length: features smaller than this fade.
    roughness
        Exponent of the fall-off beyond `scale_px`; 2 is cloud-like, 4 and more is smooth.
    stretch, angle
        Features are `stretch` times longer along `angle` (radians).

    Returns
    -------
    numpy.ndarray
        "YX" float32 with mean 0 and standard deviation 1.
    """
    # A field without fine detail is drawn on a coarser grid and enlarged.
    step = int(np.clip(scale_px / 2.5, 1, min(8, min(shape) / 16)))
    if step > 1:
        coarse = (-(-shape[0] // step), -(-shape[1] // step))
        return stretch_to(_filtered_noise(rng, coarse, scale_px / step, (roughness, stretch, angle)), shape)
    return _filtered_noise(rng, shape, scale_px, (roughness, stretch, angle))


def _filtered_noise(
    rng: np.random.Generator, shape: tuple[int, int], scale_px: float, look: tuple[float, float, float]
) -> Field:
    """White noise filtered to a correlation length; `look` is roughness, stretch and angle."""
    roughness, stretch, angle = look
    height, width = (int(fft.next_fast_len(n, real=True)) for n in shape)
    fy = np.fft.fftfreq(height).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(width).astype(np.float32)[None]
    along = (fx * np.float32(np.cos(angle)) + fy * np.float32(np.sin(angle))) * np.float32(stretch)
    across = fy * np.float32(np.cos(angle)) - fx * np.float32(np.sin(angle))
    power = 1 + (along * along + across * across) * np.float32((2.5 * scale_px) ** 2)
    gain = power ** np.float32(-roughness / 2)
    gain[0, 0] = 0
    noise = rng.standard_normal((2, *gain.shape), dtype=np.float32)
    field = fft.irfft2((noise[0] + 1j * noise[1]) * gain, s=(height, width))[: shape[0], : shape[1]]
    field = field - field.mean()
    return np.asarray(field / (field.std() + 1e-9), dtype=np.float32)


def blur(field: Field, sigma_px: float) -> Field:
    """Blur a "YX" field with a Gaussian; wide ones are computed on a coarser grid."""
    if sigma_px < 0.3:
        return field
    step = int(min(sigma_px / 1.6, min(field.shape) / 16))
    if step < 2:
        return np.asarray(ndimage.gaussian_filter(field, sigma_px, truncate=3.0, mode="nearest"), dtype=np.float32)
    small = shrink(field, step)
    small = ndimage.gaussian_filter(small, sigma_px / step, truncate=3.0, mode="nearest")
    return stretch_to(small, field.shape)


def shrink(field: Field, step: float) -> Field:
    """Average a "YX" field down by `step`, as a coarser camera would see it."""
    whole = int(step)
    if whole >= 2:
        field = np.asarray(ndimage.uniform_filter(field, whole, mode="nearest"), dtype=np.float32)
    height, width = (max(round(n / step), 4) for n in field.shape)
    return stretch_to(field, (height, width))


def stretch_to(field: Field, shape: Any) -> Field:
    """Resample a "YX" field to `shape` linearly, pixel areas aligned."""
    rows = _taps(field.shape[0], int(shape[0]))
    cols = _taps(field.shape[1], int(shape[1]))
    tall = field[rows[0]] * (1 - rows[2])[:, None] + field[rows[1]] * rows[2][:, None]
    return np.asarray(tall[:, cols[0]] * (1 - cols[2]) + tall[:, cols[1]] * cols[2], dtype=np.float32)


def _taps(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Field]:
    """Neighbours and weights for linear resampling of one axis."""
    position = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(position).astype(np.intp)
    return low, np.minimum(low + 1, old - 1), (position - low).astype(np.float32)


def uneven_light(rng: np.random.Generator, shape: tuple[int, int], strength: float) -> Field:
    """Draw an illumination field around 1: a tilt plus vignetting, both up to `strength`."""
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] - np.float32(rng.uniform(-0.4, 0.4))
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None] - np.float32(rng.uniform(-0.4, 0.4))
    angle, tilt, dark = rng.uniform(0, 2 * np.pi), rng.uniform(0, strength) / 2, rng.uniform(0, strength) / 2
    field = 1 + tilt * (np.cos(angle) * x + np.sin(angle) * y) - dark * (x * x + y * y)
    return np.asarray(np.clip(field, 0.2, 2.0), dtype=np.float32)


def expose(rng: np.random.Generator, signal: Field, *, photons: float, read_noise: float, step: float = 1.0) -> Field:
    """Record a scene with shot noise and read-out noise.

    Parameters
    ----------
    signal
        "YX" or "YXC" float32, about 0 to 1.
    photons
        Electrons that a signal of 1 gives in one pixel; fewer is noisier.
    read_noise
        Standard deviation of the read-out noise, in electrons.
    step
        Pixels of the result per pixel of the camera; above 1 the picture is one that was enlarged afterwards.
    """
    if signal.ndim == 3:
        parts = [
            expose(rng, signal[..., c], photons=photons, read_noise=read_noise, step=step)
            for c in range(signal.shape[2])
        ]
        return np.stack(parts, axis=-1)
    seen = shrink(signal, step) if step > 1.05 else signal
    # Beyond a few electrons the Poisson law is a Gaussian, which is several times cheaper to draw.
    variance = np.maximum(seen, 0) * np.float32(photons) + np.float32(read_noise**2)
    noise = rng.standard_normal(seen.shape, dtype=np.float32) * np.sqrt(variance) / np.float32(photons)
    if photons < 60:
        noise = rng.poisson(np.maximum(seen, 0) * photons).astype(np.float32) / np.float32(photons) - np.maximum(
            seen, 0
        )
        noise += rng.standard_normal(seen.shape, dtype=np.float32) * np.float32(read_noise / photons)
    seen = seen + noise
    return stretch_to(seen, signal.shape) if step > 1.05 else np.asarray(seen, dtype=np.float32)


def digitise(rng: np.random.Generator, signal: Field, *, low: float = 0.0, high: float = 1.0) -> NDArray[Any]:
    """Turn a signal into camera counts of a drawn bit depth: uint8, or uint16 that fills 12 or 16 bits.

    `low` and `high` are the shares of the range that 0 and 1 map to; what lies outside the range saturates.
    """
    top = (255, 4095, 65535)[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]
    counts = np.rint((signal * (high - low) + low) * top)
    return np.asarray(np.clip(counts, 0, top).astype(np.uint8 if top == 255 else np.uint16))
