"""How a bundle's graphs are quantized: its dialect and its type say for which runtime.

ort, float32           ONNX Runtime on a CPU: see quantize.py and quantize_vision.py
portable, float16      TensorRT 10.3: int8, see weight_only.py
native, float16        later TensorRT, TensorRT for RTX: int8, int4, fp8
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from himix_edge.contract import Dialect, Manifest
from himix_edge.errors import BundleError, ConfigError, closest
from himix_edge.export.quantize import (
    BITS,
    METHODS,
    DecoderQuantization,
    quantized_decoder,
)
from himix_edge.export.quantize_vision import quantized_vision
from himix_edge.export.sessions import Opener, lean_session, packed_session
from himix_edge.export.symmetric import LIMITS
from himix_edge.export.weight_only import WeightOnly, quantize_weights

_NOT_PORTABLE = {
    "int4": "ONNX has since opset 21",
    "fp8": "takes a GPU of compute capability 8.9 or later, and those run the native dialect",
}


@dataclass(frozen=True)
class WeightChoice:
    """What becomes of each part.

    Attributes:
        vision, decoder: "int8", "int4" or "fp8"; None leaves it as it is.
        block_size: how many weights share a scale; None is what suits the runtime.
        method: how the decoder's weights are rounded, "rtn" or "gptq"; None is gptq in ONNX
            Runtime, and rtn for TensorRT.
        head: "int8" or "int4", of an int8 or int4 decoder's head and embedding in ONNX Runtime;
            None is int8.
        bits: a weight that an int4 decoder's layers may take on average in ONNX Runtime, scales
            counted; None is 4 and the scales.
        prefill: "int8" for a second copy of an int4 decoder's layers, with which prompts are read.
    """

    vision: str | None = None
    decoder: str | None = None
    block_size: int | None = None
    method: str | None = None
    head: str | None = None
    prefill: str | None = None
    bits: float | None = None

    def __post_init__(self) -> None:
        if self.vision is None and self.decoder is None:
            raise ConfigError(
                "nothing is to be quantized", fix="add --decoder int4, or --vision int8"
            )
        if self.method is not None and self.method not in METHODS:
            raise ConfigError(
                f"no quantization method {self.method!r}", fix=closest(self.method, METHODS)
            )
        if self.method == "gptq" and self.decoder is None:
            raise ConfigError(
                f"{self.method} is for the decoder", fix="add --decoder int4, or use --method rtn"
            )
        if self.head is not None and self.decoder is None:
            raise ConfigError("the head is the decoder's", fix="add --decoder int4, or int8")
        if self.bits is not None and self.decoder != "int4":
            raise ConfigError("bits is for an int4 decoder", fix="add --decoder int4")
        if self.prefill is not None and (self.prefill, self.decoder) != ("int8", "int4"):
            raise ConfigError(
                "a second copy for prompts means nothing here",
                expected="an int8 copy of an int4 decoder",
                found=f"{self.prefill} of {self.decoder or 'a decoder as exported'}",
                fix="use --decoder int4 --prefill int8",
            )


@dataclass(frozen=True)
class Recipe:
    """What makes a bundle's graphs into quantized ones.

    Attributes:
        block_size: of the weights that share a scale; None where none do.
        open_session: opens a quantized graph to be measured.
        vision: (source, target); None leaves the graph as it is.
        decoder: (source, target, calibration=, progress=), likewise.
        prefill: makes the decoder's second copy, likewise; None is no copy.
        calibrated: whether decoder or prefill read calibration inputs.
        method: how the decoder's weights are rounded; None where they aren't.
    """

    block_size: int | None
    open_session: Opener
    vision: Callable[[Path, Path], None] | None
    decoder: Callable[..., None] | None
    prefill: Callable[..., None] | None = None
    calibrated: bool = False
    method: str | None = None


def recipe_for(bundle: Path, manifest: Manifest, choice: WeightChoice) -> Recipe:
    """What a bundle's dialect and type ask for.

    Raises:
        BundleError: a bundle that can't be quantized.
        ConfigError: a choice that its runtime has no use for.
    """
    kind = (manifest.dialect, manifest.dtype)
    if manifest.quantization is None:
        if kind == ("ort", "float32"):
            return _for_onnx_runtime(choice)
        if kind in (("portable", "float16"), ("native", "float16")):
            return _for_tensorrt(choice, manifest.dialect)
    raise BundleError(
        f"{bundle} can't be quantized",
        expected="an ort bundle in float32, or a portable or native one in float16",
        found=str(manifest.quantization or f"{manifest.dialect}, {manifest.dtype}"),
        fix="quantize one that himix-edge export made, for a CPU with: --target cpu",
    )


def _for_onnx_runtime(choice: WeightChoice) -> Recipe:
    """Blocks of int4, or products in int8."""
    _require("vision encoder", choice.vision, ["int8"])
    _require("decoder", choice.decoder, BITS)
    _require("head", choice.head, BITS)
    vision = quantized_vision if choice.vision else None
    if choice.decoder is None:
        if choice.block_size is not None:
            raise ConfigError("block_size is for the decoder", fix="leave it out, or add --decoder")
        return Recipe(None, packed_session, vision, None)
    size = DecoderQuantization.block_size if choice.block_size is None else choice.block_size
    head = choice.head or DecoderQuantization.head
    method = choice.method or "gptq"
    how = DecoderQuantization(choice.decoder, size, method, head, choice.bits)  # type: ignore[arg-type]
    prompts = DecoderQuantization("int8", size, how.method, how.head) if choice.prefill else None
    return Recipe(
        size,
        packed_session,
        vision,
        partial(quantized_decoder, how=how),
        partial(quantized_decoder, how=prompts) if prompts else None,
        calibrated=how.is_calibrated or prompts is not None,
        method=method,
    )


def _for_tensorrt(choice: WeightChoice, dialect: Dialect) -> Recipe:
    """DequantizeLinear in front of products in float16.

    The session that measures packs no weights: it would round activations to int8 as well.
    """
    for option in ("head", "prefill", "bits"):
        if getattr(choice, option) is not None:
            raise ConfigError(
                f"{option} is for ONNX Runtime on a CPU", fix="leave it out, or export --target cpu"
            )
    parts = {"vision encoder": choice.vision, "decoder": choice.decoder}
    for part, weights in parts.items():
        _require(part, weights, LIMITS)
        if dialect == "portable" and weights not in (None, "int8"):
            raise ConfigError(
                f"the {part} of a portable bundle can't be {weights}",
                expected="int8",
                found=f"{weights}, which {_NOT_PORTABLE[weights]}",
                fix="export with --target jetpack-7.2, and quantize that bundle",
            )
    in_blocks = "int4" in parts.values()
    if choice.block_size is not None and not in_blocks:
        raise ConfigError(
            "block_size means nothing here",
            expected="int4 weights",
            found="others, with a scale to each output",
            fix="leave it out",
        )
    size = WeightOnly.block_size if choice.block_size is None else choice.block_size

    method = choice.method or "rtn"

    def quantizer(weights: str | None, method: str = "rtn") -> Callable[..., None] | None:
        if weights is None:
            return None
        how = WeightOnly(weights, size, method)  # type: ignore[arg-type]
        return partial(quantize_weights, how=how)

    vision, decoder = quantizer(choice.vision), quantizer(choice.decoder, method)
    return Recipe(
        size if in_blocks else None,
        lean_session,
        vision,
        decoder,
        calibrated=method == "gptq",
        method=method if choice.decoder else None,
    )


def _require(part: str, weights: str | None, types: Iterable[str]) -> None:
    if weights is not None and weights not in types:
        raise ConfigError(f"the {part} can't be {weights!r}", fix=closest(weights, types))
