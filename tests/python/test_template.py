"""Chat templates: real ones render as their checkpoints mean it, hostile ones end in an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from sparse_run.errors import ModelError, UsageError
from sparse_run.template import CHATML, PLAIN, ChatTemplate
from sparse_run.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]

# Written after the published formats of these families.
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


def rendered(source: str, messages: Any = TALK, **options: Any) -> str:
    return ChatTemplate(source, variables={"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **options)


@pytest.fixture(scope="module")
def utilities(need: Callable[[str], NoReturn]) -> Any:
    """The module of transformers that renders templates."""
    try:
        from transformers.utils import chat_template_utils
    except ImportError as error:
        need(f"the renderer of transformers is not there ({error}): pip install transformers")
    return chat_template_utils


def test_chatml_and_llama3_render_as_published() -> None:
    assert rendered(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(LLAMA3, TALK[:2]) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert rendered(CHATML, TALK[:2], add_generation_prompt=False).endswith("Hi<|im_end|>\n")


def test_smollm2_template_of_the_file_adds_its_own_system_prompt(smollm2_packed: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_packed)
    template = ChatTemplate.for_tokenizer(tokenizer)
    assert template.source == tokenizer.chat_template
    text = template.render([{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert "SmolLM" not in template.render(TALK)


def test_the_same_as_transformers(smollm2_packed: Path, utilities: Any) -> None:
    smollm2 = Tokenizer.load(smollm2_packed).chat_template or ""
    with_tools = (
        "{%- for tool in tools %}\n    {{- tool | tojson(indent=2) }}\n{%- endfor %}\n"
        "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {% generation %}\n{{ m.content }}\n  {% endgeneration %}\n{% endfor %}\n{{ strftime_now('%Y') }}\n"
    )
    for source in (smollm2, CHATML, LLAMA3, PLAIN, with_tools):
        tools = [{"name": "look", "note": "<b>'é'</b>"}]
        texts, _ = utilities.render_jinja_template(
            [TALK], chat_template=source, add_generation_prompt=True, tools=tools, bos_token="<s>", eos_token="</s>"
        )
        assert rendered(source, tools=tools) == texts[0]


def test_tools_their_calls_and_their_answers_reach_the_template(utilities: Any) -> None:
    source = (
        "{{ tools | tojson }}\n{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
        "{% if m.role == 'tool' %} of {{ m.tool_call_id }}{% endif %}\n{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "é"]}}}
    talk = [
        TALK[0],
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    texts, _ = utilities.render_jinja_template(
        [[{**message, "content": message["content"] or ""} for message in talk]], chat_template=source, tools=tools
    )
    assert rendered(source, talk, tools=tools) == texts[0]
    assert "<tool>3 of 1" in texts[0] and 'add({"a": 1' in texts[0]


def test_a_template_without_system_role_gets_it_in_front_of_the_first_message() -> None:
    text = rendered(GEMMA)
    assert text.startswith("<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello.")


def test_a_refused_conversation_says_what_the_template_said() -> None:
    with pytest.raises(UsageError, match="Roles must alternate"):
        rendered(GEMMA, [TALK[1], TALK[3]])


def test_without_a_template_chatml_where_the_vocabulary_has_it_else_plain(
    smollm2_packed: Path, stories_packed: Path, tmp_path: Path
) -> None:
    for file in smollm2_packed.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(re.sub(r',\s*"chat_template":.*', "\n}", config.read_text(), flags=re.DOTALL))
    assert ChatTemplate.for_tokenizer(Tokenizer.load(tmp_path)).source == CHATML
    plain = ChatTemplate.for_tokenizer(Tokenizer.load(stories_packed))
    assert plain.source == PLAIN and "\nUser:" in plain.stop
    assert plain.render(TALK) == "Be brief.\n\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:"


def test_an_override_wins_over_the_checkpoint(smollm2_packed: Path) -> None:
    tokenizer = Tokenizer.load(smollm2_packed)
    assert ChatTemplate.for_tokenizer(tokenizer, override="plain").source == PLAIN
    assert ChatTemplate.for_tokenizer(tokenizer, override="{{ eos_token }}").render(TALK) == "<|im_end|>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set _ = messages.append('x') %}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ 'x' * 1000000000 }}",
        "{{ 9 ** 99999999 }}",
        "{{ 1 / 0 }}",
        "{{ undefined_name.attribute }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError) as caught:
        rendered(source)
    assert "chat template" in str(caught.value) and "--chat-template" in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hello"],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_a_malformed_message_is_a_usage_error(messages: Any) -> None:
    with pytest.raises(UsageError):
        rendered(CHATML, messages)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\nab<|im_end|>" in rendered(CHATML, [{"role": "user", "content": parts}])


def test_rendering_does_not_change_the_messages() -> None:
    before = [dict(message) for message in TALK]
    rendered(GEMMA)
    assert before == TALK
