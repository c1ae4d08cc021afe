"""Every graph that we export becomes ONE engine of TensorRT for RTX: its parser and builder say so.

Nothing runs on a GPU here: that the numbers are right is for ONNX Runtime to show, of the same
graphs. What is compiled, each with the profiles that `himix-edge build` gives it:

    the demo model                  whole, native, for every architecture; int8 and int4 for one
    the vision graph of each pair   cut, native, once
    each decoder                    cut, native, for every architecture
    each encoder and each decoder   cut, portable, float16, once

Architectures and types of weights go round by two orthogonal Latin squares, so that every encoder
and every decoder meets each of both, and each architecture each type. Left out of this are the
pairs' other combinations; the decoder's graph is the same for every encoder. `make engines`
compiles them all, 344 engines in four minutes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx_ir
import pytest

from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Manifest
from himix_edge.engines.profiles import Profile, decoder_profiles, engine_sizes, vision_profile
from himix_edge.engines.rtx import MAX_DECODE, SMS, engine_from_onnx
from himix_edge.export.onnx import vision_onnx_from_weights, write_graph
from himix_edge.presets import ENCODERS
from tests.engines.cuts import (
    CACHE_SLOTS,
    NEEDS_BUILDER,
    STORED,
    Cuts,
    Stored,
    cut_config,
    manifest_of,
    shared_cuts,
    tiled_weights,
)

DECODERS = ("qwen2-0.5b", "tinyllama-1.1b", "llama-3.2-1b", "llama-3.2-3b")
ALL = "HIMIX_EDGE_ALL_CUTS" in os.environ
TURNED = (0, 2, 3, 1)  # doubled, in the field of four elements
TYPES: tuple[Stored, ...] = ("float16", "int8", "int4", "float16")

pytestmark = [NEEDS_BUILDER, pytest.mark.slow]


class Row(NamedTuple):
    """A combination to compile."""

    encoder: str
    decoder: str
    sm: str
    stored: Stored


@pytest.fixture(scope="session")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cuts]:
    """One folder for all processes of a run."""
    base = tmp_path_factory.getbasetemp()
    parallel = "PYTEST_XDIST_WORKER" in os.environ  # whose folders lie in the run's
    with shared_cuts((base.parent if parallel else base) / "cuts") as found:
        yield found


def chosen() -> list[Row]:
    """Each pair once: sixteen rows."""
    return [
        Row(encoder, decoder, SMS[i ^ j], TYPES[i ^ TURNED[j]])
        for i, encoder in enumerate(ENCODERS)
        for j, decoder in enumerate(DECODERS)
    ]


def diagonal() -> list[Row]:
    """Each encoder, each decoder and each architecture once, in float16."""
    return [Row(*names, "float16") for names in zip(ENCODERS, DECODERS, SMS, strict=True)]


ROWS = (
    [Row(*row) for row in itertools.product(ENCODERS, DECODERS, SMS, STORED)] if ALL else chosen()
)
PLAIN = [row for row in ROWS if row.stored == "float16"] if ALL else diagonal()

DEMO: list[tuple[str, Stored]] = (
    list(itertools.product(SMS, STORED))
    if ALL
    else [*((sm, STORED[0]) for sm in SMS), *zip(SMS, STORED[1:], strict=False)]
)


def only_decoders(rows: Sequence[Row]) -> list[Row]:
    """Without those that differ in the encoder alone."""
    return list({row[1:]: row for row in rows}.values())


def compiles(
    graph: Path, sm: str, profiles: Sequence[Profile], folder: Path, least: float = 1.0
) -> None:
    """Into one engine, which has all of the graph's weights but constants."""
    compiled = engine_from_onnx(graph, folder / graph.name, sm, profiles)
    for path in folder.iterdir():  # up to a gigabyte, and pytest keeps folders
        path.unlink()
    weights = sum(
        value.const_value.nbytes
        for value in onnx_ir.load(graph).graph.initializers.values()
        if value.const_value is not None
    )
    assert compiled.engine_bytes > least * weights


def decoder_compiles(graph: Path, sm: str, manifest: Manifest, folder: Path) -> None:
    sizes = engine_sizes(manifest, max_decode=MAX_DECODE)
    compiles(graph, sm, decoder_profiles(manifest, sizes), folder)


