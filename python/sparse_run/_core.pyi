"""The C++ core. Every heavy call releases the GIL. Errors are raised as classes of sparse_run.errors."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

def isa_list() -> list[dict[str, Any]]:
    """Instruction sets of this build, best first: {"name", "supported" (by this CPU and OS), "selected"}."""

def cpu_info() -> dict[str, Any]:
    """{"brand": str, "features": [str], "physical_cores": int, "allowed_cores": int, "default_threads": int}."""

def gpu_problem() -> str:
    """Why this build cannot use a GPU on this machine, in one line with the remedy; "" where it can."""

def gpu_info() -> dict[str, Any]:
    """The first GPU, the driver, and this build's code for them; None (0 for counts) for what is not known.

    {"built": bool, "toolkit": str, "architectures": str, "driver_cuda": str, "devices": int, "name": str, "capability": str,
    "code": str, "multiprocessors": int, "memory_bytes": int, "free_bytes": int}; code: compute capability of the machine code
    that runs there.
    """

def default_threads() -> int:
    """Physical cores allowed by the affinity mask and the cgroup quota."""

def stream_gb_per_s(threads: int, megabytes: int = 512, repetitions: int = 5) -> list[float]:
    """Rate at which `threads` threads read a buffer larger than the caches, in GB/s, one value a repetition."""

class MemoryBench:
    """Single measurements on memory that no cache holds, to be taken in turns by whoever compares. Each reads another quarter
    of `megabytes` (4 or more, of 10**6 bytes) of made-up weights. Raises UsageError on impossible values, BudgetError where
    there is no such memory."""

    def __init__(self, threads: int, megabytes: int = 1024) -> None: ...
    def gather(self, run: int, density: float) -> float:
        """GB/s of wanted bytes when runs of `run` bytes (64 or more) are wanted with probability `density`, 0 < density <= 1;
        the best of several prefetch distances."""
    def columns(
        self,
        kind: str,
        group: int,
        has_min: bool,
        rows: int,
        cols: int,
        panel_rows: int,
        density: float,
        shared_columns: bool = False,
        superblock: int = 0,
    ) -> dict[str, float]:
        """One product with a matrix of this shape, dense and on a random share of its columns:
        {"dense_seconds", "sparse_seconds", "dense_bytes", "sparse_bytes"}. shared_columns: threads share its columns, as
        they do those of q|k|v, o and down, where its shape allows it. superblock: columns that share a unit of the scales, 0:
        scales are halves. UsageError where a quarter is too small for it."""
    def rows(
        self, kind: str, group: int, has_min: bool, neurons: int, cols: int, gated: bool, density: float
    ) -> dict[str, float]:
        """One product with the rows of neurons of this shape: {"dense_seconds"} all gate and up rows in one go,
        {"listed_seconds"} both rows of a random share, {"gated_seconds"} all gate rows and then up rows of that share."""

def set_log_sink(sink: Callable[[int, str], object] | None, level: int = 20) -> None:
    """Calls sink(level, text) for messages of the core from `level` on (the numbers of logging); None = silent."""

def column_stretches(rows: int, cols: int) -> int:
    """Into how many stretches of columns the products with q|k|v, o or down of this shape are cut, for threads to share them;
    1: threads share rows (models/format.md)."""

def panel_bytes(kind: str, rows: int, cols: int, group: int, has_min: bool, superblock: int = 0) -> int:
    """Bytes of one panel of `rows` rows (models/format.md). `kind`: q4 q5 q6 q8 f32 f16 bf16; `superblock`: 256 where scales
    are products, else 0."""

def pack_panel(
    kind: str,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16] | NDArray[np.int8],
    mins: NDArray[np.float16] | NDArray[np.int8] | None,
    group: int,
    units: NDArray[np.float16] | None = None,
    min_units: NDArray[np.float16] | None = None,
) -> NDArray[np.uint8]:
    """One quantised panel: codes [rows, cols] unsigned, scales and mins [rows, ceil(cols / group)] -> its bytes. With units
    [rows, ceil(cols / 256)] scales are int8 in these units, and mins in those of `min_units`."""

def pack_panel_float(kind: str, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """One float panel (up to 64 rows), values [rows, cols] -> its bytes."""

def quantise_rows(
    values: NDArray[np.float32], kind: str, group: int, has_min: bool, importance: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16] | None, float, float]:
    """Weights [rows, cols] to codes [rows, cols] of `kind` (q4 q5 q6 q8) and scales and minima [rows, ceil(cols / group)]:
    a search per group for the least squared error, weighted by `importance` [cols]. The last two are that error and the
    weighted sum of squared weights. A scale that does not fit into a half is infinite."""

def unpack_panel(
    kind: str, data: NDArray[np.uint8], rows: int, cols: int, group: int, has_min: bool, superblock: int = 0
) -> NDArray[np.float32]:
    """The weights of one panel [rows, cols]; inverse of the packers (tests, checks)."""

def neuron_bytes(kind: str, neurons: int, cols: int, group: int, has_min: bool, gated: bool) -> int:
    """Bytes of the records of `neurons` neurons (models/format.md, layout `neurons`)."""

def pack_neurons(
    kind: str,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    mins: NDArray[np.float16] | None,
    group: int,
    gated: bool,
) -> NDArray[np.uint8]:
    """Quantised records from rows gate 0, up 0, gate 1, up 1 ... where gated, else up 0, up 1 ...: codes [rows, cols]
    unsigned, scales and mins [rows, ceil(cols / group)] -> their bytes."""

def pack_neurons_float(kind: str, values: NDArray[np.float32], gated: bool) -> NDArray[np.uint8]:
    """Float records, values [rows, cols] in the same order -> their bytes."""

def unpack_neurons(
    kind: str, data: NDArray[np.uint8], neurons: int, cols: int, group: int, has_min: bool, gated: bool
) -> NDArray[np.float32]:
    """The weights of records [rows, cols], in the packers' order (tests, checks)."""

