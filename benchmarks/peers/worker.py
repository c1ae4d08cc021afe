"""One contestant in a process of its own: it answers commands, a JSON object a line.

    python worker.py '{"answer": ["on_genai", "Decoder", {"folder": "..."}]}'

It runs in the peer's own environment, so that it and the modules beside it named `on_...` import
the standard library, numpy and that peer alone. A contestant has one role ("encode" a picture,
"answer" a prompt) or both; both may be the same object. Commands:

    {"do": "answer", "prompt": 260, "tokens": 33}   -> {"stamps": [seconds to each token]}
    {"do": "encode", "runs": 3}                     -> {"encode": [seconds of one picture], ...}
    {"do": "embed", "file": "..."}                  -> {}, the embeddings of a picture in that file
    {"do": "peak"}                                  -> {"mb": the most memory it has held}
    {"do": "versions"}                              -> {package: version} of its environment

Any other field of "answer" is passed on; "encode" gives the phases' seconds too, where there are
any. An error is an answer too: {"error": "..."}.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BEGAN = time.perf_counter()
DEATH_OF_PARENT = 1  # prctl's PR_SET_PDEATHSIG
VOCABULARY = 151_000  # ids are drawn below it, fresh for every prompt: no peer may reuse an old one


def peak_mb() -> float:
    """VmHWM: the most memory that was resident at a time, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM")


def open_roles(roles: dict[str, Any]) -> dict[str, Any]:
    """The object of each role; where two are described alike they share one."""
    made: dict[str, Any] = {}
    for described in roles.values():
        key = json.dumps(described)
        if key not in made:
            module, name, options = described
            made[key] = getattr(importlib.import_module(module), name)(**options)
    return {role: made[json.dumps(described)] for role, described in roles.items()}


def obey(roles: dict[str, Any], command: dict[str, Any]) -> dict[str, Any]:
    """What one command gives."""
    do = command.pop("do")
    if do == "answer":
        ids = random.sample(range(VOCABULARY), command.pop("prompt"))
        return {"stamps": roles["answer"].answer(ids, **command)}
    if do == "encode":
        samples: dict[str, list[float]] = {}
        for _ in range(command["runs"]):
            began = time.perf_counter()
            phases = roles["encode"].encode() or {}
            phases["encode"] = time.perf_counter() - began
            for phase, seconds in phases.items():
                samples.setdefault(phase, []).append(seconds)
        return samples
    if do == "embed":
        np.save(command["file"], roles["encode"].embed())
        return {}
    if do == "peak":
        return {"mb": peak_mb()}
    if do == "versions":
        found = importlib.metadata.distributions()
        return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in found}
    raise ValueError(f"unknown command {do!r}")


def main() -> None:
    """Loads the contestant, says so, and obeys until stdin ends."""
    # Stopped, it would not see its stdin end; so that nobody who is gone leaves it behind.
    ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGKILL)
    # Libraries print where they like: their stdout becomes stderr, answers get the real one.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        roles = open_roles(json.loads(sys.argv[1]))
    except Exception as error:  # noqa: BLE001 - reported, whatever it is
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out)
        return
    print(json.dumps({"ready": time.perf_counter() - BEGAN}), file=out)
    for line in sys.stdin:
        try:
            answer = obey(roles, json.loads(line))
        except Exception as error:  # noqa: BLE001 - reported, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out)


if __name__ == "__main__":
    main()
