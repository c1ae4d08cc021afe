"""How many threads an engine may be given."""

from __future__ import annotations

import numbers
import os

from himix_edge.errors import ConfigError
from himix_edge.plain import shown

# A device's settings may be tried on a smaller machine; a hundred thousand would end the process.
MOST = max(64, os.cpu_count() or 1)


def checked_threads(threads: object) -> int | None:
    """The number as an int; None, which leaves it to the engine.

    Raises:
        ConfigError: no whole number from 1 to `MOST`.
    """
    if threads is None:
        return None
    whole = isinstance(threads, numbers.Integral) and not isinstance(threads, bool)
    if not whole or not 1 <= int(threads) <= MOST:  # type: ignore[call-overload]
        raise ConfigError(
            "threads is out of range",
            expected=f"a whole number from 1 to {MOST}",
            found=shown(threads),
        )
    return int(threads)  # type: ignore[call-overload,no-any-return]
