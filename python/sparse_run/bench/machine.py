"""What this machine offers: cores that may be used, free memory, the read rate of a disk. Used by `sparse-run doctor`."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import tempfile
import time
from pathlib import Path

_READ_UNIT = 1 << 20
_TEST_BYTES = 64 << 20


def affinity_cores() -> int | None:
    """Logical processors that this process may run on; None where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return None


def cgroup_cores() -> float | None:
    """Processors that the control group's quota allows, e.g. 1.5; None without a quota."""
    best: float | None = None
    for folder in _cgroup_folders("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()[:2]
            if quota != "max":
                best = min(best or 1e9, int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                best = min(best or 1e9, quota_us / int((folder / "cpu.cfs_period_us").read_text()))
    return best


def memory_bytes() -> tuple[int | None, int | None]:
    """(total, available) memory in bytes, within the control group's limit where there is one; None where unknown."""
    total = available = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, value = line.split(":")
            if key == "MemTotal":
                total = int(value.split()[0]) * 1024
            elif key == "MemAvailable":
                available = int(value.split()[0]) * 1024
    if total is None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroup_folders("memory"):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / limit_name).read_text())
                if total is not None and limit >= total:
                    continue
                total = limit
                left = max(0, limit - int((folder / usage_name).read_text()))
                available = left if available is None else min(left, available)
    return total, available


def _cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's control group and all its parents, version 2 and 1."""
    out: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if names and controller not in names.split(","):
                continue
            base = Path("/sys/fs/cgroup") / (controller if names else "")
            folder = base / path.lstrip("/")
            while folder.is_relative_to(base):
                out.append(folder)
                if folder == base:
                    break
                folder = folder.parent
    return out


def disk_read_rate(folder: Path) -> tuple[float, bool]:
    """Reads a new file of 64 MB from `folder` past the page cache: (GB/s, whether the cache was really bypassed).

    Raises OSError where the folder cannot be written or the disk is full. The file is removed whatever happens.
    """
    handle, name = tempfile.mkstemp(prefix=".sparse-run-read-test-", dir=folder)
    try:
        block = os.urandom(_READ_UNIT)  # so that a compressing disk is not flattered
        with os.fdopen(handle, "wb") as out:
            for _ in range(_TEST_BYTES // _READ_UNIT):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return _read_rate(name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _read_rate(name: str) -> tuple[float, bool]:
    direct = True
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):  # no direct reads on this file system (tmpfs) or system
        direct = False
        fd = os.open(name, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with io.FileIO(fd, "r") as file, mmap.mmap(-1, _READ_UNIT) as buffer:  # page-aligned, as direct reads need it
        total, start = 0, time.perf_counter()
        while n := file.readinto(buffer):
            total += n
        return total / (time.perf_counter() - start) / 1e9, direct
