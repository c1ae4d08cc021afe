"""A fresh process from its start to the first token, and the most memory it holds.

    python -m himix_edge.bench.cold START BUNDLE PICTURE TEXT_TOKENS CANDIDATE [THREADS]

is that process; `cold_start` is what starts it. Files that were read before are in the page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himix_edge.errors import EngineError

if TYPE_CHECKING:
    from himix_edge.bench.candidates import Candidate


@dataclass(frozen=True)
class ColdStart:
    """Milliseconds, one after the other.

    Attributes:
        imports: from the start of the process until Python's modules are there.
        load: `himix_edge.load` as it is by default, every file's sha256 included.
        answer: from the picture's file to the first token.
        peak_bytes: the most resident memory, mapped files included; None where nobody knows.
    """

    imports: float
    load: float
    answer: float
    peak_bytes: int | None

    @property
    def total(self) -> float:
        """From the start of the process to the first token."""
        return self.imports + self.load + self.answer


def cold_start(
    bundle: Path, picture: Path, text: int, candidate: Candidate, threads: int | None
) -> ColdStart:
    """Starts one and waits for its figures.

    Raises:
        EngineError: it ended without any.
    """
    command = [sys.executable, "-m", "himix_edge.bench.cold", str(time.monotonic_ns())]
    command += [str(bundle), str(picture), str(text), candidate]
    command += [str(threads)] if threads is not None else []
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise EngineError(
            "a fresh process came to no first token",
            found=said[-1] if said else f"exit code {done.returncode}",
            fix="see whether this device has enough free memory for a second copy of the model",
        )
    return ColdStart(**json.loads(done.stdout))


def main(arguments: list[str]) -> None:
    """Prints a ColdStart as JSON."""
    import numpy as np

    from himix_edge.bench.candidates import first_token, token_ids
    from himix_edge.runtimes import load
    from himix_edge.runtimes.providers import import_onnxruntime

    import_onnxruntime()
    started, folder, picture, text, candidate, *threads = arguments
    marks = [int(started), time.monotonic_ns()]
    model = load(folder, device="cpu", threads=int(threads[0]) if threads else None)
    marks.append(time.monotonic_ns())
    images = model.manifest.config.image_slots if candidate == "vanilla" else 0
    ids = np.array([token_ids(model, images + int(text))], np.int64)
    first_token(model, Path(picture), ids, "vanilla" if images else "himix")
    marks.append(time.monotonic_ns())
    names = ("imports", "load", "answer")
    spans = zip(names, marks[:-1], marks[1:], strict=True)
    figures: dict[str, Any] = {name: (end - start) / 1e6 for name, start, end in spans}
    print(json.dumps({**figures, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int | None:
    """The most resident memory this process has held; None on a system that doesn't say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
