"""Many threads, one model, shared images: every question has its own right answer."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import himix_edge
from himix_edge.errors import HimixError
from himix_edge.runtimes.base import FloatArray, IntArray
from himix_edge.runtimes.generate import Answer
from himix_edge.runtimes.kvcache import Cache
from himix_edge.runtimes.model import Model
from tests.runtimes.conftest import TinyBundle
from tests.runtimes.fakes import FakeEngine, arithmetic
from tests.runtimes.test_model import fake_model

QUESTIONS = ["what", "what is it", "what is there", "who", "why not", "How many objects?"]
MAX_TOKENS = 4
THREADS, EACH = 8, 60


def pictures() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (30, 40, 3), dtype=np.uint8) for _ in range(3)]


@pytest.fixture(autouse=True)
def _switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(params=["ort", "portable", "native"])
def model(request: pytest.FixtureRequest) -> Model:
    if request.param == "native":
        tiny: TinyBundle = request.getfixturevalue("fixed_bundle")
        return himix_edge.load(tiny.folder, threads=1)
    name = "ort_bundle" if request.param == "ort" else "tiny_bundle"
    folder: Path = request.getfixturevalue(name)
    return himix_edge.load(folder, threads=1)


def in_threads(work: Any, count: int = THREADS) -> list[Any]:
    """What every thread gives; the first error of any of them."""
    found: list[Any] = []
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            found.append(work(number))
        except BaseException as error:  # noqa: BLE001 (raised below)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def test_every_thread_gets_its_own_answers(model: Model) -> None:
    """Conversations of one turn and two, on images that all threads share."""

    def asked(image: Any, first: str, second: str) -> tuple[str, str]:
        talk = model.chat(image)
        return (
            talk.ask(first, max_tokens=MAX_TOKENS).read(),
            talk.ask(second, max_tokens=MAX_TOKENS).read(),
        )

    expected = {
        (p, first, second): asked(model.encode(picture), first, second)
        for p, picture in enumerate(pictures())
        for first in QUESTIONS
        for second in QUESTIONS[:2]
    }
    assert len(set(expected.values())) > 20
    shared = [model.encode(picture) for picture in pictures()]

    def work(number: int) -> int:
        draw, wrong = random.Random(number), 0
        for _ in range(EACH):
            key = draw.choice(list(expected))
            wrong += asked(shared[key[0]], *key[1:]) != expected[key]
        return wrong

    assert in_threads(work) == [0] * THREADS


def test_every_thread_encodes_its_own_image(model: Model) -> None:
    expected = [model.generate(p, "what", max_tokens=MAX_TOKENS).read() for p in pictures()]
    assert len(set(expected)) >= 2

    def work(number: int) -> bool:
        picture = pictures()[number % 3]
        answers = [model.generate(picture, "what", max_tokens=MAX_TOKENS).read() for _ in range(10)]
        return answers == [expected[number % 3]] * 10

    assert all(in_threads(work))


class SlowEngine(FakeEngine):
    """Each token waits to be let through."""

    def __init__(self) -> None:
        super().__init__(arithmetic)
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def step(self, input_ids: IntArray, cache: Cache) -> FloatArray:
        self.begun.release()
        assert self.gate.acquire(timeout=60)
        return super().step(input_ids, cache)


def slow_answer(tmp_path: Path) -> tuple[SlowEngine, Answer]:
    model = fake_model(tmp_path, arithmetic)
    engine = SlowEngine()
    model._engine = engine
    return engine, model.generate(model.encode(pictures()[0]), "what", max_tokens=50)


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_an_answer_ended_from_another_thread(way: str, tmp_path: Path) -> None:
    engine, answer = slow_answer(tmp_path)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(answer))
    reader.start()
    for _ in range(3):  # the first token is of the prefill
        assert engine.begun.acquire(timeout=60)
        engine.gate.release()
    assert engine.begun.acquire(timeout=60)  # the fifth is in the making
    if way == "cancel":
        answer.cancel()  # and returns, while the engine computes
        assert answer.finish_reason is None
        engine.gate.release()
    else:
        closer = threading.Thread(target=answer.close)
        closer.start()
        engine.gate.release()
        closer.join(60)
        assert answer.finish_reason == "cancelled"
    reader.join(60)
    assert not reader.is_alive()
    assert answer.finish_reason == "cancelled"
    assert len(pieces) <= 5
    assert answer.text == "".join(pieces)
    assert answer.read() == answer.text


@pytest.mark.parametrize("way", ["cancel", "close"])
@pytest.mark.parametrize("read", [0, 2])
def test_an_answer_ended_while_nobody_reads(way: str, read: int, tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    answer = model.generate(model.encode(pictures()[0]), "what", max_tokens=5)
    said = "".join(next(answer) for _ in range(read))
    getattr(answer, way)()
    assert answer.finish_reason == "cancelled"
    assert list(answer) == []
    assert answer.text == said


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_an_answer_that_has_ended_stays_as_it_ended(way: str, tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    answer = model.generate(model.encode(pictures()[0]), "what", max_tokens=3)
    text = answer.read()
    getattr(answer, way)()
    assert (answer.finish_reason, answer.text) == ("length", text)


def test_cancelled_from_within(tmp_path: Path) -> None:
    """As a signal's handler does, in the thread that makes the piece."""
    model = fake_model(tmp_path, arithmetic)
    engine = FakeEngine(arithmetic)
    model._engine = engine
    answer = model.generate(model.encode(pictures()[0]), "what", max_tokens=50)

    def rule(image: int, text: list[int], positions: list[int]) -> int:
        if len(text) == 8:
            answer.close()
        return arithmetic(image, text, positions)

    engine.rule = rule
    assert len(answer.read()) == 3
    assert answer.finish_reason == "cancelled"


