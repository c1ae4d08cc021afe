from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import DECODER_GRAPH, VISION_GRAPH, Manifest
from himix_edge.errors import BundleError, ConfigError, DependencyError, PromptError
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.runtimes import load
from himix_edge.runtimes.base import FloatArray
from himix_edge.runtimes.ort import OrtEngine
from tests.models.reference import random_ids, random_tensor
from tests.runtimes.conftest import TinyBundle
from tests.tiny import opened
from tests.tolerances import ENGINE_LOGITS, HALF_GRAPH, IMAGE_KV

PROMPT = [1, 40, 41, 42, 2]


@pytest.fixture(params=["bundle", "vanilla_bundle", "fixed_bundle"])
def tiny(request: pytest.FixtureRequest) -> TinyBundle:
    bundle = request.getfixturevalue(request.param)
    assert isinstance(bundle, TinyBundle)
    return bundle


def engine_of(tiny: TinyBundle) -> OrtEngine:
    return OrtEngine(BundleFiles.open(tiny.folder), threads=1)


def pixels(seed: int = 0) -> torch.Tensor:
    return random_tensor(1, 3, 24, 24, seed=seed)


def model_logits(model: HiMix, image: torch.Tensor, ids: list[int]) -> FloatArray:
    with torch.inference_mode():
        logits, _ = model.decode(torch.tensor([ids]), model.encode(image))
    last: FloatArray = logits[:, -1].numpy()
    return last


def test_the_image_leaves_in_the_cache_what_the_model_says(tiny: TinyBundle) -> None:
    kv = engine_of(tiny).encode(pixels().numpy())
    with torch.inference_mode():
        expected = [part for layer in tiny.model.encode(pixels()) for part in layer]
    assert kv.slots == 9
    assert len(kv.tensors) == len(expected) == 4
    for tensor, part in zip(kv.tensors, expected, strict=True):
        np.testing.assert_allclose(tensor.numpy()[:, :, :9], part.numpy(), rtol=0, atol=IMAGE_KV)


def test_logits_of_prefill_decode_and_a_longer_step_are_the_models(tiny: TinyBundle) -> None:
    engine = engine_of(tiny)
    cache = engine.open(engine.encode(pixels().numpy()))
    text: list[int] = []
    for step in (PROMPT, [77], [78], [79, 80, 81]):
        text += step
        logits = engine.step(np.array([step]), cache)
        assert cache.text_length == len(text)
        expected = model_logits(tiny.model, pixels(), text)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ENGINE_LOGITS)


def test_greedy_tokens_are_the_models(tiny: TinyBundle) -> None:
    engine = engine_of(tiny)
    seen = set()
    for seed in range(6):
        prompt = random_ids(1, 6, 259, seed=seed)
        expected = tiny.model.generate_greedy(pixels(seed), prompt, max_new_tokens=20)
        cache = engine.open(engine.encode(pixels(seed).numpy()))
        tokens, fed = [], prompt.numpy()
        for _ in expected:
            tokens.append(int(engine.step(fed, cache)[0].argmax()))
            fed = np.array([tokens[-1:]])
        assert tokens == expected
        seen |= set(tokens)
    assert len(seen) > 8  # not one token for ever


def test_one_image_serves_many_questions(tiny: TinyBundle) -> None:
    engine = engine_of(tiny)
    image = engine.encode(pixels().numpy())
    before = [tensor.numpy()[:, :, :9].copy() for tensor in image.tensors]
    first, second = engine.open(image), engine.open(image)
    engine.step(np.array([PROMPT]), first)
    engine.step(np.array([[9]]), first)
    logits = engine.step(np.array([PROMPT]), second)
    assert (first.length, second.length) == (9 + 6, 9 + 5)
    expected = model_logits(tiny.model, pixels(), PROMPT)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ENGINE_LOGITS)
    for tensor, kept in zip(image.tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy()[:, :, :9], kept)


def test_a_cache_of_fixed_size_is_written_in_place(fixed_bundle: TinyBundle) -> None:
    engine = engine_of(fixed_bundle)
    image = engine.encode(pixels().numpy())
    cache = engine.open(image)
    assert cache.capacity == 9 + 60  # what the export fixed, though there are positions for more
    assert cache.tensors == image.tensors
    kept = cache.tensors[0].numpy()
    assert kept.shape == (1, 2, 69, 8)
    engine.step(np.array([PROMPT]), cache)
    assert cache.tensors == image.tensors
    assert np.all(kept[:, :, 9:14] != 0)
    assert np.all(kept[:, :, 14:] == 0)
    other = engine.open(image)  # while the first goes on, another begins in a copy
    assert other.tensors[0].data_ptr() != image.tensors[0].data_ptr()
    del cache
    assert engine.open(image).tensors == image.tensors


