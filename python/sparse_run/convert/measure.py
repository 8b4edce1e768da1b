"""What quantisation reads from running models: the inputs that each matrix sees in the source (importance of its columns), and
how far the result's predictions are from the source's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Error, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..tokenizer import Tokenizer
    from .checkpoint import Checkpoint
    from .quantise import Rounding
    from .writer import ProgressCallback

CALIBRATION_CHUNKS = 16
REPORT_CHUNKS = 20
SPARSITY_CHUNKS = 4
CONTEXT = 512
_BLOCK = 256  # rows that run_layer takes at a time
_CHARACTERS_PER_TOKEN = 12  # more than any tokenizer makes of a token on average

# The matrices that each site feeds, as roles of a layer.
_FED = {
    "A": ("attn_q", "attn_k", "attn_v"),
    "O": ("attn_o",),
    "M": ("ffn_gate", "ffn_up"),
    "Z": ("ffn_down",),
}


@dataclass(frozen=True)
class Importance:
    """What a text's run tells. `columns`: mean square of the input of every column, by role, with mean 1; `layers`: how much
    each layer changes the residual stream, as a share of the stream's energy behind it."""

    columns: dict[str, NDArray[np.float32]]
    layers: list[float]
    zeros: list[float]
    """Share of the FFN's neurons that are exactly 0, by layer."""
    tokens: int


