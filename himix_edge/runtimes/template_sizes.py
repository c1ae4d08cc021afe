"""How large a value of a template is, and how large a call would make one, before it is made.

One call of Python's own may fill the memory: `'%1000000000d' % 1` is shorter than this sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

NUMBER = re.compile(r"\d+")
FIELD = re.compile(r"[{%]")
CONTAINERS = (list, tuple, range, set, frozenset, KeysView, ValuesView, ItemsView)
CONTAINER = 40  # what one counts, beside what is in it: it takes 50 bytes and more


def size_of(value: Any, most: int) -> int:
    """Characters and items of a value and of all within it; counting ends above `most`.

    What stands in it twice counts twice, as it does where it is written.
    """
    size, waiting = 0, [value]
    while waiting and size <= most:
        item = waiting.pop()
        size += 1
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 64
        elif isinstance(item, Mapping):
            size += CONTAINER
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, CONTAINERS):
            size += CONTAINER + len(item)
            waiting += list(item) if len(item) <= most else []
    return size


def size_of_format(text: str | bytes, values: Any, most: int) -> int:
    """An upper bound of `text % values`, or of `text.format(...)` with all of its values."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    widths = sum(int(digits[:18]) for digits in NUMBER.findall(text))
    if isinstance(values, Mapping) or not isinstance(values, (list, tuple)):
        values = [*values.values()] if isinstance(values, Mapping) else [values]
        repeated = len(FIELD.findall(text))  # each may be written at every place
        written = repeated * max((size_of(value, most) for value in values), default=0)
    else:
        written = sum(size_of(value, most) for value in values)
    numbers = [value for value in values if isinstance(value, int)]
    if "*" in text or "{" in text:  # a width may be among the values
        widths += sum(abs(number) for number in numbers) * max(len(FIELD.findall(text)), 1)
    return len(text) + widths + written


def size_of_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], most: int) -> int:
    """An upper bound of what a call of a method of texts, or of `lipsum`, returns; else 0."""
    method = getattr(function, "__wrapped__", function)  # of format, which the sandbox wraps
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if name == "generate_lorem_ipsum":
        counts = [*args, *kwargs.values()]
        return _product([count for count in counts if isinstance(count, int)], 100)
    if not isinstance(text, (str, bytes)):
        return 0
    values = [*args, *kwargs.values()]
    if name in ("format", "format_map"):
        return size_of_format(text, dict(enumerate(_flat(values))), most)
    if name in ("ljust", "rjust", "center", "zfill"):
        return max([len(text), *(value for value in values if isinstance(value, int))])
    if name == "expandtabs":
        tab = next((value for value in values if isinstance(value, int)), 8)
        return len(text) * max(tab, 1)
    if name == "replace" and len(args) >= 2:
        return size_of_replaced(text, args[0], args[1])
    if name == "join" and args and isinstance(args[0], (str, Mapping, *CONTAINERS)):
        return size_of(args[0], most) + len(text) * len(args[0])
    if name == "translate" and args and isinstance(args[0], Mapping):
        longest = max((size_of(value, most) for value in args[0].values()), default=1)
        return len(text) * longest
    return 0


def size_of_filtered(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], most: int) -> int:
    """An upper bound of what one of Jinja's filters returns of a value; else 0."""
    value, others = args[0] if args else "", [*args[1:], *kwargs.values()]
    numbers = [abs(number) for number in others if isinstance(number, int)]
    texts = [len(text) for text in others if isinstance(text, str)]
    size = size_of(value, most)
    if name == "replace" and len(args) >= 3:
        return size_of_replaced(str(value), str(args[1]), str(args[2]))
    if name == "join" and isinstance(value, (str, Mapping, *CONTAINERS)):
        return size + max(texts, default=0) * len(value)
    if name == "format":
        pairs = dict(enumerate(args[1:])) | dict(kwargs)
        return size_of_format(str(value), pairs, most)
    if name in ("indent", "wordwrap"):
        lines = str(value).count("\n") + 1 if name == "indent" else size
        return size + lines * max([*texts, *(numbers if name == "indent" else [])], default=4)
    if name in ("batch", "slice", "center", "round", "truncate"):
        return size + max(numbers, default=0)
    if name == "tojson":
        return size * max([1, *numbers, *texts]) if numbers or texts else size
    return size


def size_of_replaced(text: Any, old: Any, new: Any) -> int:
    """An upper bound of `text.replace(old, new)`."""
    if not isinstance(new, (str, bytes)) or not isinstance(old, type(text)):
        return 0  # not for `replace`, which says so
    return len(text) + int(text.count(old)) * len(new)


def watched(items: Iterator[Any], check: Callable[[int], None], most: int) -> Iterator[Any]:
    """The items, whose sizes together are checked as they come."""
    size = 0
    for item in items:
        size += size_of(item, most)
        check(size)
        yield item


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from value.values() if isinstance(value, Mapping) else (value,)


def _product(numbers: Sequence[int], at_least: int) -> int:
    product = at_least
    for number in numbers:
        product *= max(abs(number), 1)
    return product