class Model:
    """A mapped packed model, shared by sessions; owns the thread pool."""

    def __init__(
        self,
        path: str,
        threads: int = 0,
        mmap: bool | None = None,
        memory_budget: int = 0,
        n_ctx: int = 0,
        extra_bytes: int = 0,
        progress: Callable[[int, int], object] | None = None,
        device: str = "cpu",
        neuron_share: float = 0.0,
        aside_bytes: int = 0,
        device_memory: int = 0,
        by_gate: bool = False,
    ) -> None:
        """`mmap`: True maps the weights, False copies them into huge pages (15-30% faster decoding), None copies them
        where that takes at most half of the available memory.

        `memory_budget`: bytes that this whole process may take, 0 = no limit. Weights that do not fit are read in every pass
        (a token, or a block of a prompt), past the page cache, with the same results. `n_ctx`: tokens that all sessions
        together may hold, 0 = what an eighth of the budget holds, from 256 to 4096. `extra_bytes`: what the caller will
        allocate. `aside_bytes`: the most that he
        will `set_aside`. `progress(done, total)`: bytes read at the start. Raises BudgetError below the floor and above the machine's
        memory. `neuron_share`: above 0, set_neurons or set_predictor will say which neurons tokens need, together so large a
        share of all; as many as fit are then held singly, and decoding reads those that are missing, where the model has a file
        of neurons (else memory()["no_neurons"] says why not). `by_gate`: where `neuron_share` is 0, tokens will say by their gates
        which neurons they need (activations with true zeros, thresholds at site G): gate rows are held and streamed first, and of
        the others only those are read that are left and missing. The same results.

        `device`: "cpu", "cuda", or "auto" (the GPU where there is one with room for the model's attention and head). Under a GPU
        `n_ctx` is what room for contexts is kept for, 0 = 4096 or what the model was trained for. `device_memory`: bytes of the
        GPU's memory that weights, working memory and contexts may take, 0 = what is free less a reserve. Neurons that do not fit
        are computed by the CPU and the results added, in another order than where all fit. Raises BudgetError below the floor."""
    @property
    def device(self) -> str:
        """The name of the GPU that runs the model, or "cpu"."""
    def memory(self) -> dict[str, Any]:
        """What a memory budget was divided into, in bytes: {"budget_bytes" (0 without one), "process_bytes", "working_bytes",
        "context_bytes" (in use), "resident_bytes" (weights now; contexts and prompts that grow make them fewer), "ring_bytes" (weights read ahead), "neuron_bytes" and "neuron_slots" (single
        neurons held), "gate_bytes" (of these: gate rows that choose the others), "gate_streamed_bytes" (gate rows that every token reads
        which works from single neurons), "no_neurons" (why none are, where they were asked for), "streamed_bytes" (that every pass reads which does
        not work from single neurons), "n_ctx", "disk_bytes_per_s" (measured at the start, 0 = unknown), "direct" (past the page
        cache)}, and what its reads have come to since: {"passes", "read_bytes", "reads", "hits", "misses" (pieces that were there
        when needed, and that were waited for), "neuron_tokens" (passes that worked from single neurons), "neuron_hits",
        "neuron_misses" (neurons that were there when asked for, and that were read), "read_seconds" (disk busy), "wait_seconds"
        (computing waited), "queue_depth" (mean)}."""
    def device_memory(self) -> dict[str, Any]:
        """What a GPU holds of the model, all 0 on the CPU: {"budget_bytes", "floor_bytes" (the smallest budget), "weight_bytes",
        "cpu_weight_bytes" (of the neurons that the CPU computes), "cpu_layers" (which have such), "hot_share" (of all neurons,
        those on the GPU)}."""
    def set_break_even(self, site: str, break_even: float) -> None:
        """The share of neurons, 0 to 1, above which all are read where some would do: "N", of a list; "G", up rows behind
        their gates. Not set: by the length of a row. Results do not depend on it. UsageError for another site or value."""
    def set_aside(self, bytes: int, for_good: bool = False) -> None:
        """Under a memory budget: the caller is about to take so many bytes for a while. Weights have given way when this returns;
        after `set_aside(0)` they come back as passes run; `for_good`: beside that, and they do not come back. Waits for a running
        pass. Raises Error when the file cannot be read."""
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

