"""Every floor against its formula, written out for a tiny model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from himix_edge.analysis import sizes
from himix_edge.analysis.floors import stored_bytes
from himix_edge.bench.bounds import Floor, floors
from himix_edge.bench.limits import Limits
from himix_edge.bench.measure import Measurement
from himix_edge.contract import FileRecord, Manifest, Quantization

# h = 32, I = 64, L = 2, H = 4, K = 2, d = 8, V = 300
# d_v = 32, 64 within, 2 layers, N = 4 and a class token
ENCODER = 2 * 4 * 3 * 14 * 14 * 32 + 2 * (8 * 5 * 32 * 32 + 4 * 5 * 32 * 64 + 4 * 5 * 5 * 32)
PROJECTIONS = 4 * 4 * 32 * 16 * 2
SLOT = 2 * 2 * 16 * 4  # bytes of a slot in fp32
COMPUTE = Limits(1e15, 1e9, 4e9)  # so much bandwidth that products decide
MEMORY = Limits(1e6, 1e15, 1e15)


def step(tokens: int, slots: int) -> int:
    """2TL(2hHd + 2hKd) + 4TSHdL, 6TLhI, 2hV"""
    attention = 2 * tokens * 2 * (2 * 32 * 32 + 2 * 32 * 16) + 4 * tokens * slots * 32 * 2
    return attention + 6 * tokens * 2 * 32 * 64 + 2 * 32 * 300


def milliseconds(floor: Floor) -> tuple[float, float]:
    return floor.fp32, floor.int8


def test_floors_of_products(measured: Measurement) -> None:
    found = floors(measured, "himix", COMPUTE)
    work = {
        "vision": ENCODER,
        "projection": PROJECTIONS,
        "prefill": step(64, 68),
        "first_token": ENCODER + PROJECTIONS + step(64, 68),
        "first_decode": step(1, 69),
        "decode_short": step(1, 77),
        "decode_long": step(1, 212),
    }
    assert list(found) == list(work)
    for phase, operations in work.items():
        expected = (operations / 1e6, operations / 4e6)
        assert milliseconds(found[phase]) == pytest.approx(expected, rel=1e-12, abs=0), phase
        assert (found[phase].fp32_bound, found[phase].int8_bound) == ("compute", "compute")


def test_vanilla_pushes_the_image_through_the_decoder(measured: Measurement) -> None:
    found = floors(measured, "vanilla", COMPUTE)
    assert "projection" not in found
    assert found["prefill"].fp32 == pytest.approx(step(68, 68) / 1e6, rel=1e-12, abs=0)
    both = (ENCODER + step(68, 68)) / 1e6
    assert found["first_token"].fp32 == pytest.approx(both, rel=1e-12, abs=0)
    assert found["decode_long"] == floors(measured, "himix", COMPUTE)["decode_long"]


def test_floors_of_memory(measured: Measurement) -> None:
    found = floors(measured, "himix", MEMORY)
    count = sizes.parameters(measured.manifest.config)
    projections = 101_000 * count.injection // (count.encoder + count.injection)
    moved = {
        "vision": 101_000 - projections,
        "projection": projections + 4 * SLOT,
        "prefill": 202_000 + 68 * SLOT,
        "first_decode": 202_000 + 69 * SLOT,
        "decode_short": 202_000 + 77 * SLOT,
        "decode_long": 202_000 + 212 * SLOT,
    }
    for phase, count_of in moved.items():
        expected = (count_of / 1e3, count_of / 1e3)
        assert milliseconds(found[phase]) == pytest.approx(expected, rel=1e-12, abs=0), phase
        assert found[phase].fp32_bound == found[phase].int8_bound == "memory"


def test_an_unknown_share_puts_both_into_vision(measured: Measurement) -> None:
    found = floors(dataclasses.replace(measured, projection_share=None), "himix", COMPUTE)
    assert "projection" not in found
    assert found["vision"].fp32 == pytest.approx((ENCODER + PROJECTIONS) / 1e6, rel=1e-12, abs=0)
    assert found["first_token"] == floors(measured, "himix", COMPUTE)["first_token"]


def test_a_sum_says_what_bounds_it() -> None:
    compute, memory = Floor(1, 2, "compute", "memory"), Floor(3, 4, "memory", "memory")
    assert compute + memory == Floor(4, 6, "both", "memory")


def test_the_weights_of_a_real_bundle(tiny_bundle: Path) -> None:
    """Its files hold the parameters and, besides, only the graphs."""
    manifest = Manifest.read(tiny_bundle)
    stored, count = stored_bytes(manifest), sizes.parameters(manifest.config)
    graphs = {name: (tiny_bundle / f"{name}.onnx").stat().st_size for name in ("vision", "decoder")}
    assert 4 * count.decoder <= stored.step <= 4 * count.decoder + graphs["decoder"]
    vision = stored.vision + stored.projections
    assert 4 * (count.encoder + count.injection) <= vision + 4 * 64
    decoder = manifest.config.decoder
    numbers = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    assert stored.slot == 4 * numbers


def test_a_graph_for_prompts_is_read_by_prompts_alone(measured: Measurement) -> None:
    files = measured.manifest.files | {"prefill.onnx.data": FileRecord("f", 500_000)}
    manifest = dataclasses.replace(measured.manifest, files=files)
    found = floors(dataclasses.replace(measured, manifest=manifest), "himix", MEMORY)
    assert found["prefill"].fp32 == pytest.approx((500_000 + 68 * SLOT) / 1e3, rel=1e-12, abs=0)
    decode = (202_000 + 69 * SLOT) / 1e3
    assert found["first_decode"].fp32 == pytest.approx(decode, rel=1e-12, abs=0)


def untied(manifest: Manifest, **changes: object) -> Manifest:
    decoder = dataclasses.replace(manifest.config.decoder, tie_word_embeddings=False)
    config = dataclasses.replace(manifest.config, decoder=decoder)
    return dataclasses.replace(manifest, config=config, **changes)  # type: ignore[arg-type]


def test_an_embedding_of_its_own_is_not_read(measured: Measurement) -> None:
    manifest = measured.manifest
    assert stored_bytes(manifest).step == 202_000
    assert stored_bytes(untied(manifest)).step == 202_000 - 300 * 32 * 4
    in_int4 = Quantization(None, "int4", 32, "rtn", {})
    quantized = untied(manifest, dialect="ort", quantization=in_int4)
    assert stored_bytes(quantized).step == 202_000 - 300 * (32 + 5)
    narrow = dataclasses.replace(in_int4, head="int4")
    quantized = untied(manifest, dialect="ort", quantization=narrow)
    assert stored_bytes(quantized).step == 202_000 - 300 * (16 + 4.5)
    wide_blocks = dataclasses.replace(
        in_int4, block_size=64
    )  # don't divide its rows: left as it is
    quantized = untied(manifest, dialect="ort", quantization=wide_blocks)
    assert stored_bytes(quantized).step == 202_000 - 300 * 32 * 4
