"""What a build takes, and when it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Manifest
from himix_edge.engines import memory
from himix_edge.engines.gpu import Gpu
from himix_edge.engines.memory import (
    available_bytes,
    build_memory_bytes,
    require_memory,
    weight_bytes,
    workspace_bytes,
)
from himix_edge.errors import EngineError

MEMINFO = """\
MemTotal:        7802040 kB
MemFree:          312300 kB
MemAvailable:    6000000 kB
SwapFree:        3901016 kB
"""
ORIN = Gpu("Orin, 8 SMs", "8.7", free_bytes=0, unified=True)


def test_a_graph_and_its_weights(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    for graph in (VISION_GRAPH, DECODER_GRAPH):
        files = [bundle / graph, bundle / f"{graph}.data"]
        assert weight_bytes(manifest, graph) == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("gigabytes", [1.0, 2.2, 13.5])  # qwen2-0.5b, tinyllama, vicuna in float16
def test_three_to_four_times_the_weights(gigabytes: float) -> None:
    weights = int(gigabytes * 1e9)
    without_libraries = build_memory_bytes(weights) - memory.LIBRARIES
    assert 3 * weights <= without_libraries <= 4 * weights


def test_small_weights_still_need_room_to_work() -> None:
    assert workspace_bytes(1000) == 256 << 20
    assert build_memory_bytes(1000) == 3 * 1000 + (256 << 20) + (512 << 20)
    assert workspace_bytes(2 << 30) == 1 << 30


def test_what_the_system_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    assert available_bytes(meminfo) == 6_000_000 * 1024
    meminfo.write_text("MemTotal: 1 kB\n")
    assert available_bytes(meminfo) is None
    assert available_bytes(tmp_path / "none") is None


def _have(monkeypatch: pytest.MonkeyPatch, host: int | None) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: host)


def test_enough_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = build_memory_bytes(10**9)
    _have(monkeypatch, needed)
    require_memory("it", 10**9, ORIN)
    _have(monkeypatch, needed - 1)
    with pytest.raises(EngineError):
        require_memory("it", 10**9, ORIN)
    _have(monkeypatch, None)
    require_memory("it", 10**15, ORIN)  # nobody knows


def test_the_refusal_has_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch, 3_100_000_000)
    with pytest.raises(EngineError) as error:
        require_memory("decoder.onnx", 10**9, ORIN)
    assert str(error.value) == (
        "building decoder.onnx takes more memory than there is: expected about 4.0 GB free, found "
        "3.1 GB. Fix: close what else runs; or try it anyway, with swap, by --force"
    )


def test_a_gpu_with_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch, 3 * 10**9)  # enough for the host's part, not for both
    require_memory("it", 10**9, Gpu("RTX", "8.9", free_bytes=3 * 10**9, unified=False))
    with pytest.raises(EngineError, match=r"more GPU memory than there is: expected about 2\.0 GB"):
        require_memory("it", 10**9, Gpu("RTX", "8.9", free_bytes=10**9, unified=False))
    _have(monkeypatch, 10**9)
    with pytest.raises(EngineError, match=r"more memory than there is: expected about 2\.5 GB"):
        require_memory("it", 10**9, Gpu("RTX", "8.9", free_bytes=80 * 10**9, unified=False))
