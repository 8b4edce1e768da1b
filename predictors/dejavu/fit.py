"""Offline half of Deja Vu: traces from the model's own generations, a predictor a layer, thresholds chosen for all layers
together, and the report that says whether any of it is worth having."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...neurons import gives_zeros
from ...packed_header import SITES, PackedHeader
from ...sparsity import SparsityFile
from ..common import corpus
from ..common.calibration import bytes_per_token
from ..common.measure import speed
from . import predictor as low_rank
from .traces import ENERGY, HEAD_SHARE, LayerTrace, traces
from .train import load_torch, train_low_rank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core
    from ...tokenizer import Tokenizer

Tick = Callable[[str, float, float], None]
"""tick(line for people, work done, work in all)."""

CANNOT_RUN = (
    "this model cannot decode with predictors: its FFN is stored in the layout panels; train with the model that "
    "`sparse-run convert --layout neurons` makes"
)
TRAIN_COST = 0.05  # of one row and epoch of a layer, in prompt tokens through the model: only for the time left


@dataclass(frozen=True)
class Options:
    """How to train. tokens: traced in all, half of them text where there is one, a tenth of them held out. rank: of the
    predictors, 0 is n_embd / 8. bits: of their weights, 4 or 8. recall: the mean over the layers that thresholds are chosen
    for. heads: predict heads too."""

    tokens: int = 16384
    ctx: int = 512
    seed: int = 0
    rank: int = 0
    epochs: int = 12
    recall: float = 0.95
    heads: bool = False
    dense_tokens: int = 16
    bits: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.recall < 1:
            raise UsageError(f"a recall of {self.recall:g} is outside 0..1; 0.95 finds 95% of the needed neurons")
        if self.ctx < 64 or self.tokens < 4 * self.ctx:
            raise UsageError("chunks must have at least 64 tokens, and there must be at least four of them")
        if self.bits not in (4, 8):
            raise UsageError(f"a predictor's weights have 4 or 8 bits, not {self.bits}")
        if self.rank < 0 or self.epochs < 1:
            raise UsageError("rank must be 0 or more and epochs at least 1")
        if not 0 <= self.dense_tokens < self.ctx // 2:
            raise UsageError(f"dense tokens must be from 0 to below half a chunk of {self.ctx}")


def rank_for(n_embd: int, wanted: int) -> int:
    """The rank in use: as wanted, or an eighth of n_embd in steps of 32, at least 32; never above n_embd."""
    return min(n_embd, wanted or max(32, n_embd // 8 // 32 * 32))


@dataclass
class _Part:
    """One layer's predictor of one kind with what held-out rows say about it."""

    layer: int
    predictor: low_rank.Predictor
    curve: low_rank.Curve
    active: float
    previous: tuple[float, float]


