"""What the commands share: option decorators, the progress bar on stderr, logging, loading a model, printing JSON."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ..errors import Error, UsageError
from ..sampling import Sampling

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..generation import Generation
    from ..model import Model

_LOG = "sparse-run commands"
F = TypeVar("F", bound=Callable[..., Any])


def model_option(function: F) -> F:
    """Gives the command `model: str | None`: -m/--model, or the first positional argument."""

    @click.argument("model_arguments", metavar="[MODEL]", nargs=-1)
    @click.option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A .gguf file, a packed model directory, or a known name (see `sparse-run list`).",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, model: str | None, model_arguments: tuple[str, ...], **kwargs: Any) -> Any:
        if len(model_arguments) > 1:
            takes_prompt = any("-p" in parameter.opts for parameter in click.get_current_context().command.params)
            raise click.UsageError(
                f"only the model is named without an option, and {model_arguments[1]!r} is one word more"
                + ("; a prompt goes with -p, in quotes" if takes_prompt else "")
            )
        if model_arguments:
            model_argument = model_arguments[0]
            source = click.get_current_context().get_parameter_source("model")
            if source is not None and source.name == "COMMANDLINE" and model != model_argument:
                raise click.UsageError(f"two models are named, {model_argument!r} and -m {model!r}; name one")
            model = model_argument
        return function(*args, model=model, **kwargs)

    return wrapper  # type: ignore[return-value]


def threads_option(function: F) -> F:
    """Gives the command `threads: int | None`."""
    return click.option(
        "-t",
        "--threads",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="Computing threads.  [default: physical cores this process may use]",
    )(function)


def ctx_option(function: F) -> F:
    """Gives the command `ctx_size: int | None`."""
    return click.option(
        "-c",
        "--ctx-size",
        type=click.IntRange(min=1),
        metavar="N",
        help="Context window in tokens.  [default: the model's own, at most 4096 and at most what an eighth of "
        "--memory-budget holds]",
    )(function)


def device_options(function: F) -> F:
    """Gives the command `device: str` and `device_memory: str | None`."""
    function = click.option(
        "--device-memory",
        metavar="SIZE",
        help="Most of the GPU's memory that the model takes, such as 6G: neurons that do not fit are computed by the CPU.  "
        "[default: what is free]",
    )(function)
    return click.option(
        "--device",
        type=click.Choice(["cpu", "cuda", "auto"]),
        default="cpu",
        show_default=True,
        help="What runs the model; auto is the GPU where there is one with room for it.",
    )(function)


def json_option(function: F) -> F:
    """Gives the command `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print one JSON object.")(
        function
    )


def sparsity_option(function: F) -> F:
    """Gives the command `sparsity: str | None`."""
    return click.option(
        "--sparsity",
        metavar="CHOICE",
        help="Skip weights while decoding: a sparsity file's name or path, a level 0..1, auto, or off.  [default: off]",
    )(function)


def budget_option(function: F) -> F:
    """Gives the command `memory_budget: str | None`."""
    return click.option(
        "--memory-budget",
        metavar="SIZE",
        help="Most memory this whole process takes, such as 700M or 2G: weights that do not fit are read from disk for each "
        "token, with the same results.  [default: no limit]",
    )(function)


def stats_option(function: F) -> F:
    """Gives the command `stats: bool`."""
    return click.option("--stats", is_flag=True, help="Say on stderr what each answer cost.")(function)


def verbosity_options(function: F) -> F:
    """Gives the command `quiet: bool` and `verbose: int`, and sends the log to stderr accordingly."""

    @click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr except errors.")
    @click.option("-v", "--verbose", count=True, help="Say more on stderr; twice for details.")
    @functools.wraps(function)
    def wrapper(*args: Any, quiet: bool, verbose: int, **kwargs: Any) -> Any:
        if not quiet:
            _log_to_stderr(verbose)
        return function(*args, quiet=quiet, verbose=verbose, **kwargs)

    return wrapper  # type: ignore[return-value]


def _log_to_stderr(verbose: int) -> None:
    import logging

    log = logging.getLogger("sparse_run")
    for old in [h for h in log.handlers if h.name == _LOG]:  # of an earlier command in this process
        log.removeHandler(old)
    handler = logging.StreamHandler()
    handler.name = _LOG
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


def sampling_options(function: F) -> F:
    """Gives the command `sampling: Sampling`."""
    default = Sampling()

    @click.option(
        "--temp", type=float, default=default.temperature, show_default=True, help="Temperature; 0 is greedy."
    )
    @click.option("--top-k", type=int, default=default.top_k, show_default=True, help="Of the K likeliest; 0 is all.")
    @click.option(
        "--top-p", type=float, default=default.top_p, show_default=True, help="Of the likeliest that sum to P."
    )
    @click.option("--min-p", type=float, default=default.min_p, show_default=True, help="At least P of the likeliest.")
    @click.option(
        "--repeat-penalty",
        type=float,
        default=default.repeat_penalty,
        show_default=True,
        help="On recent tokens; 1 is off.",
    )
    @click.option(
        "--repeat-last-n", type=int, default=default.repeat_last_n, show_default=True, help="Recent tokens it looks at."
    )
    @click.option(
        "-s", "--seed", type=int, default=default.seed, show_default=True, help="Random seed; -1 is a fresh one."
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        temp: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        repeat_last_n: int,
        seed: int,
        **kwargs: Any,
    ) -> Any:
        sampling = Sampling(
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last_n=repeat_last_n,
            seed=seed,
        )
        return function(*args, sampling=sampling, **kwargs)

    return wrapper  # type: ignore[return-value]


@dataclass(frozen=True)
class Opening:
    """How a command that makes text opens its model, as `load_model` takes it."""

    threads: int | None
    ctx_size: int | None
    sparsity: str | None
    memory_budget: str | None
    device: str
    device_memory: str | None
    mmap: bool | None


def opening_options(function: F) -> F:
    """Gives the command `opening: Opening`."""

    @sparsity_option
    @budget_option
    @click.option(
        "--mmap/--no-mmap",
        default=None,
        help="Map the weights' file, or read it into memory, which is faster later.  [default: read it where it takes at most "
        "half of the free memory]",
    )
    @threads_option
    @device_options
    @ctx_option
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        threads: int | None,
        ctx_size: int | None,
        sparsity: str | None,
        memory_budget: str | None,
        device: str,
        device_memory: str | None,
        mmap: bool | None,
        **kwargs: Any,
    ) -> Any:
        opening = Opening(threads, ctx_size, sparsity, memory_budget, device, device_memory, mmap)
        return function(*args, opening=opening, **kwargs)

    return wrapper  # type: ignore[return-value]


def print_json(value: dict[str, Any]) -> None:
    """One object on one line on stdout, `schema` first; text stays readable (UTF-8, not escapes)."""
    print(json.dumps({"schema": 1, **value}, ensure_ascii=False), flush=True)


def colour(stream: TextIO) -> bool:
    """Whether escape sequences may go to `stream`: NO_COLOR, FORCE_COLOR, CLICOLOR_FORCE, TERM=dumb, a terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0" or os.environ.get("CLICOLOR_FORCE", "0") != "0":
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """A progress bar on stderr: `progress(what, done, total)`, in bytes. A redrawn line on a terminal, otherwise one line
    per `what` and per tenth part, so that logs stay short and nobody waits in silence. Nothing when quiet.

    >>> with Progress(quiet=True) as progress:
    ...     progress("packing", 1, 2)
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._terminal = not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = 0.0
        self._open = False
        self._what = ""
        self._tenth = -1

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._quiet:
            return
        part = min(1.0, done / total) if total > 0 else 0.0
        if not self._terminal:
            tenth = int(part * 10)
            if what != self._what or (tenth != self._tenth and total > 0):
                self._what, self._tenth = what, tenth
                self._write(f"{what}: {part:.0%}\n" if total > 0 else f"{what}\n")
            return
        now = time.monotonic()
        if what == self._what and now - self._drawn < 0.1 and part < 1.0:
            return
        if self._open and what != self._what:
            self._write("\n")
        self._what, self._drawn, self._open = what, now, True
        amounts = f"{_size(done)} of {_size(total)}" if total > 0 else _size(done)
        bar = "#" * int(part * 24)
        self._write(f"\r{what} [{bar:<24}] {amounts}\x1b[K" if total > 0 else f"\r{what} {amounts}\x1b[K")

    def close(self) -> None:
        """Ends the line that is being redrawn."""
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._quiet = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Work:
    """Progress of long work on stderr with the time left: `work(what, done, total)`, in any unit. A redrawn line on a
    terminal, otherwise a line every ten seconds. Nothing when quiet."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._terminal = not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._begin = time.monotonic()
        self._shown = 0.0
        self._open = False

    def __call__(self, what: str, done: float, total: float) -> None:
        now = time.monotonic()
        if self._quiet or now - self._shown < (0.1 if self._terminal else 10.0):
            return
        self._shown = now
        line = what
        if done > 0:
            left = (now - self._begin) * (total - done) / done
            line = f"{what}; about {int(left) // 60}:{int(left) % 60:02d} left"
        try:
            self._stream.write(f"\r{line}\x1b[K" if self._terminal else f"{line}\n")
            self._stream.flush()
            self._open = self._terminal
        except OSError:
            self._quiet = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


def apply_sparsity(model: Model, choice: str | None, *, quiet: bool = False) -> None:
    """Makes an opened model decode as --sparsity says; what `auto` decided goes to stderr."""
    if choice is None or choice == "off":
        return
    with Work(quiet=quiet) as work:
        model.set_sparsity(choice, say=None if quiet else lambda text: click.echo(text, err=True), progress=work)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def check_device_memory(device: str, device_memory: str | None) -> int:
    """--device-memory in bytes, 0 without it. Raises UsageError where it is no size, or the CPU was asked for."""
    from ..memory import parse_size

    if device_memory is None:
        return 0
    if device == "cpu":
        raise click.UsageError("--device-memory is for a GPU; add --device cuda")
    return parse_size(device_memory, "device memory budget")


def load_model(
    model: str | None, opening: Opening, *, quiet: bool = False, chat_template: str | None = None
) -> Model:
    """Finds the model (converting or downloading it where that is needed, with a bar) and opens it. Under a memory budget it
    says on stderr what will happen."""
    from ..memory import parse_size
    from ..model import Model

    if opening.memory_budget is not None:  # before anything is downloaded or converted
        parse_size(opening.memory_budget)
        if opening.mmap is not None:
            raise UsageError("--mmap and --no-mmap say what --memory-budget decides; leave one of them out")
    check_device_memory(opening.device, opening.device_memory)
    with Progress(quiet=quiet) as progress:
        opened = Model.load(
            model,
            threads=opening.threads,
            ctx_size=opening.ctx_size,
            chat_template=chat_template,
            memory_budget=opening.memory_budget,
            room_for=opening.sparsity,
            device=opening.device,
            device_memory=opening.device_memory,
            mmap=opening.mmap,
            progress=progress,
        )
    try:
        if opening.memory_budget is not None and not quiet:
            say_budget(opened.stats()["memory"])
        if opening.device != "cpu" and not quiet:
            say_device(opening.device, opened)
        apply_sparsity(opened, opening.sparsity, quiet=quiet)
    except BaseException:
        opened.close()
        raise
    return opened


def say_device(wanted: str, opened: Model) -> None:
    """On stderr, what of the model the GPU has no room for, or that the CPU runs it although there is one."""
    from .. import _core
    from ..memory import division_text

    if opened.device == "cpu":
        if wanted == "auto" and not _core.gpu_problem():
            click.echo("the CPU runs the model; --device cuda says what the GPU has not got for it", err=True)
    elif line := division_text(opened.stats()["device_memory"]):
        click.echo(line, err=True)


def say_budget(memory: Mapping[str, Any]) -> None:
    """What will happen under a memory budget, on stderr."""
    from ..memory import start_text

    click.echo(start_text(memory), err=True)


class Waiting:
    """Says on stderr how far a slow disk is, where nothing has been written for two seconds; on a terminal the text stands
    behind the answer until that goes on. Only for models that read weights while they generate.

    >>> with Waiting(model, quiet=False) as waiting:  # doctest: +SKIP
    ...     for piece in generation:
    ...         waiting.write(piece)
    """

    PATIENCE = 2.0
    _AGAIN = 1.0  # seconds after which the text on a terminal is renewed; elsewhere PATIENCE

    def __init__(self, model: Model, *, quiet: bool, stream: TextIO | None = None) -> None:
        memory = model.stats().get("memory", {})
        self._model, self._stream = model, sys.stderr if stream is None else stream
        self._active = not quiet and bool(memory.get("streamed_bytes"))
        self._terminal = self._active and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._drawn = False
        self._thread: threading.Thread | None = None
        self._restart()

    def _restart(self) -> None:
        self._since = self._said = time.monotonic()
        self._read = self._model.stats()["memory"]["read_bytes"] if self._active else 0

    def write(self, piece: str) -> None:
        """Writes a piece of the answer to stdout."""
        with self._lock:
            self._clear()
            sys.stdout.write(piece)
            sys.stdout.flush()
            self._restart()

    def _clear(self) -> None:
        if self._drawn:
            self._put("\x1b[K")
            self._drawn = False

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._active = False

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            with self._lock:
                now = time.monotonic()
                again = self._AGAIN if self._terminal and self._drawn else self.PATIENCE
                if not self._active or self._ended.is_set() or now - self._said < again:
                    continue
                self._said = now
                try:
                    memory = self._model.stats()["memory"]
                except Error:  # the model was closed
                    return
                read = memory["read_bytes"] - self._read
                seconds = now - self._since
                text = f"[waiting for the disk: {_size(read)} in {seconds:.0f} s, a token takes {_size(memory['streamed_bytes'])}]"
                self._put(f"\x1b7 {text}\x1b[K\x1b8" if self._terminal else text + "\n")
                self._drawn = self._terminal

    def __enter__(self) -> Self:
        self._restart()
        if self._active:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._clear()


def read_text(path: str) -> str:
    """The text of a file, or of stdin for `-`. Raises UsageError where it is not UTF-8."""
    if path == "-" and sys.stdin is None:
        raise UsageError("stdin is closed; give the text in a file")
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{'stdin' if path == '-' else path} is not UTF-8 text (byte {error.start}); convert it"
        ) from None


def quality_line(quality: Mapping[str, Any]) -> str:
    """What rounding cost, as `convert --report-text` found it."""
    return (
        f"perplexity {quality['perplexity']:.4f}, source {quality['perplexity_source']:.4f} "
        f"({quality['perplexity_increase']:+.2%} +- {quality['perplexity_increase_stderr']:.2%}); "
        f"KL {quality['kl_mean']:.5f} a token, 99% below {quality['kl_p99']:.4f}; the same first choice for "
        f"{quality['top1_agreement']:.1%}; {quality['tokens_scored']} tokens"
    )


def timings_line(generation: Generation) -> str:
    """Speed of one answer, for people."""
    timings = generation.timings
    cached = f" (+{timings.cached_tokens} cached)" if timings.cached_tokens else ""
    return (
        f"[prompt {timings.prompt_tokens} tokens{cached}, {timings.prompt_tokens_per_s:.0f}/s; "
        f"answer {len(generation.tokens)} tokens, {timings.decode_tokens_per_s:.1f}/s; "
        f"first token after {timings.first_token_seconds:.2f} s]"
    )
