"""Offline half of GRIFFIN and CoreInfer: what a file says about how prompts choose neurons, measured as it is used, and for
the similarity-guided variant the clusters of passages.

There are no thresholds. A level is the share of the FFN's neurons that decoding leaves out, over all layers: what protected
layers keep, the others give up in addition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import UsageError
from ..common.calibration import Calibration
from . import clusters
from .selection import Choice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...skipping import Skipping
    from ...sparsity import SparsityFile

PASSAGE = 64  # tokens of a passage that clusters are made of


class Fit(Calibration):
    """CoreInfer: token-wise and sentence-wise cores, protected first and last layers. "stability": the prompt's own core;
    "similarity": the list of the nearest cluster of passages."""

    METHOD: ClassVar[str] = "coreinfer"
    ALLOCATIONS: ClassVar[tuple[str, ...]] = ("stability", "similarity")
    MAX_LEVEL: ClassVar[float] = 0.6  # more is not there to be given up beside the protected layers
    STATISTIC: ClassVar[str] = "core"

    _counts: NDArray[np.float32] | None = None

    def check(self) -> None:
        """Raises UsageError where the FFN is stored by columns."""
        self.header.need_neurons(self.METHOD)

    def protected(self, allocation: str) -> tuple[int, int]:
        """First and last layers that stay dense: 6 and 5 of 32, as in the paper."""
        n = self.header.n_layers
        return max(1, round(n * 6 / 32)), max(1, round(n * 5 / 32))

    def choice(self, allocation: str, target: float) -> Choice:
        """For a level; raises UsageError where the layers that are not protected cannot give up that much."""
        n = self.header.n_layers
        first, last = self.protected(allocation)
        free = n - first - last
        density = 1 - target * n / free if free > 0 else 0.0
        if density <= 0.01:
            raise UsageError(
                f"a level of {target:g} is more than the {max(free, 0)} of {n} layers that {self.METHOD} does not protect can "
                f"give up; at most {max(0.0, 0.99 * free / n):.2f}"
            )
        return Choice(statistic=self.STATISTIC, density=min(1.0, density), first=first, last=last)

    def thresholds_at(
        self, allocation: str, target: float
    ) -> tuple[dict[str, list[NDArray[np.float32] | None]], dict[str, list[float]]]:
        chosen, n = self.choice(allocation, target), self.header.n_layers
        levels = [0.0 if chosen.protected(i, n) else round(1 - chosen.density, 6) for i in range(n)]
        return {}, {"N": levels}

    def arrays_at(self, allocation: str, target: float) -> dict[str, NDArray[Any]]:
        if allocation != "similarity":
            return {}
        centroids, lists = clusters.make(self.counts(), self.choice(allocation, target))
        return {"clusters.centroids": centroids, "clusters.neurons": lists}

    def plan_at(self, allocation: str, target: float) -> Skipping:
        from ...skipping import bind

        return bind(self.file(allocation, target, measure=False), self.model)

    def file(
        self, allocation: str, target: float, *, measure: bool = True, extra: dict[str, Any] | None = None
    ) -> SparsityFile:
        c = self.choice(allocation, target)
        own = {
            "statistic": c.statistic,
            "density": c.density,
            "first": c.first,
            "last": c.last,
            "min_prompt": c.min_prompt,
            "prompt_tokens": self.ctx // 2,  # that the figures in `quality` were measured after
        }
        return super().file(allocation, target, measure=measure, extra={**own, **(extra or {})})

    def prepare(self, allocation: str) -> None:
        if allocation == "similarity":
            self.counts()

    def counts(self) -> NDArray[np.float32]:
        """Core counts of passages of the calibration corpus, [passages, n_layers, n_ff]."""
        if self._counts is None:
            self._counts = self.stage("passages", [*self.key(), PASSAGE], self._make_counts)["counts"]
        return self._counts

    def _make_counts(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        from ... import _core

        fit, _ = self.chunks()
        passages = fit[:, : fit.shape[1] // PASSAGE * PASSAGE].reshape(-1, PASSAGE)
        self.announce(float(passages.size))
        session = _core.Session(self.model, PASSAGE)
        counts = np.zeros((len(passages), self.header.n_layers, self.header.width("Z")), np.float32)
        for i, passage in enumerate(passages):
            session.truncate(0)
            session.collect("core")
            session.eval(np.ascontiguousarray(passage))
            counts[i] = session.statistic()
            self.step(f"passages, {i + 1} of {len(passages)}", PASSAGE)
        return {"counts": counts}


class Griffin(Fit):
    """GRIFFIN: the largest relative activations over the prompt. "protected": 3 first and 2 last of 30 layers stay dense, which
    costs less perplexity at equal bytes (README.md); "uniform": the same share in every layer, as in the paper."""

    METHOD: ClassVar[str] = "griffin"
    ALLOCATIONS: ClassVar[tuple[str, ...]] = ("protected", "uniform")
    MAX_LEVEL: ClassVar[float] = 0.8
    STATISTIC: ClassVar[str] = "griffin"

    def protected(self, allocation: str) -> tuple[int, int]:
        n = self.header.n_layers
        return (0, 0) if allocation == "uniform" else (max(1, round(n * 3 / 30)), max(1, round(n * 2 / 30)))


FITS: dict[str, type[Calibration]] = {"coreinfer": Fit, "griffin": Griffin}


