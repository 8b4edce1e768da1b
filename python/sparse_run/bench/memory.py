"""Peak memory and page faults of this process, as the operating system counts them."""

from __future__ import annotations

from pathlib import Path


def reset_peak_rss() -> None:
    """Lets the peak begin anew from the present size where the system can do that (Linux), so that a conversion done
    earlier by this process does not count. Otherwise nothing happens."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_rss_bytes() -> int:
    """Largest resident size in bytes, mapped file pages included; 0 where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def major_faults() -> int:
    """Page faults of this process so far that had to wait for the disk."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
