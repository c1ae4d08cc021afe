"""Memory and floors of time against section 4's formulas, written out here once more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from himix_edge.analysis.devices import DEVICES, GIB, device
from himix_edge.analysis.memory import Setting, memory, setting_for
from himix_edge.analysis.plan import DESIGNS, plan_report, plan_text
from himix_edge.errors import ConfigError
from himix_edge.presets import DECODERS, ENCODERS, preset_config

# SigLIP so400m at 384 with Qwen2-0.5B, a question of 64 tokens, 1024 tokens at most.
W, I_V, N, LAYERS_RUN, HEADS_V = 1152, 4304, 729, 26, 16
h, L, H, K, d, INNER, V = 896, 24, 14, 2, 64, 4864, 151936
M, MOST = 64, 1024
S = N + MOST
PROMPT = 512  # the longest step that engines take

ENCODER_LAYERS = LAYERS_RUN * (4 * W * W + 2 * W * I_V)
ENCODER_REST = 3 * 14 * 14 * W + W + N * W + LAYERS_RUN * (4 * W + I_V + W + 4 * W)
PROJECTIONS = 2 * L * W * K * d
CONNECTOR = W * h + h + h * h + h
LAYERS = L * (2 * h * H * d + 2 * h * K * d + 3 * h * INNER)
LAYERS_REST = L * (H * d + 2 * K * d + 2 * h) + h
TABLE = V * h  # embedding and head in one
SLOT = 2 * L * K * d
LIBRARIES = 512 << 20


def config(decoder: str = "qwen2-0.5b", design: Any = "himix") -> Any:
    return preset_config("siglip-so400m-384", decoder, design)


def report(on: str, **changes: Any) -> dict[str, Any]:
    return plan_report(on, config(), "a pair", setting_for(on, **changes))


def step_products(tokens: int, slots: int) -> int:
    """2TL(2hHd + 2hKd) + 4TSHdL + 6TLhI, and the logits of one token."""
    attention = 2 * tokens * L * (2 * h * H * d + 2 * h * K * d) + 4 * tokens * slots * H * d * L
    return attention + 6 * tokens * L * h * INNER + 2 * h * V


def test_memory_in_float16() -> None:
    for design, injection, tokens in (
        ("himix", PROJECTIONS, PROMPT),
        ("vanilla", CONNECTOR, N + PROMPT),
    ):
        found = report("orin-nano-8gb")["designs"][design]["bytes"]
        seeing = N * (2 * W + 2 * I_V)
        reading = tokens * (2 * h + 2 * INNER)
        expected = {
            "encoder": 2 * (ENCODER_LAYERS + ENCODER_REST),
            "injection": 2 * injection,
            "decoder": 2 * (LAYERS + LAYERS_REST + TABLE),
            "cache": 2 * SLOT * S,
            "activations": 2 * max(seeing, reading),
            "libraries": LIBRARIES,
        }
        assert {name: found[name] for name in expected} == expected
        assert found["run"] == sum(expected.values())
        assert found["weights"] == sum(list(expected.values())[:3])
        # Three copies, half a one to try kernels in, and the libraries.
        assert found["build"] == 3 * expected["decoder"] + expected["decoder"] // 2 + LIBRARIES


def test_the_portable_dialect_holds_two_caches_and_unfused_scores() -> None:
    found = report("orin-nano-8gb", target_name="jetpack-6.2")["designs"]["himix"]["bytes"]
    assert found["cache"] == 2 * 2 * SLOT * S
    seeing = N * (2 * 2 * W + max(2 * 4 * W + 4 * N * HEADS_V, 2 * 2 * I_V))
    reading = PROMPT * (2 * 2 * h + max(2 * (2 * H * d + 2 * K * d) + 4 * S * H, 2 * 2 * INNER))
    assert found["activations"] == max(seeing, reading) == reading


def test_clips_class_token_is_a_token() -> None:
    pair = preset_config("tinyclip-40m", "smollm2-360m")
    found = memory(pair, Setting("rtx", "native", "float16", text_tokens=4, max_text=8))
    assert found.activations == 2 * 50 * (2 * 512 + 2 * 2048)  # 49 patches; 8 tokens take less


@pytest.mark.parametrize(("storage", "bits"), [("int4", 4), ("int8", 8), ("fp8", 8)])
def test_stored_weights_of_native_graphs(storage: str, bits: int) -> None:
    """A scale in fp16 for 64 weights of the decoder's; none that counts for vision's."""
    found = report("orin-nano-8gb", vision=storage, weights=storage)["designs"]["himix"]["bytes"]
    assert found["encoder"] == ENCODER_LAYERS * bits // 8 + 2 * ENCODER_REST
    assert found["injection"] == PROJECTIONS * bits // 8
    assert found["decoder"] == LAYERS * bits // 8 + LAYERS // 64 * 2 + 2 * (LAYERS_REST + TABLE)


def test_stored_weights_for_onnx_runtime() -> None:
    """A scale in fp32 and a zero point for 128; the table in int8; everything else in fp32."""
    found = report("raspberry-pi-5", weights="int4")
    assert found["setting"]["dialect"] == "ort"
    found = found["designs"]["himix"]["bytes"]
    layers = LAYERS // 2 + (LAYERS // 128 * 36) // 8
    rotary = 32768 * d * 4  # cosines and sines of every position
    assert found["decoder"] == layers + TABLE + TABLE // 128 * 5 + 4 * LAYERS_REST + rotary
    assert found["encoder"] == 4 * (ENCODER_LAYERS + ENCODER_REST)
    assert found["cache"] == 4 * SLOT * (S + N)  # the image's slots twice
    assert (found["libraries"], found["build"]) == (0, None)


def test_untied_tables_count_twice() -> None:
    tables = 2 * 32000 * 2048
    layers = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632 + 2 * 2048) + 2048
    found = memory(config("tinyllama-1.1b"), setting_for("h100"))
    assert found.decoder == 2 * (tables + layers)


# Both graphs of real exports, docs/measurements/full-size.md.
MEASURED = [
    ("siglip-so400m-384", "qwen2-0.5b", Setting("cpu", "portable", "float32"), 3.598e9),
    ("siglip-so400m-384", "tinyllama-1.1b", Setting("cpu", "portable", "float32"), 6.04e9),
    ("siglip-so400m-384", "llama-3.2-3b", Setting("cpu", "portable", "float32"), 14.71e9),
    ("tinyclip-39m", "qwen2-0.5b", Setting("cpu", "portable", "float16"), 1.07e9),
    ("siglip-so400m-384", "qwen2-0.5b", Setting("cpu", "ort", "float32", "int8", "int4"), 0.754e9),
    ("siglip-so400m-384", "qwen2-0.5b", Setting("cpu", "ort", "float32", None, "int4"), 1.964e9),
]


@pytest.mark.parametrize(("encoder", "decoder", "setting", "measured"), MEASURED)
def test_weights_are_those_of_real_exports(
    encoder: str, decoder: str, setting: Setting, measured: float
) -> None:
    """To a hundredth: the files hold the graphs too, and their sizes are printed rounded."""
    ours = memory(preset_config(encoder, decoder), setting).weights
    assert abs(ours - measured) < 0.01 * measured


def test_floors_of_himix_and_vanilla() -> None:
    rate, bandwidth = 10e12, 68e9  # Orin Nano 8GB
    seeing = 2 * N * 3 * 14 * 14 * W + LAYERS_RUN * (
        8 * N * W * W + 4 * N * W * I_V + 4 * N * N * W
    )
    read = 2 * (LAYERS + LAYERS_REST + TABLE)
    expected = {
        "himix": [
            (seeing, 2 * (ENCODER_LAYERS + ENCODER_REST)),
            (4 * N * L * W * K * d, 2 * PROJECTIONS + 2 * SLOT * N),
            (step_products(M, N + M), read + 2 * M * h + 2 * SLOT * (N + M)),
        ],
        "vanilla": [
            (seeing, 2 * (ENCODER_LAYERS + ENCODER_REST)),
            (2 * N * h * (W + h), 2 * CONNECTOR),
            (step_products(N + M, N + M), read + 2 * M * h + 2 * SLOT * (N + M)),
        ],
    }
    found = report("orin-nano-8gb")
    assert list(found["designs"]) == list(DESIGNS)
    for design, phases in expected.items():
        shown = found["designs"][design]
        assert [(p["operations"], p["bytes"]) for p in shown["first_token"]] == phases
        seconds = [max(work / rate, moved / bandwidth) for work, moved in phases]
        assert [p["seconds"] for p in shown["first_token"]] == pytest.approx(seconds, rel=1e-12)
        assert shown["first_token_seconds"] == pytest.approx(sum(seconds), rel=1e-12)
        for key, slots in (("second_token", N + M + 1), ("last_token", S)):
            work, moved = step_products(1, slots), read + 2 * h + 2 * SLOT * slots
            assert (shown[key]["operations"], shown[key]["bytes"]) == (work, moved)
            assert shown[key]["seconds"] == pytest.approx(moved / bandwidth, rel=1e-12)
            assert shown[key]["bound"] == "memory"
    bounds = [phase["bound"] for phase in found["designs"]["himix"]["first_token"]]
    assert bounds == ["compute", "compute", "memory"]
    bounds = [phase["bound"] for phase in found["designs"]["vanilla"]["first_token"]]
    assert bounds == ["compute", "compute", "compute"]


def test_int8_pictures_run_at_int8s_rate_and_stored_decoder_weights_at_the_dtypes() -> None:
    plain = report("agx-orin-64gb")["designs"]["himix"]["first_token"]
    stored = report("agx-orin-64gb", vision="int8", weights="int8")["designs"]["himix"]
    assert stored["first_token"][0]["seconds"] == pytest.approx(plain[0]["seconds"] / 2, rel=1e-12)
    assert stored["first_token"][2]["operations"] == plain[2]["operations"]
    on_cpu = report("cpu", weights="int8", text_tokens=900)["designs"]["himix"]["first_token"][2]
    assert on_cpu["bound"] == "compute"
    assert on_cpu["seconds"] == pytest.approx(on_cpu["operations"] / 1.536e12, rel=1e-12)
    large = report("agx-orin-64gb", weights="int8", text_tokens=900)["designs"]["himix"]
    prefill = large["first_token"][2]
    assert prefill["seconds"] == pytest.approx(prefill["operations"] / 42.5e12, rel=1e-12)


def test_a_floor_is_never_above_what_more_of_a_device_allows() -> None:
    slow, fast = (
        report(name)["designs"]["himix"] for name in ("orin-nano-8gb", "orin-nano-8gb-super")
    )
    assert fast["first_token_seconds"] < slow["first_token_seconds"]
    assert fast["second_token"]["seconds"] == pytest.approx(
        slow["second_token"]["seconds"] * 68 / 102, rel=1e-12
    )


def test_what_fits() -> None:
    small = plan_report(
        "orin-nano-8gb", config("llama-3.2-3b"), "a pair", setting_for("orin-nano-8gb")
    )["designs"]["himix"]
    assert (small["fits"], small["build_fits"]) == (False, False)
    middle = plan_report(
        "orin-nano-8gb", config("llama-3.2-1b"), "a pair", setting_for("orin-nano-8gb")
    )["designs"]["himix"]
    assert (middle["fits"], middle["build_fits"]) == (True, False)
    large = plan_report("thor-t5000", config("vicuna-7b"), "a pair", setting_for("thor-t5000"))[
        "designs"
    ]["himix"]
    assert (large["fits"], large["build_fits"]) == (True, True)
    # A card's memory holds less of a build than a board's, which holds the host's part too.
    card = report("rtx-4060")["designs"]["himix"]["bytes"]
    assert card["build"] == card["decoder"] + card["decoder"] // 2 + LIBRARIES


def test_the_text_shows_both_designs() -> None:
    shown = plan_text(report("orin-nano-8gb")).splitlines()
    rows = {line[:36].strip(): line[36:].split() for line in shown}
    assert rows["cache"] == ["22", "22"]
    assert rows["decoder"] == ["988", "988"]
    assert rows["prefill"] == ["62.19", "compute", "14.68", "memory"]
    assert rows["second token"] == ["14.67", "memory", "14.67", "memory"]
    assert rows["so does the build"] == ["yes", "yes"]
    assert "Computed from dimensions and data sheets, not measured." in "\n".join(shown)
    on_cpu = plan_text(report("raspberry-pi-5"))
    assert "build" not in on_cpu
    assert "CUDA" not in on_cpu
    assert "Not verified: 4 Cortex-A76" in on_cpu
    refused = plan_text(
        plan_report("orin-nano-8gb", config("vicuna-7b"), "a pair", setting_for("orin-nano-8gb"))
    )
    [line] = [line for line in refused.splitlines() if "so does the build" in line]
    assert line.split()[-2:] == ["NO", "NO"]


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"target_name": "jetpack-6"}, "did you mean 'jetpack-6.2'?"),
        ({"target_name": "rtx"}, "orin-nano-8gb is no device for rtx"),
        ({"dtype": "float61"}, "did you mean 'float16'?"),
        ({"dtype": "float32"}, "no rate of Jetson Orin Nano 8GB, 15 W is known in float32"),
        ({"vision": "int3"}, "did you mean 'int"),
        ({"weights": "q4"}, "use one of: int8, int4, fp8"),
        ({"text_tokens": 0}, "expected 1 to 1023"),
        ({"text_tokens": 1024}, "found 1024"),
        ({"max_text": 40000}, "expected at most 32039 tokens beside the image"),
    ],
)
def test_what_can_not_be_planned(changes: dict[str, Any], saying: str) -> None:
    with pytest.raises(ConfigError) as caught:
        report("orin-nano-8gb", **changes)
    assert saying in str(caught.value)


def test_every_device_is_whole() -> None:
    for name, entry in DEVICES.items():
        assert entry.memory_bytes % GIB == 0
        assert 0 < entry.reserved_bytes < entry.memory_bytes
        assert entry.sources or entry.unverified
        assert (entry.compute_capability is None) == (entry.targets == ("cpu",))
        assert 5e9 < entry.bandwidth < 5e12
        assert entry.rates["int8"] >= 2 * max(
            rate for kind, rate in entry.rates.items() if kind != "int8"
        )
        for target_name in entry.targets:
            setting = setting_for(name, target_name)
            assert memory(config(), setting).run > 1e9
    assert device("agx-orin-64gb").rates["int8"] == 85e12  # half of 170, which are sparse


def test_the_command(himix: Any) -> None:
    done = himix("plan", "--device", "orin-nano-8gb", "--encoder", "tinyclip-39m", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["model"] == "tinyclip-39m + qwen2-0.5b"
    assert found["image_tokens"] == 196
    assert found["designs"]["himix"]["bytes"]["cache"] == 2 * SLOT * (196 + 1024)
    done = himix(
        "plan", "--device", "rtx-4090", "--decoder", "llama-3.2-1b", "--weights", "int4",
        "--vision", "int8", "--dtype", "bfloat16", "--target", "tensorrt", "--text", 20,
        "--max-text", 500,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "tensorrt: native graphs in bfloat16; vision graph in int8, decoder in int4" in done.out
    assert "729 image tokens, 20 of the question, 500 of question and answer" in done.out


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        (["--device", "orin-nano"], "did you mean 'orin-nano-8gb'?"),
        (["--device", "h100", "--encoder", "siglip-so400m"], "did you mean 'siglip-so400m-384'?"),
        (["--device", "h100", "--decoder", "no/such/folder"], "no/such/folder"),
    ],
)
def test_the_command_refuses(himix: Any, arguments: list[str], saying: str) -> None:
    done = himix("plan", *arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: ")
    assert saying in done.err


def test_every_pair_of_presets_can_be_planned() -> None:
    """Where the image is large, HiMix's first token comes sooner whatever the decoder is."""
    for encoder in ENCODERS:
        for decoder in DECODERS:
            pair = preset_config(encoder, decoder)
            found = plan_report("orin-nx-8gb", pair, "a pair", setting_for("orin-nx-8gb"))[
                "designs"
            ]
            himix, vanilla = (found[design]["first_token_seconds"] for design in DESIGNS[::-1])
            assert himix > 0
            assert himix < vanilla or encoder != "siglip-so400m-384"
