"""The report's dict: plain, whole, and its operations those of the formulas."""

from __future__ import annotations

import dataclasses
import json

from himix_edge import __version__
from himix_edge.config import HiMixConfig
from himix_edge.convert.report import Operations, last_judgement
from tests.convert.reports import BLAME, DISTILLED, FITTED, conversion


def test_json_gives_back_the_very_same() -> None:
    report = conversion(DISTILLED).to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_what_it_says() -> None:
    report = conversion().to_dict()
    assert report["himix_edge"] == __version__
    assert report["source"] == {"name": "llava-tiny", "family": "llava", "licence": "apache-2.0"}
    assert HiMixConfig.from_dict(report["config"]) == conversion().student
    assert report["pictures"] == {
        "images": 56,
        "held_out": 7,
        "skipped": {"notes.txt": "image notes.txt can't be read: it is <b>no</b> picture"},
    }
    assert report["fit"]["keys"] == [0.25, 0.05]
    assert report["fit"]["trained_values"] == [0.35, 0.08]
    assert report["fit"]["curve"][1] == {"images": 56, "keys": [0.25, 0.05], "values": [0.4, 0.1]}
    assert report["blame"]["heads"] == [{"layer": 1, "keys": [0.4, 0.11], "values": [0.01, 0.02]}]
    assert report["blame"]["all_keys"] == BLAME.all_keys
    assert (report["seconds"], report["peak_memory"]) == ({"fit": 100.5, "judge": 20.0}, 3 << 30)


def test_judgements_before_and_after_distilling() -> None:
    plain, more = conversion().to_dict(), conversion(DISTILLED).to_dict()
    assert plain["judgements"]["distilled"] is None
    assert plain["distil_steps"] == 0
    assert last_judgement(plain) == plain["judgements"]["fitted"]
    assert last_judgement(more) == more["judgements"]["distilled"]
    assert more["distil_steps"] == 250
    fitted = plain["judgements"]["fitted"]
    assert fitted["kl"] == (2 * 0.125 + 4 * 0.5) / 6
    assert fitted["agreement"] == 5 / 6
    assert (fitted["same"], fitted["answers"], fitted["tokens"]) == (1, 2, 6)
    assert (fitted["labelled"], fitted["teacher_right"], fitted["student_right"]) == (1, 1, 0)
    assert [one["right"] for one in fitted["exchanges"]] == [None, False]
    assert fitted["exchanges"][1]["student"] == FITTED.exchanges[1].student


def test_operations_by_the_formulas() -> None:
    """h 32, L 2, H 4 over Hkv 2 of d 16, I 64, V 300; N 4 of d_v 32, P 3, M 64."""
    made = conversion()
    counted = Operations.of(made.teacher, made.student)
    through, slots = 3 + 4 + 64, 3 + 4 + 64
    projections = 2 * through * 2 * (2 * 32 * 64 + 2 * 32 * 32)
    products = 4 * through * slots * 64 * 2 + through * slots * 4 * 2  # and the softmax
    ffn = 6 * through * 2 * 32 * 64 + through * 64 * 2  # and the activation
    connector = 2 * 4 * 32 * (32 + 32) + 4 * 32
    assert counted.before == connector + projections + products + ffn + 2 * through * 32 * 300
    assert (counted.text_tokens, counted.image_slots) == (64, 7)
    projections, products, ffn, head = (
        2 * 64 * 2 * (2 * 32 * 64 + 2 * 32 * 32),
        4 * 64 * slots * 64 * 2 + 64 * slots * 4 * 2,
        6 * 64 * 2 * 32 * 64 + 64 * 64 * 2,
        2 * 64 * 32 * 300,
    )
    assert counted.after == 4 * 4 * 2 * 32 * 32 + projections + products + ffn + head


def test_a_context_too_short_for_the_usual_prompt() -> None:
    teacher = conversion().teacher
    short = dataclasses.replace(teacher.decoder, max_position_embeddings=27)
    teacher = dataclasses.replace(teacher, decoder=short)
    student = dataclasses.replace(conversion().student, decoder=short)
    assert Operations.of(teacher, student).text_tokens == 20
