"""What becomes of freed memory while training: kept for the next tensor, or, where it is large, given back at once.

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


@contextlib.contextmanager
def freed_memory(what: Freed) -> Iterator[None]:
    """Keep or return freed memory for a while; afterwards, what is free is returned. Only glibc can be told.

    Parameters
    ----------
    what
        ``"keep"`` is faster, ``"return"`` smaller.
    """
    switch_freed_memory(what)
    try:
        yield
    finally:
        _set(_DEFAULTS)
        return_free_memory()


def switch_freed_memory(what: Freed) -> None:
    """Keep or return freed memory from now on."""
    _set(_SETTINGS[what])


def return_free_memory() -> None:
    """Give what is free back to the system now."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


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
