"""Trains one low-rank predictor with PyTorch: B (A h) + bias against what was needed, binary cross-entropy in which zeros
count less (as in Deja Vu's own training), early stop on held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PATIENCE = 3  # epochs without a better held-out loss


def load_torch() -> Any:
    """PyTorch. Raises UsageError, which names the extra, where it is not installed."""
    try:
        import torch
    except ImportError:
        raise UsageError(
            "training predictors needs PyTorch, which is not installed; install it with `pip install 'sparse-run[train]'` "
            "(running a trained predictor does not need it)"
        ) from None
    return torch


def train_low_rank(
    h: NDArray[np.float32],
    needed: NDArray[np.bool_],
    held: NDArray[np.bool_],
    *,
    rank: int,
    epochs: int,
    seed: int,
    threads: int,
    batch: int = 512,
    rate: float = 2e-3,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """A [rank, n_embd], B [n, rank], bias [n] from rows h [rows, n_embd] and needed [rows, n]; `held` rows only decide
    when to stop."""
    import numpy as np

    torch = load_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        generator = torch.Generator().manual_seed(seed)
        n_embd, n = h.shape[1], needed.shape[1]
        share = needed[~held].mean(0)
        a = torch.randn(rank, n_embd, generator=generator) / n_embd**0.5
        b = torch.randn(n, rank, generator=generator) / rank**0.5
        # It begins with the neurons' own frequencies, so that only what depends on the token is left to learn.
        bias = torch.from_numpy(np.log((share + 1e-4) / (1 - share + 1e-4)).astype(np.float32))
        parameters = [p.requires_grad_() for p in (a, b, bias)]
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
        weight_zero = float(share.mean()) + 0.005

        def loss_of(rows: Any) -> Any:
            x = torch.from_numpy(h[rows])
            y = torch.from_numpy(needed[rows].astype(np.float32))
            logits = (x @ a.T) @ b.T + bias
            weights = y + (1 - y) * weight_zero
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, weight=weights, reduction="sum")
            return loss / weights.sum()

        order = np.flatnonzero(~held)
        watch = np.flatnonzero(held)[:4096]
        rng = np.random.default_rng(seed)
        best, best_at, kept = float("inf"), 0, [p.detach().clone() for p in parameters]
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs, eta_min=rate / 20)
        for epoch in range(epochs):
            rng.shuffle(order)
            for begin in range(0, len(order), batch):
                optimiser.zero_grad()
                loss_of(order[begin : begin + batch]).backward()
                optimiser.step()
            schedule.step()
            with torch.no_grad():
                now = float(loss_of(watch)) if len(watch) else float(-epoch)
            if now < best:
                best, best_at, kept = now, epoch, [p.detach().clone() for p in parameters]
            elif epoch - best_at >= PATIENCE:
                break
        return tuple(np.ascontiguousarray(p.numpy(), np.float32) for p in kept)  # type: ignore[return-value]
    finally:
        torch.set_num_threads(before)
