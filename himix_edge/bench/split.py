"""How much of the vision graph's time is HiMix's projections, by ONNX Runtime's own profile.

The projections are the graph's last products. Counted from the end, they are as many as it takes
to give N x 2 L Hkv D numbers, all keys and values of an image, be they one product or many; and
N x 2c more where they have a connector of width c. They and all that runs after the first of them
(which lays out the keys and values) is "projection". In int8, what turns the features into codes
runs before and counts as vision.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from himix_edge.bundle.files import BundleFiles
from himix_edge.claims import scratch_folder
from himix_edge.config import HiMixConfig
from himix_edge.contract import PIXEL_VALUES, VISION_GRAPH
from himix_edge.runtimes.base import FloatArray
from himix_edge.runtimes.providers import CPU, import_onnxruntime, open_graph

Event = dict[str, Any]
RUNS = 3
PRODUCTS = ("MatMul", "Gemm")  # are part of the name of every operator that is one


def projection_share(
    bundle: Path, config: HiMixConfig, pixels: FloatArray, threads: int | None
) -> float | None:
    """The projections' part of the vision graph's time, 0..1, in a session of its own.

    Returns:
        None where it can't be told: of a graph that takes a cache too, or whose last products
        don't give the keys and values.

    Raises:
        BundleError: a graph that can't be opened.
    """
    with scratch_folder() as folder:
        options = import_onnxruntime().SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "vision")
        if threads is not None:
            options.intra_op_num_threads = threads
        with BundleFiles.open(bundle, verify=False) as files:
            session = open_graph(CPU, files, VISION_GRAPH, options)
        inputs = [node.name for node in session.get_inputs()]
        if inputs == [PIXEL_VALUES]:
            for _ in range(1 + RUNS):  # the first one plans
                session.run(None, {PIXEL_VALUES: pixels})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return share_of_profile(events, config) if inputs == [PIXEL_VALUES] else None


def share_of_profile(events: list[Event], config: HiMixConfig) -> float | None:
    """The median over a profile's runs, the first left out; None where it can't be told."""
    decoder = config.decoder
    width = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    width += 2 * (config.projection.connector_size or 0)
    numbers = config.vision.num_image_tokens * width
    shares = [_share(nodes, numbers) for nodes in _runs(events)[1:]]
    told = [share for share in shares if share is not None]
    return statistics.median(told) if told and len(told) == len(shares) else None


def _runs(events: list[Event]) -> list[list[Event]]:
    """The nodes of each run, in the order in which they ran."""
    nodes = sorted((e for e in events if _is_node(e)), key=lambda event: float(event["ts"]))
    return [
        [n for n in nodes if run["ts"] <= n["ts"] < run["ts"] + run["dur"]]
        for run in sorted(events, key=lambda event: float(event.get("ts", 0)))
        if run.get("name") == "model_run"
    ]


def _share(nodes: list[Event], numbers: int) -> float | None:
    left = numbers
    for at in reversed(range(len(nodes))):
        if any(name in nodes[at]["args"]["op_name"] for name in PRODUCTS):
            left -= _outputs(nodes[at])
        if left <= 0:
            break
    total = sum(node["dur"] for node in nodes)
    if left or not total:
        return None
    return float(sum(node["dur"] for node in nodes[at:]) / total)


def _outputs(node: Event) -> int:
    """How many numbers a node gives; ONNX Runtime writes [{"float": [1, 196, 6144]}]."""
    shapes = node["args"].get("output_type_shape", [])
    return sum(math.prod(shape) for typed in shapes for shape in typed.values())


def _is_node(event: Event) -> bool:
    return event.get("cat") == "Node" and str(event.get("name")).endswith("_kernel_time")
