"""Building: a plan in, engines in the bundle out, or nothing changed."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.graphs import read_graph
from himix_edge.engines import rtx, trt
from himix_edge.engines.key import EngineKey, timing_cache_name
from himix_edge.engines.memory import require_memory, workspace_bytes
from himix_edge.engines.opened import Engines
from himix_edge.engines.plan import TENSORRT, BuildPlan, GraphPlan
from himix_edge.engines.progress import BuildProgress, Report, run_cancellable
from himix_edge.engines.store import refuse_linked_folders, seal_engines, whole_engines
from himix_edge.engines.trust import keep_timings, kept_timings
from himix_edge.engines.user_key import make_user_key


@dataclass(frozen=True)
class Built:
    """Engines, and what making them took.

    Attributes:
        seconds: for each graph.
    """

    engines: Engines
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, ready for JSON."""
        key = dataclasses.asdict(self.engines.key)
        return {"engines": str(self.engines.folder), "key": key, "seconds": self.seconds}


def build_engines(
    plan: BuildPlan, *, force: bool = False, report: Report = lambda *_: None
) -> Built:
    """Builds the engines of a plan and puts them into the bundle, in the place of older ones.

    They are whole first, and then sealed as this user's: what a kill leaves between the two is not
    loaded, and the next build replaces it.

    Args:
        force: try it also where the memory is too small by estimate.
        report: called from other threads, with how far the building of a part has come.

    Raises:
        DependencyError: no engine library.
        BundleError: a graph that isn't as exported.
        EngineError: no GPU, too little memory, or the library refuses a graph; engines that are a
            link; or this user's key can't be relied on.
        OutputError: the bundle or the key can't be written, or the disk is full.
        KeyboardInterrupt: Ctrl-C. In each of these cases the bundle keeps the engines it had.
    """
    key = plan.ready_key()
    files = BundleFiles.open(plan.bundle)
    files.check()  # the key is of these very files
    for graph in plan.graphs:
        read_graph(files, graph.graph)  # for what must not be in it
    if not force:
        largest = max(plan.graphs, key=lambda graph: graph.weight_bytes)
        require_memory(largest.graph, largest.weight_bytes, plan.gpu)
    refuse_linked_folders(plan.bundle, key.device)
    make_user_key()  # before the work, if it can't be had
    seconds = {}
    with whole_engines(plan.bundle, key) as folder:
        for graph in plan.graphs:
            begun = time.perf_counter()
            report(graph.graph, 0.0, "reading")
            if plan.target == TENSORRT:
                _build_with_tensorrt(plan, graph, key, folder, report)
            else:
                sm = plan.target.removeprefix("rtx-")
                source = plan.bundle / graph.graph
                rtx.engine_from_onnx(source, folder / graph.engine, sm, graph.profiles)
            files.require_unchanged()
            report(graph.graph, 1.0, "")
            seconds[graph.graph] = time.perf_counter() - begun
    return Built(seal_engines(plan.bundle, key), seconds)


def _build_with_tensorrt(
    plan: BuildPlan, graph: GraphPlan, key: EngineKey, folder: Path, report: Report
) -> None:
    progress = BuildProgress(
        lambda phase, done, inner: report(f"{graph.graph}, {phase}", done, inner)
    )
    timings = timing_cache_name(key.device)
    measured = run_cancellable(
        lambda: trt.engine_from_onnx(
            plan.bundle / graph.graph,
            folder / graph.engine,
            graph.profiles,
            key,
            kept_timings(plan.bundle, timings),
            workspace_bytes(graph.weight_bytes),
            progress,
        ),
        progress.cancel,
    )
    keep_timings(plan.bundle, timings, measured)