@dataclass(frozen=True)
class Quality:
    """The result beside its source on the same tokens; KL is of the result's distribution from the source's, in nats."""

    perplexity: float
    perplexity_source: float
    perplexity_increase: float
    """perplexity / perplexity_source - 1."""
    perplexity_increase_stderr: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    tokens_scored: int
    ctx: int
    chunks: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def chunks_of(tokenizer: Tokenizer, text: str, wanted: int, what: str, *, spread: bool) -> NDArray[np.int32]:
    """Up to `wanted` chunks of CONTEXT tokens, each beginning with BOS where the model asks for it: from the text's beginning
    on, or spread over it. Raises UsageError where it has not even one; `what` names the text."""
    import numpy as np

    text = text.replace("\r\n", "\n").replace("\r", "\n")
    span = CONTEXT * _CHARACTERS_PER_TOKEN
    if spread and len(text) > 2 * span * wanted:
        starts = [text.find(" ", i * (len(text) // wanted)) + 1 for i in range(wanted)]
        pieces = [tokenizer.encode(text[at : at + span], parse_special=False)[:CONTEXT] for at in starts]
    else:
        ids = tokenizer.encode(text[: span * wanted], parse_special=False)
        pieces = [ids[at : at + CONTEXT] for at in range(0, CONTEXT * wanted, CONTEXT)]
    whole = [piece for piece in pieces if len(piece) == CONTEXT]
    if not whole:
        raise UsageError(f"{what} is shorter than one chunk of {CONTEXT} tokens; give a longer text")
    out = np.asarray(whole, dtype=np.int32)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        out[:, 0] = tokenizer.bos_id
    return out


def calibrate(
    rounding: Rounding,
    checkpoint: Checkpoint,
    packed: Path,
    tokenizer: Tokenizer,
    text: str,
    progress: ProgressCallback | None = None,
) -> None:
    """Puts what a text tells of a checkpoint, packed at `packed`, into its rounding."""
    import numpy as np

    from .checkpoint import load_roles
    from .quantise import matrices_of

    chunks = chunks_of(tokenizer, text, CALIBRATION_CHUNKS, "the calibration text", spread=True)
    roles = load_roles(checkpoint)
    matrices = matrices_of(roles)
    norm = {name: values for name, values in roles.items() if isinstance(values, np.ndarray) and "output_norm" in name}
    found = measure_importance(packed, chunks, norm, progress, checkpoint.decoder.config["n_ff"])
    rounding.natural_sparsity = {
        "ffn": float(np.mean(found.zeros)), "by_layer": found.zeros, "tokens": found.tokens,
    }  # fmt: skip
    rounding.importance = {
        # n_ff is padded in the packed model, not in the checkpoint.
        role: columns[: matrices[role].cols] for role, columns in found.columns.items() if role in matrices
    }
    if "output" not in matrices:
        rounding.importance["token_embd"] = found.columns["output"]


def measure_importance(
    packed: Path,
    chunks: NDArray[np.int32],
    norm: Mapping[str, NDArray[np.float32]],
    progress: ProgressCallback | None = None,
    n_ff: int = 0,
) -> Importance:
    """Runs a text through a packed model, layer by layer. `norm`: weight and bias of the last norm, in front of the head
    ("output_norm", "output_norm.bias"); `n_ff`: neurons without those that pad the packed model (0: all). Raises Error where
    an activation is not a finite number."""
    import numpy as np

    from .. import _core

    model = _core.Model(str(packed), 0, True)
    try:
        config = json.loads(model.config_json)
        session = _core.Session(model, chunks.shape[1])
        streams = [session.embed(chunk) for chunk in chunks]
        columns: dict[str, NDArray[np.float32]] = {}
        shares, zeros = [], []
        n_layers = config["n_layers"]
        for layer in range(n_layers):
            sums: dict[str, NDArray[np.float64]] = {}
            changed = energy = idle = 0.0
            for i, stream in enumerate(streams):
                parts = []
                for pos in range(0, len(stream), _BLOCK):
                    out, taps = session.run_layer(layer, pos, stream[pos : pos + _BLOCK], taps=True)
                    parts.append(out)
                    for site, values in taps.items():
                        if site in _FED:
                            sums[site] = sums.get(site, 0) + np.square(values, dtype=np.float64).sum(0)
                    idle += float((taps["Z"][:, : n_ff or None] == 0).sum())
                after = np.concatenate(parts)
                changed += float(np.square(after - stream, dtype=np.float64).sum())
                energy += float(np.square(after, dtype=np.float64).sum())
                streams[i] = after
                if progress is not None:
                    progress("running the source", layer * len(streams) + i + 1, n_layers * len(streams))
            for site, total in sums.items():
                mean = _normalised(total, f"layer {layer}, site {site}")
                columns.update({f"layers.{layer}.{name}": mean for name in _FED[site]})
            shares.append(changed / energy if energy > 0 else 0.0)
            zeros.append(idle / (chunks.size * (n_ff or config["n_ff"])))
    finally:
        model.close()
    columns["output"] = _normalised(_last_inputs(streams, config, norm), "the head")
    return Importance(columns, shares, zeros, int(chunks.size))


def natural_sparsity(
    packed: Path, tokenizer: Tokenizer, text: str, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """The share of the FFN's neurons that are exactly 0 on a text: `ffn`, the mean, `by_layer`, and the `tokens` it was
    measured on. Raises UsageError where the text is too short."""
    import numpy as np

    from .. import _core
    from .codes import TILE_ROWS

    chunks = chunks_of(tokenizer, text, SPARSITY_CHUNKS, "the text", spread=True)
    model = _core.Model(str(packed), 0, True)
    try:
        config = json.loads(model.config_json)
        session = _core.Session(model, chunks.shape[1])
        streams = [session.embed(chunk) for chunk in chunks]
        zeros = np.zeros((config["n_layers"], config["n_ff"]), np.int64)  # by neuron
        for layer in range(config["n_layers"]):
            for i, stream in enumerate(streams):
                for pos in range(0, len(stream), _BLOCK):
                    rows = slice(pos, pos + _BLOCK)
                    stream[rows], taps = session.run_layer(layer, pos, stream[rows], taps=True)
                    zeros[layer] += (taps["Z"] == 0).sum(0)
                if progress is not None:
                    progress("counting zeros", layer * len(streams) + i + 1, len(zeros) * len(streams))
    finally:
        model.close()
    # Neurons that pad the packed model are the last ones and idle everywhere.
    busy = np.flatnonzero((zeros < chunks.size).any(0))
    padding = max(0, min(TILE_ROWS - 1, config["n_ff"] - 1 - int(busy.max(initial=0))))
    by_layer = zeros[:, : config["n_ff"] - padding].mean(1) / chunks.size
    return {"ffn": float(by_layer.mean()), "by_layer": by_layer.tolist(), "tokens": int(chunks.size)}


def _last_inputs(
    streams: list[NDArray[np.float32]], config: Mapping[str, Any], norm: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    """Sum of squares by column of what the head multiplies."""
    import numpy as np

    total = np.zeros(config["n_embd"], np.float64)
    for stream in streams:
        x = stream.astype(np.float64)
        if config["norm"] == "layer":
            x -= x.mean(1, keepdims=True)
        x /= np.sqrt(np.square(x).mean(1, keepdims=True) + config["norm_eps"])
        x = x * norm["output_norm"] + norm.get("output_norm.bias", 0.0)
        total += np.square(x).sum(0)
    return total


def _normalised(total: NDArray[np.float64], where: str) -> NDArray[np.float32]:
    import numpy as np

    mean = float(total.mean())
    if not math.isfinite(mean):
        raise Error(f"{where}: activations are not finite numbers; the source is damaged, fetch it again")
    return (total / mean if mean > 0 else np.ones_like(total)).astype(np.float32)


def compare_models(
    source: Path, result: Path, chunks: NDArray[np.int32], progress: ProgressCallback | None = None
) -> Quality:
    """Scores the second half of every chunk with both packed models, as `eval` does. Raises Error where logits are not
    finite numbers."""
    import numpy as np

    from .. import _core
    from ..eval.perplexity import log_softmax

    models = [_core.Model(str(path), 0, True) for path in (source, result)]
    try:
        n_vocab = json.loads(models[0].config_json)["n_vocab"]
        rows = max(1, min(256, (64 << 20) // (4 * n_vocab)))
        ctx = chunks.shape[1]
        sessions = [_core.Session(model, ctx) for model in models]
        nlls: list[NDArray[np.float64]] = []
        divergences: list[NDArray[np.float64]] = []
        same = 0
        for c, chunk in enumerate(chunks):
            for session in sessions:
                session.truncate(0)
                session.eval(chunk[: ctx // 2])
            for begin in range(ctx // 2, ctx - 1, rows):
                part = chunk[begin : min(begin + rows, ctx - 1)]
                targets = chunk[begin + 1 : begin + 1 + len(part)]
                p, q = (log_softmax(session.eval_all(part)) for session in sessions)
                at = np.arange(len(part))
                nlls.append(-np.stack([p[at, targets], q[at, targets]]).astype(np.float64))
                divergences.append(np.maximum((np.exp(p) * (p - q)).sum(1, dtype=np.float64), 0.0))
                same += int((p.argmax(1) == q.argmax(1)).sum())
            if not np.isfinite(nlls[-1]).all():
                raise Error(f"chunk {c + 1} of the report's text: logits are not finite numbers; use more bits")
            if progress is not None:
                progress("comparing with the source", c + 1, len(chunks))
    finally:
        for model in models:
            model.close()
    before, after = np.concatenate(nlls, axis=1)
    kl = np.concatenate(divergences)
    factor = math.exp(min(700.0, float((after - before).mean())))
    return Quality(
        perplexity=math.exp(min(700.0, float(after.mean()))),
        perplexity_source=math.exp(min(700.0, float(before.mean()))),
        perplexity_increase=factor - 1,
        perplexity_increase_stderr=factor * float((after - before).std()) / math.sqrt(len(kl)),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=same / len(kl),
        tokens_scored=len(kl),
        ctx=ctx,
        chunks=len(chunks),
    )
