"""Numbers and names as people say them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def duration(seconds: float) -> str:
    """Say a time in words, as ``3 min 20 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def rough_duration(seconds: float) -> str:
    """Say a time roughly: ``40 s``, ``4 min``, ``1 h 12 min``, ``3 days``."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 10:
        return f"{hours} h {minutes:02} min" if minutes else f"{hours} h"
    if hours < 48:
        return f"{hours} h"
    return f"{round(hours / 24)} days"


def time_range(least: float, most: float) -> str:
    """Say a range of times; one word when both ends read the same."""
    low, high = rough_duration(least), rough_duration(most)
    return low if low == high else f"{low} to {high}"


def gigabytes(value: float) -> str:
    """Say memory with the digits that matter."""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def counted(number: int, noun: str) -> str:
    """Say ``1 image`` or ``3 images``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def short_names(paths: Collection[str]) -> dict[str, str]:
    """Say for each path the fewest of its last parts that tell all of them apart."""
    parts = {path: Path(path).parts or (path,) for path in paths}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        short = {path: str(Path(*those[-count:])) for path, those in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {path: path for path in paths}
