"""Regular expressions from a stranger: those that try every way to read a text are refused.

A tokenizer's pattern repeats characters and classes of them. What takes exponential time repeats a
group that itself repeats something, or has alternatives; or calls itself.
"""

from __future__ import annotations

import re

MAX_PATTERN = 20_000  # characters; long ones list the letters of a script
MAX_REPEATED = 4  # parts of one alternative that are repeated; each takes the text's length again
QUANTIFIER = re.compile(r"[*+?][+?]?|\{(\d*)(,?)(\d*)\}[+?]?")
GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|[a-z-]+[:)]|#[^)]*\)))?")
CALL = re.compile(r"\\[gk]|\\[1-9]|\(\?(?:<[^=!]|\(|R|&|P|~|@|\{)|\(\*")


def check_pattern(pattern: str) -> None:
    """Refuses a pattern that may take exponential time.

    Raises:
        ValueError: it may, or is no pattern that is understood here.
    """
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern of more than {MAX_PATTERN:,} characters")
    # Of each open group: whether it can match in several ways; how often its alternative repeats.
    open_groups: list[list[int]] = [[0, 0]]
    position, closed = 0, None
    while position < len(pattern):
        ends = QUANTIFIER.match(pattern, position)
        if ends and (pattern[position] != "{" or ends.group(1) or ends.group(3)):
            _repeat(open_groups[-1], ends, closed, pattern)
            position, closed = ends.end(), None
            continue
        sign, closed = pattern[position], None
        if CALL.match(pattern, position):
            raise _refused(pattern, "refers to a part of itself")
        if sign == "\\":
            position += 2
        elif sign == "[":
            position = _end_of_class(pattern, position)
        elif sign == "(":
            end = next(GROUP.finditer(pattern, position)).end()
            if pattern[end - 1] != ")":  # else options or a remark
                open_groups.append([0, 0])
            position = end
        elif sign == ")":
            if len(open_groups) == 1:
                raise _refused(pattern, "closes a group that is not open")
            closed = open_groups.pop()
            open_groups[-1][1] += closed[1]
            open_groups[-1][0] |= closed[0]
            position += 1
        else:
            if sign == "|":
                open_groups[-1] = [1, 0]
            position += 1


def _repeat(
    group: list[int], quantifier: re.Match[str], closed: list[int] | None, pattern: str
) -> None:
    """Counts a quantifier of the group; `closed` is what it repeats, if that is a group."""
    sign, most = quantifier.group()[0], quantifier.group(3) or quantifier.group(1)
    once = sign == "?" or (sign == "{" and most in ("0", "1") and quantifier.group(3) != "")
    exact = sign == "{" and not quantifier.group(2)
    if closed and closed[0] and not once:
        raise _refused(pattern, "repeats what repeats something, or has alternatives")
    group[0] |= not exact
    group[1] += not (once or exact)
    if group[1] > MAX_REPEATED:
        raise _refused(pattern, f"repeats more than {MAX_REPEATED} parts of an alternative")


def _end_of_class(pattern: str, position: int) -> int:
    """Behind a class of characters, which may have others within."""
    depth, start = 0, position
    while position < len(pattern):
        sign = pattern[position]
        if sign == "\\":
            position += 1
        elif sign == "[":
            depth += 1
            position += pattern.startswith("^", position + 1)
            if pattern.startswith("]", position + 1):
                position += 1  # the first is a character
        elif sign == "]":
            depth -= 1
            if not depth:
                return position + 1
        position += 1
    raise _refused(pattern[start:], "has a class without an end")


def _refused(pattern: str, why: str) -> ValueError:
    return ValueError(f"the pattern {pattern[:60]!r} {why}")
