"""What a bundle is, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.quality import quality_of, summary
from himix_edge.contract import ENGINES, MANIFEST, FileRecord
from himix_edge.replacing import entries


def summary_of(files: BundleFiles) -> Iterator[str]:
    """The lines of `himix-edge info`, of a bundle whose files were checked."""
    manifest = files.manifest
    config, decoder = manifest.config, manifest.config.decoder
    yield f"{manifest.name}: {megabytes(manifest.files)}, each listed file as its manifest says"
    if manifest.notice:
        yield manifest.notice
    slots = f", a cache of {manifest.cache_slots} slots" if manifest.cache_slots else ""
    yield f"dialect     {manifest.dialect}, {manifest.dtype}{slots}"
    if manifest.quantization:
        yield f"quantized   {manifest.quantization}"
        yield f"quality     {summary(quality_of(manifest.quantization))}"
    yield f"design      {config.design}"
    size, tokens = config.vision.image_size, config.vision.num_image_tokens
    yield f"image       {size} px, {tokens} tokens, by {config.preprocess.resize}"
    yield f"decoder     {decoder.num_hidden_layers} layers, {decoder.hidden_size} wide"
    yield f"context     {config.max_text_tokens} text tokens"
    tools = ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())
    yield f"made with   {tools}"
    for name, record in manifest.files.items():
        yield f"  {record.sha256[:12]}  {record.size:>12,}  {name}"
    for path in sorted(entries(files.path)):
        if path.name not in (*manifest.files, MANIFEST, ENGINES):
            yield f"  not in the manifest, and not used: {path.name}"


def megabytes(files: Mapping[str, FileRecord]) -> str:
    """The size of all files, as text."""
    return f"{sum(record.size for record in files.values()) / 1e6:.1f} MB"
