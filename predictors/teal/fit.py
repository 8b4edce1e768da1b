"""Offline half of TEAL: thresholds from quantiles, levels by one of three allocations, and the search for a perplexity budget.

Everything runs on the packed model through the core: the same quantised weights, the same masks and the same bits as
decoding. Measured stages are kept in `sparsity/.work`, so that an interrupted or a second run goes on from there.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Error, UsageError
from ...packed_header import SITES, PackedHeader
from ...sparsity import SparsityFile, folder
from ..common import allocate, corpus
from ..common.layers import POINTS, Stream, quantile_table, threshold_at
from .sensitivity import Sensitivity, branch_error, relative_increase, speed, token_nll

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core
    from ...tokenizer import Tokenizer

ALLOCATIONS = ("global", "greedy", "uniform")
SCORES = ("abs", "wina")
PROBE = 256  # positions of a chunk that error curves are measured on
CURVE_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
GREEDY_STEP = 0.05
GROUPS = 6
_VERSION = 1  # of the stages in .work

Tick = Callable[[str, float, float], None]
"""tick(line for people, work done, work in all): work in tokens through the model."""


@dataclass(frozen=True)
class Options:
    """How to calibrate. tokens: for thresholds, half of them text where there is one. eval_tokens: held-out tokens for the
    budget and the quality report. ctx: tokens of a chunk. dense_tokens: first positions that stay dense."""

    tokens: int = 8192
    eval_tokens: int = 6144
    ctx: int = 512
    seed: int = 0
    score: str = "abs"
    dense_tokens: int = 16

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise UsageError(f"score is {self.score!r}; it must be one of {', '.join(SCORES)}")
        if self.ctx < 64:
            raise UsageError(f"chunks of {self.ctx} tokens are too short to calibrate with; use at least 64")
        if min(self.tokens, self.eval_tokens) < 2 * self.ctx:
            raise UsageError(f"tokens and eval tokens must be at least two chunks, {2 * self.ctx}")
        if not 0 <= self.dense_tokens < self.ctx // 2:
            raise UsageError(f"dense tokens must be from 0 to below half a chunk of {self.ctx}")


class Fit:
    """One calibration: corpus, statistics of every layer, and from them as many sparsity files as are asked for."""

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
        """text: what to calibrate on besides the model's own text; None is its own text only."""
        self.model, self.tokenizer, self.header, self.options = model, tokenizer, header, options
        self.n_vocab = int(header.config["n_vocab"])
        self.ctx = min(options.ctx, int(header.config["n_ctx_train"]))
        self._tick, self._done, self._total = tick, 0.0, 0.0
        self._text = text
        self._dense_nll: float | None = None
        self._increases: dict[tuple[str, float], float] = {}
        self._tables: NDArray[np.float32] | None = None
        self._curves: NDArray[np.float64] | None = None
        self._greedy: dict[str, NDArray[np.float64]] | None = None
        self._chunks: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None
        self._norms: dict[str, list[NDArray[np.float32]]] | None = None
        import numpy as np

        self.weights = np.asarray(
            [[header.site_bytes(s, i) * header.maskable(s, i) for s in SITES] for i in range(header.n_layers)],
            np.float64,
        )
        """Bytes that a layer and site can skip, [n_layers, 4]."""
        if not self.weights.any():
            raise UsageError(
                "this model's matrices are float: there are no columns to skip; sparsity needs a quantised model"
            )

    # Work and time

    def announce(self, work: float) -> None:
        """Adds to the work that is still to be done, in tokens through the model."""
        self._total += work

    def _step(self, what: str, work: float) -> None:
        self._done += work
        if self._tick is not None:
            self._tick(what, self._done, max(self._total, self._done))

    # Corpus

    def chunks(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Chunks [n, ctx] for thresholds, and held-out ones for the budget and the report."""
        import numpy as np

        if self._chunks is not None:
            return self._chunks
        o = self.options
        n_fit, n_eval = o.tokens // o.ctx, o.eval_tokens // o.ctx
        if self._text is None:
            n_fit, n_eval = max(2, n_fit // 2), max(2, n_eval * 2 // 3)
            made = self._generated(n_fit + n_eval)
            self._chunks = made[:n_fit], made[n_fit:]
        else:
            n_text = n_fit - n_fit // 2
            cut = corpus.cut(self.tokenizer, self._text, ctx=self.ctx, wanted=n_text + n_eval, least=2)
            n_held = min(n_eval, max(1, len(cut) * n_eval // (n_text + n_eval)))
            held = np.zeros(len(cut), dtype=bool)
            held[np.linspace(0, len(cut) - 1, n_held).round().astype(int)] = True
            self._chunks = np.concatenate([self._generated(n_fit // 2), cut[~held]]), cut[held]
        return self._chunks

    def _generated(self, count: int) -> NDArray[np.int32]:
        def compute() -> dict[str, NDArray[Any]]:
            # Decoding a token takes about four times as long as reading one of a prompt.
            self.announce(4.0 * count * self.ctx)
            made = corpus.generate(
                self.model,
                self.tokenizer,
                chunks=count,
                ctx=self.ctx,
                seed=self.options.seed,
                tick=lambda what, n: self._step(what, 4 * n),
            )
            return {"chunks": made}

        return self._stage("text", [count, self.ctx, self.options.seed], compute)["chunks"]

    def _stage(
        self, name: str, key: list[Any], compute: Callable[[], dict[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """Arrays that were computed before for the same model and key, or are now."""
        import numpy as np

        text = json.dumps([_VERSION, self.header.fingerprint, name, key])
        work = folder(self.header.path) / ".work"
        path = work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
        with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile, EOFError), np.load(path) as stored:
            return {key: stored[key] for key in stored.files}
        arrays = compute()
        work.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=work)
        try:
            with os.fdopen(handle, "wb") as out:
                np.savez(out, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return arrays

    def _key(self) -> list[Any]:
        fit, _ = self.chunks()
        return [corpus.corpus_hash(fit), self.options.dense_tokens, self.options.score]

    # Statistics of the layers

    def column_norms(self) -> dict[str, list[NDArray[np.float32]]]:
        """Norms of the columns that a site multiplies, by site and layer [width]; for the score |x| times norm."""
        if self._norms is None:
            from ..common.columns import column_norms

            self._norms = {
                site: [column_norms(self.header, site, i) for i in range(self.header.n_layers)] for site in SITES
            }
        return self._norms

    def tables(self) -> NDArray[np.float32]:
        """Quantiles of the score, [n_layers, 4, POINTS]."""
        if self._tables is None:
            self._tables = self._stage("quantiles", self._key(), self._make_tables)["tables"]
        return self._tables

    def _make_tables(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        layers = self.header.n_layers
        self.announce(1.5 * fit.size)
        stream = Stream(self.model, fit)
        tables = np.zeros((layers, len(SITES), POINTS), np.float32)
        for layer in range(layers):
            for site, values in stream.advance(self.options.dense_tokens).items():
                score = np.abs(values)
                if self.options.score == "wina":
                    score *= self.column_norms()[site][layer]
                tables[layer, SITES.index(site)] = quantile_table(score)
            self._step(f"thresholds, layer {layer + 1} of {layers}", 1.5 * fit.size / layers)
        return {"tables": tables}

    def thresholds(self, levels: NDArray[np.float64]) -> dict[str, list[NDArray[np.float32] | None]]:
        """Thresholds for levels [n_layers, 4]; NaN is dense, and so is what cannot be skipped."""
        import numpy as np

        tables = self.tables()
        out: dict[str, list[NDArray[np.float32] | None]] = {site: [None] * len(levels) for site in SITES}
        for k, site in enumerate(SITES):
            for i, level in enumerate(levels[:, k]):
                if math.isnan(level) or not self.weights[i, k]:
                    continue
                t = np.full(1, threshold_at(tables[i, k], float(level)), np.float32)
                if self.options.score == "wina" and t[0] > 0:
                    norms = self.column_norms()[site][i]
                    with np.errstate(divide="ignore", over="ignore"):
                        t = np.minimum(t / norms, np.finfo(np.float32).max).astype(np.float32)
                out[site][i] = t
        return out

    def plan(self, levels: NDArray[np.float64]) -> _core.Sparsity:
        from ... import _core

        return _core.Sparsity(self.model, self.thresholds(levels), dense_tokens=self.options.dense_tokens)

    def _alone(self, layer: int, levels: NDArray[np.float64]) -> _core.Sparsity:
        """A plan that masks one layer: levels [4]."""
        import numpy as np

        only = np.full_like(self.weights, np.nan)
        only[layer] = np.where(levels > 0, levels, np.nan)
        return self.plan(only)

    def _probes(self) -> list[int]:
        """The chunks that error curves are measured on: one of the model's own text, one of the other half."""
        return [0, len(self.chunks()[0]) - 1]

    def curves(self) -> NDArray[np.float64]:
        """Relative squared error of a layer's branch at CURVE_LEVELS of one site, [n_layers, 4, levels]."""
        if self._curves is None:
            self._curves = self._stage("curves", [*self._key(), PROBE, CURVE_LEVELS], self._make_curves)["curves"]
        return self._curves

    def _make_curves(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        self.tables()
        layers, probes = self.header.n_layers, self._probes()
        self.announce(len(CURVE_LEVELS) * len(SITES) * PROBE * len(probes))
        curves = np.zeros((layers, len(SITES), len(CURVE_LEVELS)))
        stream = Stream(self.model, fit[probes])
        for layer in range(layers):
            before = stream.x[:, :PROBE].copy()
            stream.advance(0)
            after = stream.x[:, :PROBE]
            for k in range(len(SITES)):
                if not self.weights[layer, k]:
                    continue
                for j, level in enumerate(CURVE_LEVELS):
                    plan = self._alone(layer, np.eye(len(SITES))[k] * level)
                    errors = [
                        branch_error(x, y, stream.run(layer, x, plan)[0], self.options.dense_tokens)
                        for x, y in zip(before, after, strict=True)
                    ]
                    curves[layer, k, j] = np.mean(errors)
            work = len(CURVE_LEVELS) * len(SITES) * PROBE * len(probes) / layers
            self._step(f"error curves, layer {layer + 1} of {layers}", work)
        return {"curves": curves}

    def kappas(self) -> NDArray[np.float64]:
        """KL divergence of the output per unit of a layer's error, [n_layers, 4]; equal within a group of layers."""

        def compute() -> dict[str, NDArray[Any]]:
            return {"kappas": self._make_kappas()}

        self.curves()
        return self._stage("kappas", [*self._key(), PROBE, CURVE_LEVELS, GROUPS], compute)["kappas"]

    def _make_kappas(self) -> NDArray[np.float64]:
        import numpy as np

        fit, _ = self.chunks()
        curves, layers = self.curves(), self.header.n_layers
        groups = np.array_split(np.arange(layers), min(GROUPS, layers))
        at = CURVE_LEVELS.index(0.5)
        work = 4.0 * PROBE
        self.announce(work * (len(groups) * len(SITES) + 1))
        picks = np.unique(np.linspace(0, len(fit) - 1, 4).astype(int))
        sensitivity = Sensitivity(self.model, fit[picks, :PROBE], self.n_vocab)
        self._step("sensitivity", work)
        kappas = np.zeros_like(self.weights)
        for group in groups:
            for k, site in enumerate(SITES):
                error = curves[group, k, at].sum()
                if error > 0:
                    levels = np.full_like(self.weights, np.nan)
                    levels[group, k] = CURVE_LEVELS[at]
                    kappas[group, k] = max(sensitivity.kl(self.plan(levels)), 1e-9) / error
                self._step(f"sensitivity, layers {group[0]} to {group[-1]}, site {site}", work)
        return kappas

    def greedy(self) -> dict[str, NDArray[np.float64]]:
        """Greedy paths within each block: "levels" [n_layers, steps, 4] and the bytes skipped, "shares" [n_layers, steps]."""
        if self._greedy is None:
            self._greedy = self._stage("greedy", [*self._key(), PROBE, GREEDY_STEP], self._make_greedy)
        return self._greedy

    def _make_greedy(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        fit, _ = self.chunks()
        self.tables()
        layers, probes = self.header.n_layers, self._probes()
        half = PROBE // 2
        sites = range(len(SITES))
        levels_of: list[list[NDArray[np.float64]]] = []
        work = 100.0 * half * len(probes)
        self.announce(work)
        stream = Stream(self.model, fit[probes])
        for layer in range(layers):
            before = stream.x[:, :half].copy()
            stream.advance(0)
            after = stream.x[:, :half]
            share = self.weights[layer] / max(1.0, self.weights[layer].sum())
            # A step of a small matrix would skip all of it at once: steps are capped and compared per byte.
            steps = np.minimum(GREEDY_STEP / np.maximum(share, 1e-9), 2 * GREEDY_STEP)
            now, error = np.zeros(len(SITES)), 0.0
            path = [now]
            while share.any() and (now * share).sum() < allocate.MAX_LEVEL - 1e-9:
                best: tuple[float, float, NDArray[np.float64]] | None = None
                for k in sites:
                    if not share[k] or now[k] >= allocate.MAX_LEVEL:
                        continue
                    tried = now.copy()
                    tried[k] = min(allocate.MAX_LEVEL, now[k] + steps[k])
                    plan = self._alone(layer, tried)
                    errors = [
                        branch_error(x, y, stream.run(layer, x, plan)[0], self.options.dense_tokens)
                        for x, y in zip(before, after, strict=True)
                    ]
                    mean = float(np.mean(errors))
                    cost = (mean - error) / (share[k] * (tried[k] - now[k]))
                    if best is None or cost < best[0]:
                        best = cost, mean, tried
                if best is None:
                    break
                _, error, now = best
                path.append(now)
            levels_of.append(path)
            self._step(f"greedy search, layer {layer + 1} of {layers}", work / layers)
        longest = max(len(path) for path in levels_of)
        levels = np.stack([np.stack([*path, *[path[-1]] * (longest - len(path))]) for path in levels_of])
        shares = (levels * (self.weights / np.maximum(self.weights.sum(1, keepdims=True), 1.0))[:, None]).sum(2)
        return {"levels": levels, "shares": shares}

    # Allocation

    def levels(self, allocation: str, target: float) -> NDArray[np.float64]:
        """Levels [n_layers, 4] that skip a share `target` of the bytes that can be skipped; NaN is dense."""
        import numpy as np

        if allocation == "uniform" or not target:
            return np.full_like(self.weights, target)
        if target > allocate.MAX_LEVEL:
            raise UsageError(f"a level of {target:g} is above {allocate.MAX_LEVEL}, the most that an allocation skips")
        if allocation == "greedy":
            paths = self.greedy()
            rows = [allocate.along_path(p, s, target) for p, s in zip(paths["levels"], paths["shares"], strict=True)]
            out = np.stack(rows)
        elif allocation == "global":
            measured = self.curves().reshape(-1, len(CURVE_LEVELS))
            kappas = self.kappas().reshape(-1, 1)
            points = np.asarray(CURVE_LEVELS)
            curves = kappas * np.stack([allocate.convex_curve(points, row) for row in measured])
            out = allocate.equal_marginal_cost(curves, self.weights.ravel(), target).reshape(self.weights.shape)
        else:
            raise UsageError(f"allocation is {allocation!r}; it must be one of {', '.join(ALLOCATIONS)}")
        # A mask that skips next to nothing costs more than it brings.
        return np.where(out < 0.02, np.nan, out)

    def increase(self, allocation: str, target: float) -> float:
        """Measured perplexity on held-out text, relative to dense: 0.01 is one percent more."""
        key = (allocation, target)
        if key not in self._increases:
            levels = self.levels(allocation, target)
            _, held = self.chunks()
            if self._dense_nll is None:
                self.announce(held.size)
                self._dense_nll = token_nll(self.model, held, None, self.n_vocab)
                self._step("perplexity, dense", held.size)
            self.announce(held.size)
            nll = token_nll(self.model, held, self.plan(levels), self.n_vocab)
            self._increases[key] = relative_increase(nll, self._dense_nll)
            self._step(f"perplexity at {target:.1%}: {self._increases[key]:+.2%}", held.size)
        return self._increases[key]

    def search(self, allocation: str, budget: float, *, resolution: float = 0.01) -> float:
        """The largest level found whose measured increase of perplexity is at most `budget`; 0 where none is."""
        self.levels(allocation, 0.5)  # its statistics first, so that the time left is known
        # Levels measured for other budgets are ends of the bracket as well.
        known = [(t, i) for (a, t), i in self._increases.items() if a == allocation]
        low = max([t for t, i in known if i <= budget], default=0.0)
        high = min([t for t, i in known if i > budget and t > low], default=allocate.MAX_LEVEL)
        if low > 0 and high == allocate.MAX_LEVEL or not known:
            level = min(0.8, max(low + 0.05, 0.25 * (budget / 0.01) ** 0.35))
        else:
            level = (low + high) / 2
        for _ in range(7):
            if high - low <= resolution:
                break
            level = round(min(max(level, low + resolution / 2), high - resolution / 2), 4)
            measured = self.increase(allocation, level)
            if measured <= budget:
                low = level
            else:
                high = level
            # Perplexity grows about with the cube of the level: aim with that, and halve where it does not help.
            aim = level * (budget / measured) ** (1 / 3) if measured > 0.2 * budget else 1.3 * level
            level = (
                aim if low + resolution / 4 < aim < high - resolution / 4 and high - low > 0.05 else (low + high) / 2
            )
        return low

    # Result

    def file(
        self, allocation: str, target: float, *, measure: bool = True, extra: dict[str, Any] | None = None
    ) -> SparsityFile:
        """The sparsity file of an allocation and level, with its quality where `measure`."""
        import numpy as np

        from ... import _core

        levels = self.levels(allocation, target)
        fit, held = self.chunks()
        file = SparsityFile(
            method="teal",
            thresholds=self.thresholds(levels),
            levels={
                s: [0.0 if math.isnan(v) else round(float(v), 4) for v in levels[:, k]] for k, s in enumerate(SITES)
            },
            dense_tokens=self.options.dense_tokens,
            model_name=str(self.header.config.get("name") or self.header.path.name),
            fingerprint=self.header.fingerprint,
            shape=self.header.shape,
            quantisation=self.header.quantisation,
            options={**asdict(self.options), "allocation": allocation, "level": target, **(extra or {})},
            corpus=corpus.corpus_hash(fit, held),
            n_tokens=int(fit.size),
            tool_version=_core.__version__,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        if measure:
            file.quality = self.quality(file.plan(self.model), held)
            if not np.isfinite(file.quality["perplexity"]):
                raise Error("the sparse run has no finite perplexity; choose a lower level")
        return file

    def quality(self, plan: _core.Sparsity, held: NDArray[np.int32]) -> dict[str, Any]:
        """The report that goes into the file: quality on held-out text, bytes and speed."""
        from ...eval.sparse import compare

        self.announce(3.0 * held.size)
        result = compare(self.model, held.ravel().tolist(), plan, n_vocab=self.n_vocab, ctx=self.ctx)
        self._step("quality report", 2.0 * held.size)
        rates = speed(self.model, plan, held[0], sparse_from=self.options.dense_tokens)
        self._step("speed", 1.0 * held.size)
        body = sum(self.header.site_bytes(s, i) for s in SITES for i in range(self.header.n_layers))
        return {
            "perplexity": result.perplexity,
            "perplexity_dense": result.perplexity_dense,
            "perplexity_increase": result.perplexity / result.perplexity_dense - 1,
            "kl_mean": result.kl_mean,
            "kl_p99": result.kl_p99,
            "top1_agreement": result.top1_agreement,
            "density": result.density,
            "tokens_scored": result.tokens_scored,
            "text": "held-out text" if self._text is not None else "generated text",
            "bytes_per_token": round(self.model.bytes_per_token - body * (1 - result.density.get("body", 1.0))),
            "bytes_per_token_dense": self.model.bytes_per_token,
            "tokens_per_s": rates[1],
            "tokens_per_s_dense": rates[0],
            "threads": self.model.threads,
            "isa": self.model.isa,
        }


def level_name(level: float, allocation: str = "uniform") -> str:
    """The file's name for a level, such as "uniform-0.50"."""
    return f"{allocation}-{level:.2f}" if round(level, 2) == level else f"{allocation}-{level:g}"
