"""What becomes of freed memory while a model works: kept for the next tensor, or, if large, given back at once.

glibc's own way is in between: with every step it learns to keep larger blocks, in a heap full of holes. Kept memory
spares the fresh pages that the system zeroes at their first touch, and is faster; large blocks given back at once leave
no holes, and a step of ``vit_b`` then takes about 1 GB less. No number changes either way.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Literal

import psutil

from napari_resfinetune.planning.memory import GB

Freed = Literal["keep", "return"]

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
# Smaller blocks fill the holes that smaller blocks leave; returning them too costs another third of the time.
_LARGE_BYTES = 12 * 2**20
_SETTINGS: dict[Freed, tuple[tuple[int, int], ...]] = {
    "keep": ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)),
    "return": ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, _LARGE_BYTES), (_M_TRIM_THRESHOLD, 2**31 - 1)),
}
_DEFAULTS = ((_M_MMAP_MAX, 65536), (_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**26))
# Segmenting takes up to 5 GB with memory kept.
_ROOM_GB = 8
# What is in force, the innermost last.
_in_force: list[Freed] = []


@contextlib.contextmanager
def freed_memory(what: Freed) -> Iterator[None]:
    """Keep or return freed memory for a while; after the outermost, what is free is returned. Only glibc can be told.

    Parameters
    ----------
    what
        ``"keep"`` is faster, ``"return"`` smaller.
    """
    _in_force.append(what)
    _set(_SETTINGS[what])
    try:
        yield
    finally:
        _in_force.pop()
        if _in_force:
            _set(_SETTINGS[_in_force[-1]])
        else:
            _set(_DEFAULTS)
            return_free_memory()


@contextlib.contextmanager
def kept_where_there_is_room() -> Iterator[None]:
    """Keep freed memory while a model is used: up to twice as fast, for a third more memory."""
    roomy = psutil.virtual_memory().available > _ROOM_GB * GB
    with freed_memory("keep") if roomy else contextlib.nullcontext():
        yield


def switch_freed_memory(what: Freed) -> None:
    """Within `freed_memory`, do otherwise from now on."""
    if _in_force:
        _in_force[-1] = what
    _set(_SETTINGS[what])


def return_free_memory() -> None:
    """Give what is free back to the system now."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def can_be_returned() -> bool:
    """Say whether this system's library for memory can be told what to do with what is freed."""
    return _glibc() is not None


def _set(options: tuple[tuple[int, int], ...]) -> None:
    libc = _glibc()
    if libc is not None:
        for option, value in options:
            libc.mallopt(option, value)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    known = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return library if known else None