def test_the_chosen_rows_cover_every_two_factors() -> None:
    for first, second in itertools.combinations(range(4), 2):
        whole = [sorted({row[place] for row in chosen()}) for place in (first, second)]
        met = {(row[first], row[second]) for row in chosen()}
        assert met == set(itertools.product(*whole))
    assert {row.stored for row in chosen()} == set(STORED)
    assert len(chosen()) == 16


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_the_vision_graph_of_a_pair(row: Row, cuts: Cuts, tmp_path: Path) -> None:
    manifest = manifest_of(cut_config(row.encoder, row.decoder), CACHE_SLOTS)
    graph = cuts.vision(row.encoder, row.decoder, "native", row.stored)
    compiles(graph, row.sm, [vision_profile(manifest)], tmp_path)


@pytest.mark.parametrize("row", only_decoders(ROWS), ids="-".join)
def test_a_decoder(row: Row, cuts: Cuts, tmp_path: Path) -> None:
    manifest = manifest_of(cut_config(row.encoder, row.decoder), CACHE_SLOTS)
    graph = cuts.decoder(row.decoder, "native", row.stored)
    decoder_compiles(graph, row.sm, manifest, tmp_path)


@pytest.mark.parametrize("row", PLAIN, ids="-".join)
def test_a_portable_vision_graph(row: Row, cuts: Cuts, tmp_path: Path) -> None:
    manifest = manifest_of(cut_config(row.encoder, row.decoder), None)
    graph = cuts.vision(row.encoder, row.decoder, "portable", row.stored)
    compiles(graph, row.sm, [vision_profile(manifest)], tmp_path)


@pytest.mark.parametrize("row", only_decoders(PLAIN), ids="-".join)
def test_a_portable_decoder(row: Row, cuts: Cuts, tmp_path: Path) -> None:
    manifest = manifest_of(cut_config(row.encoder, row.decoder), None)
    graph = cuts.decoder(row.decoder, "portable", row.stored)
    decoder_compiles(graph, row.sm, manifest, tmp_path)


@pytest.mark.parametrize(("sm", "stored"), DEMO)
def test_the_demo_model(sm: str, stored: Stored, cuts: Cuts, tmp_path: Path) -> None:
    manifest = cuts.demo_manifest()
    compiles(cuts.demo(VISION_GRAPH, stored), sm, [vision_profile(manifest)], tmp_path)
    decoder_compiles(cuts.demo(DECODER_GRAPH, stored), sm, manifest, tmp_path)


def test_projections_put_into_a_traced_graph_are_those_that_are_traced(
    cuts: Cuts, tmp_path: Path
) -> None:
    encoder, decoder = "tinyclip-40m", "tinyllama-1.1b"
    config = cut_config(encoder, decoder)
    path = tmp_path / "traced.onnx"
    write_graph(vision_onnx_from_weights(config, tiled_weights(config), "float16"), path)
    made = cuts.vision(encoder, decoder, "portable", "float16")
    assert outline(onnx_ir.load(made)) == outline(onnx_ir.load(path))


def outline(model: onnx_ir.Model) -> list[object]:
    """All of a graph but the values of large constants, and the numbers in torch's names."""
    numbered: dict[str, str] = {}

    def named(value: onnx_ir.Value | None) -> str:
        name = value.name if value and value.name else ""
        if name.startswith("val_"):  # counted as it traced, what came to nothing included
            return numbered.setdefault(name, f"val {len(numbered)}")
        return name

    nodes = [
        (
            node.op_type,
            [named(value) for value in node.inputs],
            [named(value) for value in node.outputs],
            {name: str(attribute.value) for name, attribute in node.attributes.items()},
        )
        for node in model.graph
    ]
    constants = sorted(
        (named(value), str(value.dtype), str(value.shape), small(value))
        for value in model.graph.initializers.values()
    )
    ends = [
        (value.name, str(value.dtype), str(value.shape))
        for value in (*model.graph.inputs, *model.graph.outputs)
    ]
    return [constants, nodes, ends]


def small(value: onnx_ir.Value) -> str:
    tensor = value.const_value
    return str(tensor.numpy().tolist()) if tensor is not None and tensor.size < 100 else ""
