"""A conversion's report as one HTML page that needs nothing beside it: no scripts, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from himix_edge.convert import tables
from himix_edge.convert.plots import mean, plots
from himix_edge.convert.report import last_judgement
from himix_edge.runtimes.preprocess import load_image

MOST_ANSWERS = 36  # that the page shows; the JSON beside it has all
THUMBNAIL, QUALITY = 160, 70  # pixels of the longer edge; of the JPEG

STYLE = """\
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #66676b; --paper: #fff; --line: #d9dade;
  --card: #f5f5f7; --mark: #fbe6c8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e8; --soft: #a0a1a6; --paper: #17181a;
  --line: #37383c; --card: #222326; --mark: #4a3617; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { max-width: 44rem; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.tiles, .plots { display: grid; gap: .8rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); margin-top: 1.2rem; }
.tiles div { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; }
.tiles strong { display: block; font-size: 1.45rem; font-weight: 600; line-height: 1.3; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  margin-top: 1.2rem; }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: .5rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { font-weight: 400; min-width: 6rem; }
.numbers td, .numbers thead th + th { text-align: right; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
.exchange { display: flex; gap: .9rem; padding: .9rem 0; border-top: 1px solid var(--line); }
.exchange img { width: 6rem; height: 6rem; object-fit: contain; flex: none;
  background: var(--card); border-radius: .4rem; }
.exchange div { min-width: 0; overflow-wrap: anywhere; }
.exchange dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; }
.exchange dt { color: var(--soft); }
.exchange dd { margin: 0; white-space: pre-wrap; }
.exchange p { margin: 0 0 .3rem; font-weight: 600; }
.differs { background: var(--mark); border-radius: .2rem; }
@media (max-width: 30rem) { .exchange img { width: 4rem; height: 4rem; } }
"""


def page(report: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """The page; the same report and pictures give the same text.

    Args:
        report: `Conversion.to_dict`.
        pictures: the files by the names that the exchanges have; one that is not here is left out.

    Raises:
        DependencyError: matplotlib isn't installed.
        ImageError: a picture that can't be read.
    """
    drawn, name = plots(report), escape(report["source"]["name"])
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} as HiMix</title>
<style>
{STYLE}</style>
</head>
<body>
<h1>{name} as a HiMix model</h1>
<p class="soft">{_origin(report)}</p>
{_tiles(report)}
<h2>How close it is</h2>
<p>In the pictures held out. Next tokens are compared along the teacher's own greedy answers, which
both models are given.</p>
{_table(tables.closeness(report), head=True)}
<div class="plots">
{_figure(drawn["agreement"], "Next tokens and whole answers that are the teacher's own.")}
{_figure(drawn["variance"], _variance_said(report))}
{_figure(drawn["curve"], "More pictures, a better fit: the mean over the layers, held out.")}
{_figure(drawn["blame"], _blame_said(report))}
</div>
<h2>Where it loses</h2>
{_weakest(report)}
<h2>What it saves</h2>
<p>{tables.operations(report)}</p>
<h2>How it was made</h2>
{_table(tables.how(report))}
{_skipped(report)}
<h2>What it took</h2>
{_table(tables.spent(report))}
<h2>Answers side by side</h2>
{_answers(report, pictures)}
</body>
</html>
"""


def thumbnail(path: Path) -> str:
    """A small picture as a data: address.

    Raises:
        ImageError: a file that is no picture.
    """
    image = load_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _origin(report: Mapping[str, Any]) -> str:
    source = report["source"]
    licence = source["licence"] or "not stated by its folder"
    return escape(
        f"Converted by himix-edge {report['himix_edge']} from a model of the family "
        f"{source['family']}. Its licence, which is this model's too: {licence}."
    )


def _tiles(report: Mapping[str, Any]) -> str:
    judged, counted, fit = last_judgement(report), report["operations"], report["fit"]
    facts = [
        (f"{judged['agreement']:.1%}", "of next tokens are the teacher's"),
        (f"{judged['kl']:.4f}", "nats of KL a token"),
        (f"{judged['same']} of {judged['answers']}", "answers are the same word for word"),
        (f"{mean(fit['keys']):.1%}, {mean(fit['values']):.1%}", "unexplained of keys and values"),
        (f"{counted['after'] / counted['before']:.1%}", "of the decoder's operations are left"),
        (tables.duration(sum(report["seconds"].values())), "in all"),
    ]
    tiles = (f"<div><strong>{figure}</strong>{said}</div>" for figure, said in facts)
    return '<div class="tiles">\n' + "\n".join(tiles) + "\n</div>"


