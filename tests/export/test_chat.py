"""Chat templates of the wild, taken apart and put together again."""

from __future__ import annotations

import datetime

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from himix_edge.contract import Chat, Turn
from himix_edge.errors import ExportError
from himix_edge.export.chat import chat_from_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the manner of Qwen2.5's, which has a branch for tools, and looks ahead for a system message.
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- raise_exception("no tools here") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# TinyLlama's (zephyr), with the line breaks that trim_blocks and lstrip_blocks are there for.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The beginning of Llama 3.2's, which writes a date and looks at tools.
LLAMA32 = (
    """{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
"""
    + """{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {{- raise_exception("no tools here") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
)
VICUNA = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if loop.first %}{{ bos_token + 'A chat between a curious user and an artificial "
    "intelligence assistant. ' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


CHATML_CUE = "<|im_end|>\n<|im_start|>assistant\n"
CHATML_USER = "<|im_start|>user\n"
QWEN2_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LLAMA_CUE = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
VICUNA_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "


@pytest.mark.parametrize(
    ("template", "first", "later"),
    [
        pytest.param(
            CHATML,
            Turn(CHATML_USER, CHATML_CUE),
            Turn("<|im_end|>\n" + CHATML_USER, CHATML_CUE),
            id="chatml",
        ),
        pytest.param(
            QWEN2,
            Turn(QWEN2_SYSTEM + CHATML_USER, CHATML_CUE),
            Turn("<|im_end|>\n" + CHATML_USER, CHATML_CUE),
            id="qwen2",
        ),
        pytest.param(
            QWEN25,
            Turn(QWEN2_SYSTEM + CHATML_USER, CHATML_CUE),
            Turn("<|im_end|>\n" + CHATML_USER, CHATML_CUE),
            id="qwen2.5",
        ),
        pytest.param(
            ZEPHYR,
            Turn("<|user|>\n", "</s>\n<|assistant|>\n"),
            Turn("</s>\n<|user|>\n", "</s>\n<|assistant|>\n"),
            id="tinyllama",
        ),
        pytest.param(
            LLAMA3,
            Turn("<s>" + LLAMA_USER, LLAMA_CUE),
            Turn("<|eot_id|>" + LLAMA_USER, LLAMA_CUE),
            id="llama-3",
        ),
        pytest.param(
            VICUNA,
            Turn("<s>" + VICUNA_SYSTEM + "USER: ", " ASSISTANT:"),
            Turn("</s>USER: ", " ASSISTANT:"),
            id="vicuna",
        ),
    ],
)
def test_pieces(template: str, first: Turn, later: Turn) -> None:
    chat = chat_from_template(template, bos_token="<s>", eos_token="</s>")
    assert chat == Chat(first, later)


def test_four_turns_are_what_the_template_renders() -> None:
    words = ["one", "1", "two", "2", "three", "3", "four"]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(words)
    ]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(QWEN2).render(messages=messages, add_generation_prompt=True)

    chat = chat_from_template(QWEN2)
    pieces = chat.first.before + "one" + chat.first.after
    for answer, question in (("1", "two"), ("2", "three"), ("3", "four")):
        pieces += answer + chat.next.before + question + chat.next.after
    assert pieces == rendered


def test_a_date_is_that_of_the_export() -> None:
    chat = chat_from_template(LLAMA32, bos_token="<s>")
    head, _, rest = chat.first.before.partition("Today Date: ")
    date, _, tail = rest.partition("\n\n")
    assert head == "<s><|start_header_id|>system<|end_header_id|>\n\n"
    assert abs(datetime.datetime.strptime(date, "%d %b %Y") - datetime.datetime.now()).days <= 1
    assert tail == "<|eot_id|>" + LLAMA_USER
    assert chat.next == Turn("<|eot_id|>" + LLAMA_USER, LLAMA_CUE)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("hello", id="no messages"),
        pytest.param("{{ messages[0].content }}{{ messages[0].content }}", id="words twice"),
        pytest.param("{{ messages[-1].content }}", id="only the last"),
        pytest.param(
            "{% if messages | length > 1 %}again {% endif %}"
            "{% for m in messages %}|{{ m.content }}{% endfor %}",
            id="history changes the beginning",
        ),
        pytest.param(
            "{% for m in messages %}{% if loop.last %}tools{% endif %}|{{ m.content }}{% endfor %}",
            id="system prompt before the last question",
        ),
        pytest.param(
            "{% for m in messages %}|{{ m.content | upper }}{% endfor %}", id="words change"
        ),
        pytest.param(
            "{% for m in messages %}|{{ m.content.split('\n')[0] }}{% endfor %}",
            id="words get lost",
        ),
        pytest.param(
            "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", id="counts"
        ),
    ],
)
def test_templates_that_are_no_pieces(template: str) -> None:
    with pytest.raises(ExportError, match="more than fixed text around the messages"):
        chat_from_template(template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only with a system prompt') }}", "only with a system prompt"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ nothing.at_all }}", "UndefinedError"),
    ],
)
def test_templates_that_fail(template: str, reason: str) -> None:
    with pytest.raises(ExportError, match=f"can't be rendered.*{reason}"):
        chat_from_template(template)
