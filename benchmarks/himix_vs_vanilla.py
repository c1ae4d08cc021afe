"""HiMix against the same pair as a vanilla model, in one run: prefill, decode, peak memory.

    make      the graphs of both designs at full size, weights left out: a few MB to carry about
    measure   fills in random weights (neither time nor memory depends on them) and times both

    python benchmarks/himix_vs_vanilla.py make build/duel --decoder qwen2-0.5b
    python benchmarks/himix_vs_vanilla.py measure build/duel --device cuda --json duel.json

The rounds of the two are interleaved, the figures are medians. "first token" is a picture's way
from pixels to the first logits: vanilla pushes all image tokens through the decoder there, which is
a part of its vision graph here. Memory is the highest of a process that runs one design alone. The
text lengths are those of the paper's Table 5.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from himix_edge.config import Design, HiMixConfig
from himix_edge.contract import DECODER_GRAPH, MANIFEST, VISION_GRAPH, Manifest
from himix_edge.runtimes.base import Engine
from himix_edge.runtimes.devices import Choices, open_engine

DESIGNS: tuple[Design, ...] = ("himix", "vanilla")
TEXT_LENGTHS = (32, 64, 200, 728, 1000)
DECODED = 16
SMALL = 1 << 16  # bytes of a tensor that stays as it is: shapes, norms, biases
# (text tokens, design) -> Max VRAM in GB, on an A100; the paper's Table 5
PAPER_GB = {
    "qwen2-0.5b": {
        "vanilla": (7.41, 7.56, 8.32, 11.95, 14.22),
        "himix": (4.82, 4.95, 5.52, 8.47, 10.34),
    },
    "tinyllama-1.1b": {
        "vanilla": (9.15, 9.35, 10.65, 16.95, 21.04),
        "himix": (5.29, 5.46, 6.35, 11.12, 14.42),
    },
}


def make(folder: Path, encoder: str, decoder: str, dtype: str, layers: int | None) -> None:
    """Writes both designs' graphs, their weights taken out again."""
    import onnx_ir

    from himix_edge.export.bundle import manifest_of
    from himix_edge.export.onnx import decoder_onnx_from_weights, vision_onnx_from_weights
    from himix_edge.models.standin import random_checkpoint
    from himix_edge.presets import DECODERS, ENCODERS, preset

    eyes, mind = preset("encoder", ENCODERS, encoder), preset("decoder", DECODERS, decoder).decoder
    vision = eyes.vision
    if layers:  # for a rehearsal
        vision = dataclasses.replace(vision, num_hidden_layers=layers + 1)
        mind = dataclasses.replace(mind, num_hidden_layers=layers)
    for design in DESIGNS:
        config = HiMixConfig(vision, mind, eyes.preprocess, design)
        checkpoint = random_checkpoint(f"{encoder} + {decoder}, {design}", config)
        bundle = folder / design
        bundle.mkdir(parents=True)
        for name, graph_of in (
            (VISION_GRAPH, vision_onnx_from_weights),
            (DECODER_GRAPH, decoder_onnx_from_weights),
        ):
            graph = graph_of(config, checkpoint.weights, dtype)  # type: ignore[arg-type]
            weights = f"{name}.data"
            onnx_ir.save(
                graph,
                bundle / name,
                external_data=weights,
                size_threshold_bytes=SMALL,
                max_workers=1,
            )
            (bundle / weights).unlink()
        manifest = manifest_of(checkpoint, dtype)  # type: ignore[arg-type]
        (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    (folder / "pair.json").write_text(json.dumps({"encoder": encoder, "decoder": decoder}))


def fill(graph: Path) -> None:
    """Writes the external data that a graph names: small random numbers of each tensor's type."""
    model = onnx.load(graph, load_external_data=False)
    rng = np.random.default_rng(0)
    block = {
        TensorProto.FLOAT16: (rng.standard_normal(1 << 20) * 0.02).astype(np.float16).tobytes(),
        TensorProto.FLOAT: (rng.standard_normal(1 << 19) * 0.02).astype(np.float32).tobytes(),
    }
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            continue
        left = int(where["length"])
        path = graph.parent / where["location"]
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(int(where.get("offset", 0)))
            while left > 0:
                left -= file.write(block[tensor.data_type][:left])


class Duellist:
    """One design on a device, and what a round of it takes."""

    def __init__(self, bundle: Path, device: str) -> None:
        self.manifest = Manifest.read(bundle)
        opened = open_engine(bundle, self.manifest, device, Choices(verify=False))
        self.engine: Engine = opened.engine
        size = self.manifest.config.vision.image_size
        self.pixels = np.zeros((1, 3, size, size), np.float32)

    def round(self, text: int) -> dict[str, float]:
        """Milliseconds of each phase."""
        ids = np.arange(text, dtype=np.int64)[None] % 200
        began = time.perf_counter()
        image = self.engine.encode(self.pixels)
        cache = self.engine.open(image)
        encoded = time.perf_counter()
        self.engine.prefill(ids, cache)
        first = time.perf_counter()
        for _ in range(DECODED):
            self.engine.step(ids[:, :1], cache)
        last = time.perf_counter()
        return {
            "image": 1e3 * (encoded - began),
            "prefill": 1e3 * (first - encoded),
            "first token": 1e3 * (first - began),
            "a token": 1e3 * (last - first) / DECODED,
        }


def measure(folder: Path, device: str, rounds: int, texts: Sequence[int]) -> dict[str, Any]:
    """Both designs, interleaved, and each one's memory in a process of its own."""
    for design in DESIGNS:
        for name in (VISION_GRAPH, DECODER_GRAPH):
            fill(folder / design / name)
    memory = {
        design: [_alone(folder / design, device, text) for text in texts] for design in DESIGNS
    }
    models = {design: Duellist(folder / design, device) for design in DESIGNS}
    cells: dict[str, Any] = {}
    for text in texts:
        for model in models.values():
            model.round(text)  # warm up: the first run of a shape plans it
        taken: dict[Design, list[dict[str, float]]] = {design: [] for design in DESIGNS}
        for _ in range(rounds):
            for design, model in models.items():
                taken[design].append(model.round(text))
        cells[str(text)] = {
            design: {phase: statistics.median(r[phase] for r in runs) for phase in runs[0]}
            for design, runs in taken.items()
        }
    pair = json.loads((folder / "pair.json").read_text())
    return {**pair, "device": device, "rounds": rounds, "ms": cells, "peak_mb": memory}


def _alone(bundle: Path, device: str, text: int) -> float:
    """The peak memory of one design at one length, in MB: the GPU's, or the process's own."""
    command = [sys.executable, __file__, "alone", str(bundle), "--device", device]
    done = subprocess.run(
        [*command, "--text", str(text)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def alone(bundle: Path, device: str, text: int) -> float:
    """Runs twice and says the most memory that was held."""
    used = _gpu_mb if device != "cpu" else _own_mb
    before = used() if device != "cpu" else 0.0
    model = Duellist(bundle, device)
    peak = 0.0
    for _ in range(2):
        model.round(text)
        peak = max(peak, used())  # an arena keeps what it once took
    return peak - before


def _gpu_mb() -> float:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(
        subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    )


def _own_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(result: dict[str, Any]) -> str:
    """For people: every figure, and vanilla's over HiMix's."""
    lines = [f"{result['encoder']} + {result['decoder']} on {result['device']}, ms (medians)"]
    paper = PAPER_GB.get(result["decoder"], {})
    for at, (text, cell) in enumerate(result["ms"].items()):
        lines.append(f"{text} text tokens")
        rows = [(phase, cell["himix"][phase], cell["vanilla"][phase]) for phase in cell["himix"]]
        rows.append(("peak MB", result["peak_mb"]["himix"][at], result["peak_mb"]["vanilla"][at]))
        for name, himix, vanilla in rows:
            lines.append(f"  {name:12} {himix:10.1f} {vanilla:10.1f}  {vanilla / himix:5.2f} x")
        if paper and int(text) in TEXT_LENGTHS:
            ours, theirs = (paper[design][TEXT_LENGTHS.index(int(text))] for design in DESIGNS)
            lines.append(f"  paper's GB   {ours:10.2f} {theirs:10.2f}  {theirs / ours:5.2f} x")
    return "\n".join(lines)


def main() -> None:
    """Runs one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    making = steps.add_parser("make", help="both designs' graphs")
    making.add_argument("folder", type=Path)
    making.add_argument("--encoder", default="siglip-so400m-384")
    making.add_argument("--decoder", default="qwen2-0.5b")
    making.add_argument("--dtype", default="float16")
    making.add_argument("--layers", type=int, help="cut both parts, for a rehearsal")
    timing = steps.add_parser("measure", help="fill, run, report")
    timing.add_argument("folder", type=Path)
    timing.add_argument("--rounds", type=int, default=7)
    timing.add_argument("--texts", type=int, nargs="+", default=TEXT_LENGTHS)
    timing.add_argument("--json", type=Path)
    single = steps.add_parser("alone", help="one design's peak memory")
    single.add_argument("folder", type=Path)
    single.add_argument("--text", type=int, required=True)
    for step in (timing, single):
        step.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.step == "make":
        make(given.folder, given.encoder, given.decoder, given.dtype, given.layers)
    elif given.step == "alone":
        print(alone(given.folder, given.device, given.text))
    else:
        result = measure(given.folder, given.device, given.rounds, given.texts)
        if given.json:
            given.json.write_text(json.dumps(result, indent=2) + "\n")
        print(table(result))


if __name__ == "__main__":
    main()
