"""One rewrite at a time: the graph before and after it, on the same inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from numpy.typing import NDArray

from himix_edge.contract import DECODER_GRAPH, PIXEL_VALUES, VISION_GRAPH
from himix_edge.export.dialects import NATIVE_OPSET
from himix_edge.export.sessions import decoder_feeds, lean_session
from tests.tiny import tiny_config
from tests.tolerances import HALF_REWRITE, REWRITE

Array = NDArray[Any]
Rewrite = Callable[[onnx_ir.Model], None]
CONFIG = tiny_config()
LAYERS, HEAD_DIM = 2, CONFIG.decoder.head_dim
FILLED, TOKENS = 6, 3  # slots that are filled, tokens that come: no two sizes of the graph alike


class Subject:
    """A tiny bundle's portable graphs, in one type."""

    def __init__(self, folder: Path, dtype: str, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch
        self.dtype = np.dtype(dtype)
        self.tolerance = REWRITE if dtype == "float32" else HALF_REWRITE

    def decoder(self) -> onnx_ir.Model:
        return onnx_ir.load(self.folder / DECODER_GRAPH)

    def vision(self) -> onnx_ir.Model:
        return onnx_ir.load(self.folder / VISION_GRAPH)

    def random(self, *shape: int) -> Array:
        return np.random.default_rng(sum(shape)).standard_normal(shape).astype(self.dtype)

    def past(self, batch: int = 2) -> list[Array]:
        decoder = CONFIG.decoder
        shape = (batch, decoder.num_key_value_heads, FILLED, decoder.head_dim)
        return [self.random(*shape) + i for i in range(2 * LAYERS)]

    def decoder_feeds(self, cache_slots: int | None = None) -> dict[str, Array]:
        ids = np.array([[5, 77, 123], [9, 2, 200]])
        return decoder_feeds(CONFIG, ids, self.past(), cache_slots)

    def vision_feeds(self) -> dict[str, Array]:
        size = CONFIG.vision.image_size
        return {PIXEL_VALUES: self.random(2, 3, size, size).astype(np.float32)}

    def run(self, graph: onnx_ir.Model, feeds: dict[str, Array]) -> list[Array]:
        """The outputs in ONNX Runtime, of a graph that is valid ONNX."""
        path = self.scratch / "graph.onnx"
        onnx_ir.save(graph, path, external_data="graph.onnx.data")
        onnx.checker.check_model(path, full_check=True)
        outputs: list[Array] = lean_session(path).run(None, feeds)
        return outputs

    def same(self, before: list[Array], after: list[Array]) -> None:
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, rtol=0, atol=self.tolerance)


def raised(graph: onnx_ir.Model) -> onnx_ir.Model:
    graph.opset_imports[""] = NATIVE_OPSET
    return graph


def operators(graph: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.all_nodes())


@pytest.fixture(params=["float32", "float16"])
def subject(
    request: pytest.FixtureRequest, tiny_bundle: Path, half_bundle: Path, tmp_path: Path
) -> Subject:
    folder = tiny_bundle if request.param == "float32" else half_bundle
    return Subject(folder, request.param, tmp_path)
