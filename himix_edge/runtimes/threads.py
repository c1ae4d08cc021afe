"""How many threads an engine may be given."""

from __future__ import annotations

import numbers
import os

from himix_edge.errors import ConfigError
from himix_edge.plain import shown

MOST_PER_CORE = 4  # more only wait for each other, and a hundred thousand end the process


def checked_threads(threads: object) -> int | None:
    """The number as an int; None, which leaves it to the engine.

    Raises:
        ConfigError: no whole number, below 1, or far more than the machine has cores.
    """
    if threads is None:
        return None
    cores = os.cpu_count() or 1
    whole = isinstance(threads, numbers.Integral) and not isinstance(threads, bool)
    if not whole or not 1 <= int(threads) <= MOST_PER_CORE * cores:  # type: ignore[call-overload]
        raise ConfigError(
            "threads is out of range",
            expected=f"a whole number from 1 to {MOST_PER_CORE * cores}, four for each of this "
            "machine's cores",
            found=shown(threads),
        )
    return int(threads)  # type: ignore[call-overload,no-any-return]