def test_a_cache_goes_on_from_any_of_its_tokens(tiny: TinyBundle) -> None:
    engine = engine_of(tiny)
    image = engine.encode(pixels().numpy())
    before = [tensor.numpy()[:, :, :9].copy() for tensor in image.tensors]
    cache = engine.open(image)
    engine.prefill(np.array([PROMPT]), cache)
    engine.step(np.array([[9]]), cache)
    assert cache.reusable == 6  # all went through one graph
    for count, more in ((6, [50]), (7, [51, 52]), (3, [53, 54, 55]), (0, PROMPT)):
        engine.rewind(cache, count)
        assert (cache.text_length, cache.reusable) == (count, count)
        text = [*[*PROMPT, 9, 50][:count], *more]
        logits = engine.prefill(np.array([more]), cache)
        expected = model_logits(tiny.model, pixels(), text)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=ENGINE_LOGITS)
    for tensor, kept in zip(image.tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy()[:, :, :9], kept)


def test_two_images_at_once(tiny: TinyBundle) -> None:
    engine = engine_of(tiny)
    both = np.concatenate([pixels(1).numpy(), pixels(2).numpy()])
    logits = engine.step(np.array([PROMPT, PROMPT]), engine.open(engine.encode(both)))
    for row, seed in zip(logits, (1, 2), strict=True):
        expected = model_logits(tiny.model, pixels(seed), PROMPT)[0]
        np.testing.assert_allclose(row, expected, rtol=0, atol=ENGINE_LOGITS)


def test_text_without_an_image(tiny: TinyBundle) -> None:
    engine = engine_of(tiny)
    cache = engine.open(None)
    assert cache.next_positions(1, 2).tolist() == [[0, 1]]
    logits = engine.step(np.array([PROMPT]), cache)
    with torch.inference_mode():
        decoder = tiny.model.decoder
        hidden, _ = decoder(torch.tensor([PROMPT]), torch.arange(5)[None])
        expected = decoder.logits(hidden[:, -1]).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ENGINE_LOGITS)
    assert (cache.length, cache.image_slots, cache.text_length) == (5, 0, 5)


def test_a_full_cache_takes_no_more_and_stays_as_it_is(bundle: TinyBundle) -> None:
    engine = engine_of(bundle)
    cache = engine.open(engine.encode(pixels().numpy()))
    assert cache.room == 64
    engine.step(np.full((1, 60), 5), cache)
    with pytest.raises(PromptError, match="expected at most 4 more tokens, found 5"):
        engine.step(np.full((1, 5), 5), cache)
    engine.step(np.full((1, 4), 5), cache)
    assert cache.room == 0


def test_vanilla_positions_leave_less_room(vanilla_bundle: TinyBundle) -> None:
    engine = engine_of(vanilla_bundle)
    cache = engine.open(engine.encode(pixels().numpy()))
    assert cache.room == 64 - 9
    assert cache.next_positions(1, 2).tolist() == [[9, 10]]


def test_float16_answers_as_the_model_does(half_bundle: Path, tiny_checkpoint: Checkpoint) -> None:
    engine = OrtEngine(BundleFiles.open(half_bundle), threads=1)
    model = tiny_checkpoint.model()
    image = random_tensor(1, 3, 28, 28)
    kv = engine.encode(image.numpy())
    assert {tensor.numpy().dtype for tensor in kv.tensors} == {np.dtype(np.float16)}
    cache = engine.open(kv)
    text: list[int] = []
    for step in (PROMPT, [77], [78, 79]):
        text += step
        logits = engine.step(np.array([step]), cache)
        assert logits.dtype == np.float32
        expected = model_logits(model, image, text)
        assert np.abs(logits - expected).max() < HALF_GRAPH * np.abs(expected).max()
        assert not np.array_equal(logits, expected)

    cache = engine.open(None)  # text alone, over an empty cache of that type
    logits = engine.step(np.array([PROMPT]), cache)
    with torch.inference_mode():
        hidden, _ = model.decoder(torch.tensor([PROMPT]), torch.arange(5)[None])
        expected = model.decoder.logits(hidden[:, -1]).numpy()
    assert np.abs(logits - expected).max() < HALF_GRAPH * np.abs(expected).max()


