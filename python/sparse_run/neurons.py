"""What a sparsity file needs under a memory budget, known before the budget is divided: how many single neurons decoding will ask
for, and what the method itself holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .sparsity import SparsityFile

_BLOCK = 256  # tokens of a prompt that are computed together
_LARGEST = 4 << 20  # bytes of the heap that copying a layer's predictor may leave in use
_WORTHWHILE = 0.8  # of the neurons below their thresholds: with fewer, long reads of whole FFNs cost less than single ones


@dataclass(frozen=True)
class Needs:
    """For `_core.Model`: `neuron_share` (0: no lists of single neurons), `extra_bytes` and `by_gate`."""

    neuron_share: float = 0.0
    extra_bytes: int = 0
    by_gate: bool = False


def gives_zeros(config: Mapping[str, Any]) -> bool:
    """Whether a model's activation makes neurons exactly 0, which decoding then leaves out."""
    relu = config.get("activation") in ("relu", "relu2")
    return relu or float(config.get("activation_threshold") or 0) > 0 or bool(config.get("up_relu"))


def known(choice: str | float | None, packed: Path) -> tuple[SparsityFile | None, str]:
    """The file that `--sparsity` means, without running the model, and what "auto" has decided. Raises UsageError for a level
    that was not calibrated yet: that takes memory which no budget foresees."""
    from .packed_header import read_header
    from .sparsity import find_auto, load, parse_level, path_of, resolve

    if choice is None or choice == "off":
        return None, ""
    header = read_header(packed)
    if choice == "auto":
        return find_auto(header)
    level = parse_level(str(choice))
    if level is None:
        return resolve(str(choice), header), ""
    from .predictors.teal.fit import level_name

    path = path_of(header.path, level_name(level))
    if not path.is_file():
        raise UsageError(
            f"the level {level:g} was not calibrated for this model yet, which a memory budget leaves no room for; run "
            f"`sparse-run generate --sparsity {level:g}` once without --memory-budget, or `sparse-run calibrate`"
        )
    return load(path, header), ""


def zeros_pay(config: Mapping[str, Any], packed: Path) -> bool:
    """Whether neurons that are exactly 0 are many enough to read the others one by one: they are taken to be, where nothing
    was measured (`convert --order TEXT` and `info --measure TEXT` do)."""
    from .registry import read_source

    if not gives_zeros(config):
        return False
    measured = read_source(packed).get("natural_sparsity") or {}
    return float(measured.get("ffn", 1.0)) >= _WORTHWHILE


def needs(file: SparsityFile | None, config: Mapping[str, Any], packed: Path) -> Needs:
    """What decoding with a file, or without one, needs of a packed model. What the file holds already is in memory and not
    counted again."""
    zeros = zeros_pay(config, packed)
    if file is None:
        return Needs(by_gate=zeros)
    n_layers, n_ff = int(config["n_layers"]), int(config["n_ff"])
    if file.method == "dejavu":
        return Needs(1.0, _predictor_bytes(file.arrays, int(config["n_embd"])) + n_ff * 16)
    if file.method in ("griffin", "coreinfer"):
        from .predictors.coreinfer.selection import Choice

        choice = Choice.of(file.options)
        each = [n_ff if choice.protected(i, n_layers) else choice.keep(n_ff) for i in range(n_layers)]
        # Sums in double precision, twice, their copy in Python, marks of a block, lists and flags.
        return Needs(sum(each) / (n_layers * n_ff), n_layers * n_ff * 40 + _BLOCK * n_ff)
    widths = sum(int(t.size) for layers in file.thresholds.values() for t in layers if t is not None)
    most = n_layers * 5 * max(n_ff, int(config["n_embd"]), int(config["n_heads"]) * int(config["head_dim"]))
    levels = file.levels.get("G", [])
    chosen = sum(levels) >= _WORTHWHILE * n_layers and all(t is not None for t in file.thresholds.get("G", [None]))
    return Needs(0.0, 4 * max(widths, most), by_gate=zeros or chosen)


def _predictor_bytes(arrays: Mapping[str, NDArray[Any]], n_embd: int) -> int:
    """What `_core.Predictor` takes, the arrays of one layer while they are copied included; of arrays that are damaged, which
    it refuses, anything."""
    from . import _core

    held = most = 0
    for name in arrays:
        part, _, key = name.rpartition(".")
        if key != "threshold":
            continue
        rank, n = arrays.get(f"{part}.a_scale"), arrays.get(f"{part}.b_scale")
        if rank is None or n is None or not len(rank) or not len(n):
            continue
        held += _core.predictor_bytes(len(rank), len(n), n_embd)
        most = max(most, (n_embd + len(n)) * len(rank))
    return held + 3 * most + _LARGEST


__all__ = ["Needs", "gives_zeros", "known", "needs", "zeros_pay"]
