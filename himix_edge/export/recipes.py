"""How a bundle's graphs are quantized: its dialect and its type say for which runtime.

portable, float32      ONNX Runtime: the ort dialect, see quantize.py
portable, float16      TensorRT 10.3: int8, see weight_only.py
native, float16        later TensorRT, TensorRT for RTX: int8, int4, fp8
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from himix_edge.contract import Dialect, Manifest
from himix_edge.errors import BundleError, ConfigError, closest
from himix_edge.export.onnx import WEIGHTS_SUFFIX
from himix_edge.export.quantize import (
    BITS,
    METHODS,
    DecoderQuantization,
    quantized_decoder,
    quantized_vision,
)
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
        method: how the decoder's weights are rounded, "rtn" or "gptq".
    """

    vision: str | None = None
    decoder: str | None = None
    block_size: int | None = None
    method: str = "rtn"

    def __post_init__(self) -> None:
        if self.vision is None and self.decoder is None:
            raise ConfigError(
                "nothing is to be quantized", fix="add --decoder int4, or --vision int8"
            )
        if self.method not in METHODS:
            raise ConfigError(
                f"no quantization method {self.method!r}", fix=closest(self.method, METHODS)
            )
        if self.method != "rtn" and self.decoder is None:
            raise ConfigError(
                f"{self.method} is for the decoder", fix="add --decoder int4, or use --method rtn"
            )


@dataclass(frozen=True)
class Recipe:
    """What makes a bundle's graphs into quantized ones.

    Attributes:
        dialect: of the quantized bundle.
        block_size: of the weights that share a scale; None where none do.
        open_session: opens a quantized graph to be measured.
        vision: (source, target); None leaves the graph as it is.
        decoder: (source, target, calibration=, progress=), likewise.
    """

    dialect: Dialect
    block_size: int | None
    open_session: Opener
    vision: Callable[[Path, Path], None] | None
    decoder: Callable[..., None] | None


def recipe_for(bundle: Path, manifest: Manifest, choice: WeightChoice) -> Recipe:
    """What a bundle's dialect and type ask for.

    Raises:
        BundleError: a bundle that can't be quantized.
        ConfigError: a choice that its runtime has no use for.
    """
    kind = (manifest.dialect, manifest.dtype)
    if manifest.quantization is None:
        if kind == ("portable", "float32"):
            return _for_onnx_runtime(choice)
        if kind in (("portable", "float16"), ("native", "float16")):
            return _for_tensorrt(choice, manifest.dialect)
    raise BundleError(
        f"{bundle} can't be quantized",
        expected="a portable bundle in float32 or float16, or a native one in float16",
        found=str(manifest.quantization or f"{manifest.dialect}, {manifest.dtype}"),
        fix="quantize the one that himix-edge export made",
    )


def _for_onnx_runtime(choice: WeightChoice) -> Recipe:
    """MatMulNBits, and dynamic int8 for the vision graph."""
    _require("vision encoder", choice.vision, ["int8"])
    _require("decoder", choice.decoder, BITS)
    vision = _vision_from_a_copy if choice.vision else None
    if choice.decoder is None:
        if choice.block_size is not None:
            raise ConfigError("block_size is for the decoder", fix="leave it out, or add --decoder")
        return Recipe("ort", None, packed_session, vision, None)
    size = DecoderQuantization.block_size if choice.block_size is None else choice.block_size
    how = DecoderQuantization(choice.decoder, size, choice.method)  # type: ignore[arg-type]
    return Recipe("ort", size, packed_session, vision, partial(quantized_decoder, how=how))


def _vision_from_a_copy(source: Path, target: Path) -> None:
    """ONNX Runtime's quantizer writes beside its source, and a bundle may be read-only."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        for file in (source.name, source.name + WEIGHTS_SUFFIX):
            shutil.copyfile(source.with_name(file), Path(scratch) / file)
        quantized_vision(Path(scratch) / source.name, target)


def _for_tensorrt(choice: WeightChoice, dialect: Dialect) -> Recipe:
    """DequantizeLinear in front of products in float16.

    The session that measures packs no weights: it would round activations to int8 as well.
    """
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

    def quantizer(weights: str | None, method: str = "rtn") -> Callable[..., None] | None:
        if weights is None:
            return None
        how = WeightOnly(weights, size, method)  # type: ignore[arg-type]
        return partial(quantize_weights, how=how)

    vision, decoder = quantizer(choice.vision), quantizer(choice.decoder, choice.method)
    return Recipe(dialect, size if in_blocks else None, lean_session, vision, decoder)


def _require(part: str, weights: str | None, types: Iterable[str]) -> None:
    if weights is not None and weights not in types:
        raise ConfigError(f"the {part} can't be {weights!r}", fix=closest(weights, types))
