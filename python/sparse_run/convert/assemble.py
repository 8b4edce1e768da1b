"""From a checkpoint's tensors by role to the tensors of the packed model: fusing, promoting, padding. Exact throughout.

A *role* is a tensor before fusing, named as in models/format.md: `layers.0.attn_q`, `layers.0.ffn_gate`, `output_norm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .codes import TILE_ROWS, Form, common_form
from .layout import round_up
from .rows import ArrayRows, CastRows, ConcatRows, InterleavedRows, PaddedRows, RowSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .writer import TensorData

_GLOBAL_VECTORS = (
    "output_norm",
    "output_norm.bias",
    "position_embd",
    "rope_factors",
    "rope_factors_local",
    "rope_factors_long",
)
_LAYER_VECTORS = (
    "attn_norm",
    "attn_norm.bias",
    "attn_sub_norm",
    "q_norm",
    "k_norm",
    "post_attn_norm",
    "ffn_norm",
    "ffn_norm.bias",
    "post_ffn_norm",
)


def assemble(
    config: Mapping[str, Any], roles: Mapping[str, TensorData]
) -> tuple[dict[str, Any], dict[str, TensorData]]:
    """The packed model's config and its final tensors, in the order in which a token uses them.

    `config` is that of the checkpoint. Matrices may be arrays too; they are stored as float32. n_ff is padded to a multiple
    of 64 with zero neurons. Every role must be one that models/format.md has a place for; ValueError otherwise.
    """
    left = dict(roles)
    out: dict[str, TensorData] = {}

    def matrix(role: str) -> RowSource | None:
        data = left.pop(role, None)
        return None if data is None else _rows(data)

    def move_vectors(prefix: str, names: tuple[str, ...]) -> None:
        for name in names:
            if prefix + name in left:
                out[prefix + name] = left.pop(prefix + name)

    def put(name: str, source: RowSource | None) -> None:
        if source is not None:
            out[name] = source

    n_ff = round_up(config["n_ff"], TILE_ROWS)
    put("token_embd", matrix("token_embd"))
    for i in range(config["n_layers"]):
        layer = f"layers.{i}."
        out.update(_qkv(config, layer, left))
        put(layer + "attn_o", matrix(layer + "attn_o"))
        gate, up = matrix(layer + "ffn_gate"), matrix(layer + "ffn_up")
        if gate is not None and up is not None:
            out[layer + "ffn_gate_up"] = _gate_up(gate, up, n_ff)
        else:
            put(layer + "ffn_up", None if up is None else _padded(up, n_ff, up.cols))
        down = matrix(layer + "ffn_down")
        put(layer + "ffn_down", None if down is None else _padded(down, down.rows, n_ff))
        gate_bias, up_bias = left.pop(layer + "ffn_gate.bias", None), left.pop(layer + "ffn_up.bias", None)
        if gate is not None and (gate_bias is not None or up_bias is not None):
            out[layer + "ffn_gate_up.bias"] = _gate_up_bias(gate_bias, up_bias, n_ff)
        elif up_bias is not None:
            out[layer + "ffn_up.bias"] = _padded_vector(up_bias, n_ff)
        if layer + "ffn_sub_norm" in left:
            out[layer + "ffn_sub_norm"] = _padded_vector(left.pop(layer + "ffn_sub_norm"), n_ff)
        move_vectors(layer, ("attn_o.bias", "ffn_down.bias", *_LAYER_VECTORS))
    put("output", matrix("output"))
    move_vectors("", _GLOBAL_VECTORS)
    if left:
        raise ValueError(f"the packed format has no place for {', '.join(sorted(left))}")
    return {**config, "n_ff": n_ff, "tied_embeddings": "output" not in out}, out


def _rows(data: TensorData) -> RowSource:
    import numpy as np

    return ArrayRows(data) if isinstance(data, np.ndarray) else data


def _qkv(config: Mapping[str, Any], layer: str, left: dict[str, TensorData]) -> dict[str, TensorData]:
    """q, k and v as one matrix, or as parts where neighbours have different forms; a missing bias counts as zeros."""
    import numpy as np

    sources = [_rows(left.pop(layer + "attn_" + part)) for part in "qkv" if layer + "attn_" + part in left]
    parts: list[list[RowSource]] = []
    for source in sources:
        if parts and parts[-1][0].form == source.form:
            parts[-1].append(source)
        else:
            parts.append([source])
    fused = [part[0] if len(part) == 1 else ConcatRows(part) for part in parts]
    name = layer + "attn_qkv"
    out: dict[str, TensorData] = {name if len(fused) == 1 else f"{name}.{i}": s for i, s in enumerate(fused)}
    biases = {part: left.pop(f"{layer}attn_{part}.bias", None) for part in "qkv"}
    if any(bias is not None for bias in biases.values()):
        heads = {"q": config["n_heads"], "k": config["n_kv_heads"], "v": config["n_kv_heads"]}
        zeros = {part: np.zeros(count * config["head_dim"], np.float32) for part, count in heads.items()}
        out[name + ".bias"] = np.concatenate([zeros[p] if b is None else _array(b) for p, b in biases.items()])
    return out


def _gate_up(gate: RowSource, up: RowSource, n_ff: int) -> RowSource:
    form = common_form(gate.form, up.form)
    return InterleavedRows(*(_padded(_cast(source, form), n_ff, source.cols) for source in (gate, up)))


def _gate_up_bias(gate: TensorData | None, up: TensorData | None, n_ff: int) -> NDArray[np.float32]:
    """In the order of the matrix's rows; a missing one counts as zeros."""
    import numpy as np

    both = [np.zeros(n_ff, np.float32) if b is None else _padded_vector(b, n_ff) for b in (gate, up)]
    return np.stack([b.reshape(-1, TILE_ROWS) for b in both], axis=1).reshape(-1)


def _cast(source: RowSource, form: Form) -> RowSource:
    return source if source.form == form else CastRows(source, form)


def _padded(source: RowSource, rows: int, cols: int) -> RowSource:
    if (source.rows, source.cols) == (rows, cols):
        return source
    if cols != source.cols and source.form.quantised and source.cols % source.form.group:
        source = CastRows(source, Form("f32"))
    return PaddedRows(source, rows, cols)


def _padded_vector(data: TensorData, length: int) -> NDArray[np.float32]:
    import numpy as np

    values = _array(data)
    return np.pad(values, (0, length - values.shape[0]))


def _array(data: TensorData) -> NDArray[np.float32]:
    import numpy as np

    if not isinstance(data, np.ndarray):
        raise TypeError("a vector must be an array")
    return data.astype(np.float32, copy=False)
