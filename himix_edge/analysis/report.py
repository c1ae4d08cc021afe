"""What `himix-edge flops` and `models` show: as plain data for JSON, and as tables."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from himix_edge.analysis import costs, paper, sizes
from himix_edge.config import Design, HiMixConfig
from himix_edge.errors import DependencyError
from himix_edge.presets import DECODERS, ENCODERS, is_preset_name, preset_config

GIGA = 1e9
DESIGNS: tuple[Design, ...] = ("vanilla", "himix", "uniform", "hierarchical")


def pair_config(encoder: str, decoder: str, design: Design = "himix") -> HiMixConfig:
    """A model of an encoder and a decoder: presets, Hugging Face folders, or hub ids.

    Raises:
        ConfigError: no such preset, or two that don't go together.
        CheckpointError: a folder or repository that can't be had or used.
        DependencyError: one was named, and torch is not there.
    """
    if not (is_preset_name(encoder) and is_preset_name(decoder)):
        return dataclasses.replace(_config_of_folders(encoder, decoder), design=design)
    return preset_config(encoder, decoder, design)


def _config_of_folders(encoder: str, decoder: str) -> HiMixConfig:
    try:
        from himix_edge.models.pairs import Pair
    except ImportError as error:
        raise DependencyError(
            f"a folder or a repository needs {error.name}", fix="pip install 'himix-edge[export]'"
        ) from error
    return Pair(encoder, decoder).config()


# A pair, in the four designs.


def pair_report(
    encoder: str, decoder: str, text_tokens: int, image_tokens: int | None
) -> dict[str, Any]:
    """FLOPs, parameters and bytes of a pair in each design.

    Raises:
        as `pair_config`, and ConfigError for a number of tokens out of range.
    """
    config = pair_config(encoder, decoder)
    images = config.vision.num_image_tokens if image_tokens is None else image_tokens
    return {
        "encoder": encoder,
        "decoder": decoder,
        "text_tokens": text_tokens,
        "image_tokens": images,
        "designs": {
            design: _design_report(dataclasses.replace(config, design=design), text_tokens, images)
            for design in DESIGNS
        },
    }


def _design_report(config: HiMixConfig, text_tokens: int, image_tokens: int) -> dict[str, Any]:
    cost = costs.cost(config, text_tokens, image_tokens)
    parts = {
        "encoder": cost.encoder,
        "connectors": cost.connectors,
        "projections": cost.projections,
        "attention": cost.attention,
        "ffn": cost.ffn,
        "head": cost.head,
        "decoder": cost.decoder,
        "total": cost.total,
        "total_last_logits": cost.total_as_run,
    }
    count = sizes.parameters(config)
    return {
        "flops": {name: flops.total for name, flops in parts.items()},
        "of_them_matmul": {name: flops.matmul for name, flops in parts.items()},
        "parameters": {**dataclasses.asdict(count), "total": count.total},
        "bytes_fp16": {
            "weights": count.total * sizes.HALF,
            "kv_cache": sizes.kv_cache_bytes(config.decoder, image_tokens + text_tokens),
            "kv_cache_image": sizes.kv_cache_bytes(config.decoder, image_tokens),
        },
    }


_LAST_FLOPS = "total, last token's logits only"
_PAIR_ROWS = (  # what is shown, its path in a design's report, its unit, decimals
    ("encoder", "flops encoder", GIGA, 2),
    ("connectors", "flops connectors", GIGA, 2),
    ("image to keys and values", "flops projections", GIGA, 2),
    ("attention", "flops attention", GIGA, 2),
    ("FFN", "flops ffn", GIGA, 2),
    ("head, all tokens", "flops head", GIGA, 2),
    ("decoder", "flops decoder", GIGA, 2),
    ("total", "flops total", GIGA, 2),
    (_LAST_FLOPS, "flops total_last_logits", GIGA, 2),
    ("parameters (M)", "parameters total", 1e6, 1),
    ("  of the encoder", "parameters encoder", 1e6, 1),
    ("  of connectors or projections", "parameters injection", 1e6, 1),
    ("  of the decoder", "parameters decoder", 1e6, 1),
    ("weights in fp16 (MB)", "bytes_fp16 weights", 1e6, 1),
    ("KV cache in fp16 (MB)", "bytes_fp16 kv_cache", 1e6, 1),
    ("  of the image", "bytes_fp16 kv_cache_image", 1e6, 1),
)


def pair_tables(report: dict[str, Any]) -> list[Table]:
    title = (
        f"{report['encoder']} + {report['decoder']}: "
        f"{report['image_tokens']} image and {report['text_tokens']} text tokens, GFLOPs"
    )
    rows = []
    for label, path, unit, decimals in _PAIR_ROWS:
        group, name = path.split()
        values = (report["designs"][design][group][name] / unit for design in DESIGNS)
        rows.append([label, *(f"{value:,.{decimals}f}" for value in values)])
    caption = (
        "The decoder is what the paper counts: image to keys and values, attention, FFN, and the\n"
        "logits of all tokens; the exported graphs compute the last token's alone."
    )
    return [_table(title, ["", *DESIGNS], rows, caption, end=_LAST_FLOPS)]


# The paper.


def paper_report(cells: Iterable[paper.Cell]) -> list[dict[str, Any]]:
    """Every figure of the paper beside ours."""
    return [
        {
            "table": cell.table,
            "row": cell.row,
            "column": cell.column,
            "paper": float(cell.printed),
            "ours": cell.ours,
            "difference": cell.difference,
            "rounding": cell.rounding,
            "within_rounding": cell.agrees,
            "reason": cell.reason,
        }
        for cell in cells
    ]


def paper_tables(cells: Sequence[paper.Cell]) -> list[Table]:
    """A table for each of the paper's, with a note for each reason to differ."""
    numbers = dict.fromkeys(cell.table for cell in cells)
    return [_paper_table(number, [c for c in cells if c.table == number]) for number in numbers]


