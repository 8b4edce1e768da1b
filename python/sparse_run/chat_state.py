"""A conversation: its messages and settings, fitting it into the context, saving and loading it. No terminal here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ContextLengthError, Error, UsageError
from .generation import Generation
from .sampling import Sampling

if TYPE_CHECKING:
    from .model import Message, Model
    from .session import Session

_SCHEMA = 1
_ROLES = ("system", "user", "assistant")
# Room that is kept for an answer before turns are forgotten: this many tokens, or a quarter of a small context.
_ANSWER_ROOM = 256


class Conversation:
    """Messages so far, and the session that has read them.

    >>> conversation = Conversation(model, session, Sampling(temperature=0))  # doctest: +SKIP
    >>> generation, forgotten = conversation.ask("Hello")  # doctest: +SKIP
    >>> generation.read(); conversation.answered(generation)  # doctest: +SKIP
    """

    def __init__(
        self, model: Model, session: Session, sampling: Sampling, *, max_tokens: int = -1, system: str | None = None
    ) -> None:
        self.model = model
        self.session = session
        self.sampling = sampling
        self.max_tokens = max_tokens  # -1: up to the end of the context
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The turns, the system prompt in front."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def ask(self, text: str) -> tuple[Generation, int]:
        """Adds a user message and begins the answer; also says how many of the oldest messages were forgotten for it.
        Where that fails, the conversation is as before."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            return self.answer()
        except Error:
            self.turns = before
            raise

    def answer(self) -> tuple[Generation, int]:
        """Begins the answer to the last message, which is the user's. Raises ContextLengthError where that message alone
        does not fit."""
        before, forgotten = list(self.turns), 0
        room = min(_ANSWER_ROOM, self.session.n_ctx // 4)
        if self.max_tokens >= 0:
            room = min(room, self.max_tokens)
        ids = self.model.chat_ids(self.messages)
        while len(ids) + room > self.session.n_ctx:
            # The oldest exchange goes, so that the rest begins with a user's message again.
            cut = next((i for i, turn in enumerate(self.turns[1:], 1) if turn["role"] == "user"), None)
            if cut is None:
                break
            del self.turns[:cut]
            forgotten += cut
            ids = self.model.chat_ids(self.messages)
        if len(ids) >= self.session.n_ctx:
            self.turns = before
            raise ContextLengthError(
                f"the message does not fit: with it the prompt has {len(ids)} tokens and the context holds "
                f"{self.session.n_ctx}; shorten it, or start with a larger -c (the model allows {self.model.n_ctx_train})"
            )
        limit = None if self.max_tokens < 0 else self.max_tokens
        return self.session.answer(ids, self.sampling, max_tokens=limit), forgotten

    def answered(self, generation: Generation) -> None:
        """Takes the answer, also one that was stopped, into the conversation; one that was stopped before its first word
        takes its question with it."""
        if generation.text or generation.finish_reason != "cancelled":
            self.turns.append({"role": "assistant", "content": generation.text})
        else:
            self.undo()

    def undo(self) -> bool:
        """Forgets the last exchange; false where there is none."""
        last = next((i for i in range(len(self.turns) - 1, -1, -1) if self.turns[i]["role"] == "user"), None)
        if last is None:
            return False
        del self.turns[last:]
        return True

    def retry(self) -> tuple[Generation, int]:
        """Answers the last user message again."""
        last = next((i for i in range(len(self.turns) - 1, -1, -1) if self.turns[i]["role"] == "user"), None)
        if last is None:
            raise UsageError("there is no message to answer again")
        del self.turns[last + 1 :]
        return self.answer()

    def clear(self) -> None:
        """Forgets all turns; the system prompt stays."""
        self.turns = []

    def settings(self) -> dict[str, float]:
        """The values that `set` changes, by name."""
        names = {"temperature": "temp"}
        values = {names.get(name, name).replace("_", "-"): value for name, value in asdict(self.sampling).items()}
        return {**values, "max-tokens": self.max_tokens}

    def set(self, name: str, text: str) -> None:
        """Changes a setting by the name of its flag; raises UsageError for an unknown name or an impossible value."""
        key = name.lower().replace("_", "-").lstrip("-")
        settings = self.settings()
        alike = {"temperature": "temp", "n-predict": "max-tokens", "num-predict": "max-tokens", "n": "max-tokens"}
        key = alike.get(key, key)
        if key in ("num-ctx", "ctx-size", "c"):
            raise UsageError("the context's size is fixed when the chat begins: leave, and start it with -c N")
        if key not in settings:
            raise UsageError(f"no setting {name!r}; there are {', '.join(settings)}, system and verbose")
        if not text:
            raise UsageError(f"{name} needs a value; it is {settings[key]:g}")
        field = {"temp": "temperature"}.get(key, key.replace("-", "_"))
        whole = isinstance(getattr(Sampling, field, -1), int)
        try:
            value: float = int(text) if whole else float(text)
        except ValueError:
            raise UsageError(f"{name} is a {'whole ' if whole else ''}number, not {text!r}") from None
        if key == "max-tokens":
            if value < -1:
                raise UsageError("max-tokens is -1 (no limit) or more")
            self.max_tokens = int(value)
            return
        self.sampling = replace(self.sampling, **{field: value})  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Writes the conversation as JSON: {"schema", "model", "system", "messages", "settings"}. The file is whole or not
        there at all."""
        target = Path(path).expanduser()
        value = {
            "schema": _SCHEMA,
            "model": self.model.name,
            "system": self.system,
            "messages": self.turns,
            "settings": {**asdict(self.sampling), "max_tokens": self.max_tokens},
        }
        write_atomically(target, json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    def load(self, path: str | Path) -> None:
        """Reads what `save` wrote. Raises UsageError, and changes nothing, where the file is something else."""
        source = Path(path).expanduser()
        try:
            value = json.loads(source.read_bytes())
        except OSError as error:
            raise UsageError(f"{source}: {error.strerror or error}; check the path") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{source} is not a saved conversation (it is not JSON)") from None
        system, turns, sampling, max_tokens = _checked(value, str(source))
        self.system, self.turns, self.sampling, self.max_tokens = system, turns, sampling, max_tokens


def _checked(value: Any, name: str) -> tuple[str | None, list[Message], Sampling, int]:
    def need(holds: bool, problem: str) -> None:
        if not holds:
            raise UsageError(f"{name} is not a saved conversation ({problem})")

    need(isinstance(value, dict) and isinstance(value.get("messages"), list), "it has no list of messages")
    need(value.get("schema") == _SCHEMA, f"its schema is {value.get('schema')!r}, this version reads {_SCHEMA}")
    system = value.get("system")
    need(system is None or isinstance(system, str), "its system prompt is no text")
    turns: list[Message] = []
    for i, message in enumerate(value["messages"], 1):
        need(isinstance(message, dict), f"message {i} is no object")
        role, content = message.get("role"), message.get("content")
        need(role in _ROLES and isinstance(content, str), f"message {i} has no role and content")
        turns.append({"role": role, "content": content})
    settings = value.get("settings", {})
    need(isinstance(settings, dict), "its settings are no object")
    known = {field.name: type(field.default) for field in fields(Sampling)}
    for key, number in settings.items():
        whole = known.get(key, int) is int
        sound = isinstance(number, int) if whole else isinstance(number, (int, float))
        need(sound and not isinstance(number, bool), f"its setting {key} is no {'whole ' if whole else ''}number")
    max_tokens = settings.get("max_tokens", -1)
    need(max_tokens >= -1, "its setting max_tokens is out of range")
    return system, turns, Sampling(**{key: settings[key] for key in known if key in settings}), max_tokens


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by a new one that is complete; after a failure the old one is untouched."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        _quietly(lambda: os.unlink(name))
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError:
        pass
