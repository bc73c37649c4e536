"""What dry runs found, kept on disk: the same step of the same code costs the same, and a dry run takes seconds."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from napari_resfinetune.config.cache import read_cached, write_cached
from napari_resfinetune.planning.hardware import package_version
from napari_resfinetune.planning.levers import Work

FILE = "dry-runs.json"
# What a step is made of, and whose code that is.
_FLOORS = ("models", "training", "planning", "data")
_PACKAGES = ("torch", "micro-sam", "segment-anything-py", "torch-em", "peft", "timm")


@dataclass(frozen=True)
class PartCost:
    """Tensors of a part of the step in GB: most alive going forward (decoders: at all) and backward, alive in between.

    `gradients_gb` stay until the optimizer has used them; `frozen_tflop` is the share below the first unit that learns.
    """

    forward_gb: float = 0.0
    held_gb: float = 0.0
    backward_gb: float = 0.0
    gradients_gb: float = 0.0
    tflop: float = 0.0
    frozen_tflop: float = 0.0
    features_gb: float = 0.0


def kept(dry_run: Callable[[Work], PartCost]) -> Callable[[Work], PartCost]:
    """Let a dry run happen once for all processes of this user, until the code changes."""

    @functools.lru_cache(maxsize=256)
    @functools.wraps(dry_run)
    def from_disk(work: Work) -> PartCost:
        key = f"{dry_run.__name__} {json.dumps({**asdict(work), 'strategy': work.strategy.model_dump()})}"
        known = _known().get(key)
        if _is_whole(known):
            return PartCost(**known)
        found = dry_run(work)
        write_cached(FILE, {"code": CODE, "figures": {**_known(), key: asdict(found)}})
        return found

    return from_disk


def _known() -> dict[str, dict[str, float]]:
    content = read_cached(FILE)
    figures = content.get("figures") if content.get("code") == CODE else None
    return figures if isinstance(figures, dict) else {}


def _is_whole(known: Any) -> TypeGuard[dict[str, float]]:
    if not isinstance(known, dict) or known.keys() != {field.name for field in fields(PartCost)}:
        return False
    return all(isinstance(number, int | float) and 0 <= number < math.inf for number in known.values())


def _code_hash() -> str:
    digest = hashlib.blake2b(str([package_version(package) for package in _PACKAGES]).encode(), digest_size=20)
    root = Path(__file__).parents[1]
    for file in sorted(file for floor in _FLOORS for file in (root / floor).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Now, while the code that is loaded is what lies there.
CODE = _code_hash()
