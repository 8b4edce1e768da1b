"""A model, opened: text in, text out. The typed API that the commands use as well."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .bound import Bound
from .errors import UsageError
from .generation import Generation
from .session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from . import _core
    from .skipping import Skipping
    from .sparsity import SparsityFile
    from .template import ChatTemplate
    from .tokenizer import Tokenizer

DEFAULT_CTX_SIZE = 4096
NUMPY_BYTES = 24 << 20
"""More than importing NumPy takes: 13 MB of version 2."""
SPARE_BYTES = 160 << 20
"""Where a budget exceeds the weights by this, everything stays in memory, the tokenizer as well."""
Progress = Callable[[str, int, int], None]

log = logging.getLogger("sparse_run")
log.addHandler(logging.NullHandler())


@functools.cache
def _hear_core() -> None:
    """Sends what the core has to say to the log of this package."""
    from . import _core

    _core.set_log_sink(log.log)


def _check_ctx_size(ctx_size: int | None) -> None:
    if ctx_size is not None and not 1 <= ctx_size < 2**31:
        raise UsageError(f"ctx_size is {ctx_size}; it must be from 1 to 2^31 - 1")


class Message(TypedDict):
    """One turn of a conversation; role is "system", "user" or "assistant"."""

    role: str
    content: str


class Model(Bound):
    """An opened model. Safe to use from several threads: each generation has a session of its own.

    >>> with Model.load("model.gguf") as model:  # doctest: +SKIP
    ...     print(model.generate("The capital of France is", max_tokens=8, temperature=0).read())
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        ctx_size: int | None = None,
        chat_template: str | None = None,
        memory_budget: str | int | None = None,
        room_for: str | float | None = None,
        device: str = "cpu",
        device_memory: str | int | None = None,
        mmap: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Opens a packed model directory; `Model.load` also takes GGUF files and names."""
        from . import _core
        from .memory import parse_size
        from .neurons import Needs, known, needs

        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; it must be 1 or more")
        _check_ctx_size(ctx_size)
        _hear_core()
        budget = 0 if memory_budget is None else parse_size(memory_budget)
        on_device = 0 if device_memory is None else parse_size(device_memory, "device memory budget")
        self.path = Path(path)
        self._tokenizer: Tokenizer | None = None
        self._planned: tuple[str, SparsityFile | None, str] | None = None
        """Under a memory budget: what there is room for, the file that this means, and what "auto" decided."""
        wanted = Needs()
        if budget:
            # Before the weights take what is left: all that generating needs counts.
            import jinja2  # noqa: F401

            self._tokenizer = tokenizer_within(budget, self.path)
            file, why = known(room_for, self.path)
            self._planned = (str(room_for), file, why)
            wanted = needs(file, json.loads((self.path / "config.json").read_bytes()), self.path)
        self._core: _core.Model | None = _core.Model(
            os.fspath(path),
            threads or 0,
            mmap=mmap,
            memory_budget=budget,
            n_ctx=(ctx_size or 0) if budget or device != "cpu" else 0,
            extra_bytes=wanted.extra_bytes,
            neuron_share=wanted.neuron_share,
            by_gate=wanted.by_gate,
            device=device,
            device_memory=on_device,
            aside_bytes=self._tokenizer.peak_bytes if self._tokenizer is not None else 0,
            progress=None if progress is None else lambda done, total: progress("loading", done, total),
        )
        if self._tokenizer is not None:
            self._tokenizer.attach(self._set_aside)
        self.config: dict[str, Any] = json.loads(self._core.config_json)
        self.n_ctx_train = int(self.config["n_ctx_train"])
        usual = self._core.memory()["n_ctx"] if budget else min(self.n_ctx_train, DEFAULT_CTX_SIZE)
        self.ctx_size = ctx_size or usual
        if self.ctx_size > self.n_ctx_train:
            log.warning("context of %d tokens: the model was trained for %d", self.ctx_size, self.n_ctx_train)
        self._chat_template = chat_template
        self._lock = threading.RLock()
        self._template: ChatTemplate | None = None
        self._idle: Session | None = None
        self._sparsity: tuple[SparsityFile, Skipping] | None = None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        threads: int | None = None,
        ctx_size: int | None = None,
        chat_template: str | None = None,
        memory_budget: str | int | None = None,
        room_for: str | float | None = None,
        device: str = "cpu",
        device_memory: str | int | None = None,
        mmap: bool | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Opens a packed directory, a GGUF file (converted into the cache on first use) or a known name; None is the default
        model, which is downloaded on first use.

        threads: computing threads; None is the physical cores this process may use. ctx_size: context window in tokens;
        None is the model's own, at most 4096. chat_template: Jinja text, or "chatml", "gemma", "llama3", "phi3", "plain", instead of
        the checkpoint's.
        memory_budget: the most memory that this whole process may take, such as "700M"; weights that do not fit are read from
        the file for every token, with the same results. The context is then what an eighth of it holds, unless ctx_size says.
        room_for: only with a memory budget: what `set_sparsity` will be given. Its memory counts, and where it names the neurons
        that a token needs, and the model has a file of them (`convert --order`), single neurons are held and read.
        device: "cpu", "cuda" (needs a build with CUDA and a GPU), or "auto", the GPU where there is one with room for the model's
        attention and head. device_memory: the most of the GPU's memory that the model and its contexts take, such as "6G"; None is
        what is free less a reserve. Neurons that do not fit are computed by the CPU.
        mmap: True maps the weights' file, False reads it into memory, which decodes faster; None reads it where that takes at
        most half of the memory that is free. Not with a memory budget, which has a way of its own.
        progress: called with (what, done, total) in bytes while a conversion or a download runs, or weights are read.

        Raises ModelError where the model is missing, damaged or of an unsupported kind; UsageError for impossible options;
        BudgetError, which names the floor, where the budget is too small.
        """
        from .registry import resolve

        return cls(
            resolve(model, progress=progress),
            threads=threads,
            ctx_size=ctx_size,
            chat_template=chat_template,
            memory_budget=memory_budget,
            room_for=room_for,
            device=device,
            device_memory=device_memory,
            mmap=mmap,
            progress=progress,
        )

    def __repr__(self) -> str:
        if self._core is None:
            return f"<Model {self.name!r}, closed>"
        return f"<Model {self.name!r}, {self.threads} threads, {self.isa}, {self.weight_bytes / 1e6:.0f} MB>"

    @property
    def name(self) -> str:
        """The model's own name, else that of its directory."""
        return str(self.config.get("name") or self.path.name)

    @property
    def threads(self) -> int:
        """Computing threads."""
        return self._opened().threads

    @property
    def device(self) -> str:
        """The name of the GPU that runs the model, or "cpu"."""
        return self._opened().device

    @property
    def mapped(self) -> bool:
        """Whether the weights are mapped from their file, not read into memory."""
        return self._opened().mapped

    @property
    def isa(self) -> str:
        """Instruction set of the kernels, such as "avx2"."""
        return self._opened().isa

    @property
    def n_vocab(self) -> int:
        """Length of a vector of logits."""
        return int(self.config["n_vocab"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self._opened().weight_bytes

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that one decoded token reads."""
        return self._opened().bytes_per_token

    def stats(self) -> dict[str, Any]:
        """What the weights take and what reading them has cost: {"weight_bytes", "bytes_per_token", and under a memory budget
        "memory": the core's `memory()` with hit rate, expected speed, and bytes and seconds a pass (see `sparse_run.memory`), and on
        a GPU "device_memory": the core's `device_memory()`}."""
        from .memory import summary

        core = self._opened()
        memory = core.memory()
        stats: dict[str, Any] = {"weight_bytes": core.weight_bytes, "bytes_per_token": core.bytes_per_token}
        if memory["budget_bytes"]:
            stats["memory"] = summary(memory)
        if core.device != "cpu":
            stats["device_memory"] = core.device_memory()
        return stats

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded on first use."""
        with self._lock:
            if self._tokenizer is None:
                from .tokenizer import Tokenizer

                self._tokenizer = Tokenizer.load(self.path)
            return self._tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The chat template in use, loaded on first use."""
        with self._lock:
            if self._template is None:
                from .template import ChatTemplate

                self._template = ChatTemplate.for_tokenizer(
                    self.tokenizer, override=self._chat_template, name=self.name
                )
            return self._template

    @property
    def sparsity(self) -> SparsityFile | None:
        """The sparsity file that new sessions decode with; None is dense."""
        return self._sparsity[0] if self._sparsity is not None else None

    def set_sparsity(
        self,
        choice: str | float | None,
        *,
        say: Callable[[str], object] | None = None,
        progress: Callable[[str, float, float], None] | None = None,
    ) -> SparsityFile | None:
        """Sessions opened from now on decode with less weight: "off" or None, "auto", a level 0..1, the name of one of the
        model's sparsity files, or a path. A level is calibrated on first use, which takes a while.

        say: called with what "auto" decided, and before a level is calibrated. progress: called with (what, done,
        total) while it is.

        Raises UsageError for a level outside 0..1, an unknown name, and under a memory budget for all but what it was given as
        `room_for`; ModelError for a file of another model.

        >>> model.set_sparsity(0.4)  # doctest: +SKIP
        """
        from .packed_header import read_header
        from .skipping import bind
        from .sparsity import choose

        core = self._opened()
        found = None
        if choice is not None and choice != "off" and self._planned is not None:
            room_for, found, why = self._planned
            if room_for != str(choice):
                raise UsageError(
                    f"this model's memory budget was divided without room for the sparsity {choice}; give it when loading, as room_for"
                )
            if why and say is not None:
                say(why)
        elif choice is not None and choice != "off":
            found = choose(str(choice), read_header(self.path), core, self.tokenizer, say=say, tick=progress)
        self._sparsity = (found, bind(found, core)) if found is not None else None
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None:
            idle.close()
        return found

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. An empty text gives the beginning-of-text token, where the model has one.

        >>> model.tokenize("Hello world")  # doctest: +SKIP
        [19556, 905]
        """
        ids = self.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)
        if not ids and add_bos and self.tokenizer.bos_id is not None:
            return [self.tokenizer.bos_id]
        return ids

    def detokenize(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids, without control tokens unless `skip_special` is false."""
        return self.tokenizer.decode(ids, skip_special=skip_special)

    def chat_ids(self, messages: Iterable[Mapping[str, Any]]) -> list[int]:
        """A conversation as the tokens that the model answers to: the chat template, then the tokenizer."""
        return self.tokenizer.encode(self.template.render(messages))

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
        """Continues a text, or token ids; no template is applied. Iterate over the result, or `.read()` it.

        max_tokens: None is up to the end of the context. Sampling options: see `Sampling`; temperature 0 is greedy.
        stop: texts that end the answer and are not part of it. ignore_eos: goes on after end tokens.

        Raises ContextLengthError where the prompt is longer than the context, UsageError for impossible options.

        >>> for piece in model.generate("Once", max_tokens=16):  # doctest: +SKIP
        ...     print(piece, end="", flush=True)
        """
        return self._with_session(
            lambda session: session.generate(
                prompt,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                repeat_last_n=repeat_last_n,
                seed=seed,
                stop=stop,
                ignore_eos=ignore_eos,
            )
        )

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
        """Answers a conversation, a list of {"role", "content"}; options as for `generate`.

        >>> model.chat([{"role": "user", "content": "Say hi."}], temperature=0).read()  # doctest: +SKIP
        'Hi!'
        """
        return self._with_session(
            lambda session: session.chat(
                messages,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                repeat_last_n=repeat_last_n,
                seed=seed,
                stop=stop,
            )
        )

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every one of `ids`, [len(ids), n_vocab]: row i predicts token i + 1."""
        with self.session(ctx_size=max(1, len(ids))) as session:
            return session.logits(ids)

    def session(self, *, ctx_size: int | None = None) -> Session:
        """A cache of its own, for a conversation or a thread; close it, or use it in a `with` block."""
        _check_ctx_size(ctx_size)
        session = Session(self, ctx_size or self.ctx_size)
        self._sessions.add(session)
        return session

    def close(self) -> None:
        """Cancels what runs, closes all sessions and unmaps the model."""
        with self._lock:
            sessions, self._idle = list(self._sessions), None
        for session in sessions:
            session.close()
        core, self._core = self._core, None
        if core is not None:
            core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self) -> _core.Model:
        if self._core is None:
            raise UsageError("the model is closed; load it again")
        return self._core

    def _set_aside(self, bytes_: int) -> None:
        if self._core is not None:
            self._core.set_aside(bytes_)

    def _release_tokenizer(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.release()

    def _prepare_numpy(self) -> None:
        """Under a memory budget: makes room for NumPy before it is imported, which generating text does without."""
        if self._planned is not None and "numpy" not in sys.modules:
            self._opened().set_aside(NUMPY_BYTES, for_good=True)

    def _with_session(self, start: Callable[[Session], Generation]) -> Generation:
        """Starts in the idle session, so that a prompt that goes on from the last one is cheap; else in a new one."""
        self._opened()
        with self._lock:
            session, self._idle = self._idle, None
            if session is None:
                session = Session(self, self.ctx_size, on_idle=self._keep)
                self._sessions.add(session)
        try:
            return start(session)
        except BaseException:
            self._keep(session)
            raise

    def _keep(self, session: Session) -> None:
        """Keeps the session that became idle last; its predecessor's memory is freed."""
        with self._lock:
            previous, self._idle = self._idle, session if self._core is not None else None
        if previous is not None and previous is not session:
            previous.close()


def tokenizer_within(budget: int, path: Path) -> Tokenizer:
    """The tokenizer of a model that has to share a budget with it: the small one where not all weights will stay."""
    from .tokenizer import Tokenizer
    from .tokenizer.lean import load_lean

    try:
        weights = (path / "weights.safetensors").stat().st_size
    except OSError:
        weights = 0  # the core says what is wrong
    lean = load_lean(path) if budget < weights + SPARE_BYTES else None
    return lean if lean is not None else Tokenizer.load(path)


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    ctx_size: int | None = None,
    chat_template: str | None = None,
    memory_budget: str | int | None = None,
    room_for: str | float | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    mmap: bool | None = None,
    progress: Progress | None = None,
) -> Model:
    """Short for `Model.load`."""
    return Model.load(
        model,
        threads=threads,
        ctx_size=ctx_size,
        chat_template=chat_template,
        memory_budget=memory_budget,
        room_for=room_for,
        device=device,
        device_memory=device_memory,
        mmap=mmap,
        progress=progress,
    )