def _variance_said(report: Mapping[str, Any]) -> str:
    return (
        "What the closed-form fit leaves unexplained of the teacher's keys and "
        f"values, in {report['pictures']['held_out']:,} pictures held out."
    )


def _blame_said(report: Mapping[str, Any]) -> str:
    return (
        "What each layer loses by itself: the KL if only its keys, or only its values, are the "
        f"converted model's and all else is the teacher's. On {report['blame']['pictures']:,} "
        "pictures."
    )


def _weakest(report: Mapping[str, Any]) -> str:
    """The heads of the worst layers, and what keys and values lose as a whole."""
    blame = report["blame"]
    rows: list[tables.Row] = [("KL, nats a token", "of keys", "of values")]
    rows.append(("all layers", f"{blame['all_keys']:.2e}", f"{blame['all_values']:.2e}"))
    for weak in blame["heads"]:
        layer = weak["layer"]
        keys, values = blame["keys"][layer], blame["values"][layer]
        rows.append((f"layer {layer}", f"{keys:.2e}", f"{values:.2e}"))
        for head, (key, value) in enumerate(zip(weak["keys"], weak["values"], strict=True)):
            rows.append((f"layer {layer}, head {head}", f"{key:.2e}", f"{value:.2e}"))
    said = "<p>The layers that lose most by themselves, and their key-value heads.</p>\n"
    return said + _table(rows, head=True)


def _skipped(report: Mapping[str, Any]) -> str:
    skipped = report["pictures"]["skipped"]
    if not skipped:
        return ""
    rows: list[tables.Row] = [("passed over", "because"), *skipped.items()]
    return _table(rows, head=True, kind="")


def _answers(report: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    exchanges = last_judgement(report)["exchanges"]
    shown = sorted(exchanges, key=lambda exchange: exchange["same"])[:MOST_ANSWERS]
    small = {name: thumbnail(pictures[name]) for name in _names(shown) if name in pictures}
    differing = sum(not exchange["same"] for exchange in exchanges)
    said = f"{differing} of {len(exchanges)} answers differ; those first."
    if len(shown) < len(exchanges):
        said += f" {len(shown)} are shown here, all of them are in the JSON report."
    blocks = (_exchange(exchange, small) for exchange in shown)
    return f'<p class="soft">{said}</p>\n' + "\n".join(blocks)


def _names(exchanges: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({exchange["image"] for exchange in exchanges})


def _exchange(exchange: Mapping[str, Any], small: Mapping[str, str]) -> str:
    name = escape(exchange["image"])
    picture = (
        f'<img alt="{name}" src="{small[exchange["image"]]}">' if exchange["image"] in small else ""
    )
    mark = "" if exchange["same"] else ' class="differs"'
    label = exchange["label"]
    answers = [("teacher", "", exchange["teacher"]), ("HiMix", mark, exchange["student"])]
    if label is not None:
        answers.append(("right", "", label))
    said = "".join(
        f"<dt>{who}</dt><dd><span{marked}>{escape(text) or '(nothing)'}</span></dd>"
        for who, marked, text in answers
    )
    figures = (
        f"{name}: {exchange['agreed']} of {exchange['tokens']} tokens agree, "
        f"KL {exchange['kl']:.4f}"
    )
    return (
        f'<section class="exchange">{picture}<div><p>{escape(exchange["prompt"])}</p>'
        f'<dl>{said}</dl><span class="soft">{figures}</span></div></section>'
    )


def _figure(svg: str, said: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(said)}</figcaption></figure>"


def _table(rows: Sequence[tables.Row], *, head: bool = False, kind: str = "numbers") -> str:
    """Rows of text, the first of them the head if there is one."""
    top = ""
    if head:
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
        top, rows = f"<thead><tr>{cells}</tr></thead>", rows[1:]
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
        for name, *cells in rows
    )
    return f'<div class="wide"><table class="{kind}">{top}<tbody>\n{body}</tbody></table></div>'
