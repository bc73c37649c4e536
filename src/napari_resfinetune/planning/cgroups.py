"""Memory and cores that this process may use, which containers and batch systems make less than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from napari_resfinetune.planning.memory import GB

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> tuple[int, int]:
    """Return physical and logical cores that this process may use, under affinity and a container's CPU quota.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    installed = psutil.cpu_count() or 1
    per_core = max(1, installed // (psutil.cpu_count(logical=False) or installed))
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else installed
    physical = max(1, logical // per_core)
    quota = max(1, math.floor(min(_cpu_quota(root), installed)))
    return min(physical, quota), min(logical, quota)


def usable_memory_gb(root: Path = _ROOT) -> tuple[float, float]:
    """Return total and free RAM in GB, under the limits of the control groups (containers, batch jobs) it runs in.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.
    """
    memory = psutil.virtual_memory()
    total, free = float(memory.total), float(memory.available)
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in _cgroup_folders("memory", root):
        for limit_name, usage_name in names:
            limit = _number(folder / limit_name)
            if not limit < memory.total:  # no limit is written as "max" or as an enormous number
                continue
            # Cached file pages count as used, but the kernel gives them up first.
            used = max(0.0, _number(folder / usage_name, 0.0) - _reclaimable(folder))
            total, free = min(total, limit), min(free, max(0.0, limit - used))
    return total / GB, free / GB


def read_text(path: Path) -> str:
    """Return a file's stripped text, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpu_quota(root: Path) -> float:
    """Cores' worth of time that control groups allow; infinite without a quota."""
    quota = math.inf
    for folder in _cgroup_folders("cpu", root):
        allowed, _, period = read_text(folder / "cpu.max").partition(" ")
        if not allowed:
            allowed, period = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
        if allowed.isdecimal() and period.isdecimal() and int(period) > 0:
            quota = min(quota, int(allowed) / int(period))
    return quota


def _cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Control group of the process and those above it, of version 1 and 2; each of them may hold a limit."""
    mounted = root / "sys" / "fs" / "cgroup"
    for line in read_text(root / "proc" / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        # In a container the path may be the host's and not exist here; the container's own group is then at the top.
        group = top / inside.lstrip("/")
        while top in group.parents:
            yield group
            group = group.parent
        yield top


def _reclaimable(folder: Path) -> float:
    for line in read_text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdecimal():
            return float(value)
    return 0.0


def _number(path: Path, otherwise: float = math.inf) -> float:
    text = read_text(path)
    return float(text) if text.isdecimal() else otherwise
