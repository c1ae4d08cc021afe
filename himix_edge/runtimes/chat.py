"""The checkpoint's own chat template, rendered on the device as transformers renders it.

Reference: transformers' `render_jinja_template`: the same sandbox, extensions, filters and
    globals. A
template is a program from a stranger, so it has besides a time limit, and nothing in it may become
larger than any prompt: see `template_sizes.py`.
"""

from __future__ import annotations

import datetime
import functools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from himix_edge.contract import CHAT_TEMPLATE, Chat
from himix_edge.errors import BundleError, HimixError, PromptError
from himix_edge.runtimes.template_sizes import (
    size_of,
    size_of_call,
    size_of_filtered,
    size_of_format,
    watched,
)

SECONDS = 5.0  # for one rendering, which takes a millisecond
LARGEST = 1_000_000  # characters, items or bits of what a template may multiply into being
MOST = 4 * LARGEST  # ... as reckoned, from above, ahead of a call; and of a list with all within it


class Message(TypedDict):
    """One turn of a conversation: the role is "system", "user" or "assistant"."""

    role: str
    content: str


History = Sequence[Message]


def user_message(words: str) -> Message:
    return {"role": "user", "content": words}


def assistant_message(words: str) -> Message:
    return {"role": "assistant", "content": words}


class ChatTemplate:
    """A compiled chat template with its variables.

    Attributes:
        chat: what the template does not say of a conversation's way to token ids.
        first: the messages before a conversation's first question: none.
    """

    first: History = ()

    def __init__(self, source: str, chat: Chat) -> None:
        """Compiles the template, and renders two trial conversations.

        Raises:
            BundleError: a template with a syntax error, or without the question in it, or that
                can't render a question, or a
                further one, within the time limit and the sandbox.
        """
        self.chat = chat
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
            question, answer = user_message("What is it?"), assistant_message("A circle.")
            alike = self._render([question]) == self._render([user_message("Where is it?")])
            self._render([question, answer, question])
        except Exception as error:  # a template is a program, it may raise anything
            raise BundleError(
                f"the chat template ({CHAT_TEMPLATE}) can't be rendered",
                expected="a Jinja template that takes user and assistant messages in turn",
                found=_reason(error),
                fix="correct the template of the checkpoint, and export it again",
            ) from error
        if alike:
            raise BundleError(
                f"the chat template ({CHAT_TEMPLATE}) leaves out the question",
                expected="other text for another question",
                found="the same",
                fix="correct the template of the checkpoint, and export it again",
            )

    def render(self, messages: History, now: datetime.datetime | None = None) -> str:
        """The conversation as text, up to the cue for the next answer.

        Args:
            now: what the template takes for the time; None is the clock's.

        Raises:
            PromptError: messages that the template refuses.
        """
        try:
            return self._render(messages, now)
        except Exception as error:
            raise PromptError(
                "the chat template refuses this conversation",
                expected="messages as the model was trained with",
                found=_reason(error),
            ) from error

    def _render(self, messages: History, now: datetime.datetime | None = None) -> str:
        clock = {} if now is None else {"strftime_now": now.strftime}
        said = sum(len(message["content"]) for message in messages)
        with self._environment.limits(LARGEST + 10 * said):
            text: str = self._template.render(
                messages=self._messages(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.chat.special_tokens,
                **clock,
            )
            return text

    def _messages(self, messages: History) -> list[dict[str, Any]]:
        """As the template takes them: contents are texts, or typed parts with the image ahead."""
        image = self.chat.image
        if image is None or not image.typed_content:
            return [dict(message) for message in messages]
        typed: list[dict[str, Any]] = []
        has_image = False
        for message in messages:
            content: list[dict[str, str]] = [{"type": "text", "text": message["content"]}]
            if message["role"] == "user" and not has_image:
                content, has_image = [{"type": "image"}, *content], True
            typed.append({"role": message["role"], "content": content})
        return typed


class _LimitError(HimixError):
    """A template that takes too long or makes too much."""


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' sandbox; what makes a value looks at the clock, and at the value's size."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _to_json
        self.filters |= {
            name: self._limited(name, function) for name, function in self.filters.items()
        }
        self.filters |= {
            "_checked": self._checked,
            "_joined": self._joined,
            "_watched": self._watched,
            "_written": self._written,
        }
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._local = threading.local()

    def limits(self, most: int) -> _Limits:
        """For the time within the block, of this thread; `most` characters may be written."""
        return _Limits(self._local, most)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        watched: nodes.Template = _Watching(self).visit(tree)
        return watched

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self._look_at_clock()
        __self._require(size_of_call(__obj, args, kwargs, LARGEST))
        args = tuple(map(__self._watched_if_lazy, args))
        return __self._checked_size(super().call(__context, __obj, *args, **kwargs))

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that refuses to make too much."""
        ahead = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self._look_at_clock()
            given = [*map(self._watched_if_lazy, args[ahead:])]
            if name in ("join", "batch", "slice", "tojson", "pprint", "string") and given:
                given[0] = list(given[0]) if isinstance(given[0], Iterator) else given[0]
            self._require(size_of_filtered(name, given, kwargs, LARGEST))
            return self._checked_size(function(*args[:ahead], *given, **kwargs))

        return limited

    def _watched_if_lazy(self, value: Any) -> Any:
        return watched(value, self._require, LARGEST) if isinstance(value, Iterator) else value

    def _require(self, size: int) -> None:
        self._look_at_clock()
        if size > MOST:
            raise _LimitError(f"it makes a value of more than {MOST:,} characters or items")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuses products, powers, sums and formats that no prompt needs."""
        if operator == "%" and isinstance(left, (str, bytes)):
            size = size_of_format(left, right, LARGEST)
        elif operator == "%":
            size = 0
        elif operator == "**":
            size = _size(left) * right if isinstance(right, int) else 0
        elif isinstance(left, int) and isinstance(right, int):
            size = _size(left) + _size(right)
        elif operator == "*":
            size = max(_size(left), 1) * right if isinstance(right, int) else _size(right) * left
        else:
            size = 0
        if size > LARGEST:
            raise _LimitError(f"it computes a value of more than {LARGEST:,} characters or bits")
        return self._checked_size(super().call_binop(context, operator, left, right))

    @jinja2.pass_context
    def _joined(self, _context: Any, parts: list[Any]) -> str:
        self._require(size_of(parts, LARGEST))
        return "".join(map(str, parts))

    @jinja2.pass_context
    def _written(self, _context: Any, value: Any, fixed: int = 0) -> Any:
        """A value on its way into the text, with `fixed` characters beside it."""
        self._local.left -= fixed + size_of(value, LARGEST)
        if self._local.left < 0:
            raise _LimitError(f"it makes a prompt of more than {self._local.most:,} characters")
        return value

    @jinja2.pass_context
    def _watched(self, _context: Any, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._look_at_clock()
            yield item

    @jinja2.pass_context
    def _checked(self, _context: Any, value: Any) -> Any:
        return self._checked_size(value)

    def _checked_size(self, value: Any) -> Any:
        self._look_at_clock()
        if size_of(value, MOST) > MOST:
            raise _LimitError(f"it makes a text or list of more than {MOST:,} items")
        return value

    def _look_at_clock(self) -> None:
        if time.monotonic() > getattr(self._local, "deadline", float("inf")):  # else it compiles
            raise _LimitError(f"it does not end within {SECONDS:.0f} seconds")


class _Limits:
    def __init__(self, local: threading.local, most: int) -> None:
        self._local, self._most = local, most

    def __enter__(self) -> None:
        self._local.deadline = time.monotonic() + SECONDS
        self._local.left = self._local.most = self._most

    def __exit__(self, *_: object) -> None:
        self._local.deadline = float("-inf")


class _Watching(NodeTransformer):
    """Puts iterables, lists, joined texts and all that is written through the checks."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        node.iter = self._filtered(node.iter, "_watched")
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._filtered(self.generic_visit(node), "_checked")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._filtered(self.generic_visit(node), "_checked")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx == "store" else self._filtered(node, "_checked")

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        fixed = sum(len(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
        beside = nodes.Const(fixed, lineno=node.lineno)
        counted: list[nodes.Expr] = [self._filtered(nodes.Const(""), "_written", [beside])]
        node.nodes = counted + [
            part if isinstance(part, nodes.TemplateData) else self._filtered(part, "_written")
            for part in node.nodes
        ]
        return node

    def _filtered(
        self, node: nodes.Node, name: str, args: list[nodes.Expr] | None = None
    ) -> nodes.Filter:
        new = nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)
        new.set_environment(self._environment)
        return new


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant said and writes nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace`, which holds no name that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, args = args[0], args[1:]
        attributes: dict[str, Any] = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _size(value: Any) -> int:
    """Bits of a whole number, else its size."""
    return value.bit_length() if isinstance(value, int) else size_of(value, LARGEST)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__.lstrip('_')}: {lines[0]}" if lines else type(error).__name__
