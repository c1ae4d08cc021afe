"""What goes through the engine in each candidate's turn, and what is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from himix_edge.bench import candidates
from himix_edge.bench.candidates import DECODED, Plan, plan_for, run, run_text_only, token_ids
from himix_edge.errors import ConfigError, PromptError
from himix_edge.runtimes import Model, load
from himix_edge.runtimes.base import FloatArray, IntArray, VisionKV
from himix_edge.runtimes.kvcache import Cache


class Recorder:
    """An engine that writes down what it is asked, and passes it on."""

    def __init__(self, model: Model) -> None:
        self.engine = model.engine
        self.calls: list[str] = []
        self.caches: list[Cache] = []

    def encode(self, pixel_values: FloatArray) -> VisionKV:
        self.calls.append("encode")
        return dataclasses.replace(
            self.engine.encode(pixel_values), wait=lambda: self.calls.append("wait")
        )

    def open(self, image: VisionKV | None) -> Cache:
        self.calls.append("open" if image is None else "open with image")
        self.caches.append(self.engine.open(image))
        return self.caches[-1]

    def prefill(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        self.calls.append(f"prefill {input_ids.shape[1]}")
        return self.engine.prefill(input_ids, cache)

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        self.calls.append(f"step {input_ids.shape[1]}")
        return self.engine.step(input_ids, cache)

    def rewind(self, cache: Cache, count: int) -> None:
        self.calls.append(f"rewind {count}")
        self.engine.rewind(cache, count)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return load(tiny_bundle, device="cpu", threads=1)


@pytest.fixture
def recorder(model: Model, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(model)
    monkeypatch.setattr(model, "_engine", recorder)
    return recorder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 60)).save(path)
    return path


def test_exactly_so_many_ids(model: Model) -> None:
    ids = token_ids(model, 500)
    assert len(ids) == 500
    words = model.tokenizer.encode_turn(model.tokenizer.chat.first, candidates.TEXT)
    assert ids == (words * 500)[:500]
    assert token_ids(model, 3) == ids[:3]


def test_himix(model: Model, recorder: Recorder, picture: Path) -> None:
    timing = run(model, picture, Plan(token_ids(model, 200), 10, 100, vanilla=False), "himix")
    later = ["step 1"] * DECODED
    filled = 4 + 10 + 1 + DECODED  # image, prompt, second token, later ones
    expected = ["encode", "wait", "open with image", "prefill 10", "step 1", *later]
    assert recorder.calls == [*expected, f"prefill {4 + 100 - filled}", *later]
    assert [cache.length for cache in recorder.caches] == [4 + 100 + DECODED]
    assert timing.long is not None


def test_vanilla(model: Model, recorder: Recorder, picture: Path) -> None:
    timing = run(model, picture, Plan(token_ids(model, 200), 10, 100, vanilla=True), "vanilla")
    later = ["step 1"] * DECODED
    expected = ["encode", "wait", "open", "prefill 14", "step 1", *later]
    assert recorder.calls == [*expected, f"prefill {100 - 10 - 1 - DECODED}", *later]
    assert [cache.length for cache in recorder.caches] == [4 + 100 + DECODED]
    assert timing.long is not None


def test_text_only(model: Model, recorder: Recorder) -> None:
    run_text_only(recorder, Plan(token_ids(model, 20), 10, None, vanilla=False))
    assert recorder.calls == ["open", "prefill 10"]


def test_what_the_clock_says(model: Model, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # began, seen, encoded, first token; second; short from, to; long from, to
    clock = iter([1.0, 1.5, 3.5, 7.5, 15.5, 20.0, 20.0 + DECODED, 40.0, 40.0 + 3 * DECODED])
    monkeypatch.setattr("himix_edge.bench.candidates.time.perf_counter", lambda: next(clock))
    timing = run(model, picture, Plan(token_ids(model, 200), 10, 100, vanilla=False), "himix")
    assert timing == candidates.Timing(500, 2000, 4000, 6500, 8000, 1000, 3000)


def test_the_tokens_are_the_models_own(model: Model, picture: Path) -> None:
    """Greedy, as `Model.generate` chooses them."""
    ids = token_ids(model, 10)
    answer = candidates.first_token(model, picture, np.array([ids]), "himix")
    logits = model.engine.prefill(np.array([ids]), model.engine.open(model.encode(picture).kv))
    assert answer.token.tolist() == [[int(np.argmax(logits[0]))]]


def test_a_plan_within_the_positions(model: Model) -> None:
    plan = plan_for(model, 64, vanilla=False)  # 256 positions
    assert (plan.text, plan.long, len(plan.ids)) == (64, 256 - DECODED, 4 + 512)
    assert plan_for(model, 64, vanilla=True).long == 256 - 4 - DECODED
    assert plan_for(model, 230, vanilla=False).long is None


@pytest.mark.parametrize("vanilla", [False, True])
def test_the_longest_text(model: Model, picture: Path, vanilla: bool) -> None:
    most = 256 - 1 - DECODED - (4 if vanilla else 0)
    plan = plan_for(model, most, vanilla=vanilla)
    assert run(model, picture, plan, "vanilla" if vanilla else "himix").long is None
    with pytest.raises(PromptError, match=f"at most {most}, .*smaller --text") as error:
        plan_for(model, most + 1, vanilla=vanilla)
    assert ("leave out --vs" in str(error.value)) == vanilla


@pytest.mark.parametrize("text", [0, -3])
def test_no_text(model: Model, text: int) -> None:
    with pytest.raises(ConfigError, match="text is out of range"):
        plan_for(model, text, vanilla=False)
