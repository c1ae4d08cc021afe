"""The card of a converted model: whose it was, how close it is, and its licence."""

from __future__ import annotations

import pytest

from himix_edge import __version__
from himix_edge.convert.card import model_card
from tests.convert.reports import DISTILLED, conversion


def test_what_it_says() -> None:
    card = model_card(conversion().to_dict())
    assert card.startswith("---\nlicense: apache-2.0\n---\n\n# llava-tiny as HiMix\n")
    assert f"(family: llava) by himix-edge {__version__}." in card
    assert "nothing was trained" in card
    for row in (
        "|  | as fitted |",
        "| likeliest next token the same | 83.3% |",
        "| KL of the next token, nats | 0.3750 |",
        "| answers the same, word for word | 1 of 2 |",
        "| right answers of the student | 0 of 1 |",
        "| pictures fitted on | 56 |",
        "| neighbourhood | 1 |",
        "| joined layers | none |",
    ):
        assert f"\n{row}\n" in card
    assert "15.00% of the keys' variance (at most 25.00%), 25.00% of the values' variance" in card
    assert "himix-edge run PICTURE" in card
    assert "That of llava-tiny, whose weights this model holds: apache-2.0." in card


def test_a_distilled_one() -> None:
    card = model_card(conversion(DISTILLED).to_dict())
    assert "trained for 250 steps" in card
    assert "nothing was trained" not in card
    assert "\n|  | as fitted | as distilled |\n| --- | --- | --- |\n" in card
    assert "\n| KL of the next token, nats | 0.3750 | 0.0938 |\n" in card


@pytest.mark.parametrize(
    ("licence", "front", "said"),
    [
        ("Apache-2.0", "license: apache-2.0", "this model holds: Apache-2.0."),
        ("Our *own* licence: v1\nx", "license: other", r"Our \*own\* licence: v1 x."),
        ("", None, "whose folder doesn't say which. Find out before"),
    ],
)
def test_licences(licence: str, front: str | None, said: str) -> None:
    card = model_card(conversion(licence=licence).to_dict())
    assert said in card
    if front is None:
        assert card.startswith("# ")
        assert "license:" not in card
    else:
        assert card.startswith(f"---\n{front}\n---\n\n# ")


def test_a_name_that_is_markdown() -> None:
    card = model_card(conversion(name="a|b\n# c <i>", options={"d|e": "f|g"}).to_dict())
    assert r"# a\|b \# c \<i\> as HiMix" in card
    assert "\n# c" not in card
    assert r"| d\|e | f\|g |" in card