class Sparsity:
    """Thresholds at the sites A, O, M, Z and G, bound to one model; shared by sessions, immutable.

    An input j of A, O, M or Z is kept iff |x[j]| > threshold[j]. G chooses neurons: neuron j is kept iff
    |act(gate)[j]| > threshold[j]; of the others neither the up row nor the column of down is read, their z is 0. M
    needs the layout `panels` and G needs `neurons` (`sparse-run convert --layout`). Prefill and the positions before
    `dense_tokens` stay dense."""

    def __init__(
        self,
        model: Model,
        thresholds: dict[str, list[NDArray[np.float32] | None]],
        dense_tokens: int = 16,
        break_even: float | dict[str, float] | None = None,
    ) -> None:
        """thresholds: site letter -> one entry a layer: None (dense) or [width] or [1] thresholds >= 0, not NaN;
        widths: A, M: n_embd; O: n_heads * head_dim; Z, G: n_ff. `break_even`: density above which a product runs dense
        (on the masked input: the same bits), one for all or by site; where None or left out, by the matrix's shape. Raises
        UsageError on a wrong site, shape or value, where a site's matrix is float (not G), and where the layout of the FFN does
        not allow the site, with the layout that does."""
    def break_even(self, site: str) -> float:
        """The density above which products of a site run dense: as it was given, else the smallest that the layers' shapes
        give. Raises UsageError on an unknown site."""
    @property
    def dense_tokens(self) -> int: ...

