from __future__ import annotations

from pathlib import Path

import pytest
import torch

from himix_edge.training.log import WINDOW, LogLine, TrainingLog, read_log
from himix_edge.training.loop import Phase, Progress
from himix_edge.training.tasks import Outcome

PHASE = Phase("finetune", steps=60, scenes=1, learning_rate=1e-3)


def progress(step: int, loss: float, right: dict[str, float]) -> Progress:
    return Progress(PHASE, step, Outcome(torch.tensor(loss), right))


def test_a_line_is_the_mean_of_a_window(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path)
    for step in range(1, 61):
        right = {"count": step / 100} | ({"which": 1.0} if step == 3 else {})
        log.update(progress(step, float(step), right))
    lines = read_log(tmp_path)
    assert [(line.phase, line.step) for line in lines] == [
        ("finetune", WINDOW),
        ("finetune", 2 * WINDOW),
        ("finetune", 60),  # the last window is cut short by the phase's end
    ]
    assert [line.loss for line in lines] == [13.0, 38.0, 55.5]
    assert lines[0].right == {"count": pytest.approx(0.13), "which": 1.0}
    assert lines[1].right == {"count": pytest.approx(0.38)}
    assert log.last["finetune"] == lines[-1]
    assert str(LogLine("finetune", 1, 2.0, 0.5, {"which": 0.5})) == "loss 0.500  which 50%"


def test_seconds_go_on_where_an_earlier_run_stopped(tmp_path: Path) -> None:
    first = TrainingLog(tmp_path)
    for step in range(1, WINDOW + 1):
        first.update(progress(step, 1.0, {}))
    earlier = first.last["finetune"].seconds
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text.replace(f'"seconds": {earlier}', '"seconds": 1000.0'))
    again = TrainingLog(tmp_path)
    for step in range(WINDOW + 1, 2 * WINDOW + 1):
        again.update(progress(step, 1.0, {}))
    assert 1000.0 <= again.last["finetune"].seconds < 1010.0


def test_no_log_no_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
