"""The user's cache folder, and small JSON files in it. All of it may be deleted at any time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Return the folder; ``RESFINETUNE_CACHEDIR`` moves it."""
    import pooch

    return Path(os.environ.get("RESFINETUNE_CACHEDIR") or pooch.os_cache("napari-resfinetune"))


def read_cached(name: str) -> dict[str, Any]:
    """Read a file; one that is missing or damaged is as good as empty."""
    try:
        found = json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_cached(name: str, content: Mapping[str, Any]) -> None:
    """Write a file whole; without room or access nothing is kept. Of two processes at once the later one wins."""
    file = cache_folder() / name
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.{os.getpid()}")
        new.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(new, file)