class Fit:
    """One training. Rows of one layer are in memory at a time."""

    def __init__(
        self,
        model: _core.Model,
        tokenizer: Tokenizer,
        header: PackedHeader,
        options: Options,
        *,
        text: str | None = None,
        tick: Tick | None = None,
    ) -> None:
        """text: what to trace besides the model's own text. Raises UsageError where PyTorch is missing."""
        load_torch()
        self.model, self.tokenizer, self.header, self.options = model, tokenizer, header, options
        self.true_zeros = gives_zeros(header.config)
        self.ctx = min(options.ctx, int(header.config["n_ctx_train"]))
        self.n_embd, self.n_ff = int(header.config["n_embd"]), int(header.config["n_ff"])
        self.rank = rank_for(self.n_embd, options.rank)
        self._text, self._tick, self._done = text, tick, 0.0
        self._layer_work = options.tokens * (1.5 / header.n_layers + TRAIN_COST * options.epochs * (1 + options.heads / 4))
        made = options.tokens if text is None else options.tokens / 2
        self._total = 4.0 * made + self._layer_work * header.n_layers

    def _step(self, what: str, work: float) -> None:
        self._done += work
        if self._tick is not None:
            self._tick(what, self._done, max(self._total, self._done))

    def chunks(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Chunks [n, ctx], the model's own first, and which of them training does not see: some of both kinds."""
        import numpy as np

        n = max(4, self.options.tokens // self.ctx)
        n_text = n // 2 if self._text is not None else 0
        parts = [
            corpus.generate(
                self.model,
                self.tokenizer,
                chunks=n - n_text,
                ctx=self.ctx,
                seed=self.options.seed,
                tick=lambda what, count: self._step(what, 4.0 * count),
            )
        ]
        if self._text is not None:
            parts.append(corpus.cut(self.tokenizer, self._text, ctx=self.ctx, wanted=n_text, least=2))
        held = np.concatenate([np.arange(len(part)) % 10 == min(9, len(part) - 1) for part in parts])
        return np.concatenate(parts), held

    @property
    def runs(self) -> bool:
        """Whether this model can decode with predictors: its FFN is stored by neuron."""
        return all(part.layout["layout"] == "neurons" for layer in self.header.parts["M"] for part in layer)

    def warnings(self) -> list[str]:
        """What makes the hours of training likely to be in vain, known before them."""
        said = [] if self.runs else [CANNOT_RUN]
        if not self.true_zeros:
            said.append(
                f"this model's activation gives no exact zeros: predictors learn which neurons hold {ENERGY:.0%} of "
                "the energy of act(gate) * up; for such models `sparse-run calibrate` is made"
            )
        return said

    def file(self) -> SparsityFile:
        """The sparsity file: predictors, thresholds and, in `quality`, recall, density and the trivial predictor's; where the
        model can decode with it, what that costs and how fast it is."""
        from ... import _core

        chunks, held = self.chunks()
        config = self.header.config
        neurons: list[_Part] = []
        heads: list[_Part] = []
        for trace in traces(
            self.model, chunks, config=config, drop=self.options.dense_tokens, held_chunks=held
        ):
            neurons.append(self._train(trace, trace.x, trace.active))
            if self.options.heads and trace.before is not None:
                heads.append(self._train(trace, trace.before, trace.heads))
            part = neurons[-1]
            at = low_rank.recall_at(part.curve, part.previous[1])
            self._step(
                f"layer {trace.layer + 1} of {self.header.n_layers}: recall {at:.0%} where the previous token's set has "
                f"{part.previous[0]:.0%}",
                self._layer_work,
            )
        quality: dict[str, Any] = {"true_zeros": self.true_zeros, "rank": self.rank}
        arrays: dict[str, NDArray[Any]] = {}
        for what, parts in (("neurons", neurons), ("heads", heads)):
            if parts:
                quality[what] = self._choose(parts, what, arrays)
        predictor_bytes = sum(part.predictor.nbytes for part in (*neurons, *heads))
        quality["predictor_bytes"] = predictor_bytes
        quality["predictor_share"] = predictor_bytes / max(
            1, sum(self.header.site_bytes(s, i) for s in ("M", "Z") for i in range(self.header.n_layers))
        )
        file = SparsityFile(
            method="dejavu",
            thresholds={},
            levels={site: [] for site in SITES},
            dense_tokens=self.options.dense_tokens,
            model_name=str(config.get("name") or self.header.path.name),
            fingerprint=self.header.fingerprint,
            shape=self.header.shape,
            quantisation=self.header.quantisation,
            options={**asdict(self.options), "rank": self.rank},
            corpus=corpus.corpus_hash(chunks),
            n_tokens=int(chunks.size),
            quality=quality,
            tool_version=_core.__version__,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            arrays=arrays,
        )
        if self.runs:
            quality.update(self._decoded(file, chunks[held]))
        return file

    def _decoded(self, file: SparsityFile, held: NDArray[np.int32]) -> dict[str, Any]:
        """Perplexity, KL divergence, densities and rates with the predictors, on chunks that training did not see."""
        from ...eval.sparse import compare
        from ...skipping import bind

        skipping = bind(file, self.model)
        n_vocab = int(self.header.config["n_vocab"])
        found = compare(self.model, held.ravel().tolist(), skipping, n_vocab=n_vocab, ctx=self.ctx)
        rates = speed(self.model, skipping, held[-1], sparse_from=skipping.sparse_from)
        return {
            "perplexity": found.perplexity,
            "perplexity_dense": found.perplexity_dense,
            "perplexity_increase": found.perplexity_increase,
            "perplexity_increase_stderr": found.perplexity_increase_stderr,
            "kl_mean": found.kl_mean,
            "kl_p99": found.kl_p99,
            "top1_agreement": found.top1_agreement,
            "density": found.density,
            "tokens_scored": found.tokens_scored,
            "text": "held-out chunks",
            "bytes_per_token": bytes_per_token(self.model, self.header, found.density.get("body", 1.0)),
            "bytes_per_token_dense": self.model.bytes_per_token,
            "tokens_per_s": rates[1],
            "tokens_per_s_dense": rates[0],
            "threads": self.model.threads,
            "isa": self.model.isa,
        }

    def _train(self, trace: LayerTrace, h: NDArray[np.float32], needed: NDArray[np.bool_]) -> _Part:
        rank = min(self.rank, needed.shape[1])
        a, b, bias = train_low_rank(
            h,
            needed,
            trace.held,
            rank=rank,
            epochs=self.options.epochs,
            seed=self.options.seed + trace.layer,
            threads=self.model.threads,
        )
        made = low_rank.make(a, b, bias, self.options.bits)
        # Measured on the quantised weights, on rows that training did not see.
        held = trace.held
        return _Part(
            layer=trace.layer,
            predictor=made,
            curve=low_rank.curve(made, h[held], needed[held]),
            active=float(needed[held].mean()),
            previous=low_rank.previous_token(needed[held], trace.first[held]),
        )

    def _choose(self, parts: list[_Part], what: str, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Moves the thresholds to the wanted recall, adds the arrays, and returns the report of one kind."""
        import numpy as np

        offsets = low_rank.joint_offsets([part.curve for part in parts], self.options.recall)
        layers = []
        for part, offset in zip(parts, offsets, strict=True):
            chosen = low_rank.Predictor(**vars(part.predictor))
            chosen.threshold = (part.predictor.threshold + np.float32(offset)).astype(np.float32)
            arrays.update(chosen.arrays(f"predictor.{part.layer}.{what}"))
            i = int(np.searchsorted(part.curve.offsets, offset))
            layers.append(
                {
                    "layer": part.layer,
                    "recall": float(part.curve.recall[i]),
                    "density": float(part.curve.density[i]),
                    "active": part.active,
                    "previous_token_recall": part.previous[0],
                    "previous_token_density": part.previous[1],
                    "recall_at_previous_density": low_rank.recall_at(part.curve, part.previous[1]),
                }
            )

        def mean(key: str) -> float:
            return math.fsum(float(layer[key]) for layer in layers) / len(layers)

        # One curve for the model, for pictures: all layers at a common price.
        points = []
        for recall in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99):
            at = low_rank.joint_offsets([part.curve for part in parts], recall)
            spots = [int(np.searchsorted(p.curve.offsets, o)) for p, o in zip(parts, at, strict=True)]
            points.append(
                {
                    "recall": float(np.mean([p.curve.recall[i] for p, i in zip(parts, spots, strict=True)])),
                    "density": float(np.mean([p.curve.density[i] for p, i in zip(parts, spots, strict=True)])),
                }
            )
        return {
            **{key: mean(key) for key in layers[0] if key != "layer"},
            "curve": points,
            "layers": layers,
        }


def advice(file: SparsityFile) -> str:
    """What the figures mean for a person: one line, a warning where the model is not of the kind that this is made for."""
    q = file.quality
    n = q["neurons"]
    found = (
        f"finds {n['recall']:.1%} of the needed neurons at a density of {n['density']:.1%} "
        f"(needed: {n['active']:.1%}; at the density of the previous token's set it finds "
        f"{n['recall_at_previous_density']:.1%}, that set {n['previous_token_recall']:.1%})"
    )
    if not q["true_zeros"]:
        return (
            f"Deja Vu is meant for FFNs of ReLU type; this model's has no true zeros, so \"needed\" is the neurons that hold "
            f"{ENERGY:.0%} of the energy of act(gate) * up: it {found}. Use `sparse-run calibrate` for this model"
        )
    if n["recall_at_previous_density"] <= n["previous_token_recall"]:
        return f"not better than reusing the previous token's set: it {found}"
    return found


__all__ = ["ENERGY", "HEAD_SHARE", "Fit", "Options", "advice", "rank_for"]