class Predictor:
    """Low-rank predictors of the neurons and heads that a token needs (Deja Vu), bound to one model; shared by
    sessions.

    Scores are b_scale * (B (a_scale * (A h))), h being the residual stream at root mean square 1, in int8 blocks of 32;
    item i is predicted where score[i] > threshold[i]. Neurons of a layer are predicted from the stream before its
    attention, beside which the work is done; heads of a layer from the stream before the layer before it."""

    def __init__(self, model: Model, arrays: Mapping[str, NDArray[Any]], dense_tokens: int = 16) -> None:
        """arrays: `predictor.<layer>.neurons.KEY` (n = n_ff) and `predictor.<layer>.heads.KEY` (n = n_heads, not for
        layer 0), KEY being a (int8 [rank, n_embd]), a_scale (float32 [rank]), b (int8 [n, rank]), b_scale and threshold
        (float32 [n]): a sparsity file's own arrays; other names are passed over, layers without arrays are computed
        whole. Positions before `dense_tokens` are, too. Arrays are asked for layer by layer, and copied. Raises UsageError
        where they do not fit or are not finite, and for neurons where the FFN is stored in panels, with the way to convert
        it."""
    @property
    def dense_tokens(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes that a decoded token reads of the predictors."""

def predictor_bytes(rank: int, n: int, n_embd: int) -> int:
    """Memory that a Predictor takes for one layer's neurons (n = n_ff) or heads (n = n_heads)."""

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
    def eval(self, tokens: NDArray[np.int32] | list[int]) -> None:
        """Appends tokens; logits of the last one are then in `logits()`. Cancellable, also during prefill:
        raises Cancelled and leaves the cache as it was after the last whole block."""
    def eval_all(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """As eval, and returns the logits of every token, [len(tokens), n_vocab]."""
    def logits(self) -> NDArray[np.float32]:
        """A read-only view [n_vocab] of the last token's logits, valid until the next call."""
    def set_sparsity(self, plan: Sparsity | None, mask_prefill: bool = False) -> None:
        """From now on decoding skips by `plan`. mask_prefill: blocks of tokens are masked as well, from position
        plan.dense_tokens on (dense products on masked inputs: the bits of sparse decoding, at prefill's speed)."""
    def density(self) -> dict[str, float]:
        """Shares read since the last call, by site (an input above its threshold whose int8 code is 0 adds nothing, is not
        read and not counted): of columns ("A", "O", "M", "Z"), neurons ("N", chosen beforehand;
        "G", of those by thresholds or exact zeros) or heads ("H"); sites where nothing was to be skipped are absent.
        "body": share of the bytes of the layers' matrices that was read (predictors' bytes are added), over the tokens
        of which some could have been skipped. "recall": see set_predictor. Resets the counters."""
    def set_neurons(self, sets: list[NDArray[np.int32] | None] | None, mask_prefill: bool = False) -> None:
        """From now on decoding computes these neurons of the FFN only: one entry a layer, an ascending int32 array or
        None for all; None instead of the list ends it. The others have z = 0 and none of their weights is read;
        thresholds and exact zeros work within the sets. Choosing costs nothing per token. mask_prefill: blocks of
        tokens are masked as well, to the same bits. Stays through truncate. Raises UsageError where a list is not
        ascending or out of range, and for a layer whose FFN is stored in panels, with the way to convert it."""
    def set_predictor(self, predictor: Predictor | None, mask_prefill: bool = False, measure: bool = False) -> None:
        """From now on decoding computes only what the predictor names, from position predictor.dense_tokens on; None:
        everything. It goes before set_neurons; thresholds and exact zeros work within what is named. A head that is not
        named reads neither keys nor values nor its columns of attn_o; the token's own keys and values are computed and
        cached all the same, so that nothing is missing when a head is named later. mask_prefill: blocks of tokens are
        masked as well, to the same bits. measure: nothing is left out; of blocks, density() then says which share of
        the neurons would have been kept ("N") and which share of the neurons that are not 0 is among them
        ("recall")."""
    def collect(self, kind: str | None) -> None:
        """Counts, from zero, what the tokens of blocks (prompts of two tokens or more) do to each neuron; None ends it
        and forgets. "griffin": sum over tokens of (z_tj / ||z_t||)^2; "core": in how many tokens' cores j is, a core
        being the largest fifth, rounded up, of a token's positive z, of equal ones the first. Goes on through several
        evals and through truncate (what was counted stays counted); a block that is cancelled counts nothing. Does not
        depend on how a prompt is cut. The last layer then computes all tokens of a prompt, not the last one only."""
    def statistic(self) -> NDArray[np.float32]:
        """What `collect` has counted so far, [n_layers, n_ff]."""
    @property
    def collected(self) -> int:
        """Tokens that `collect` has counted."""
    def set_exact(self, on: bool) -> None:
        """Whether decoding leaves out what an activation with true zeros (ReLU, its square, FATReLU, dReLU) makes
        exactly 0: up rows and columns of down (with panels: columns of down only). The same bits; on by default."""
    def embed(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """The residual stream before the first layer, [n, n_embd]."""
    def run_layer(
        self, layer: int, pos: int, x: NDArray[np.float32], taps: bool = False
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """One layer alone: x [n <= 256, n_embd] at positions pos, pos + 1 ... -> the stream after the layer, [n,
        n_embd], and with `taps` the inputs of its sites before masking, {"A": [n, n_embd], "O", "M", "Z"}, and where
        the FFN is gated "G", act(gate) before masking (signed), and "U", what multiplies it, both [n, n_ff]. Uses the
        cache's memory of that layer (positions before pos must have been run through it); the session's tokens must be
        empty. Masks as set by set_sparsity with mask_prefill; predictors are not used. Calibration, and traces for
        training predictors: x is what a predictor sees, Z != 0 the neurons it should name, O the heads' outputs."""
    def step(self, sampler: Sampler) -> int:
        """Samples from the last logits, appends the token, evaluates it, returns it."""
    def sample(self, sampler: Sampler) -> int:
        """Samples from the last logits without evaluating; the sampler has accepted the token."""
    def cancel(self) -> None:
        """Makes a running or the next eval raise Cancelled; callable from any thread."""
    def stats(self) -> dict[str, Any]:
        """{"prompt_tokens", "prompt_seconds", "decode_tokens", "decode_seconds"} since the session began; tokens
        evaluated one at a time count as decoded, others as prompt."""
