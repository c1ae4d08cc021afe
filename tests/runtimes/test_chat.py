# ruff: noqa: E501 (templates)
"""The sandbox; what templates render is compared in tests/models/test_chat_files.py."""

from __future__ import annotations

import datetime
import threading
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from himix_edge.contract import Chat, ImagePlace
from himix_edge.errors import BundleError, PromptError
from himix_edge.runtimes import chat
from himix_edge.runtimes.chat import ChatTemplate, Message, assistant_message, user_message

QUESTION = "{{ messages[-1].content }}"
CONVERSATION: list[Message] = [
    {"role": "system", "content": "Be <brief> & kind."},
    user_message(" What's it?\n"),
    assistant_message("A 'dog'"),
    user_message("Où?"),
]


ROLES = "{% for m in messages %}{{ m.role }}"
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content }}]\n{% endif %}{% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=2) }}",
    ROLES + "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    ROLES + "{% if loop.first %}{% continue %}{% endif %}{{ loop.last }}{% endfor %}",
    ROLES + "{{ loop.length }}{{ loop.revindex }}{{ loop.nextitem }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{% else %}none{% endfor %}",
    "{% for m in nothing %}{{ m }}{% else %}none{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% generation %}{% set x = 'in' %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
    "{%- macro turn(m) -%}{{ m.role ~ ':' ~ m.content }}{%- endmacro -%}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k * 2 }}={{ v + '!' }}{% endfor %}",
    "{{ dict(a=1) }}{{ range(3) | list }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ '%s-%d' % ('a', 2) }}",
    "{{ messages | map(attribute='content') | join('|') }}{{ bos_token }}{{ pad_token }}",
    "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ bos_token is defined }}",
    "{{ messages[0].content.strip().split('s')[0] | upper | trim }}{{ messages[1:] | length }}",
    "{{ raise_exception('three') if messages | length == 3 and messages[0].role == 'system' }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_it_renders_as_transformers_does(template: str) -> None:
    template += QUESTION
    tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(template, Chat(tokens))
    conversations: Any = (CONVERSATION[1:2], CONVERSATION, CONVERSATION[1:])
    for messages in conversations:
        try:
            rendered: Any = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=True, **tokens
            )
        except Exception as error:  # noqa: BLE001, PERF203 (whatever it raises)
            with pytest.raises(PromptError, match=type(error).__name__):
                ours.render(messages)
        else:
            assert [ours.render(messages)] == rendered[0]


def test_a_date_is_that_of_the_rendering() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}" + QUESTION, Chat())
    before, after = (datetime.datetime.now().strftime("%d %b %Y") for _ in range(2))
    assert template.render([user_message("x")]) in (f"{before}x", f"{after}x")


def test_another_date() -> None:
    source = "{% macro day() %}{{ strftime_now('%d.%m.%Y') }}{% endmacro %}{{ day() }}" + QUESTION
    template, day = ChatTemplate(source, Chat()), datetime.datetime(2001, 2, 3)
    assert template.render([user_message("x")], day) == "03.02.2001x"
    assert template.render([user_message("x")]) != "03.02.2001x"


def test_typed_contents_have_the_image_in_the_first_question() -> None:
    place = ImagePlace("<image>", 5, ())
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
        "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %};{% endfor %}",
        Chat(image=place),
    )
    assert template.render(CONVERSATION) == (
        "system:Be <brief> & kind.;user:<image> What's it?\n;assistant:A 'dog';user:Où?;"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace(_x=1) %}", "SecurityError: a namespace can't hold '_x'"),
        ("{{ raise_exception('only with tools') }}", "TemplateError: only with tools"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ bos_token + 'x' }}", "UndefinedError"),
        ("{{ 2 ** 9999999 }}", "LimitError: it computes a value of more than 1,000,000"),
        ("{{ 'x' * 10000000 }}", "LimitError: it computes"),
        ("{{ 10000000 * 'x' }}", "LimitError: it computes"),
        ("{% set ns = namespace(x='xx') %}{% for i in range(99) %}"
         "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "LimitError: it makes"),
        ("{% set ns = namespace(x='xx') %}{% for i in range(99) %}"
         "{% set ns.x = ns.x + ns.x %}{% endfor %}", "LimitError: it makes"),
        ("{{ '%9999999d' % 1 }}", "LimitError: it computes a value of more than 1,000"),
        ("{{ 'x'.ljust(9999999) }}", "LimitError: it makes a value"),
        ("{% for i in range(99999) %}" + "x" * 999 + "{% endfor %}", "LimitError: it makes a prompt"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].content.encode('utf-16').decode('ascii') }}", "UnicodeDecodeError"),
        ("hello", "leaves out the question"),
    ],
)  # fmt: skip
def test_a_template_that_is_refused(template: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as error:
        ChatTemplate(template, Chat())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
        "{% for i in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 90 }}{% endfor %}",
        "{{ lipsum(9000) | length }}",
    ],
)
def test_a_template_without_an_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(BundleError, match="it does not end within"):
        ChatTemplate(template + QUESTION, Chat())
    assert time.monotonic() - began < 60  # it ends; the product of its loops would take hours


def test_a_long_question_is_no_fault_of_the_template() -> None:
    words = "x" * 2 * chat.LARGEST
    assert ChatTemplate(QUESTION * 2, Chat()).render([user_message(words)]) == words * 2


def test_messages_that_the_template_refuses() -> None:
    template = ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + QUESTION,
        Chat(),
    )
    assert template.render(CONVERSATION[1:]) == "Où?"
    with pytest.raises(PromptError, match=r"refuses this conversation.*TemplateError: no system"):
        template.render(CONVERSATION)


def test_threads_have_a_clock_each() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}", Chat())
    found: list[bool] = []

    def render(name: str) -> None:
        messages = [user_message(f"{name}-{i}") for i in range(20)]
        expected = "".join(f"{name}-{i};" for i in range(20))
        found.extend(template.render(messages) == expected for _ in range(200))

    threads = [threading.Thread(target=render, args=(f"thread{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 800
