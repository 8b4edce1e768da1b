"""One answer: an iterator of text pieces with its tokens, its end and its timings; and stop strings that never leak."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .bound import Bound
from .errors import Cancelled

if TYPE_CHECKING:
    from typing_extensions import Self

    from . import _core
    from .session import Session

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Timings:
    """Counts and wall-clock seconds of one generation.

    prompt_tokens: prompt tokens that were computed; cached_tokens: those that were still in the cache.
    decode_tokens: single-token passes; the first token of an answer comes from the prompt's pass.
    first_token_seconds: from the start to the first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Computed prompt tokens per second; 0 where there were none."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Decoded tokens per second; 0 where there were none."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All fields and both rates, for JSON."""
        return {
            **asdict(self),
            "prompt_tokens_per_s": self.prompt_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


class StopMatcher:
    """Watches a stream of text for stop strings. Of several, the one that is complete first ends the text; what could still
    become one is held back.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.push("the E"), matcher.push("ND of it"), matcher.stopped
    ('the ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that may be shown after `text` came; sets `stopped` where a stop string is complete."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        longest = min(len(held), max(map(len, self._stops)) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(held[-size:]) for stop in self._stops):
                self._held = held[-size:]
                return held[:-size]
        self._held = ""
        return held

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return "" if self.stopped else held


class Generation(Bound):
    """Text as the model makes it. Iterate over it; leaving the loop early, `close` or the end of a `with` block cancels.

    text: what came so far, without stop strings. tokens: the ids so far, without the token that ended the answer.
    finish_reason: None while it runs, then "stop" (end token or stop string), "length" (max_tokens, or the context is
    full: see `context_full`) or "cancelled". timings: see `Timings`.

    >>> with model.generate("Once upon a time", max_tokens=20) as generation:  # doctest: +SKIP
    ...     for piece in generation:
    ...         print(piece, end="", flush=True)
    >>> generation.finish_reason  # doctest: +SKIP
    'length'
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampler: _core.Sampler,
        *,
        max_tokens: int | None,
        stop: Sequence[str],
        ignore_eos: bool,
        strip_space: bool,
    ) -> None:
        """Made by `Model.generate`, `Model.chat` and their like of Session."""
        self.prompt_tokens = list(prompt)
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.context_full = False
        self.timings = Timings()
        self.ticket = object()  # who holds the session; outlives this object, unlike a reference to it
        self._session = session
        self._sampler = sampler
        self._max_tokens = max_tokens
        self._ends = frozenset() if ignore_eos else frozenset(session.model.tokenizer.eos_ids)
        self._matcher = StopMatcher(stop)
        self._stream = session.model.tokenizer.stream(strip_space=strip_space)
        self._began = time.perf_counter()
        self._cancel_lock = threading.RLock()  # a signal handler may cancel
        self._cancelled = False
        self._ready = False

    def cancel(self) -> None:
        """Stops the generation as soon as possible, also within the prompt; callable from any thread, any number of times."""
        with self._cancel_lock:
            if self.finish_reason is None and not self._cancelled:
                self._cancelled = True
                self._session._interrupt(self)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called while it ran."""
        return self._cancelled

    def read(self) -> str:
        """Runs to the end and returns the whole text."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Cancels what is left; what came so far stays in `text` and `tokens`."""
        if self.finish_reason is None:
            self._cancelled = True
            self._finish("cancelled")

    def __iter__(self) -> Iterator[str]:
        try:
            while True:
                try:
                    piece = next(self)
                except StopIteration:
                    return
                yield piece
        finally:
            self.close()

    def __next__(self) -> str:
        while self.finish_reason is None:
            try:
                piece = self._advance()
            except Cancelled:
                piece = self._finish("cancelled")
            except BaseException:
                self.close()
                raise
            if piece:
                self.text += piece
                return piece
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "finish_reason", "stop") is None:
            self.close()

    def _advance(self) -> str:
        """Computes what is pending, takes one more token, and returns the text that is certain by it."""
        session, timings = self._session, self.timings
        if self._cancelled:
            raise Cancelled("cancelled")
        if self._max_tokens is not None and len(self.tokens) >= self._max_tokens:
            return self._finish("length")
        if self._ready and session.n_past >= session.n_ctx:
            self.context_full = True
            return self._finish("length")
        start = time.perf_counter()
        if self._ready:
            session._decode(self, self.tokens[-1])
            timings.decode_tokens += 1
        else:
            timings.cached_tokens = session._prefill(self, self.prompt_tokens)
            timings.prompt_tokens = len(self.prompt_tokens) - timings.cached_tokens
        token = session._sample(self, self._sampler)
        seconds = time.perf_counter() - start
        if self._ready:
            timings.decode_seconds += seconds
        else:
            self._ready = True
            timings.prompt_seconds = seconds
            timings.first_token_seconds = time.perf_counter() - self._began
        if token in self._ends:
            return self._finish("stop")
        self.tokens.append(token)
        piece = self._matcher.push(self._stream.push(token))
        return piece + self._finish("stop") if self._matcher.stopped else piece

    def _finish(self, reason: FinishReason) -> str:
        """Ends the generation and returns the text that was still held back."""
        with self._cancel_lock:
            if self.finish_reason is not None:
                return ""
            self.finish_reason = reason
        self._session._release(self)
        return "" if self._matcher.stopped else self._matcher.push(self._stream.finish()) + self._matcher.finish()
