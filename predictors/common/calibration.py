"""One calibration, whatever the method: the corpus, stages that are kept so that an interrupted run goes on, the search for a
perplexity budget, and the sparsity file with its quality report. A method's fit.py says how a level becomes thresholds.

Everything runs on the packed model through the core: the same quantised weights, the same masks and the same bits as
decoding. Measured stages are kept in `sparsity/.work` beside the model.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import Error, UsageError
from ...packed_header import PackedHeader
from ...skipping import Skipping, bind
from ...sparsity import SparsityFile, folder
from . import corpus
from .measure import relative_increase, speed, token_nll

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core
    from ...tokenizer import Tokenizer

_VERSION = 2  # of the stages in .work

Tick = Callable[[str, float, float], None]
"""tick(line for people, work done, work in all): work in tokens through the model."""

FIRST = 0.19  # the level that is tried first for a budget of 1%
POWER = 5.0  # an increase of perplexity grows about so with the level, at the levels of budgets

Thresholds = "dict[str, list[NDArray[np.float32] | None]]"


@dataclass(frozen=True)
class Options:
    """How to calibrate. tokens: for thresholds, half of them text where there is one. eval_tokens: held-out tokens for the
    budget and the quality report. ctx: tokens of a chunk. dense_tokens: first positions that stay dense."""

    tokens: int = 8192
    eval_tokens: int = 6144
    ctx: int = 512
    seed: int = 0
    dense_tokens: int = 16

    def __post_init__(self) -> None:
        if self.ctx < 64:
            raise UsageError(f"chunks of {self.ctx} tokens are too short to calibrate with; use at least 64")
        if min(self.tokens, self.eval_tokens) < 2 * self.ctx:
            raise UsageError(f"tokens and eval tokens must be at least two chunks, {2 * self.ctx}")
        if not 0 <= self.dense_tokens < self.ctx // 2:
            raise UsageError(f"dense tokens must be from 0 to below half a chunk of {self.ctx}")


class Calibration(abc.ABC):
    """Corpus, stages, budget search and quality report; from them as many sparsity files as are asked for.

    A method derives from it: `thresholds_at` is all that it must say."""

    METHOD: ClassVar[str]
    ALLOCATIONS: ClassVar[tuple[str, ...]]
    """The method's variants; the first is the one for a budget."""
    LEVEL_ALLOCATION: ClassVar[str] = ""
    """The variant for --level; empty: the first."""
    MAX_LEVEL: ClassVar[float] = 0.9
    """The largest level that a budget is searched up to."""

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
        """text: what to calibrate on besides the model's own text; None is its own text only. Raises what `check` does."""
        self.model, self.tokenizer, self.header, self.options = model, tokenizer, header, options
        self.n_vocab = int(header.config["n_vocab"])
        self.ctx = min(options.ctx, int(header.config["n_ctx_train"]))
        self._tick, self._done, self._total = tick, 0.0, 0.0
        self._text = text
        self._dense_nll: NDArray[np.float64] | None = None
        self._increases: dict[tuple[str, float], float] = {}
        self._chunks: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None
        self.check()

    # What a method says

    def check(self) -> None:
        """Raises UsageError where the method cannot work with this model."""

    @abc.abstractmethod
    def thresholds_at(
        self, allocation: str, target: float
    ) -> tuple[dict[str, list[NDArray[np.float32] | None]], dict[str, list[float]]]:
        """Thresholds for a level 0..1, by site and layer (None: dense), and the level of each site and layer."""

    def arrays_at(self, allocation: str, target: float) -> dict[str, NDArray[Any]]:
        """What the method keeps in its file besides thresholds."""
        return {}

    def notes(self, allocation: str) -> dict[str, Any]:
        """What else should be known of the file; goes into its options."""
        return {}

    def prepare(self, allocation: str) -> None:
        """Makes the statistics that the allocation needs, so that the time left of a search is known."""

    def plan_at(self, allocation: str, target: float) -> _core.Sparsity | Skipping:
        from ... import _core

        return _core.Sparsity(
            self.model, self.thresholds_at(allocation, target)[0], dense_tokens=self.options.dense_tokens
        )

    @classmethod
    def default_allocation(cls, *, budget: bool) -> str:
        return cls.ALLOCATIONS[0] if budget or not cls.LEVEL_ALLOCATION else cls.LEVEL_ALLOCATION

    def name_of(self, allocation: str, level: float | None, budget: float | None) -> str:
        """The file's name: "cats-0.50", "cats-chess-0.50", "cats-1pct"; the first variant is not named."""
        parts = [self.METHOD, *([allocation] if allocation not in (self.METHOD, self.ALLOCATIONS[0]) else [])]
        return "-".join([*parts, f"{100 * budget:g}pct" if budget is not None else level_text(level or 0.0)])

    # Work and time

    def announce(self, work: float) -> None:
        """Adds to the work that is still to be done, in tokens through the model."""
        self._total += work

    def step(self, what: str, work: float) -> None:
        """Says that announced work is done."""
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
        """Chunks of the model's own text [count, ctx], each a stage of its own: they take long."""
        import numpy as np

        keys = self._text_keys(count)
        # Decoding a token takes about four times as long as reading one of a prompt.
        self.announce(4.0 * self.ctx * sum(not self.stage_path("text", key).exists() for key in keys))

        def make(number: int) -> dict[str, NDArray[Any]]:
            what = f"text of the model's own, {number + 1} of {count}"
            found = corpus.generate(
                self.model,
                self.tokenizer,
                chunks=1,
                ctx=self.ctx,
                seed=self.options.seed + 7919 * number,
                tick=lambda _, n: self.step(what, 4 * n),
            )
            return {"chunks": found}

        return np.concatenate([self.stage("text", key, partial(make, n))["chunks"] for n, key in enumerate(keys)])

    def _text_keys(self, count: int) -> list[list[Any]]:
        return [[number, self.ctx, self.options.seed] for number in range(count)]

    def share_text(self, other: PackedHeader) -> None:
        """Takes over the text that the same weights have written in another layout."""
        for key in self._text_keys(self.options.tokens // self.options.ctx):
            theirs, ours = self.stage_path("text", key, other), self.stage_path("text", key)
            if theirs.is_file() and not ours.exists():
                ours.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(theirs, ours)

    def stage_path(self, name: str, key: list[Any], header: PackedHeader | None = None) -> Path:
        """Where a stage's arrays are kept. header: of another packed model."""
        header = header or self.header
        text = json.dumps([_VERSION, header.fingerprint, name, key])
        return folder(header.path) / ".work" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"

    def stage(
        self, name: str, key: list[Any], compute: Callable[[], dict[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """Arrays that were computed before for the same model and key, or are now."""
        import numpy as np

        path = self.stage_path(name, key)
        work = path.parent
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

    def key(self) -> list[Any]:
        """What every stage that depends on the corpus depends on."""
        fit, _ = self.chunks()
        return [corpus.corpus_hash(fit), *asdict(self.options).values()]

    # Budget

    def increase(self, allocation: str, target: float) -> float:
        """Measured perplexity on held-out text, relative to dense: 0.01 is one percent more. Kept from run to run."""
        import numpy as np

        at = (allocation, target)
        if at not in self._increases:
            dense, sparse = self._likelihoods(allocation, target)
            self._increases[at] = relative_increase(float(np.mean(sparse)), float(np.mean(dense)))
        return self._increases[at]

    def increase_error(self, allocation: str, target: float) -> tuple[float, float]:
        """`increase`, and its standard error from the differences token by token."""
        dense, sparse = self._likelihoods(allocation, target)
        found = self.increase(allocation, target)
        return found, (1 + found) * float((sparse - dense).std()) / math.sqrt(len(dense))

    def _likelihoods(self, allocation: str, target: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of every scored token of the held-out text, negative and logarithmic: dense, and at a level [n]."""
        _, held = self.chunks()
        key = [*self.key(), corpus.corpus_hash(held), self.METHOD]

        def dense() -> dict[str, NDArray[Any]]:
            self.announce(held.size)
            found = token_nll(self.model, held, None, self.n_vocab)
            self.step("perplexity, dense", held.size)
            return {"nll": found}

        def sparse() -> dict[str, NDArray[Any]]:
            self.announce(held.size)
            found = token_nll(self.model, held, self.plan_at(allocation, target), self.n_vocab)
            self.step(f"perplexity at {target:.1%}", held.size)
            return {"nll": found}

        if self._dense_nll is None:
            self._dense_nll = self.stage("dense", key, dense)["nll"]
        if self.is_dense(allocation, target):
            return self._dense_nll, self._dense_nll
        nll = self.stage("sparse", [*key, allocation, target, self.stamp(allocation, target)], sparse)["nll"]
        return self._dense_nll, nll

    def stamp(self, allocation: str, target: float) -> str:
        """A hash of the thresholds, so that a measurement is never taken for one of other thresholds."""
        digest = hashlib.sha256()
        for site, layers in sorted(self.thresholds_at(allocation, target)[0].items()):
            for i, t in enumerate(layers):
                if t is not None:
                    digest.update(f"{site}{i}".encode() + t.tobytes())
        for name, array in sorted(self.arrays_at(allocation, target).items()):
            digest.update(name.encode() + array.tobytes())
        return digest.hexdigest()

    def search(self, allocation: str, budget: float, *, resolution: float = 0.01) -> float:
        """The largest level found whose measured increase of perplexity is at most `budget`; 0 where none is.

        The next level is where the budget would be met if the increase grew as a power of the level, through the nearest
        measured below and above. The search ends where that level is nearer than `resolution`. A level at which nothing
        worth skipping is left is 0."""
        self.prepare(allocation)
        # Levels measured for other budgets are ends of the bracket as well.
        known = {t: i for (a, t), i in self._increases.items() if a == allocation}
        for _ in range(8):
            low = max([t for t, i in known.items() if i <= budget], default=0.0)
            high = min([t for t, i in known.items() if i > budget and t > low], default=self.MAX_LEVEL)
            if high - low <= resolution or reached(known, low, budget, resolution):
                break
            level = aim(known, low, high, budget, resolution)
            level = round(min(max(level, low + resolution / 2), high - resolution / 2), 4)
            known[level] = self.increase(allocation, level)
        return max([t for t, i in known.items() if i <= budget and not self.is_dense(allocation, t)], default=0.0)

    def is_dense(self, allocation: str, target: float) -> bool:
        """Whether nothing is skipped at a level."""
        return not any(map(any, self.thresholds_at(allocation, target)[1].values()))

    # Result

    def file(
        self, allocation: str, target: float, *, measure: bool = True, extra: dict[str, Any] | None = None
    ) -> SparsityFile:
        """The sparsity file of an allocation and level, with its quality where `measure`."""
        from ... import _core

        fit, held = self.chunks()
        thresholds, levels = self.thresholds_at(allocation, target)
        file = SparsityFile(
            method=self.METHOD,
            thresholds=thresholds,
            levels=levels,
            dense_tokens=self.options.dense_tokens,
            model_name=str(self.header.config.get("name") or self.header.path.name),
            fingerprint=self.header.fingerprint,
            shape=self.header.shape,
            quantisation=self.header.quantisation,
            options={
                **asdict(self.options),
                "allocation": allocation,
                "level": target,
                **self.notes(allocation),
                **(extra or {}),
            },
            corpus=corpus.corpus_hash(fit, held),
            n_tokens=int(fit.size),
            tool_version=_core.__version__,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            arrays=self.arrays_at(allocation, target),
        )
        if measure:
            file.quality = self.quality(bind(file, self.model), held)
            if not math.isfinite(file.quality["perplexity"]):
                raise Error("the sparse run has no finite perplexity; choose a lower level")
        return file

    def quality(self, plan: Skipping, held: NDArray[np.int32]) -> dict[str, Any]:
        """The report that goes into the file: quality on held-out text, bytes and speed."""
        from ...eval.sparse import compare

        self.announce(3.0 * held.size)
        result = compare(self.model, held.ravel().tolist(), plan, n_vocab=self.n_vocab, ctx=self.ctx)
        self.step("quality report", 2.0 * held.size)
        rates = speed(self.model, plan, held[0], sparse_from=plan.sparse_from)
        self.step("speed", 1.0 * held.size)
        return {
            "perplexity": result.perplexity,
            "perplexity_dense": result.perplexity_dense,
            "perplexity_increase": result.perplexity / result.perplexity_dense - 1,
            "perplexity_increase_stderr": result.perplexity_increase_stderr,
            "kl_mean": result.kl_mean,
            "kl_p99": result.kl_p99,
            "top1_agreement": result.top1_agreement,
            "density": result.density,
            "tokens_scored": result.tokens_scored,
            "text": "held-out text" if self._text is not None else "generated text",
            "bytes_per_token": bytes_per_token(self.model, self.header, result.density.get("body", 1.0)),
            "bytes_per_token_dense": self.model.bytes_per_token,
            "tokens_per_s": rates[1],
            "tokens_per_s_dense": rates[0],
            "threads": self.model.threads,
            "isa": self.model.isa,
        }


def aim(known: dict[float, float], low: float, high: float, budget: float, resolution: float) -> float:
    """A level between `low` and `high` at which an increase near `budget` is likely. known: increases by level; low: the
    largest level that meets the budget, or 0; high: the smallest above it that does not, or the most that is allowed."""
    below, above = known.get(low, 0.0), known.get(high)
    if above is None:  # nothing above was measured
        if not low:
            return min(0.8, FIRST * math.pow(budget / 0.01, 0.35))
        # A small increase is mostly noise, and says little of how far away the budget is.
        return low * min(1.35, math.pow(budget / below, 1 / POWER) if below > 0.1 * budget else 1.35)
    if below <= 0.05 * budget:  # nothing below was measured, or nothing but noise
        further = [t for t in known if t > high and known[t] > above]
        power = growth(known, high, min(further)) if further else POWER
        found = high * math.pow(budget / above, 1 / min(max(power, 1.0), POWER)) - resolution / 2
        return max((low + high) / 2 if low else low, found)
    found = low * math.pow(budget / below, 1 / growth(known, low, high)) - resolution / 4
    edge = 0.1 * (high - low)  # one end that stays would make it slow
    return min(max(found, low + edge), high - edge)


def reached(known: dict[float, float], low: float, budget: float, resolution: float) -> bool:
    """Whether the budget would be met by a level less than `resolution` above `low`, as the increase grows between `low`
    and the nearest other level."""
    if known.get(low, 0.0) <= 0:
        return False
    others = [t for t in known if known[t] > 0 and (known[t] - known[low]) * (t - low) > 0]
    if not others:
        return False
    power = growth(known, low, min(others, key=lambda t: abs(math.log(t / low))))
    return low * (math.pow(budget / known[low], 1 / power) - 1) <= resolution


def growth(known: dict[float, float], a: float, b: float) -> float:
    """The power of the level with which increases above 0 grow from level a to b."""
    return max(math.log(known[b] / known[a]) / math.log(b / a), 0.1)


def level_text(level: float) -> str:
    """ "0.50" for 0.5, and all digits where two are not enough."""
    return f"{level:.2f}" if round(level, 2) == level else f"{level:g}"


def bytes_per_token(model: _core.Model, header: PackedHeader, body: float) -> int:
    """Weight bytes that a decoded token reads where a share `body` of the layers' matrices is read."""
    held = sum(header.site_bytes(s, i) for s in header.parts for i in range(header.n_layers))
    return round(model.bytes_per_token - held * (1 - body))
