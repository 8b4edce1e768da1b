"""Conversations to text: the checkpoint's own chat template, Jinja run in an immutable sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .errors import Error, ModelError, UsageError

if TYPE_CHECKING:
    import jinja2

    from .tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For models that were never taught a conversation format: a transcript, which they continue.
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Formats of families whose base models have the tokens but no template.
_SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}" + _SYSTEM_FIRST + "{% for message in turns %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GRANITE = (
    "{% for message in messages %}"
    "{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + _SYSTEM_FIRST + "{% for message in turns %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ '[INST] ' + (system if loop.first else '') + message['content'] + '[/INST]' }}{% endif %}"
    "{% endfor %}"
)
BUILT_IN = {
    "chatml": CHATML,
    "gemma": GEMMA,
    "granite": GRANITE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "phi3": PHI3,
    "plain": PLAIN,
}
# Which format a vocabulary is made for: the first whose tokens it has.
_MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
}

_LARGEST = 1 << 24  # characters or elements that one operator of a template may make


class _Refused(Exception):
    """The template called raise_exception: it does not want this conversation."""


class ChatTemplate:
    """A chat template, ready to render.

    >>> template = ChatTemplate(CHATML)
    >>> template.render([{"role": "user", "content": "Hi"}])
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, str] | None = None,
        stop: Iterable[str] = (),
        name: str = "the model",
    ) -> None:
        """`variables` are given to the template (`bos_token` ...). `stop` are texts that end an answer, for formats without
        a token that does. Raises ModelError, naming `name`, where the source is no Jinja."""
        import jinja2

        self.source = source
        self.stop = tuple(stop)
        self._variables = dict(variables or {})
        self._name = name
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {name} is not valid (line {error.lineno}: {error.message}); "
                f"give another one with --chat-template"
            ) from None
        except RecursionError:
            raise ModelError(
                f"the chat template of {name} is nested too deeply; give another one with --chat-template"
            ) from None

    @classmethod
    def for_tokenizer(
        cls, tokenizer: Tokenizer, *, override: str | None = None, name: str = "the model"
    ) -> ChatTemplate:
        """The template to use with a tokenizer: `override` (Jinja text, or a name of BUILT_IN), else the checkpoint's own,
        else that of the family whose tokens the vocabulary has, else a plain transcript."""
        source = override or tokenizer.chat_template
        if source is None:
            fits = (name for name, marks in _MARKS.items() if all(tokenizer.find(m) is not None for m in marks))
            source = next(fits, "plain")
        variables = {
            "bos_token": tokenizer.token_text(tokenizer.bos_id),
            "eos_token": tokenizer.token_text(next(iter(tokenizer.eos_ids), None)),
        }
        stop = ("\nUser:", "\nuser:") if source in ("plain", PLAIN) else ()
        return cls(BUILT_IN.get(source, source), variables=variables, stop=stop, name=name)

    def render(
        self, messages: Iterable[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation, up to where the model answers. `messages`: {"role", "content"} each.

        Raises UsageError where a message is malformed or the template refuses the conversation, ModelError where the
        template fails. A template that knows no system role gets the system text in front of the first user message."""
        checked = [_checked(message) for message in messages]
        if not checked:
            raise UsageError("the conversation is empty; give at least one message")
        try:
            return self._render(checked, add_generation_prompt, variables)
        except _Refused as refusal:
            merged = _without_system(checked)
            if merged is not None:
                try:
                    return self._render(merged, add_generation_prompt, variables)
                except _Refused:
                    pass
            raise UsageError(f"the chat template of {self._name} refuses this conversation: {refusal}") from None

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        values = {
            "tools": None,
            "documents": None,
            **self._variables,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except (_Refused, Error):
            raise
        except RecursionError:
            problem = "endless recursion"
        except Exception as error:  # noqa: BLE001 - template code can raise anything
            problem = f"{type(error).__name__}: {error}"
        raise ModelError(f"the chat template of {self._name} failed ({problem}); give another one with --chat-template")


def _checked(message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"a message is a mapping with role and content, not {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UsageError("a message has no role; give it 'system', 'user' or 'assistant'")
    if content is None and message.get("tool_calls"):  # an answer that only calls tools
        content = ""
    if isinstance(content, (list, tuple)):  # OpenAI's parts
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise UsageError("a message holds parts that are not text; only text is supported")
        content = "".join(str(text) for text in texts)
    if not isinstance(content, str):
        raise UsageError(f"the content of a message is a text, not {type(content).__name__}")
    return {**message, "role": role, "content": content}


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    merged = {**messages[1], "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    return [merged, *messages[2:]]


def _environment() -> jinja2.Environment:
    """As `transformers` sets it up, so that templates written for it give the same text."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's part for training; here just its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Also refuses to build gigantic values; a template is untrusted input."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
            plain = all(isinstance(value, (int, float)) for value in (left, right))
            if operator == "**" and max(sizes) > 64 or operator == "*" and not plain and sizes[0] * sizes[1] > _LARGEST:
                raise ValueError("a value is too large")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: Any) -> None:
        raise _Refused(str(message))

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
