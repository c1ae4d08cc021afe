"""The paper's figures: which we reproduce, and that the reasons given for the others hold."""

from __future__ import annotations

import pytest

from himix_edge.analysis import costs, paper
from himix_edge.analysis.paper import Cell
from himix_edge.analysis.report import pair_config
from himix_edge.config import Design
from himix_edge.presets import DECODERS

CELLS = {(cell.table, cell.row, cell.column): cell for cell in paper.cells()}
LAYERS = {name: DECODERS[key].decoder.num_hidden_layers for name, key in paper.PRESETS.items()}


def test_every_figure_is_there_once() -> None:
    assert len(CELLS) == len(paper.cells())
    count = {table: 0 for table, _, _ in CELLS}
    for table, _, _ in CELLS:
        count[table] += 1
    assert count == {
        "1": 6 + 8,  # parameters and FLOPs of three parts, and two percentages
        "2": 3,
        "3, 4": 4 * 5,
        "5": 8 * 5,
        "6": 4 * 3,
        "8": 5,
        "9": 1 + 8 * 2 + 2,
        "10": 2 * 8 * 5,
    }


def test_what_differs_is_what_has_a_reason() -> None:
    assert {key for key, cell in CELLS.items() if not cell.agrees} == set(paper.REASONS)
    assert all(cell.reason == paper.REASONS.get(key, "") for key, cell in CELLS.items())


@pytest.mark.parametrize(
    ("table", "printed", "rounding"),
    [
        ("5", "837", 0.5),
        ("5", "1750", 5.0),
        ("5", "10090", 5.0),
        ("10", "1750", 0.5),
        ("3, 4", "0.50", 0.005),
        ("6", "0.428", 0.0005),
        ("6", "670.89", 0.005),
    ],
)
def test_rounding_is_half_a_unit_of_the_last_digit(
    table: str, printed: str, rounding: float
) -> None:
    cell = Cell(table, "", "", printed, 0.0)
    assert cell.rounding == pytest.approx(rounding, rel=0, abs=1e-12)
    for difference, agrees in ((0.98, True), (-0.98, True), (1.02, False), (-1.02, False)):
        ours = float(printed) + difference * rounding
        assert Cell(table, "", "", printed, ours).agrees is agrees


def ours(table: str, row: str, column: str) -> float:
    return CELLS[table, row, column].ours


def test_some_figures_to_their_last_digit() -> None:
    """Computed apart, by hand, from the dimensions of Qwen2-0.5B; and as measured by calflops."""
    tokens, layers = 792, 24
    attention = 2 * tokens * (2 * 896 * 14 * 64 + 2 * 896 * 2 * 64) + 4 * tokens**2 * 14 * 64
    softmax, swiglu = tokens**2 * 14, tokens * 4864
    ffn = 6 * tokens * 896 * 4864
    head = 2 * tokens * 896 * 151936
    assert ours("10", "Qwen2-0.5B", "attention at 728:64") == layers * (attention + softmax) / 1e9
    assert ours("10", "Qwen2-0.5B", "FFN at 728:64") == layers * (ffn + swiglu) / 1e9
    whole = layers * (attention + softmax + ffn + swiglu) + head
    assert ours("5", "Qwen2-0.5B", "GFLOPs at 728:64") == whole / 1e9 == 836.692521984
    assert ours("3, 4", "Qwen2-0.5B", "parameters (B)") == 0.494032768


def test_shares_are_of_the_figures_above_them() -> None:
    share = 100 * ours("9", "HiMix", "GFLOPs") / ours("9", "Llama-3.2-1B", "GFLOPs")
    assert ours("9", "HiMix", "% of vanilla") == pytest.approx(share, rel=0, abs=1e-9)
    overall = 100 * ours("1", "w.MA", "overall GFLOPs") / ours("1", "S+L", "overall GFLOPs")
    assert ours("1", "w.MA", "% of vanilla, overall") == pytest.approx(overall, rel=0, abs=1e-9)


# The reasons.


def cost(name: str, design: Design, text: int, images: int = 728) -> costs.Cost:
    return costs.cost(pair_config("siglip-so400m-384", paper.PRESETS[name], design), text, images)


def giga(flops: costs.Flops) -> float:
    return flops.total / 1e9


def part(name: str, row: str, column: str, text: int) -> costs.Flops:
    """A figure of Table 10, at another number of text tokens."""
    spent = cost(name, "himix" if "HiMix" in row else "vanilla", text)
    return spent.ffn if column.startswith("FFN") else spent.projections + spent.attention


def reasoned(words: str) -> list[Cell]:
    return [CELLS[key] for key, reason in paper.REASONS.items() if words in reason]


def test_59_text_tokens_would_give_all_of_table_2() -> None:
    hierarchical = cost("Llama-3.2-1B", "hierarchical", 59, 729)
    assert round(giga(cost("Llama-3.2-1B", "vanilla", 59, 729).decoder)) == 2029
    assert round(giga(cost("Llama-3.2-1B", "uniform", 59, 729).decoder), 1) == 200.9
    assert round(giga(hierarchical.decoder + hierarchical.connectors), 1) == 353.8


def test_31_text_tokens_would_give_what_table_10_prints_at_32() -> None:
    found = reasoned("31 text tokens")
    assert len(found) == 5
    for cell in found:
        name = cell.row.removesuffix(" +HiMix")
        assert "728:32" in cell.column
        assert round(giga(part(name, cell.row, cell.column, 31))) == int(cell.printed)


def test_one_layer_to_two_decimals_times_the_layers_gives_all_other_of_table_10() -> None:
    cells = [cell for key, cell in CELLS.items() if key[0] == "10"]
    others = [cell for cell in cells if "31 text tokens" not in cell.reason]
    assert len(others) == 75
    for cell in others:
        name = cell.row.removesuffix(" +HiMix")
        layer = cell.ours / LAYERS[name]
        shown = round(layer, 2) if layer >= 1 else round(layer, 5)  # below one, in MFLOPs
        assert round(shown * LAYERS[name]) == int(cell.printed)


def test_33_text_tokens_would_give_tinyllamas_92() -> None:
    assert round(giga(cost("TinyLlama-1.1B", "himix", 33).decoder), 1) == 91.7


def test_729_image_tokens_would_give_tinyllamas_161() -> None:
    assert round(giga(cost("TinyLlama-1.1B", "himix", 64, 729).decoder), 2) == 160.52
    for cell in reasoned("0.02 beyond"):
        assert abs(cell.difference) - cell.rounding == pytest.approx(0.02, rel=0, abs=0.005)


def test_the_percentages_that_differ_are_those_of_the_printed_figures() -> None:
    assert round(100 * 525 / 5310, 1) == 9.9
    assert round(100 * 765 / 2040, 1) == 37.5
