"""Turns off the usage reports that libraries send by themselves.

From 1.29 on, ONNX Runtime on Linux and macOS writes a device id and a database of events to the
user's cache, opens `$TMPDIR/.ses` through links, and tries to reach a server, all from its import
on. It reads its variable once, then: `disable_telemetry_events` after it stops none of these. So
importing any part of himix_edge sets the variables, and processes that it starts inherit them.
"""

from __future__ import annotations

import os
from typing import Any

ONNX_RUNTIME = "ORT_DISABLE_TELEMETRY"
VARIABLES = (ONNX_RUNTIME, "HF_HUB_DISABLE_TELEMETRY")


def turn_off_telemetry() -> None:
    """Sets the variables that are unset or empty.

    A value that the user chose stays, "0" included: whoever sets that wants the reports.
    """
    for name in VARIABLES:
        if not os.environ.get(name):
            os.environ[name] = "1"


def turn_off_session_events(onnxruntime: Any) -> None:
    """Turns off what can still be turned off after the import: the events of sessions and models.

    This matters where another package imported ONNX Runtime before himix_edge, and on Windows,
    where ONNX Runtime doesn't read the variable.
    """
    if os.environ.get(ONNX_RUNTIME) == "1" and hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
