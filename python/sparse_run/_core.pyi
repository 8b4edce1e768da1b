"""The C++ core. Every heavy call releases the GIL. Errors are raised as classes of sparse_run.errors."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

def isa_list() -> list[dict[str, Any]]:
    """Instruction sets of this build, best first: {"name", "supported" (by this CPU and OS), "selected"}."""

def cpu_info() -> dict[str, Any]:
    """{"brand": str, "features": [str], "physical_cores": int, "allowed_cores": int, "default_threads": int}."""

def default_threads() -> int:
    """Physical cores allowed by the affinity mask and the cgroup quota."""

def stream_gb_per_s(threads: int, megabytes: int = 512, repetitions: int = 5) -> list[float]:
    """Rate at which `threads` threads read a buffer larger than the caches, in GB/s, one value a repetition."""

def set_log_sink(sink: Callable[[int, str], object] | None, level: int = 20) -> None:
    """Calls sink(level, text) for messages of the core from `level` on (the numbers of logging); None = silent."""

def panel_bytes(kind: str, rows: int, cols: int, group: int, has_min: bool) -> int:
    """Bytes of one panel of `rows` rows (models/format.md). `kind`: q4 q5 q6 q8 f32 f16 bf16."""

def pack_panel(
    kind: str,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    mins: NDArray[np.float16] | None,
    group: int,
) -> NDArray[np.uint8]:
    """One quantised panel: codes [rows, cols] unsigned, scales and mins [rows, ceil(cols / group)] -> its bytes."""

def pack_panel_float(kind: str, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """One float panel (up to 64 rows), values [rows, cols] -> its bytes."""

def unpack_panel(kind: str, data: NDArray[np.uint8], rows: int, cols: int, group: int, has_min: bool) -> NDArray[np.float32]:
    """The weights of one panel [rows, cols]; inverse of the packers (tests, checks)."""

class Model:
    """A mapped packed model, shared by sessions; owns the thread pool."""

    def __init__(self, path: str, threads: int = 0, mmap: bool | None = None) -> None:
        """`mmap`: True maps the weights, False copies them into huge pages (15-30% faster decoding), None copies them
        where that takes at most half of the available memory."""
    @property
    def mapped(self) -> bool:
        """Whether the weights are mapped from the file, not copied into memory."""
    @property
    def config_json(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
    @property
    def bytes_per_token(self) -> int:
        """Weight bytes that one decoded token reads (dense)."""
    def close(self) -> None: ...

class Sampler:
    """Seeded token sampler: repetition penalty, temperature, top-k, top-p, min-p, in llama.cpp's order and meaning."""

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = -1,
    ) -> None: ...
    @property
    def seed(self) -> int:
        """The seed in use; with it a run whose seed was drawn (-1) can be repeated."""
    def sample(self, logits: NDArray[np.float32]) -> int:
        """Picks a token from logits [n_vocab] without accepting it."""
    def accept(self, token: int) -> None: ...
    def reset(self) -> None: ...

class Session:
    """A KV cache and its buffers. Not for two threads at once, except `cancel`."""

    def __init__(self, model: Model, n_ctx: int) -> None:
        """`n_ctx` from 1 on, or 0 for what the model was trained for."""
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_past(self) -> int: ...
    @property
    def tokens(self) -> list[int]:
        """Tokens whose keys and values are cached, oldest first."""
    @property
    def kv_bytes(self) -> int: ...
    def truncate(self, n: int) -> None:
        """Forgets all but the first `n` cached tokens."""
    def eval(self, tokens: NDArray[np.int32]) -> None:
        """Appends tokens; logits of the last one are then in `logits()`. Cancellable, also during prefill:
        raises Cancelled and leaves the cache as it was after the last whole block."""
    def eval_all(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """As eval, and returns the logits of every token, [len(tokens), n_vocab]."""
    def logits(self) -> NDArray[np.float32]:
        """A read-only view [n_vocab] of the last token's logits, valid until the next call."""
    def step(self, sampler: Sampler) -> int:
        """Samples from the last logits, appends the token, evaluates it, returns it."""
    def sample(self, sampler: Sampler) -> int:
        """Samples from the last logits without evaluating; the sampler has accepted the token."""
    def cancel(self) -> None:
        """Makes a running or the next eval raise Cancelled; callable from any thread."""
    def stats(self) -> dict[str, Any]:
        """{"prompt_tokens", "prompt_seconds", "decode_tokens", "decode_seconds"} since the session began; tokens
        evaluated one at a time count as decoded, others as prompt."""
