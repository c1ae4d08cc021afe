"""From the portable dialect to the others, a rewrite a file.

Native graphs have the operators that ONNX got for language models (opset 23 and 24), and a cache of
fixed size. Each of them says in one node what takes ten to twenty primitives, which an engine then
need not recognize, and has a kernel of its own in TensorRT from 10.15 on and TensorRT for RTX.

Graphs of the ort dialect have ONNX Runtime's own operators, and a cache of any size that is written
in place.
"""

from __future__ import annotations

import onnx_ir

from himix_edge.config import HiMixConfig
from himix_edge.contract import Manifest, past_names
from himix_edge.export.dialects import (
    NATIVE_OPSET,
    ORT_DOMAIN,
    ORT_OPSET,
    require_native,
    require_ort,
)
from himix_edge.export.rewrites.attention import DecoderAttention, EncoderAttention
from himix_edge.export.rewrites.group_query_attention import fuse_attention
from himix_edge.export.rewrites.ort_vision import ort_vision
from himix_edge.export.rewrites.residual import SiLU, join_gate_and_up, keep_last_token
from himix_edge.export.rewrites.rms_normalization import RMSNormalization
from himix_edge.export.rewrites.rotary_embedding import RotaryEmbedding
from himix_edge.export.rewrites.tensor_scatter import fix_decoder_cache, fix_vision_cache
from himix_edge.export.wide import NOTHING_WIDE, WideParts


def rewrite_vision(
    graph: onnx_ir.Model, manifest: Manifest, wide: WideParts = NOTHING_WIDE
) -> None:
    """Brings a portable vision graph into the dialect of a bundle, in place.

    Args:
        wide: what the graph was made with.

    Raises:
        ExportError: a graph that is not what `vision_onnx_from_weights` makes.
    """
    if manifest.dialect == "ort":
        ort_vision(graph, manifest.config)
        require_ort(graph)
    elif manifest.cache_slots is not None:
        native_vision(graph, manifest.config, manifest.cache_slots, wide)


def rewrite_decoder(graph: onnx_ir.Model, manifest: Manifest) -> None:
    """Brings a portable decoder graph into the dialect of a bundle, in place.

    Raises:
        ExportError: a graph that is not what `decoder_onnx_from_weights` makes.
    """
    if manifest.dialect == "ort":
        ort_decoder(graph, manifest.config)
    elif manifest.cache_slots is not None:
        native_decoder(graph, manifest.config, manifest.cache_slots)


def native_decoder(graph: onnx_ir.Model, config: HiMixConfig, cache_slots: int) -> None:
    """Rewrites a portable decoder graph, in place.

    Args:
        cache_slots: S, of the image and the text together.

    Raises:
        ExportError: a graph that is not what `decoder_onnx_from_weights` makes.
    """
    layers = config.decoder.num_hidden_layers
    RMSNormalization.apply(graph, times=2 * layers + 1)
    RotaryEmbedding.apply(graph, times=2 * layers)
    DecoderAttention.apply(graph, times=layers)
    fix_decoder_cache(graph, past_names(layers), cache_slots)
    _finish(graph)


def ort_decoder(graph: onnx_ir.Model, config: HiMixConfig) -> None:
    """Rewrites a portable decoder graph for ONNX Runtime, in place.

    Raises:
        ExportError: a graph that is not what `decoder_onnx_from_weights` makes.
    """
    layers = config.decoder.num_hidden_layers
    RMSNormalization.apply(graph, times=2 * layers + 1)
    RotaryEmbedding.apply(graph, times=2 * layers)
    DecoderAttention.apply(graph, times=layers)
    SiLU.apply(graph, times=layers)
    fuse_attention(graph, config)
    keep_last_token(graph)
    join_gate_and_up(graph, times=layers)
    graph.opset_imports.update({"": ORT_OPSET, ORT_DOMAIN: 1})
    require_ort(graph)


def native_vision(
    graph: onnx_ir.Model,
    config: HiMixConfig,
    cache_slots: int,
    wide: WideParts = NOTHING_WIDE,
) -> None:
    """Rewrites a portable vision graph, in place; arguments and errors as of `native_decoder`.

    Attention in float32 stays in primitives: TensorRT has no kernel for the operator in it.

    Args:
        wide: what the graph was made with.
    """
    encoder_layers = config.vision.num_hidden_layers + 1 + config.vision.feature_layer
    EncoderAttention.apply(graph, times=encoder_layers - len(wide.attentions))
    fix_vision_cache(graph, past_names(config.decoder.num_hidden_layers), cache_slots)
    _finish(graph)


def _finish(graph: onnx_ir.Model) -> None:
    """Between opsets 18 and 24 the operators that are left have only learnt new types."""
    graph.opset_imports[""] = NATIVE_OPSET
    require_native(graph)
