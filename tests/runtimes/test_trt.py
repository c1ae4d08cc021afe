"""The TensorRT runtime from end to end, with the true numbers, on a GPU that can be looked into."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import FileRecord, Manifest
from himix_edge.engines.build import Built
from himix_edge.engines.gpu import gpu_here
from himix_edge.engines.plan import BuildPlan
from himix_edge.engines.store import StoredEngines, find_engines
from himix_edge.engines.trt import engine_device
from himix_edge.errors import ConfigError, DependencyError, EngineError, PromptError
from himix_edge.runtimes import load
from himix_edge.runtimes.base import FloatArray
from himix_edge.runtimes.ort import OrtEngine
from himix_edge.runtimes.trt import TrtEngine
from tests.models.reference import random_tensor
from tests.runtimes.conftest import TinyBundle
from tests.runtimes.fake_cuda import FakeGpu, runtime_of
from tests.runtimes.fake_tensorrt import engines_of, tensorrt_of
from tests.tolerances import ENGINE_LOGITS, HALF_GRAPH

PROMPT = [1, 40, 41, 42, 43, 44, 2]
MAX_PROMPT = 4  # so that the prompt goes in by parts
Opener = Callable[..., TrtEngine]


def install(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, **versions: str) -> FakeGpu:
    """Makes a GPU this machine's."""
    cuda, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    runtime = runtime_of(gpu)
    bindings.__dict__["runtime"] = runtime
    for name, module in (
        ("cuda", cuda),
        ("cuda.bindings", bindings),
        ("cuda.bindings.runtime", runtime),
        ("tensorrt", tensorrt_of(gpu, **versions)),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return gpu


@pytest.fixture(params=["late", "eager"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    gpu = install(FakeGpu(eager=request.param == "eager"), monkeypatch)
    gc.freeze()  # what is older has no part in this, and is much to look through
    yield gpu
    gc.collect()
    gc.unfreeze()
    assert gpu.memory == {}  # whatever was allocated is freed with the engine
    assert gpu.pinned == {}
    assert gpu.graphs == {}


@pytest.fixture(params=["bundle", "fixed_bundle"])
def source(request: pytest.FixtureRequest) -> TinyBundle:
    bundle = request.getfixturevalue(request.param)
    assert isinstance(bundle, TinyBundle)
    return bundle


def with_engines(source: Path, tmp_path: Path, gpu: FakeGpu, **options: object) -> Path:
    folder = tmp_path / "bundle"
    shutil.copytree(source, folder)
    engines_of(folder, gpu, **{"max_prompt": MAX_PROMPT, **options})  # type: ignore[arg-type]
    return folder


def engine_of(source: TinyBundle, tmp_path: Path, gpu: FakeGpu, **options: int) -> TrtEngine:
    folder = with_engines(source.folder, tmp_path, gpu)
    return TrtEngine(folder, Manifest.read(folder), **options)  # type: ignore[arg-type]


def pixels(seed: int = 0) -> FloatArray:
    array: FloatArray = random_tensor(1, 3, 24, 24, seed=seed).numpy()
    return array


def expected_logits(source: TinyBundle, seed: int, ids: list[int]) -> FloatArray:
    model = source.model
    with torch.inference_mode():
        logits, _ = model.decode(torch.tensor([ids]), model.encode(torch.from_numpy(pixels(seed))))
    last: FloatArray = logits[:, -1].numpy()
    return last


def check(source: TinyBundle, seed: int, text: list[int], logits: FloatArray) -> None:
    expected = expected_logits(source, seed, text)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ENGINE_LOGITS)


def test_logits_are_the_models_and_onnxruntimes(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu)
    other = OrtEngine(BundleFiles.open(source.folder), threads=1)
    cache = engine.open(engine.encode(pixels()))
    twin = other.open(other.encode(pixels()))
    text: list[int] = []
    for step in (PROMPT, [77], [78], [79], [80, 81, 82], [83], list(range(90, 99)), [84]):
        text += step
        logits = engine.step(np.array([step]), cache)
        check(source, 0, text, logits)
        same = other.step(np.array([step]), twin)
        np.testing.assert_allclose(logits, same, rtol=0, atol=ENGINE_LOGITS)
        assert (cache.length, cache.text_length) == (9 + len(text), len(text))
    assert cache.capacity == twin.capacity


def test_only_a_cache_of_fixed_size_has_its_steps_recorded(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu)
    cache = engine.open(engine.encode(pixels()))
    engine.step(np.array([PROMPT]), cache)
    for token in range(50, 56):
        engine.step(np.array([[token]]), cache)
    fixed = Manifest.read(source.folder).cache_slots is not None
    assert gpu.launches == (5 if fixed else 0)  # the first of the six is what is recorded
    assert engine.unrecordable is None


def test_what_cannot_be_recorded_runs_as_it_is(
    fixed_bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    gpu.recordable = False
    engine = engine_of(fixed_bundle, tmp_path, gpu)
    cache = engine.open(engine.encode(pixels()))
    text: list[int] = []
    for step in (PROMPT, [77], [78], [79]):
        text += step
        check(fixed_bundle, 0, text, engine.step(np.array([step]), cache))
    assert gpu.launches == 0
    assert "cudaErrorStreamCaptureInvalidated" in str(engine.unrecordable)


def test_a_cache_goes_on_from_any_of_its_tokens(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu, caches=2)
    image = engine.encode(pixels())
    cache = engine.open(image)
    check(source, 0, PROMPT, engine.prefill(np.array([PROMPT]), cache))
    answer = [*PROMPT, 77, 78, 79]
    for token in answer[len(PROMPT) :]:
        engine.step(np.array([[token]]), cache)
    assert cache.reusable == len(answer)  # all went through one graph
    for count in (len(answer), 8, 3, 0):
        for more in ([50], [51, 52, 53, 54, 55]):
            engine.rewind(cache, count)
            assert (cache.text_length, cache.reusable) == (count, count)
            text = [*answer[:count], *more]
            check(source, 0, text, engine.prefill(np.array([more]), cache))
            check(source, 0, [*text, 60], engine.step(np.array([[60]]), cache))
    other = engine.open(image)  # the image is what it was
    del cache
    check(source, 0, PROMPT, engine.prefill(np.array([PROMPT]), other))


def test_a_prompt_of_one_token_goes_through_the_prompts_profile(
    fixed_bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(fixed_bundle, tmp_path, gpu)
    cache = engine.open(engine.encode(pixels()))
    text: list[int] = []
    for token in (5, 6, 7, 8):
        text.append(token)
        check(fixed_bundle, 0, text, engine.prefill(np.array([[token]]), cache))
    assert gpu.launches == 0  # none is a decode step, which would have been recorded


def test_conversations_about_one_image_do_not_meet(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu)
    image = engine.encode(pixels())
    caches = [engine.open(image), engine.open(image)]
    texts: list[list[int]] = [[], []]
    for step in (PROMPT, [77], [78], [79], [80, 81], [82], [83]):
        for i, cache in enumerate(caches):
            mine = [token + 10 * i for token in step]
            texts[i] += mine
            check(source, 0, texts[i], engine.step(np.array([mine]), cache))
    late = engine.open(image)  # the image is what it was, whatever was said about it
    check(source, 0, [5, 6], engine.step(np.array([[5, 6]]), late))


def test_an_image_is_encoded_while_an_answer_is_half_read(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu)
    first = engine.open(engine.encode(pixels(1)))
    text = list(PROMPT)
    check(source, 1, text, engine.step(np.array([PROMPT]), first))
    image = engine.encode(pixels(2))  # nobody waits for it yet
    for token in (60, 61, 62):
        text.append(token)
        check(source, 1, text, engine.step(np.array([[token]]), first))
    second = engine.open(image)
    check(source, 2, PROMPT, engine.step(np.array([PROMPT]), second))
    text.append(63)
    check(source, 1, text, engine.step(np.array([[63]]), first))


def test_images_that_nobody_waited_for(source: TinyBundle, tmp_path: Path, gpu: FakeGpu) -> None:
    engine = engine_of(source, tmp_path, gpu)
    images = [engine.encode(pixels(seed)) for seed in (1, 2, 3)]
    for seed, image in zip((1, 2, 3), images, strict=True):
        cache = engine.open(image)
        check(source, seed, PROMPT, engine.step(np.array([PROMPT]), cache))
        del cache


def test_a_buffer_passes_from_one_image_to_the_next(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu, caches=2)
    for seed in range(4):
        image = engine.encode(pixels(seed))
        cache = engine.open(image)
        del image
        text = []
        for step in ([1, 2, 3], [70 + seed], [80 + seed]):
            text += step
            check(source, seed, text, engine.step(np.array([step]), cache))
        del cache


def test_a_copy_is_made_before_its_source_is_written_anew(
    fixed_bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(fixed_bundle, tmp_path, gpu, caches=2)
    image = engine.encode(pixels(1))
    first, second = engine.open(image), engine.open(image)
    written = image.tensors[0].set
    del image, first  # while the copy for the second is still under way
    image = engine.encode(pixels(2))
    assert image.tensors[0].set is written
    check(fixed_bundle, 1, PROMPT, engine.step(np.array([PROMPT]), second))
    check(fixed_bundle, 2, PROMPT, engine.step(np.array([PROMPT]), engine.open(image)))


def test_encode_does_not_wait_and_wait_does(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu)
    image = engine.encode(pixels())
    lease = image.tensors[0]
    heads, dim = 2, 8
    size = 4 * heads * dim * engine._sizes.max_cache

    def key() -> FloatArray:
        raw = gpu.bytes_at(lease.set.addresses[0], size).view(np.float32)
        slots = engine._sizes.max_cache if engine._fixed else 9
        array: FloatArray = raw[: heads * slots * dim].reshape(1, heads, slots, dim)[:, :, :9]
        return array

    assert np.all(key() == 0)  # zeros, not what memory is fresh with
    image.wait()
    with torch.inference_mode():
        expected = source.model.encode(torch.from_numpy(pixels()))[0].key.numpy()
    np.testing.assert_allclose(key(), expected, rtol=0, atol=ENGINE_LOGITS)


def test_greedy_answers_of_several_turns_are_onnxruntimes(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    folder = with_engines(source.folder, tmp_path, gpu)
    picture = np.random.default_rng(3).integers(0, 255, (30, 40, 3), np.uint8)
    answers = []
    for device in ("tensorrt", "cpu"):
        model = load(folder, device=device, threads=1)
        assert model.device == device
        chat = model.chat(model.encode(picture, wait=False))
        answers.append([chat.ask(words, max_tokens=9).read() for words in ("what", "and", "so")])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 3


def test_float16(half_bundle: Path, tmp_path: Path, gpu: FakeGpu) -> None:
    folder = with_engines(half_bundle, tmp_path, gpu, max_cache=40)
    manifest = Manifest.read(folder)
    engine, other = TrtEngine(folder, manifest), OrtEngine(BundleFiles(folder, manifest), threads=1)
    image: FloatArray = random_tensor(1, 3, 28, 28).numpy()
    cache, twin = engine.open(engine.encode(image)), other.open(other.encode(image))
    assert cache.capacity == 40
    for step in (PROMPT, [77], [78, 79]):
        logits, expected = engine.step(np.array([step]), cache), other.step(np.array([step]), twin)
        assert np.abs(logits - expected).max() < HALF_GRAPH * np.abs(expected).max()


def test_a_full_cache_takes_no_more_and_stays_as_it_is(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu)
    cache = engine.open(engine.encode(pixels()))
    full = cache.room
    assert full == (60 if engine._fixed else 64)
    text = [5] * (full - 2)
    engine.step(np.array([text]), cache)
    with pytest.raises(PromptError, match="expected at most 2 more tokens, found 3"):
        engine.step(np.array([[6, 6, 6]]), cache)
    text += [7, 8]
    check(source, 0, text, engine.step(np.array([[7, 8]]), cache))
    assert cache.room == 0


def test_text_without_an_image(fixed_bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu) -> None:
    engine = engine_of(fixed_bundle, tmp_path, gpu)
    logits = engine.step(np.array([PROMPT]), engine.open(None))
    with torch.inference_mode():
        decoder = fixed_bundle.model.decoder
        hidden, _ = decoder(torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None])
        expected = decoder.logits(hidden[:, -1]).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ENGINE_LOGITS)


def test_a_growing_cache_begins_with_an_image(
    bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    with pytest.raises(EngineError, match="begin with an image"):
        engine_of(bundle, tmp_path, gpu).open(None)


def test_more_than_the_caches_hold(source: TinyBundle, tmp_path: Path, gpu: FakeGpu) -> None:
    engine = engine_of(source, tmp_path, gpu, caches=2)
    extra = 0 if engine._fixed else 1  # what a growing step writes
    held = [engine.encode(pixels(seed)) for seed in range(2 + extra)]
    with pytest.raises(EngineError, match=r"all caches .* no more than .*caches=N"):
        engine.encode(pixels())
    held.pop()
    held.append(engine.encode(pixels(9)))
    del held[: 1 + extra]
    check(source, 9, PROMPT, engine.step(np.array([PROMPT]), engine.open(held[-1])))


def test_one_image_and_one_conversation_at_a_time(
    source: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(source, tmp_path, gpu)
    with pytest.raises(EngineError, match=r"one image and one conversation .* found 2"):
        engine.encode(np.concatenate([pixels(), pixels()]))
    cache = engine.open(engine.encode(pixels()))
    with pytest.raises(EngineError, match="found 2"):
        engine.step(np.array([PROMPT, PROMPT]), cache)


def test_a_full_gpu(bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu) -> None:
    gpu.memory_limit = 20_000
    with pytest.raises(EngineError, match=r"memory is full: expected 0 MB more.*MemoryAllocation"):
        engine_of(bundle, tmp_path, gpu)


def test_engines_for_another_gpu(bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu) -> None:
    folder = with_engines(bundle.folder, tmp_path, gpu)
    gpu.capability = (8, 9)
    with pytest.raises(EngineError, match=r"no engine for this device.*sm 8\.9.*sm 8\.7.*build"):
        load(folder, device="tensorrt")
    model = load(folder, device="auto", threads=1)
    assert model.device == "cpu"
    assert "sm 8.9" in model.passed_over[0]


def test_auto_takes_the_engines_that_fit(bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu) -> None:
    model = load(with_engines(bundle.folder, tmp_path, gpu))
    assert (model.device, model.passed_over) == ("tensorrt", ())


def test_auto_build(
    bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    with pytest.raises(EngineError, match=r"has no engine.*himix-edge build"):
        load(folder, device="tensorrt")

    def build(plan: BuildPlan, *, report: Callable[..., None]) -> object:
        assert plan.bundle == folder
        report("decoder.onnx", 0.5, "half")
        engines_of(folder, gpu)
        device = engine_device(gpu_here())
        return Built(find_engines(folder, Manifest.read(folder), device), {})

    monkeypatch.setattr("himix_edge.engines.build.build_engines", build)
    said: list[tuple[object, ...]] = []
    model = load(folder, device="tensorrt", auto_build=True, report=lambda *line: said.append(line))
    assert (model.device, said) == ("tensorrt", [("decoder.onnx", 0.5, "half")])


def test_engines_without_weights_get_them(
    fixed_bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    folder = with_engines(fixed_bundle.folder, tmp_path, gpu, stripped=True)
    engine = TrtEngine(folder, Manifest.read(folder))
    logits = engine.step(np.array([PROMPT]), engine.open(engine.encode(pixels())))
    check(fixed_bundle, 0, PROMPT, logits)


def test_a_plan_that_tensorrt_refuses(bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu) -> None:
    folder = with_engines(bundle.folder, tmp_path, gpu)
    (plan,) = folder.glob("engines/*/decoder.plan")
    plan.write_bytes(b"x" * plan.stat().st_size)
    with pytest.raises(EngineError, match=r"decoder\.plan is corrupt.*sha256"):
        load(folder, device="tensorrt")
    with pytest.raises(EngineError, match=r"decoder\.plan is corrupt.*sha256"):
        load(folder, device="tensorrt", verify=False)  # that is about the bundle, not its engines
    record = json.loads((plan.parent / "engine.json").read_bytes())
    record["files"]["decoder.plan"] = dataclasses.asdict(FileRecord.of(plan))
    (plan.parent / "engine.json").write_text(json.dumps(record))
    StoredEngines.read(folder, plan.parent.name).trust()
    with pytest.raises(EngineError, match=r"can't load .*decoder\.plan: found magic tag"):
        load(folder, device="tensorrt")


def test_shapes_that_the_engine_was_not_built_for(
    bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu
) -> None:
    engine = engine_of(bundle, tmp_path, gpu)
    with pytest.raises(EngineError, match=r"doesn't take pixel_values as \[1, 3, 24, 25\].*within"):
        engine._vision.bind("pixel_values", engine._pixels.address, (1, 3, 24, 25))
    with pytest.raises(EngineError, match=r"no tensor pixels"):
        engine._vision.bind("pixels", engine._pixels.address)


def test_what_is_missing(
    bundle: TinyBundle, tmp_path: Path, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_engines(bundle.folder, tmp_path, gpu)
    manifest = Manifest.read(folder)
    for caches in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match="caches is out of range"):
            TrtEngine(folder, manifest, caches=caches)  # type: ignore[arg-type]
    gpu.count = 0
    with pytest.raises(EngineError, match="cudaErrorNoDevice"):
        TrtEngine(folder, manifest)
    gpu.count = 1
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DependencyError, match="cuda-python is missing"):
        TrtEngine(folder, manifest)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match="TensorRT is missing"):
        TrtEngine(folder, manifest)
