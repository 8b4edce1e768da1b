"""The terminal side of a conversation: reading messages, commands, printing answers, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..chat_state import Conversation
from ..errors import Error
from ..memory import stats_text
from .common import Waiting, colour, timings_line

if TYPE_CHECKING:
    from ..generation import Generation

HELP = """\
/help, /?            this list
/system [TEXT]       show or set the system prompt
/set NAME VALUE      change a setting: temp, top-k, top-p, min-p, repeat-penalty, repeat-last-n, seed, max-tokens, verbose
/show                model, settings and context in use
/clear               forget the conversation
/undo                forget the last exchange
/retry               answer the last message again
/save FILE           write the conversation to a file
/load FILE           go on with a saved conversation
/stats               speed of the last answer; what reading weights cost
/exit, /bye, /quit   leave

\"\"\" begins and ends a message of several lines; a \\ at the end of a line goes on in the next one.
Ctrl-C stops an answer, twice leaves. Ctrl-D leaves."""

_HISTORY_LENGTH = 1000


class Leave(Exception):
    """The user wants to go."""


class ChatLoop:
    """Talks: `talk` in a terminal, `lines` with piped lines, `one` with a single message. Each returns the exit code."""

    def __init__(self, conversation: Conversation, *, interactive: bool, quiet: bool, verbose: bool) -> None:
        self._conversation = conversation
        self._interactive = interactive
        self._quiet = quiet
        self._verbose = verbose
        self._last: Generation | None = None
        self._running: Generation | None = None
        self._stopped = False  # Ctrl-C was pressed during this answer
        self._hint_given = False  # Ctrl-C was pressed just now: once more leaves

    def talk(self, opening: str = "") -> int:
        """Reads messages from the terminal until the user leaves."""
        model = self._conversation.model
        self._note(f"{model.name}, {model.threads} threads, {model.isa}. /help lists the commands, Ctrl-D leaves.")
        message: str | None = opening
        with _history(self._quiet):
            while True:
                try:
                    if message is None:
                        message = self._read_message()
                        self._hint_given = False
                    text, message = message, None
                    self._respond(text)
                except KeyboardInterrupt:
                    sys.stderr.write("\n")
                    if self._hint_given:
                        return 130
                    self._hint_given = True
                    self._note("Ctrl-C again or Ctrl-D leaves.")
                except EOFError:
                    if not self._quiet:
                        sys.stderr.write("\n")
                    return 0
                except Leave:
                    return 0

    def lines(self, source: Iterable[str]) -> int:
        """Each line (or block between triple quotes) is a message; the first failure ends it."""
        lines = _undecodable_is_an_error(iter(source))

        def read(_prompt: str) -> str:
            line = next(lines, None)
            if line is None:
                raise EOFError
            return line.removesuffix("\n").removesuffix("\r")

        try:
            while True:
                self._respond(_message(read))
        except (EOFError, Leave):
            return 0

    def one(self, text: str) -> int:
        """Answers one message, whatever it begins with."""
        with self._ctrl_c_stops_the_answer():
            self._answer(*self._conversation.ask(text))
        return 0

    def _respond(self, message: str) -> None:
        if not message.strip():
            return
        try:
            with self._ctrl_c_stops_the_answer():
                if message.startswith("/") and "\n" not in message:
                    self._command(message)
                else:
                    self._answer(*self._conversation.ask(message))
        except Error as error:
            if not self._interactive:
                raise
            self._say(f"error: {error}")
        except OSError as error:
            if not self._interactive or isinstance(error, BrokenPipeError):
                raise
            self._say(f"error: {error.filename or ''}: {error.strerror or error}")

    @contextlib.contextmanager
    def _ctrl_c_stops_the_answer(self) -> Iterator[None]:
        """From a message to the end of its answer Ctrl-C cancels instead of raising, at whatever moment it comes."""
        self._stopped = False

        def stop(_signal: int, _frame: object) -> None:
            self._stopped = True
            if self._running is not None:
                self._running.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self._stopped:
            if not self._interactive:
                raise KeyboardInterrupt
            self._hint_given = True
            self._note("(stopped)")

    def _answer(self, generation: Generation, forgotten: int) -> None:
        conversation = self._conversation
        if forgotten:
            self._note(
                f"(the context of {conversation.session.n_ctx} tokens is full: "
                f"the oldest {forgotten} messages are forgotten)"
            )
        self._running = generation
        if self._stopped:
            generation.cancel()
        try:
            with Waiting(conversation.model, quiet=self._quiet) as waiting:
                for piece in generation:
                    waiting.write(piece)
        finally:
            self._running = None
            generation.close()
            conversation.answered(generation)
        if self._interactive or not generation.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
        self._last = generation
        if generation.context_full:
            self._note(
                f"(the context of {conversation.session.n_ctx} tokens is full, the answer is cut short; /clear forgets the "
                f"conversation, -c N at the start gives more room)"
            )
        if self._verbose:
            self._note(timings_line(generation))
            memory = conversation.model.stats().get("memory")
            if memory:
                self._note(stats_text(memory))

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        action = {
            "help": self._help,
            "?": self._help,
            "system": self._system,
            "set": self._set,
            "show": self._show,
            "clear": self._clear,
            "undo": self._undo,
            "retry": self._retry,
            "save": self._save,
            "load": self._load,
            "stats": self._stats,
            "exit": self._leave,
            "bye": self._leave,
            "quit": self._leave,
        }.get(name.strip().lower())
        if action is None:
            self._say(f"no command /{name}; /help lists them")
        else:
            action(rest)

    def _help(self, _rest: str) -> None:
        self._say(HELP)

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
            self._note("system prompt set")
        else:
            self._say(self._conversation.system or "no system prompt; /system TEXT sets one")

    def _set(self, rest: str) -> None:
        name, _, value = rest.removeprefix("parameter ").lstrip().partition(" ")  # /set parameter, as ollama has it
        value = value.strip()
        if not name:
            self._show("")
        elif name.lower() == "verbose":
            self._verbose = value.lower() not in ("off", "0", "no", "false")
        elif name.lower() == "system":
            self._system(value)
        else:
            self._conversation.set(name, value)

    def _show(self, _rest: str) -> None:
        conversation, model = self._conversation, self._conversation.model
        used = len(model.chat_ids(conversation.messages)) if conversation.turns else 0
        self._say(
            f"model     {model.name} ({model.path})\n"
            f"computes  {model.threads} threads, {model.isa}, {model.weight_bytes / 1e6:.0f} MB of weights\n"
            f"context   {used} of {conversation.session.n_ctx} tokens, {len(conversation.turns)} messages\n"
            f"system    {conversation.system or '(none)'}\n"
            f"settings  {', '.join(f'{name} {value:g}' for name, value in conversation.settings().items())}"
        )

    def _clear(self, _rest: str) -> None:
        self._conversation.clear()
        self._note("conversation forgotten")

    def _undo(self, _rest: str) -> None:
        self._say("last exchange forgotten" if self._conversation.undo() else "there is nothing to undo")

    def _retry(self, _rest: str) -> None:
        self._answer(*self._conversation.retry())

    def _save(self, path: str) -> None:
        if not path:
            self._say("/save needs a file name")
            return
        self._conversation.save(path)
        self._note(f"saved to {path}")

    def _load(self, path: str) -> None:
        if not path:
            self._say("/load needs a file name")
            return
        self._conversation.load(path)
        self._note(f"loaded {len(self._conversation.turns)} messages from {path}")

    def _stats(self, _rest: str) -> None:
        memory = self._conversation.model.stats().get("memory")
        self._say("no answer yet" if self._last is None else timings_line(self._last))
        if memory:
            self._say(stats_text(memory))

    def _leave(self, _rest: str) -> None:
        raise Leave

    def _read_message(self) -> str:
        if sys.stdout.isatty():
            bold = ("\001\x1b[1m\002", "\001\x1b[0m\002") if colour(sys.stdout) else ("", "")
            return _message(lambda prompt: input(bold[0] + prompt + bold[1]))

        def read(prompt: str) -> str:  # stdout is a file: nothing but answers may go there
            sys.stderr.write(prompt)
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")

        return _message(read)

    def _note(self, text: str) -> None:
        """For people only: nothing when quiet."""
        if not self._quiet:
            self._say(text)

    def _say(self, text: str) -> None:
        dim = ("\x1b[2m", "\x1b[0m") if colour(sys.stderr) else ("", "")
        sys.stderr.write(f"{dim[0]}{text}{dim[1]}\n")
        sys.stderr.flush()


def _message(read: Callable[[str], str]) -> str:
    """One message: a line; lines joined by a trailing backslash; or all between triple quotes. The end of the input ends
    a message that was begun; with none begun it raises EOFError."""
    line = read(">>> ")
    if line.lstrip().startswith('"""'):
        lines = [line.lstrip()[3:]]
        with contextlib.suppress(EOFError):
            while not lines[-1].rstrip().endswith('"""'):
                lines.append(read("... "))
            lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip("\n")
    lines = []
    with contextlib.suppress(EOFError):
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = ""
            line = read("... ")
    return "\n".join([*lines, line])


def _undecodable_is_an_error(lines: Iterator[str]) -> Iterator[str]:
    from ..errors import UsageError

    while True:
        try:
            yield next(lines)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise UsageError("stdin is not UTF-8 text; convert it") from None


def _history_file() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local/state") / "sparse-run" / "history"


@contextlib.contextmanager
def _history(quiet: bool) -> Iterator[None]:
    """Line editing, and a history that is kept between runs; both are left out where they cannot be had."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = _history_file()
    readline.set_history_length(_HISTORY_LENGTH)
    names = [word for line in HELP.splitlines() for word in line.replace(",", " ").split()[:3] if word.startswith("/")]

    def complete(text: str, state: int) -> str | None:
        matches = [name for name in names if text.startswith("/") and name.startswith(text)]
        return matches[state] if state < len(matches) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(file)
        except OSError as error:
            if not quiet:
                sys.stderr.write(f"the history could not be kept: {file}: {error.strerror or error}\n")
