"""The page: well-formed, self-contained, and its figures those of the report."""

from __future__ import annotations

import base64
import builtins
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from himix_edge.convert import page as convert_page
from himix_edge.convert.judge import Exchange, Judgement
from himix_edge.convert.page import MOST_ANSWERS, page
from himix_edge.convert.plots import plots
from himix_edge.errors import DependencyError, ImageError
from himix_edge.plotting import require_plots
from tests.convert.reports import DISTILLED, FITTED, conversion, painted

VOID = {"meta", "img"}
EVIL = '<script>alert("x")</script>&.png'


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return plots(conversion().to_dict())


@pytest.fixture(autouse=True)
def _drawn_once(monkeypatch: pytest.MonkeyPatch, drawn: dict[str, str]) -> None:
    """Pages differ in their words here; all have the same plots."""
    monkeypatch.setattr(convert_page, "plots", lambda _report: drawn)


class Parsed(HTMLParser):
    """Checks that tags are closed in order; collects text, tags and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]


def test_it_says_what_the_report_says(tmp_path: Path) -> None:
    report = conversion(DISTILLED).to_dict()
    parsed = Parsed(page(report, painted(tmp_path)))
    for row in (
        ["likeliest next token the same", "83.3%", "83.3%"],
        ["KL of the next token, nats", "0.3750", "0.0938"],
        ["KL of an answer's first token", "0.5000", "0.5000"],
        ["answers the same, word for word", "1 of 2", "1 of 2"],
        ["right answers of the teacher", "1 of 1", "1 of 1"],
        ["right answers of the student", "0 of 1", "0 of 1"],
        ["pictures fitted on", "56"],
        ["pictures held out", "7"],
        ["ridge penalty", "0.0001 of the inputs' mean variance"],
        ["distilling steps", "250"],
        ["connector", "no"],
        ["joined layers", "none"],
        ["notes.txt", "image notes.txt can't be read: it is <b>no</b> picture"],
        ["all layers", "6.10e-01", "7.00e-02"],
        ["layer 1", "5.00e-01", "3.00e-02"],
        ["layer 1, head 0", "4.00e-01", "1.00e-02"],
        ["layer 1, head 1", "1.10e-01", "2.00e-02"],
        ["fit", "1 min 40 s"],
        ["in all", "2 min 0 s"],
        ["peak memory", "3.00 GiB"],
    ):
        assert row in parsed.rows
    words = "".join(parsed.words)
    assert "15.0%, 25.0%" in words  # unexplained, the mean over the layers
    assert "apache-2.0" in words
    operations = report["operations"]
    assert f"{operations['after'] / operations['before']:.1%} of it." in words


def test_without_distilling_or_labels_there_is_no_word_of_them(tmp_path: Path) -> None:
    plain = Judgement(tuple(dataclasses.replace(one, label=None) for one in FITTED.exchanges))
    parsed = Parsed(page(conversion(fitted=plain).to_dict(), painted(tmp_path)))
    assert ["KL of the next token, nats", "0.3750"] in parsed.rows
    assert not any(row[0].startswith("right answers") for row in parsed.rows)


def test_answers_side_by_side_those_that_differ_first(tmp_path: Path) -> None:
    text = page(conversion().to_dict(), painted(tmp_path))
    assert text.index("the blue one") < text.index("How many?")
    assert '<span class="differs">the blue one</span>' in text
    assert text.count('class="differs"') == 1
    pictures = Parsed(text).attributes("src")
    assert len(pictures) == 2
    data = base64.b64decode(pictures[0].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (160, 100)


def test_it_needs_nothing_beside_it(tmp_path: Path) -> None:
    parsed = Parsed(page(conversion().to_dict(), painted(tmp_path)))
    assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object"} == set()
    for name in ("src", "href", "xlink:href"):
        assert all(at.startswith(("data:", "#")) for at in parsed.attributes(name))
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))  # four plots in one page
    used = set(re.findall(r"url\(#([^)]*)\)", str(parsed.tags)))
    used |= {at[1:] for at in parsed.attributes("xlink:href")}
    assert used <= set(ids)


def test_other_peoples_words_stay_words(tmp_path: Path) -> None:
    evil = Judgement((Exchange(EVIL, EVIL, EVIL, EVIL, "", 4, 3, 0.5, 0.75),))
    made = conversion(
        name=EVIL, family=EVIL, licence=EVIL, options={EVIL: EVIL}, seconds={EVIL: 1.0}
    )
    fit = dataclasses.replace(made.fit, skipped={EVIL: EVIL})
    report = dataclasses.replace(made, fitted=evil, fit=fit).to_dict()
    picture = tmp_path / "evil.png"
    Image.new("RGB", (4, 4)).save(picture)
    text = page(report, {EVIL: picture})
    assert "<script" not in text
    parsed = Parsed(text)
    assert EVIL in parsed.attributes("alt")
    assert [EVIL, EVIL] in parsed.rows
    assert "".join(parsed.words).count(EVIL) > 8
    assert "(nothing)" in text


def test_a_page_has_room_for_so_many_answers(tmp_path: Path) -> None:
    [same, other] = FITTED.exchanges
    many = Judgement((*[same] * 30, *[other] * 20))
    text = page(conversion(fitted=many).to_dict(), painted(tmp_path))
    assert text.count('<section class="exchange">') == MOST_ANSWERS
    assert text.count('class="differs"') == 20
    assert "20 of 50 answers differ; those first. 36 are shown here" in text


def test_the_same_report_gives_the_same_page(tmp_path: Path, drawn: dict[str, str]) -> None:
    pictures = painted(tmp_path)
    assert page(conversion().to_dict(), pictures) == page(conversion().to_dict(), pictures)
    assert plots(conversion().to_dict()) == drawn


def test_a_picture_that_has_gone(tmp_path: Path) -> None:
    text = page(conversion().to_dict(), {})
    assert "<img" not in text
    with pytest.raises(ImageError):
        page(conversion().to_dict(), {"a.png": tmp_path / "gone.png"})


def points(svg: str, colour: str) -> list[list[float]]:
    """The corners of each line of a colour."""
    found = re.findall(rf'<path d="(M [^z]*?)" [^>]*?stroke: {colour}', svg, flags=re.DOTALL)
    return [[float(number) for number in re.findall(r"-?\d+\.?\d*", path)] for path in found]


def test_the_plots_show_the_figures(drawn: dict[str, str]) -> None:
    assert list(drawn) == ["variance", "curve", "blame", "agreement"]
    for svg in drawn.values():
        ElementTree.fromstring(svg)
        assert "currentColor" in svg
        assert "#010203" not in svg
    held_out, trained = points(drawn["variance"], "#e07b00")[:2]
    # Two layers each, y downward: 25 and 5 % held out, 20 and 4 % trained on.
    per_percent = (held_out[3] - held_out[1]) / 20
    assert (trained[3] - trained[1]) / per_percent == pytest.approx(16, rel=0, abs=1e-3)
    assert (trained[1] - held_out[1]) / per_percent == pytest.approx(5, rel=0, abs=1e-3)
    assert "83.3" in drawn["agreement"]
    assert "50.0" in drawn["agreement"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name=name)
        return original(name, *arguments)

    require_plots()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match=r"pip install 'himix-edge\[plot\]'"):
        require_plots()
