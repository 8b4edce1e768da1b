"""The memory budget in words and figures: sizes as people write them, what a budget was divided into, what its reads cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
# Assumed for the expected speed: the rate at which an ordinary machine reads the resident weights.
_MEMORY_RATE = 20e9


def parse_size(text: str | int, what: str = "memory budget") -> int:
    """Bytes of a size such as 700M, 1.5G, 700MB (powers of ten), 1GiB (powers of two), or a plain number.

    Raises UsageError for anything else, and for sizes below one byte; `what` names the size there.

    >>> parse_size("700M"), parse_size("1.5 GiB")
    (700000000, 1610612736)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if not 1 <= size < 2**62:
        raise UsageError(f"a {what} of {str(text)!r} is no size; write it as 700M, 1.5G or 2GiB")
    return size


def size_text(count: float) -> str:
    """Bytes for people: 523.0 MB, 1.12 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def division_text(memory: Mapping[str, Any]) -> str:
    """A core model's `device_memory()` where not all neurons fit the GPU; empty where they do.

    >>> division_text({"hot_share": 0.4, "cpu_weight_bytes": 1_500_000_000, "cpu_layers": 20})
    'the GPU has room for 40% of the neurons; the CPU computes 1.50 GB of them in 20 layers'
    """
    if not memory["cpu_layers"]:
        return ""
    return (
        f"the GPU has room for {memory['hot_share']:.0%} of the neurons; the CPU computes "
        f"{size_text(memory['cpu_weight_bytes'])} of them in {memory['cpu_layers']} layers"
    )


def summary(memory: Mapping[str, Any]) -> dict[str, Any]:
    """A core model's `memory()` with what follows from it: "hit_rate" (share of the weights used that were in memory; of single
    neurons "neuron_hit_rate", None where none were asked for), "neuron_window" (the neurons of how many tokens the slots hold, if
    none were shared; None likewise),
    "expected_tokens_per_s" (at the disk's rate at the start; None where that is unknown), and by pass "read_bytes_per_pass",
    "read_seconds_per_pass", "wait_seconds_per_pass", "read_bytes_per_s" while the disk was busy."""
    passes = memory["passes"]
    whole = memory["resident_bytes"] + memory["streamed_bytes"]
    rate = memory["disk_bytes_per_s"]
    disk = memory["streamed_bytes"] / rate if rate else 0.0
    neurons = memory.get("neuron_hits", 0) + memory.get("neuron_misses", 0)
    return {
        **memory,
        "hit_rate": memory["resident_bytes"] / whole if whole else 1.0,
        "neuron_hit_rate": memory["neuron_hits"] / neurons if neurons else None,
        "neuron_window": memory["neuron_slots"] * memory["neuron_tokens"] / neurons if neurons else None,
        # What single neurons cost follows from the text.
        "expected_tokens_per_s": (
            1 / max(disk, whole / _MEMORY_RATE) if rate and whole and not memory.get("neuron_slots") else None
        ),
        "read_bytes_per_pass": memory["read_bytes"] / passes if passes else 0.0,
        "read_seconds_per_pass": memory["read_seconds"] / passes if passes else 0.0,
        "wait_seconds_per_pass": memory["wait_seconds"] / passes if passes else 0.0,
        "read_bytes_per_s": memory["read_bytes"] / memory["read_seconds"] if memory["read_seconds"] else 0.0,
    }


def start_text(memory: Mapping[str, Any]) -> str:
    """What will happen under a budget, for people, before anything is generated."""
    m = summary(memory)
    cached = f", {size_text(m['ring_bytes'])} are read ahead" if m["ring_bytes"] else ""
    head = (
        f"memory budget {size_text(m['budget_bytes'])}: {size_text(m['resident_bytes'])} of the weights stay in "
        f"memory{cached}, context of {m['n_ctx']} tokens"
    )
    if m.get("neuron_slots"):
        gates = ""
        if m.get("gate_bytes"):
            gates = f", {size_text(m['gate_bytes'])} of them gate rows, which choose the others"
            if m["gate_streamed_bytes"]:
                gates += f" and of which {size_text(m['gate_streamed_bytes'])} are read for each token"
        return (
            f"{head}, {m['neuron_slots']} single neurons ({size_text(m['neuron_bytes'])}{gates}); each block of a prompt reads "
            f"{size_text(m['streamed_bytes'])}, each token of the answer the neurons that it needs and that are missing"
        )
    if m.get("no_neurons"):
        head = f"{head}; neurons are not read singly ({m['no_neurons']})"
    if not m["streamed_bytes"]:
        return f"{head}; nothing is read while generating"
    speed = ""
    if m["expected_tokens_per_s"] is not None:
        speed = (
            f" at {size_text(m['disk_bytes_per_s'])}/s as measured just now: "
            f"about {m['expected_tokens_per_s']:.2g} tokens/s"
        )
    slow = "" if m["direct"] else "; this file system has no direct reads, so they go through its cache"
    return f"{head}; {size_text(m['streamed_bytes'])} are read from disk for each token{speed}{slow}"


def stats_text(memory: Mapping[str, Any]) -> str:
    """What the reads of a budget have come to, for people."""
    m = summary(memory)
    if m["neuron_hit_rate"] is not None:
        return (
            f"[memory: {m['neuron_tokens']} tokens from {m['neuron_slots']} single neurons, room for those of "
            f"{m['neuron_window']:.1f} tokens; {m['neuron_hit_rate']:.1%} of those asked for were there, "
            f"{m['neuron_misses']} were read; {m['passes']} passes in all, {size_text(m['read_bytes'])} from "
            f"disk in {m['read_seconds']:.2f} s ({m['queue_depth']:.1f} reads at once), computing waited "
            f"{m['wait_seconds']:.2f} s]"
        )
    if not m["streamed_bytes"]:
        return f"[memory: {size_text(m['resident_bytes'])} of weights, all resident]"
    return (
        f"[memory: {m['hit_rate']:.0%} of the weights resident; {m['passes']} passes, each {size_text(m['read_bytes_per_pass'])} "
        f"from disk in {m['read_seconds_per_pass']:.2f} s ({size_text(m['read_bytes_per_s'])}/s, {m['queue_depth']:.1f} reads at "
        f"once), computing waited {m['wait_seconds_per_pass']:.2f} s; {m['hits']} pieces were there in time, {m['misses']} not]"
    )
