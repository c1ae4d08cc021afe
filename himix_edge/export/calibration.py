"""What really comes in at a decoder's weight matrices: its sums for GPTQ, and its magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from himix_edge.errors import ExportError
from himix_edge.export.blocks import Floats
from himix_edge.export.products import Product
from himix_edge.export.rewrites.residual import keep_every_token
from himix_edge.runtimes.providers import import_onnxruntime

onnxruntime = import_onnxruntime()

Feeds: TypeAlias = Mapping[str, NDArray[Any]]  # a graph's inputs by name
View: TypeAlias = Callable[[Floats], Floats]  # rows [R, K] -> what they are once a graph is changed

MAX_BYTES = 1 << 30  # of sums held at a time: what doesn't fit waits for another run


class Inflow(NamedTuple):
    """What comes in at a product, over all of its rows x.

    Attributes:
        hessian: [K, K], the sum of x x^T.
        rounding: the squared error of a row that is rounded to 8 bits with a scale of its own,
            over the row's square; the mean over rows.
    """

    hessian: Floats
    rounding: float


def products_and_hessians(
    source: Path, products: Sequence[Product], calibration: Sequence[Feeds]
) -> Iterator[tuple[Product, Floats | None]]:
    """Every product, and the sum of x x^T over what comes in; None without calibration inputs.

    Raises:
        ExportError: ONNX Runtime can't run the graph on these inputs.
    """
    if not calibration:
        yield from ((product, None) for product in products)
        return
    for product, inflow in products_and_inflows(source, products, calibration):
        yield product, inflow.hessian


def products_and_inflows(
    source: Path,
    products: Sequence[Product],
    calibration: Sequence[Feeds],
    views: Mapping[str, View] | None = None,
) -> Iterator[tuple[Product, Inflow]]:
    """Every product, and what comes in at it.

    Products are grouped by what comes in, so that one sum is held for those that share it.

    Args:
        source: the graph's file, where the products are from.
        views: of what comes in at some of them, by its name.

    Raises:
        ExportError: ONNX Runtime can't run the graph on these inputs.
    """
    inlets: dict[str, list[Product]] = {}
    for product in products:
        inlets.setdefault(product.source, []).append(product)
    widths = {name: fed[0].rows for name, fed in inlets.items()}
    for name, inflow in inflows(source, widths, calibration, views):
        yield from ((product, inflow) for product in inlets[name])


def inflows(
    source: Path,
    widths: Mapping[str, int],
    calibration: Sequence[Feeds],
    views: Mapping[str, View] | None = None,
) -> Iterator[tuple[str, Inflow]]:
    """What all rows of a value within the graph come to, value by value.

    Args:
        widths: K of each value [..., K], by its name.
        views: what stands for a value's rows, by its name.

    Raises:
        ExportError: ONNX Runtime can't run the graph on these inputs.
    """
    session = _session(source, list(widths))
    for names in _groups(widths):
        sums = {name: np.zeros((widths[name], widths[name]), np.float32) for name in names}
        rounding: dict[str, list[float]] = {name: [] for name in names}
        for feeds in calibration:
            values = _values(session, source, names, feeds)
            for name, value in zip(names, values, strict=True):
                rows = value.reshape(-1, widths[name]).astype(np.float32)
                rows = views[name](rows) if views and name in views else rows
                sums[name] += rows.T @ rows
                rounding[name] += _rounding(rows).tolist()
        for name in names:
            yield name, Inflow(sums.pop(name), float(np.mean(rounding.pop(name))))


def magnitudes(
    source: Path, names: Sequence[str], calibration: Sequence[Feeds]
) -> dict[str, Floats]:
    """The root mean square of each channel of values [..., K] within the graph: name -> [K].

    Raises:
        ExportError: ONNX Runtime can't run the graph on these inputs.
    """
    session = _session(source, names)
    squares: dict[str, NDArray[np.float64]] = {}
    counts = dict.fromkeys(names, 0)
    for feeds in calibration:
        for name, value in zip(names, _values(session, source, names, feeds), strict=True):
            rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
            squares[name] = squares.get(name, 0) + np.square(rows).sum(0)
            counts[name] += len(rows)
    return {name: np.sqrt(squares[name] / counts[name]).astype(np.float32) for name in names}


def _rounding(rows: Floats) -> Floats:
    """Each row's squared error in int8, over its square: [R]."""
    steps = np.maximum(rows.max(1) / 127, rows.min(1) / -128)[:, None]
    steps[steps == 0] = 1
    errors = np.square(np.rint(rows / steps) * steps - rows).sum(1)
    squares = np.square(rows).sum(1)
    parts: Floats = errors / np.where(squares == 0, 1, squares)
    return parts


def _values(session: Any, source: Path, names: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
    try:
        values: list[NDArray[Any]] = session.run(list(names), dict(feeds))
    except Exception as error:  # ONNX Runtime's have no common base
        raise _failed(source, error) from error
    return values


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """The names in order, so many at a time as MAX_BYTES has room for; at least one."""
    group: list[str] = []
    size = 0
    for name, width in widths.items():
        if group and size + 4 * width * width > MAX_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += 4 * width * width
    if group:
        yield group


def _session(source: Path, names: Sequence[str]) -> Any:
    """The graph with values within it as outputs; its weights stay in their file."""
    model = onnx_ir.load(source)
    keep_every_token(model)
    graph = onnx_ir.to_proto(model)
    known = {output.name for output in graph.graph.output}
    graph.graph.output.extend(
        onnx.ValueInfoProto(name=name)  # of the type that ONNX Runtime infers
        for name in names
        if name not in known
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they are raised as well
    options.add_session_config_entry("session.disable_prepacking", "1")  # see `lean_session`
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(source.parent)
    )
    try:
        return onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's have no common base
        raise _failed(source, error) from error


def _failed(source: Path, error: Exception) -> ExportError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ExportError(f"ONNX Runtime can't run {source.name} for calibration", found=reason)
