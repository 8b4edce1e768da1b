"""One conversation's cache: what the model has read stays, and only what is new is computed."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .bound import Bound
from .errors import Cancelled, ContextLengthError, Error, UsageError
from .generation import Generation
from .sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from . import _core
    from .model import Model
    from .skipping import Attached


class Session(Bound):
    """A KV cache of `n_ctx` tokens and the model that fills it. For one thread at a time, except `cancel`; several sessions
    of one model may run at once.

    >>> with model.session() as session:  # doctest: +SKIP
    ...     session.generate("The capital of France is", max_tokens=8, temperature=0).read()
    ' Paris.'
    """

    def __init__(self, model: Model, n_ctx: int, *, on_idle: Callable[[Session], None] | None = None) -> None:
        """Use `Model.session`. `on_idle` is called when a generation has ended."""
        from . import _core

        self.model = model
        self._core: _core.Session | None = _core.Session(model._opened(), n_ctx)
        self._attached: Attached | None = None
        if model._sparsity is not None:
            from .skipping import Attached

            self._attached = Attached(self._core, model._sparsity[1])
        self._n_ctx = n_ctx
        self._on_idle = on_idle
        # Weak, so that a generation that nobody holds any more ends and frees the session.
        self._generation: weakref.ref[Generation] | None = None
        self._ticket: object = None
        self._lock = threading.Lock()  # held while the core computes
        self._guard = threading.RLock()  # held for moments: who computes
        self._computing: Generation | None = None

    @property
    def n_ctx(self) -> int:
        """Context window in tokens."""
        return self._n_ctx

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return self._opened().n_past

    @property
    def tokens(self) -> list[int]:
        """Tokens whose keys and values are in the cache, oldest first."""
        return list(self._opened().tokens)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = -1,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """As `Model.generate`, in this session: the longest prefix that is still cached is not computed again."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed)
        ids = self.model.tokenize(prompt) if isinstance(prompt, str) else prompt
        return self.start(ids, sampling, max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos)

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = -1,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """As `Model.chat`, in this session: earlier turns are not computed again."""
        sampling = Sampling(temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed)
        return self.answer(self.model.chat_ids(messages), sampling, max_tokens=max_tokens, stop=stop)

    def answer(
        self, ids: Sequence[int], sampling: Sampling, *, max_tokens: int | None = None, stop: str | Sequence[str] = ()
    ) -> Generation:
        """Answers a conversation that is already tokens (`Model.chat_ids`)."""
        stops = [stop] if isinstance(stop, str) else list(stop)
        return self.start(
            ids,
            sampling,
            max_tokens=max_tokens,
            stop=[*stops, *self.model.template.stop],
            strip_space=self.model.tokenizer.add_space_prefix,
        )

    def start(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        strip_space: bool = False,
    ) -> Generation:
        """A generation from token ids; nothing is computed before its first step. One that still runs here is cancelled.

        Raises ContextLengthError where the prompt does not fit, UsageError for an empty prompt, an id out of range, a
        negative `max_tokens`, or a stop string that is no text."""
        self._opened()
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(text, str) for text in stops):
            raise UsageError("a stop string is not a text")
        if max_tokens is not None and max_tokens < 0:
            raise UsageError(f"max_tokens is {max_tokens}; it must be 0 or more, or None for no limit")
        prompt = self._checked(ids)
        if len(prompt) > self._n_ctx:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens and the context holds {self._n_ctx}; shorten the prompt, or raise "
                f"the context (ctx_size, -c) up to the model's {self.model.n_ctx_train}"
            )
        self._end_running()
        sampler = sampling.sampler(self._n_ctx)
        if sampling.repeat_penalty != 1.0:
            last = self._n_ctx if sampling.repeat_last_n < 0 else sampling.repeat_last_n
            for token in prompt[len(prompt) - min(last, len(prompt)) :]:
                sampler.accept(token)
        generation = Generation(
            self,
            prompt,
            sampler,
            max_tokens=max_tokens,
            stop=stops,
            ignore_eos=ignore_eos,
            strip_space=strip_space,
        )
        self._generation, self._ticket = weakref.ref(generation), generation.ticket
        return generation

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every one of `ids`, [len(ids), n_vocab]; the cache then holds exactly `ids`. Memory: 4 bytes a value.

        Raises ContextLengthError and UsageError as `start` does."""
        self.model._prepare_numpy()
        import numpy as np

        tokens = self._checked(ids)
        if len(tokens) > self._n_ctx:
            raise ContextLengthError(
                f"{len(tokens)} tokens do not fit into the context of {self._n_ctx}; score them in chunks"
            )
        self._end_running()
        core = self._opened()
        with self._exclusive(None):
            core.truncate(0)
            return core.eval_all(np.asarray(tokens, dtype=np.int32))

    def cancel(self) -> None:
        """Cancels the running generation; callable from any thread."""
        generation = self._generation() if self._generation is not None else None
        if generation is not None:
            generation.cancel()

    def clear(self) -> None:
        """Forgets everything that was read."""
        self._end_running()
        core = self._opened()
        with self._exclusive(None):
            core.truncate(0)

    def stats(self) -> dict[str, Any]:
        """{"prompt_tokens", "prompt_seconds", "decode_tokens", "decode_seconds"} since the session began, and "n_ctx",
        "n_past" (tokens in the cache), "kv_bytes" (memory that the cache takes)."""
        core = self._opened()
        return {**core.stats(), "n_ctx": self._n_ctx, "n_past": core.n_past, "kv_bytes": core.kv_bytes}

    def close(self) -> None:
        """Cancels what runs, in whatever thread, and frees the cache."""
        self.cancel()
        with self._lock:
            self._core = None
        self._end_running()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_running(self) -> None:
        generation = self._generation() if self._generation is not None else None
        if generation is not None:
            generation.close()

    def _opened(self) -> _core.Session:
        if self._core is None:
            raise UsageError("the session is closed; open a new one with model.session()")
        return self._core

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if isinstance(ids, (str, bytes, bytearray)):
            raise UsageError(f"{type(ids).__name__} where token ids are expected; model.tokenize(text) gives them")
        try:
            tokens = [operator.index(token) for token in ids]
        except TypeError as error:
            raise UsageError(f"token ids are whole numbers: {error}") from None
        if not tokens:
            raise UsageError("the prompt is empty; give at least one token")
        n_vocab = self.model.n_vocab
        wrong = next((token for token in tokens if not 0 <= token < n_vocab), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} does not exist; ids go from 0 to {n_vocab - 1}")
        return tokens

    # What follows is for Generation.

    def _prefill(self, generation: Generation, prompt: list[int]) -> int:
        """Makes the cache hold exactly `prompt`, with the logits of its last token; returns how many were cached."""
        core = self._current(generation)
        self.model._release_tokenizer()
        cached = core.tokens
        # The last token is always computed: its logits are wanted.
        limit = min(len(cached), len(prompt) - 1)
        kept = next((i for i in range(limit) if cached[i] != prompt[i]), limit)
        if kept < len(cached):
            core.truncate(kept)
        if self._attached is not None:
            self._attached.before(kept)
        self._eval(generation, prompt[kept:])
        if self._attached is not None:
            self._attached.after()
        return kept

    def _decode(self, generation: Generation, token: int) -> None:
        self._current(generation)
        self._eval(generation, [token])

    def _sample(self, generation: Generation, sampler: _core.Sampler) -> int:
        core = self._current(generation)
        with self._exclusive(generation):
            return core.sample(sampler)

    def _current(self, generation: Generation) -> _core.Session:
        core = self._opened()
        if self._ticket is not generation.ticket:
            raise Cancelled("another generation began in this session")
        return core

    def _eval(self, generation: Generation, tokens: list[int]) -> None:
        core = self._opened()
        start = core.n_past
        for attempt in range(3):
            rest = tokens[core.n_past - start :]
            try:
                with self._exclusive(generation):
                    core.eval(rest)
                return
            except Cancelled:
                # A cancel that came too late for the generation it was meant for hits the next one: not ours, go on.
                if generation.cancelled or attempt == 2:
                    raise

    def _interrupt(self, generation: Generation) -> None:
        with self._guard:
            if self._computing is generation and self._core is not None:
                self._core.cancel()

    def _exclusive(self, generation: Generation | None) -> _Exclusive:
        return _Exclusive(self, generation)

    def _release(self, generation: Generation) -> None:
        if self._ticket is generation.ticket:
            self._generation = self._ticket = None
            if self._on_idle is not None:
                self._on_idle(self)


class _Exclusive:
    """Marks a session as computing for a generation; refuses a second thread instead of letting it corrupt the cache."""

    def __init__(self, session: Session, generation: Generation | None) -> None:
        self._session, self._generation = session, generation

    def __enter__(self) -> None:
        session = self._session
        if not session._lock.acquire(blocking=False):
            if self._generation is not None and self._generation.cancelled:  # by whoever is closing the session
                raise Cancelled("cancelled")
            raise Error("this session is in use by another thread; open one session per thread with model.session()")
        with session._guard:
            session._computing = self._generation
        if self._generation is not None and self._generation.cancelled:
            self.__exit__()
            raise Cancelled("cancelled")

    def __exit__(self, *_: object) -> None:
        with self._session._guard:
            self._session._computing = None
        self._session._lock.release()