def test_a_float16_bundle_generates(half_bundle: Path, tiny_bundle: Path) -> None:
    picture = Image.new("RGB", (40, 30), "teal")
    texts = []
    for folder in (half_bundle, tiny_bundle):
        model = load(folder)
        answer = model.generate(model.encode(picture), "describe", max_tokens=6)
        texts.append(answer.read())
        assert answer.tokens == 6
    assert texts[0] == texts[1] != ""


def test_bfloat16_is_refused_with_the_way_out(bundle: TinyBundle) -> None:
    manifest = dataclasses.replace(Manifest.read(bundle.folder), dtype="bfloat16")
    with pytest.raises(BundleError, match=r"can't run .*found bfloat16.*--dtype float32"):
        OrtEngine(BundleFiles(bundle.folder, manifest))


def test_a_manifest_of_another_dtype_is_not_that_of_the_graphs(bundle: TinyBundle) -> None:
    manifest = dataclasses.replace(Manifest.read(bundle.folder), dtype="float16")
    with pytest.raises(BundleError, match=r"vision\.onnx are not the contract's.*tensor\(float\)"):
        OrtEngine(BundleFiles(bundle.folder, manifest))


def test_onnxruntime_missing(bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="pip install onnxruntime"):
        engine_of(bundle)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5])
def test_bad_thread_counts(bundle: TinyBundle, threads: int) -> None:
    with pytest.raises(ConfigError, match="threads is out of range: expected a whole number"):
        OrtEngine(BundleFiles.open(bundle.folder), threads=threads)


def test_threads_reach_onnxruntime(bundle: TinyBundle) -> None:
    options = engine_of(bundle)._vision.get_session_options()
    assert options.intra_op_num_threads == 1


@pytest.mark.parametrize("name", [VISION_GRAPH, DECODER_GRAPH])
def test_a_file_that_is_no_graph(bundle: TinyBundle, tmp_path: Path, name: str) -> None:
    folder = copied(bundle, tmp_path)
    (folder / name).write_bytes(b"\x00not a graph")
    with pytest.raises(
        BundleError, match=f"{name} is corrupt: expected an ONNX model.*himix-edge export"
    ) as error:
        OrtEngine(opened(folder, Manifest.read(folder)))
    assert "\n" not in str(error.value)


def test_a_graph_of_an_opset_that_onnxruntime_does_not_know_yet(
    bundle: TinyBundle, tmp_path: Path
) -> None:
    folder = copied(bundle, tmp_path)
    graph = onnx.load(folder / DECODER_GRAPH, load_external_data=False)
    graph.opset_import[0].version = 99
    (folder / DECODER_GRAPH).write_bytes(graph.SerializeToString())
    with pytest.raises(BundleError, match=r"[Oo]pset 99 .*pip install --upgrade onnxruntime, or"):
        OrtEngine(opened(folder, Manifest.read(folder)))


def test_graphs_of_other_names_and_shapes(bundle: TinyBundle, tmp_path: Path) -> None:
    folder = copied(bundle, tmp_path)
    shutil.copy(folder / VISION_GRAPH, folder / DECODER_GRAPH)
    with pytest.raises(BundleError, match=r"the inputs of .*decoder.onnx are not the contract's"):
        OrtEngine(opened(folder, Manifest.read(folder)))

    folder = copied(bundle, tmp_path)
    graph = onnx.load(folder / DECODER_GRAPH, load_external_data=False)
    renamed(graph, "present.1.value", "present.one.value")
    onnx.save(graph, folder / DECODER_GRAPH)
    with pytest.raises(BundleError, match=r"outputs .*no present.1.value"):
        OrtEngine(opened(folder, Manifest.read(folder)))

    manifest = Manifest.read(bundle.folder)
    decoder = dataclasses.replace(manifest.config.decoder, vocab_size=300)
    config = dataclasses.replace(manifest.config, decoder=decoder)
    with pytest.raises(BundleError, match=r"logits float32 \[\?, 1, 300\].*found logits as .*259"):
        OrtEngine(BundleFiles(bundle.folder, dataclasses.replace(manifest, config=config)))


def copied(bundle: TinyBundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy", dirs_exist_ok=True))


def renamed(graph: onnx.ModelProto, old: str, new: str) -> None:
    (output,) = (value for value in graph.graph.output if value.name == old)
    output.name = new
    (node,) = (node for node in graph.graph.node if old in node.output)
    node.output[list(node.output).index(old)] = new
    for node in graph.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
