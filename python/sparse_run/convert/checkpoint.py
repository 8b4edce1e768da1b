"""What the sources of checkpoints have in common: their tensors are named, matched with an architecture's roles, checked and
turned into a packed model. Formats differ only in how they are opened (gguf.py, hf.py)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UnsupportedModelError
from .assemble import assemble
from .rows import PickedRows, RowSource, floats_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..models.common import Architecture, Decoder, Fused
    from .layout import LayoutChoice
    from .quantise import Rounding
    from .writer import Existing, ProgressCallback, TensorData


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a source: `shape` rows first, the `type` as the source calls it, and its reader."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    rows: Callable[[], RowSource]
    vector: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class Checkpoint:
    """An opened source with everything that the conversion needs."""

    where: str
    architecture: Architecture
    decoder: Decoder
    names: Mapping[str, str]  # role pattern -> name pattern
    tensors: Mapping[str, CheckpointTensor]
    about: Mapping[str, str]  # name, license, source
    tokenizer: Callable[[Path], None]
    norm_offset: float = 0.0  # to be added to the weights of norms
    positions_offset: int = 0  # rows of position_embd before that of position 0

    def tensor_types(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        return dict(sorted(Counter(t.type for t in self.tensors.values()).items()))


def match_roles(checkpoint: Checkpoint) -> dict[str, CheckpointTensor]:
    """Role to tensor. Raises where a tensor is missing, of a wrong shape, or none that the architecture knows."""
    from ..models.common import expected_shape

    arch, decoder = checkpoint.architecture, checkpoint.decoder
    config, fused = decoder.config, _fused(checkpoint)
    wanted: dict[str, str] = {}
    for pattern in (*decoder.required, *decoder.optional):
        if pattern in checkpoint.names:
            for role, name in _expand(pattern, checkpoint.names[pattern], config["n_layers"]):
                wanted[name] = role
    matched = {wanted[name]: tensor for name, tensor in checkpoint.tensors.items() if name in wanted}
    unknown = [name for name in checkpoint.tensors if name not in wanted and not _ignored(name, arch.ignored)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UnsupportedModelError(
            f"{checkpoint.where}: tensor {unknown[0]}{more} belongs to no part of the architecture {arch.name} that is "
            "supported; this variant of the model cannot be run"
        )
    for pattern in decoder.required:
        for role, name in _expand(pattern, checkpoint.names[pattern], config["n_layers"]):
            if role not in matched:
                raise ModelError(f"{checkpoint.where}: tensor {name} is missing; the file is not whole, fetch it again")
    for role, tensor in matched.items():
        shape = expected_shape(role, config, fused)
        if role == "position_embd":
            shape = (shape[0] + checkpoint.positions_offset, shape[1])
        if tensor.shape != shape:
            raise ModelError(
                f"{checkpoint.where}: tensor {tensor.name} has the shape {_text(tensor.shape)}, but the hyper-parameters "
                f"say {_text(shape)}; the file is damaged or made by a faulty converter"
            )
    return matched


def _expand(role: str, name: str, n_layers: int) -> Iterable[tuple[str, str]]:
    if "{i}" not in role:
        return [(role, name)]
    return [(role.replace("{i}", str(i)), name.replace("{i}", str(i))) for i in range(n_layers)]


def _ignored(name: str, patterns: Iterable[str]) -> bool:
    return any(
        re.fullmatch(re.escape(p).replace(re.escape("{i}"), r"\d+").replace(re.escape("*"), ".*"), name)
        for p in patterns
    )


def _text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _fused(checkpoint: Checkpoint) -> Mapping[str, Fused]:
    own = checkpoint.decoder.fused
    return checkpoint.architecture.fused if own is None else own


def load_roles(checkpoint: Checkpoint) -> dict[str, TensorData]:
    """The tensors by role: matrices as sources of rows, vectors in memory; what is fused is taken apart."""
    import numpy as np

    from ..models.common import part_ranges

    config, fused = checkpoint.decoder.config, _fused(checkpoint)
    roles: dict[str, TensorData] = {}
    for role, tensor in match_roles(checkpoint).items():
        layer, _, name = role.rpartition(".") if not role.endswith(".bias") else role[:-5].rpartition(".")
        if name in fused:
            for part, ranges in part_ranges(fused[name], config).items():
                whole = f"{layer}.{part}"
                if role.endswith(".bias"):
                    values = tensor.vector()
                    roles[whole + ".bias"] = np.concatenate([values[begin:end] for begin, end in ranges])
                else:
                    roles[whole] = PickedRows(tensor.rows(), ranges)
        elif role == "position_embd":
            rows = tensor.rows()
            roles[role] = floats_of(rows.read(checkpoint.positions_offset, rows.rows))
        elif len(tensor.shape) == 2:
            roles[role] = tensor.rows()
        elif role.endswith("norm") and checkpoint.norm_offset:
            roles[role] = tensor.vector() + checkpoint.norm_offset
        else:
            roles[role] = tensor.vector()
    return roles


def _add_rope_factors(checkpoint: Checkpoint, config: Mapping[str, Any], roles: dict[str, TensorData]) -> None:
    """The factors of the decoder's scaling times those that the checkpoint stores; windowed layers have the same ones
    unless their rotation is their own."""
    import numpy as np

    decoder = checkpoint.decoder
    scaling = decoder.rope_scaling
    if decoder.local_rope and scaling.short_context is not None:
        raise UnsupportedModelError(f"{checkpoint.where}: LongRoPE beside another rotation of windowed layers")
    for name, factors in (("rope_factors", scaling.factors), ("rope_factors_long", scaling.long_factors)):
        stored = roles.get(name)
        if factors is not None:
            own = np.asarray(factors, np.float32)
            stored = roles[name] = own * stored if isinstance(stored, np.ndarray) else own
        if isinstance(stored, np.ndarray) and not (stored > 0).all():
            raise ModelError(
                f"{checkpoint.where}: RoPE factors that are not positive; the file is damaged, fetch it again"
            )
    if "rope_factors" in roles and any(config.get("window") or ()) and not decoder.local_rope:
        roles["rope_factors_local"] = roles["rope_factors"]


def convert_checkpoint(
    checkpoint: Checkpoint,
    dst: Path,
    *,
    source: Callable[[], Mapping[str, Any]],
    layout: LayoutChoice,
    existing: Existing,
    progress: ProgressCallback | None,
    rounding: Rounding | None = None,
) -> None:
    """Makes the packed model, weights as they are unless `rounding` says otherwise. `source()` is called before the rename
    for source.json; it raises where the source changed meanwhile."""
    from ..models.common import check_config
    from .writer import write_packed

    config = {**checkpoint.about, "architecture": checkpoint.architecture.name, **checkpoint.decoder.config}
    check_config(config, checkpoint.where)
    roles = load_roles(checkpoint)
    _add_rope_factors(checkpoint, config, roles)
    if rounding is not None:
        roles = rounding.apply(roles)
    record = {} if rounding is None else rounding.record()
    config, tensors = assemble(config, roles)

    write_packed(
        dst,
        config,
        tensors,
        source=lambda: {**source(), "tensor_types": checkpoint.tensor_types(), **record},
        add_files=checkpoint.tokenizer,
        layout=layout,
        existing=existing,
        progress=progress,
        what=f"converting {Path(checkpoint.where).name}",
    )
