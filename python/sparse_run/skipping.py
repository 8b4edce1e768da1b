"""How a sparsity file takes effect on a session of the core: thresholds or predictors at every token, or sets of neurons that
are chosen once from each prompt and stay while its answer is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ModelError
from .packed_header import ROW_SITES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from . import _core
    from .predictors.coreinfer.selection import Choice
    from .sparsity import SparsityFile


@dataclass(frozen=True)
class Skipping:
    """What a sparsity file says, bound to an opened model; immutable, shared by sessions."""

    dense_tokens: int = 0
    plan: _core.Sparsity | None = None
    """Thresholds."""
    predictor: _core.Predictor | None = None
    """Sets of neurons and heads for every token."""
    choice: Choice | None = None
    """Sets of neurons from the prompt."""
    centroids: NDArray[np.float32] | None = None
    lists: NDArray[np.int32] | None = None
    """Clusters made offline, [k, n_ff] and [k, n_layers, keep]: the prompt only says which of them."""

    @property
    def by_prompt(self) -> bool:
        """Whether what is skipped is decided after a prompt, from what it did."""
        return self.choice is not None

    @property
    def sparse_from(self) -> int:
        """The number of tokens in the cache from which decoding skips."""
        return max(self.dense_tokens, self.choice.min_prompt if self.choice is not None else 0)


def bind(file: SparsityFile, model: _core.Model) -> Skipping:
    """A file's thresholds, predictors or sets for an opened model. Raises ModelError where its arrays are damaged, UsageError
    where the model's layout does not allow the method."""
    import json

    from .bench.breakeven import known_break_evens

    config: dict[str, Any] = json.loads(model.config_json)
    for site, value in (known_break_evens(file.fingerprint, model.isa, model.threads, ROW_SITES) or {}).items():
        model.set_break_even(site, value)
    n_ff, n_layers = int(config["n_ff"]), int(config["n_layers"])
    plan = file.plan(model) if any(t is not None for layers in file.thresholds.values() for t in layers) else None
    if file.method == "dejavu":
        return Skipping(file.dense_tokens, plan, predictor=_predictor(file, model, config))
    if file.method in ("griffin", "coreinfer"):
        from .predictors.coreinfer.selection import Choice

        choice = Choice.of(file.options)
        centroids, lists = file.arrays.get("clusters.centroids"), file.arrays.get("clusters.neurons")
        if (centroids is None) != (lists is None):
            raise ModelError(f"{file.path}: half of its clusters is missing; make it again with `sparse-run calibrate`")
        if centroids is not None and lists is not None:
            _check_clusters(file, centroids, lists, (n_layers, n_ff, choice.keep(n_ff)))
        return Skipping(file.dense_tokens, plan, choice=choice, centroids=centroids, lists=lists)
    return Skipping(file.dense_tokens, plan)


def _predictor(file: SparsityFile, model: _core.Model, config: dict[str, Any]) -> _core.Predictor:
    from . import _core
    from .predictors.dejavu import predictor as low_rank

    where = str(file.path or "the sparsity file")
    n_layers = int(config["n_layers"])
    found = 0
    for what, n in (("neurons", int(config["n_ff"])), ("heads", int(config["n_heads"]))):
        for i in range(n_layers):
            read = low_rank.read(file.arrays, i, what, n_embd=int(config["n_embd"]), n=n, where=where)
            found += read is not None
    if not found:
        raise ModelError(f"{where} holds no predictors; train them again with `sparse-run train-predictor`")
    return _core.Predictor(model, file.arrays, file.dense_tokens)


def _check_clusters(
    file: SparsityFile, centroids: NDArray[Any], lists: NDArray[Any], sizes: tuple[int, int, int]
) -> None:
    import numpy as np

    n_layers, n_ff, keep = sizes
    k = len(centroids)
    good = centroids.shape == (k, n_ff) and lists.shape == (k, n_layers, keep) and k > 0
    good = good and centroids.dtype == np.float32 and lists.dtype == np.int32 and bool(np.isfinite(centroids).all())
    good = good and 0 <= int(lists.min()) and int(lists.max()) < n_ff and bool((np.diff(lists, axis=2) > 0).all())
    if not good:
        raise ModelError(
            f"{file.path}: its clusters do not fit this model ({k} of {lists.shape}); make it again with `sparse-run calibrate`"
        )


class Attached:
    """A session that skips. `before` and `after` go around every prompt; what they observe adds up while a conversation
    goes on, and begins anew with a prompt of which less than half of what was read before is still in the cache."""

    def __init__(self, session: _core.Session, what: Skipping | _core.Sparsity | None, *, blocks: bool = False) -> None:
        """blocks: blocks of tokens are masked as decoding would mask them (the same bits), for scoring texts."""
        self.session, self._blocks = session, blocks
        self._skipping = what if isinstance(what, Skipping) else None
        plan = what.plan if isinstance(what, Skipping) else what
        session.set_sparsity(plan, mask_prefill=blocks and plan is not None)
        self._choice = self._skipping.choice if self._skipping is not None else None
        self.sets: list[NDArray[np.int32] | None] | None = None
        """The sets in use, one ascending list a layer; None: dense."""
        self._read = 0  # tokens in the cache at the end of the last prompt
        if self._choice is not None:
            session.collect(self._choice.statistic)
        if self._skipping is not None and self._skipping.predictor is not None:
            session.set_predictor(self._skipping.predictor, mask_prefill=blocks)

    @property
    def by_prompt(self) -> bool:
        return self._choice is not None

    def before(self, cached: int) -> None:
        """A prompt comes of which `cached` tokens are in the cache already: dense from now on, and observed."""
        if self._choice is None:
            return
        self._use(None)
        if 2 * cached < self._read or not cached:
            self.session.collect(self._choice.statistic)

    def after(self) -> None:
        """The prompt was read: chooses the sets."""
        from .predictors.coreinfer import selection

        s, choice = self._skipping, self._choice
        self._read = self.session.n_past
        if s is None or choice is None or self.session.collected < choice.min_prompt:
            return
        found = self.session.statistic()
        if s.centroids is None or s.lists is None:
            self._use(selection.choose(found, choice))
            return
        vector = selection.multi_hot(found[selection.reference_layer(len(found))])
        lists = s.lists[selection.nearest(vector, s.centroids)]
        n = len(lists)
        self._use([None if choice.protected(i, n) else lists[i] for i in range(n)])

    def prompt(self, tokens: NDArray[np.int32]) -> None:
        """Reads a prompt into an emptied cache."""
        self.session.truncate(0)
        self.before(0)
        self.session.eval(tokens)
        self.after()

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Appends tokens as decoding would compute them; the logits of each, [n, n_vocab]."""
        return self.session.eval_all(tokens)

    def _use(self, sets: list[NDArray[np.int32] | None] | None) -> None:
        self.sets = sets
        self.session.set_neurons(sets, mask_prefill=self._blocks)
