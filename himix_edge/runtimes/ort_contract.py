"""What the graphs of a bundle must look like to ONNX Runtime, by the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from himix_edge import contract
from himix_edge.errors import BundleError

Shape = tuple[int | None, ...]  # None where the contract leaves a dimension open
Nodes = dict[str, tuple[str, Shape]]  # dtype and shape of a graph's inputs or outputs, by name
TENSOR_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
}


def vision_nodes(manifest: contract.Manifest) -> tuple[Nodes, Nodes]:
    """Inputs and outputs of the vision graph by the contract."""
    size = manifest.config.vision.image_size
    inputs: Nodes = {contract.PIXEL_VALUES: ("float32", (None, 3, size, size))}
    layers = manifest.config.decoder.num_hidden_layers
    slots = manifest.cache_slots
    if slots is not None:
        inputs |= _cache_nodes(manifest, contract.past_names(layers), slots)
    written = slots or manifest.config.image_slots
    return inputs, _cache_nodes(manifest, contract.present_names(layers), written)


def decoder_nodes(manifest: contract.Manifest) -> tuple[Nodes, Nodes]:
    """Inputs and outputs of the decoder graph by the contract."""
    decoder, slots = manifest.config.decoder, manifest.cache_slots
    layers = decoder.num_hidden_layers
    inputs: Nodes = dict.fromkeys(
        (contract.INPUT_IDS, contract.POSITION_IDS), ("int64", (None, None))
    )
    if slots is not None or manifest.dialect == "ort":
        inputs[contract.WRITE_INDICES] = ("int64", (None,))
    outputs: Nodes = {contract.LOGITS: ("float32", (None, 1, decoder.vocab_size))}
    return (
        inputs | _cache_nodes(manifest, contract.past_names(layers), slots),
        outputs | _cache_nodes(manifest, contract.present_names(layers), slots),
    )


def _cache_nodes(manifest: contract.Manifest, names: list[str], slots: int | None) -> Nodes:
    decoder = manifest.config.decoder
    shape = (None, decoder.num_key_value_heads, slots, decoder.head_dim)
    return dict.fromkeys(names, (manifest.dtype, shape))


def check_nodes(path: Path, side: str, expected: Nodes, nodes: Sequence[Any]) -> None:
    """Names, dtypes and fixed dimensions of a graph's inputs or outputs, all misfits at once."""
    found = {node.name: node for node in nodes}
    misfits = [f"no {name}" for name in expected if name not in found]
    misfits += [f"an unknown {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        dtype, shape = expected[name]
        node = found[name]
        if node.type != TENSOR_TYPES[dtype] or not _fits(node.shape, shape):
            misfits.append(f"{name} as {node.type} {node.shape}")
    if misfits:
        wanted = ", ".join(f"{name} {dtype} {_shown(s)}" for name, (dtype, s) in expected.items())
        raise BundleError(
            f"the {side} of {path} are not the contract's",
            expected=wanted if len(expected) <= 4 else f"{len(expected)} like {wanted[:120]}...",
            found="; ".join(sorted(misfits)[:4]),
            fix="export the bundle again with: himix-edge export",
        )


def _fits(found: Sequence[object], expected: Shape) -> bool:
    """Whether each dimension that both sides fix is the same on both."""
    return len(found) == len(expected) and all(
        not isinstance(there, int) or here is None or there == here
        for there, here in zip(found, expected, strict=True)
    )


def _shown(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"
