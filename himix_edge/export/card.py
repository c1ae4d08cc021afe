"""What an export adds to a model card."""

from __future__ import annotations

from himix_edge.contract import LOGITS, Manifest
from himix_edge.export.dialects import NATIVE_OPSET, ORT_OPSET, PORTABLE_OPSET
from himix_edge.export.ranges import FLOAT16_MAX, MARGIN, Ranges, ranges_table
from himix_edge.export.verify import Parity
from himix_edge.export.wide import WideParts


def export_section(manifest: Manifest, tools: dict[str, str], parity: Parity) -> str:
    """How the graphs were made, and how close they came to the model."""
    keys_and_values = max(closeness.error for closeness in parity.vision.values())
    versions = ", ".join(f"{name} {version}" for name, version in tools.items())
    dialect = f'"portable" (opset {PORTABLE_OPSET}, operators that TensorRT 10.1 and later import)'
    if manifest.dialect == "native":
        dialect = f'"native" (opset {NATIVE_OPSET}, a cache of {manifest.cache_slots} slots)'
    if manifest.dialect == "ort":
        dialect = f'"ort" (opset {ORT_OPSET}, with operators of ONNX Runtime\'s own)'
    return f"""\
## Export

Two ONNX graphs in {manifest.dtype}, dialect {dialect}, made with
{versions}.

Checked in ONNX Runtime against the model in PyTorch on {parity.images} images. Largest difference,
over the largest value of its tensor: {keys_and_values:.1e} in the image's keys and values,
{parity.decoder[LOGITS].error:.1e} in the logits. Greedy tokens: {parity.greedy_tokens_equal} of
{parity.greedy_tokens} the same.
"""


def ranges_section(ranges: Ranges, wide: WideParts) -> str:
    """How large the values within a model in float16 get, and what is in float32 therefore."""
    return f"""\
## Ranges

The largest values within the model, over {ranges.images} images. float16 holds {FLOAT16_MAX:,.0f}.
In float32 (*) stay its norms, softmax and activations, and: {wide}.
What is within a factor of {MARGIN:.0f} of the limit and in float16 all the same is marked !.

```
{ranges_table(ranges, wide)}
```
"""
