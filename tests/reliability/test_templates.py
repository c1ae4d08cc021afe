"""A chat template is a program from a stranger: what it may make has a limit before it is made."""

from __future__ import annotations

import tracemalloc

import pytest

from himix_edge.contract import Chat
from himix_edge.errors import BundleError
from himix_edge.runtimes.chat import ChatTemplate
from tests.reliability.table import tried

QUESTION = "{{ messages[-1].content }}"
DOUBLED = (
    "{% set ns = namespace(x='y') %}"
    "{% for i in range(60) %}{% set ns.x = OP %}{% endfor %}{{ ns.x }}"
)
LOOP = "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}"
GREEDY = [
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 1000000000) }}",
    "{{ '{0:>{w}}'.format_map({'0': 1, 'w': 1000000000}) }}",
    "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "{{ ('%(a)s' * 9999) % {'a': 'x' * 99999} }}",
    "{{ 'x' * 10000000000 }}",
    "{{ [1] * 10000000000 }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{{ 'x'.rjust(10000000000) }}",
    "{{ 'x'.center(width=10000000000) if false else 'x'.center(10000000000) }}",
    "{{ 'x'.zfill(10000000000) }}",
    "{{ ('\\t' * 9999).expandtabs(1000000) }}",
    "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "{{ ('x' * 99999).join('y' * 99999) }}",
    "{{ ('x' * 99999) | join('y' * 99999) }}",
    "{{ range(99999) | join('y' * 99999) }}",
    "{{ ('y' * 99999).join(dict.fromkeys('abcdefghijklmnopqrstuvwxyz' * 2, 1)) * 9 }}",
    "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x\\nx' | indent(1000000000) }}",
    "{{ ('\\n' * 99999) | indent(99999, true, true) }}",
    "{{ ('x ' * 99999) | wordwrap(1, wrapstring='y' * 99999) }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ range(10000000000) | list }}",
    "{{ lipsum(99999999) }}",
    "{{ messages | tojson(indent=1000000000) }}",
    "{{ 1.5 | round(1000000000) }}",
    "{{ range(99999) | map('string') | map('center', 99999) | list }}",
    "{{ range(99999) | map('string') | map('center', 99999) | join }}",
    "{{ ''.join(range(99999) | map('string') | map('center', 99999)) }}",
    "{{ dict(range(99999) | map('string') | map('center', 99999) | batch(2)) }}",
    "{% set x = 'x' * 999999 %}{{ " + " ~ ".join("x" * 99) + " }}",
    "{% set x = 'x' * 999999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "{% macro f() %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    *(
        DOUBLED.replace("OP", operation)
        for operation in (
            "ns.x ~ ns.x",
            "ns.x + ns.x",
            "ns.x * 2",
            "[ns.x, ns.x]",
            "(ns.x, ns.x)",
            "{'a': ns.x, 'b': ns.x}",
            "dict(a=ns.x, b=ns.x)",
            "[ns.x, ns.x] | join",
            "(ns.x | string) + (ns.x | string)",
            "ns.x | tojson | tojson",
            "ns.x.encode() + ns.x.encode() if ns.x is string else ns.x + ns.x",
            "ns.x | replace('y', 'yy')",
            "'%s%s' % (ns.x, ns.x)",
            "'{0}{0}'.format(ns.x)",
        )
    ),
]


@tried(
    "Prompts",
    "chat templates that make gigabytes in one call, of each kind of call",
    "refused before the memory is taken",
)
@pytest.mark.parametrize("template", GREEDY)
def test_a_template_that_fills_the_memory(template: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="chat template"):
            ChatTemplate(template + QUESTION, Chat())
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
