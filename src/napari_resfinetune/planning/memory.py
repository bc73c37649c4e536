"""What this process takes, now and at most: on the machine and on the card.

GB means 10**9 bytes in the whole package, so that a limit of 8 GB is never more than 8 GB by anyone's count.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

GB = 1e9
WATCH_SECONDS = 0.1
MAPPED_LIBRARIES_GB = 0.6
_STATUS = Path("/proc/self/status")
# Where the system is told to forget the largest resident memory of this process.
_CLEAR, _PEAK = Path("/proc/self/clear_refs"), "5"


@dataclass(frozen=True)
class MemoryReading:
    """Memory in GB: taken now, taken at most so far, and allowed (`None` without a limit)."""

    now_gb: float
    peak_gb: float
    limit_gb: float | None


class MemoryGauge:
    """Reads the memory that decides on a device: the card's for CUDA and MPS, else that of this process.

    Parameters
    ----------
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    limit_gb
        What is allowed, handed on in every reading.
    """

    def __init__(self, device: str, limit_gb: float | None = None) -> None:
        self.device = device
        self.limit_gb = limit_gb
        self._seen_gb = 0.0
        if device.startswith("cuda"):
            import torch

            if torch.cuda.is_initialized():  # an earlier run in this process is not this run's peak
                torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # Linux alone can be asked to forget
                _CLEAR.write_text(_PEAK, encoding="ascii")

    def read(self) -> MemoryReading:
        """Return what is taken now and was at most, as far as the system or earlier readings know."""
        if self.device.partition(":")[0] in ("cuda", "mps"):
            now_gb, peak_gb = gpu_memory_gb(self.device)
        else:
            now_gb, peak_gb = process_memory_gb(), peak_memory_gb()
        # The system knows no peak of a process together with its children, nor of an Apple GPU.
        self._seen_gb = max(self._seen_gb, now_gb, peak_gb)
        return MemoryReading(now_gb, self._seen_gb, self.limit_gb)


class MemoryWatch:
    """Looks at the memory of this process ten times a second, in a thread, while it is open.

    Pages of files that are mapped count only as far as they may be libraries: the system takes others back at will.
    """

    def __init__(self) -> None:
        self.peak_gb = 0.0
        self._process = psutil.Process()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory watch", daemon=True)

    def __enter__(self) -> MemoryWatch:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()

    def forget(self) -> None:
        """Begin anew from what is taken now."""
        with self._lock:
            self.peak_gb = watched_memory_gb(self._process)

    def _look(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            with self._lock:
                self.peak_gb = max(self.peak_gb, watched_memory_gb(self._process))


def watched_memory_gb(process: psutil.Process | None = None) -> float:
    """Return what `MemoryWatch` counts of a process, of this one if none is given, in GB."""
    info = (process or psutil.Process()).memory_info()
    mapped = getattr(info, "shared", 0) / GB
    return float(info.rss / GB - mapped + min(mapped, MAPPED_LIBRARIES_GB))


def process_memory_gb() -> float:
    """Return resident memory of this process and its children now, in GB. Shared pages count once per process."""
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return float(total / GB)


def peak_memory_gb() -> float:
    """Return the largest resident memory that this process (without children) ever had, in GB."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset / GB)
    # Preferred over getrusage, whose figure a child inherits from a parent that was larger.
    found = re.search(r"^VmHWM:\s*(\d+) kB", _read(_STATUS), re.MULTILINE)
    if found:
        return int(found.group(1)) * 1024 / GB
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / GB


def gpu_memory_gb(device: str) -> tuple[float, float]:
    """Return memory of this process's tensors on a card, now and at most, in GB.

    The driver's own share and what torch keeps for reuse come on top.

    Parameters
    ----------
    device
        ``"cuda"``, ``"cuda:1"`` or ``"mps"``; anything else has none.
    """
    kind = device.partition(":")[0]
    if kind not in ("cuda", "mps"):
        return 0.0, 0.0
    import torch

    if kind == "mps":
        now_gb = torch.mps.current_allocated_memory() / GB
        return now_gb, now_gb
    return torch.cuda.memory_allocated(device) / GB, torch.cuda.max_memory_allocated(device) / GB


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
