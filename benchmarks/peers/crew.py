"""Processes of contestants: all are loaded, one at a time runs, the others are stopped whole.

A stopped process can't spin, so that no idle worker thread of one library slows another's turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import HERE, Contestant
from himix_edge import telemetry

THREADS = 2
IMPORTED = str(HERE.parents[1])  # where a contestant that is run by this Python finds himix_edge
LOG_TAIL = 400  # characters of what a process wrote before it ended


class PeerError(Exception):
    """A contestant that does not load, or does not answer."""


class Worker:
    """A contestant's process.

    Attributes:
        log: what it writes to stderr.
        ready: seconds its libraries and models took to load.
    """

    def __init__(self, contestant: Contestant, environments: Path, logs: Path) -> None:
        """Starts it and waits until it is ready.

        Raises:
            PeerError: it did not load.
        """
        self.contestant = contestant
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / (contestant.name.replace("/", "-").replace(" ", "-") + ".log")
        command = [contestant.python(environments), str(HERE / "worker.py")]
        variables = {"OMP_NUM_THREADS": str(THREADS), telemetry.ONNX_RUNTIME: "1"}
        variables["PYTHONPATH"] = "" if contestant.environment else IMPORTED
        with self.log.open("w") as log:
            try:
                self._process = subprocess.Popen(
                    [*command, json.dumps(contestant.roles)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | variables,
                )
            except OSError as error:
                raise PeerError(str(error)) from error
        try:
            self.ready: float = self._heard()["ready"]
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """One command's answer.

        Raises:
            PeerError: it failed, or the process ended.
        """
        pipe = self._process.stdin
        assert pipe is not None  # noqa: S101 - for mypy: it is a pipe
        try:
            pipe.write(json.dumps({"do": do} | fields) + "\n")
            pipe.flush()
        except OSError as error:
            raise PeerError(f"{error}; {self._tail()}") from error
        return self._heard()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Goes on for the block, and stops after it."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.stop()

    def stop(self) -> None:
        """Stands still until `awake`."""
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends the process, stopped or not."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _heard(self) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None  # noqa: S101 - for mypy: it is a pipe
        line = pipe.readline()
        if not line:
            raise PeerError(f"the process ended: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _tail(self) -> str:
        return self.log.read_text(errors="replace").strip()[-LOG_TAIL:]


@contextlib.contextmanager
def crew(
    contestants: list[Contestant], environments: Path, logs: Path, failed: dict[str, str]
) -> Iterator[list[Worker]]:
    """All that load, each stopped; those that don't are noted in `failed` with their error."""
    with contextlib.ExitStack() as stack:
        workers = []
        for contestant in contestants:
            try:
                worker = Worker(contestant, environments, logs)
            except PeerError as error:
                failed[contestant.name] = str(error)
                continue
            stack.callback(worker.close)
            worker.stop()
            workers.append(worker)
        yield workers


def cold_start(
    contestant: Contestant, environments: Path, logs: Path, prompt: int, tokens: int
) -> dict[str, float]:
    """A process of its own from its start to the first token, and its peak memory.

    Returns:
        "load", "total" (seconds) and "peak_mb", the tokens after the first one counted in.

    Raises:
        PeerError: it did not load or answer.
    """
    began = time.perf_counter()
    worker = Worker(contestant, environments, logs)
    try:
        if "encode" in contestant.roles:
            worker.ask("encode", runs=1)
        stamps = worker.ask("answer", prompt=prompt, tokens=tokens)["stamps"]
        total = time.perf_counter() - began - (stamps[-1] - stamps[0])
        return {"load": worker.ready, "total": total, "peak_mb": worker.ask("peak")["mb"]}
    finally:
        worker.close()