def test_one_answer_read_by_two_threads(tmp_path: Path) -> None:
    """Each piece goes to one of them."""
    model = fake_model(tmp_path, arithmetic)
    image = model.encode(pictures()[0])
    whole = model.generate(image, "what", max_tokens=200).read()
    answer = model.generate(image, "what", max_tokens=200)
    pieces = in_threads(lambda _: list(answer), 2)
    assert answer.text == whole
    assert sorted("".join(pieces[0] + pieces[1])) == sorted(whole)


def test_one_conversation_asked_by_many_threads(tmp_path: Path) -> None:
    """Whoever comes ends the answer before; nothing is mixed up."""
    model = fake_model(tmp_path, arithmetic, capacity=100_000)
    talk = model.chat(model.encode(pictures()[0]))
    in_threads(lambda number: [talk.ask(f"{number}", max_tokens=5).read() for _ in range(10)])
    roles = [message["role"] for message in talk.messages]
    assert roles == ["user", "assistant"] * 80
    again = model.chat(model.encode(pictures()[0]), history=talk.messages)
    assert talk.ask("x", max_tokens=5).read() == again.ask("x", max_tokens=5).read()


# asyncio


def test_an_answer_read_by_a_task(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    image = model.encode(pictures()[0])
    alone = {q: model.generate(image, q, max_tokens=20).read() for q in QUESTIONS}

    async def read(question: str) -> str:
        return "".join([piece async for piece in model.generate(image, question, max_tokens=20)])

    async def main() -> list[str]:
        return await asyncio.gather(*(read(question) for question in QUESTIONS))

    assert asyncio.run(main()) == [alone[question] for question in QUESTIONS]


def test_a_cancelled_task_cancels_its_answer(tmp_path: Path) -> None:
    engine, answer = slow_answer(tmp_path)

    async def read() -> None:
        async for _ in answer:
            pass

    async def main() -> None:
        task = asyncio.create_task(read())
        await asyncio.to_thread(engine.begun.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.release()

    asyncio.run(main())
    assert answer.finish_reason == "cancelled"
    assert answer.tokens <= 2


def test_an_error_reaches_the_task(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)

    def fails(*_: object) -> int:
        raise HimixError("the engine fails")

    model._engine = FakeEngine(fails)
    answer = model.generate(model.encode(pictures()[0]), "what")

    async def read() -> None:
        async for _ in answer:
            pass

    with pytest.raises(HimixError, match="the engine fails"):
        asyncio.run(read())
