"""What a sparsity file needs under a memory budget, known before the budget is divided: how many single neurons decoding will ask
for, and what the method itself holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .sparsity import SparsityFile

_BLOCK = 256  # tokens of a prompt that are computed together


@dataclass(frozen=True)
class Needs:
    """For `_core.Model`: `neuron_share` (0: no single neurons) and `extra_bytes`."""

    neuron_share: float = 0.0
    extra_bytes: int = 0


def known(choice: str | float | None, packed: Path) -> tuple[SparsityFile | None, str]:
    """The file that `--sparsity` means, without running the model, and what "auto" has decided. Raises UsageError for a level that was not calibrated yet:
    that takes memory which no budget foresees."""
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


def needs(file: SparsityFile | None, config: Mapping[str, Any]) -> Needs:
    """What decoding with a file needs of a model. Arrays that the file holds already are in memory and not counted again."""
    if file is None:
        return Needs()
    n_layers, n_ff = int(config["n_layers"]), int(config["n_ff"])
    held = sum(int(array.nbytes) for array in file.arrays.values())
    if file.method == "dejavu":
        # Copies of the predictors, and their scores and flags for a block of the prompt.
        return Needs(1.0, held + _BLOCK * n_ff * 5)
    if file.method in ("griffin", "coreinfer"):
        from .predictors.coreinfer.selection import Choice

        choice = Choice.of(file.options)
        each = [n_ff if choice.protected(i, n_layers) else choice.keep(n_ff) for i in range(n_layers)]
        # Sums in double precision, twice, their copy in Python, marks of a block, lists and flags.
        return Needs(sum(each) / (n_layers * n_ff), n_layers * n_ff * 40 + _BLOCK * n_ff)
    widths = sum(int(t.size) for layers in file.thresholds.values() for t in layers if t is not None)
    most = n_layers * 5 * max(n_ff, int(config["n_embd"]), int(config["n_heads"]) * int(config["head_dim"]))
    return Needs(0.0, 4 * max(widths, most))


__all__ = ["Needs", "known", "needs"]