def _paper_table(number: str, cells: Sequence[paper.Cell]) -> Table:
    reasons = list(dict.fromkeys(cell.reason for cell in cells if not cell.agrees))
    rows = []
    for cell in cells:
        decimals = len(cell.printed.partition(".")[2]) + 1
        ours, difference = f"{cell.ours:.{decimals}f}", f"{cell.difference:+.{decimals}f}"
        note = "" if cell.agrees else f"differs ({reasons.index(cell.reason) + 1})"
        rows.append([cell.row, cell.column, cell.printed, ours, difference, note])
    notes = "\n".join(f"({i}) {reason}" for i, reason in enumerate(reasons, start=1))
    return _table(f"Table {number}", ["", "", "paper", "ours", "difference", ""], rows, notes)


def paper_summary(cells: Sequence[paper.Cell]) -> str:
    within = sum(cell.agrees for cell in cells)
    return (
        f"{within} of {len(cells)} figures are within the paper's rounding, half a unit of the "
        "last digit.\n"
        "Max VRAM (Table 5) was measured on an A100 and is not reproduced; the accuracies follow "
        "from no formula."
    )


# The presets.


def models_report() -> dict[str, Any]:
    """Every preset: its size, and what it costs."""
    encoders = {
        name: {
            "hub_id": entry.hub_id,
            "image_size": entry.vision.image_size,
            "image_tokens": entry.vision.num_image_tokens,
            "width": entry.vision.hidden_size,
            "parameters": sizes.encoder_parameters(entry.vision),
            "flops": costs.encoder(entry.vision).total.total,
        }
        for name, entry in ENCODERS.items()
    }
    decoders = {}
    for name, entry in DECODERS.items():
        himix = pair_config("siglip-so400m-384", name)
        vanilla = dataclasses.replace(himix, design="vanilla")
        setting = (paper.TEXT_TOKENS, paper.IMAGE_TOKENS)
        decoders[name] = {
            "hub_id": entry.hub_id,
            "layers": entry.decoder.num_hidden_layers,
            "width": entry.decoder.hidden_size,
            "parameters": sizes.decoder_parameters(entry.decoder),
            "himix_parameters": sizes.injection_parameters(himix),
            "vanilla_flops": costs.cost(vanilla, *setting).decoder.total,
            "himix_flops": costs.cost(himix, *setting).decoder.total,
        }
    return {"encoders": encoders, "decoders": decoders}


def models_tables(report: dict[str, Any]) -> list[Table]:
    encoders = [
        [
            name,
            f"{entry['parameters'] / 1e6:.1f}",
            f"{entry['image_size']} px",
            f"{entry['image_tokens']} x {entry['width']}",
            f"{entry['flops'] / GIGA:.2f}",
            entry["hub_id"],
        ]
        for name, entry in report["encoders"].items()
    ]
    decoders = [
        [
            name,
            f"{entry['parameters'] / 1e6:,.1f}",
            f"{entry['himix_parameters'] / 1e6:.1f}",
            f"{entry['layers']} x {entry['width']}",
            f"{entry['vanilla_flops'] / GIGA:,.1f}",
            f"{entry['himix_flops'] / GIGA:,.1f}",
            entry["hub_id"],
        ]
        for name, entry in report["decoders"].items()
    ]
    setting = f"{paper.IMAGE_TOKENS} image and {paper.TEXT_TOKENS} text tokens"
    return [
        _table(
            "Encoders, as they run here: without the layer above the features",
            ["", "parameters (M)", "image", "image tokens", "GFLOPs", "hub id"],
            encoders,
        ),
        _table(
            f"Decoders; HiMix's part and GFLOPs with siglip-so400m-384, {setting}",
            ["", "parameters (M)", "+HiMix (M)", "layers", "vanilla", "HiMix", "hub id"],
            decoders,
        ),
    ]


def print_tables(tables: Iterable[Table]) -> None:
    """On stdout; in full width and without colours where it is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for table in tables:
        with console.capture() as capture:
            console.print(table)
        print("\n".join(line.rstrip() for line in capture.get().splitlines()), end="\n\n")


def _table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    end: str | None = None,
) -> Table:
    """A table whose columns of figures stand to the right; a line follows the row named `end`."""
    table = Table(
        title=title,
        caption=caption or None,
        box=box.SIMPLE,
        title_justify="left",
        caption_justify="left",
    )
    for i, name in enumerate(head):
        figures = all(_is_figure(row[i]) for row in rows)
        table.add_column(name, justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*row, end_section=row[0] == end)
    return table


def _is_figure(text: str) -> bool:
    return text.strip("+-").replace(",", "").replace(".", "").isdigit()
