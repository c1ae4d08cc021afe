"""A bundle is whole, says what it is, notices every changed byte; or it is not there at all."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import himix_edge
from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import DECODER_GRAPH, Chat, Dtype, Manifest
from himix_edge.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    ExportError,
    HimixError,
    OutputError,
    ParityError,
)
from himix_edge.export import bundle
from himix_edge.export.bundle import export_bundle
from himix_edge.export.verify import BOUNDS, Parity, verify
from himix_edge.files import sha256_of
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene
from tests import tiny
from tests.export.conftest import Exported

FILES = [
    "README.md",
    "chat_template.jinja",
    "decoder.onnx",
    "decoder.onnx.data",
    "preprocessor.json",
    "tokenizer.json",
    "vision.onnx",
    "vision.onnx.data",
]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def test_all_of_it_is_there(tiny_folder: Path, tiny_bundle: Path) -> None:
    assert sorted(path.name for path in tiny_bundle.iterdir()) == sorted([*FILES, "manifest.json"])
    manifest = Manifest.read(tiny_bundle)
    BundleFiles(tiny_bundle, manifest).check()
    assert sorted(manifest.files) == FILES
    assert (manifest.name, manifest.notice) == ("tiny", "It knows nothing.")
    assert (manifest.dialect, manifest.dtype) == ("portable", "float32")
    assert manifest.config == tiny.tiny_config()
    assert manifest.chat == Chat({"eos_token": "<|end|>"})
    assert manifest.tools == {
        "himix-edge": himix_edge.__version__,
        **{name: metadata.version(name) for name in bundle.TOOLS},
    }
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert sha256_of(tiny_bundle / name) == sha256_of(tiny_folder / name)
    preprocessor = json.loads((tiny_bundle / "preprocessor.json").read_text())
    assert preprocessor["image_size"] == 28
    assert preprocessor == json.loads(json.dumps(manifest.config.to_dict()["preprocess"]))


def test_figures_of_the_verification_are_kept(tiny_bundle: Path) -> None:
    parity = Manifest.read(tiny_bundle).parity
    assert set(parity["vision"]) == {
        f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value")
    }
    assert set(parity["decoder"]) == {"logits", *parity["vision"]}
    assert 0 < parity["decoder"]["logits"]["error"] < parity["max_error"] == 1e-4
    assert parity["greedy_tokens"] == parity["greedy_tokens_equal"] >= 16
    card = (tiny_bundle / "README.md").read_text()
    assert card.startswith("# tiny\n\n## Export\n")
    assert f"{parity['decoder']['logits']['error']:.1e} in the logits" in card
    assert f"torch {metadata.version('torch')}" in card


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_bundles_say_so(half_bundle: Path, bfloat: Exported, dtype: str) -> None:
    folder = {"float16": half_bundle, "bfloat16": bfloat.folder}[dtype]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    manifest = Manifest.read(folder)
    BundleFiles(folder, manifest).check()
    assert (manifest.dialect, manifest.dtype) == ("portable", dtype)
    error, cosine = BOUNDS[manifest.dtype]
    assert (manifest.parity["max_error"], manifest.parity["min_cosine"]) == (error, cosine)
    for part in ("vision", "decoder"):
        for figures in manifest.parity[part].values():
            assert 1e-5 < figures["error"] < error  # rounded, and not by more than that
    assert f"Two ONNX graphs in {dtype}" in (folder / "README.md").read_text()


def test_a_bundle_for_onnx_runtime_says_so_and_answers_as_the_portable_one(
    ort_bundle: Path, tiny_bundle: Path
) -> None:
    assert sorted(path.name for path in ort_bundle.iterdir()) == sorted([*FILES, "manifest.json"])
    manifest = Manifest.read(ort_bundle)
    BundleFiles(ort_bundle, manifest).check()
    assert (manifest.dialect, manifest.dtype, manifest.cache_slots) == ("ort", "float32", None)
    for figures in (*manifest.parity["vision"].values(), *manifest.parity["decoder"].values()):
        assert 0 < figures["error"] < manifest.parity["max_error"] / 10
    assert manifest.parity["greedy_tokens"] == manifest.parity["greedy_tokens_equal"] >= 16
    card = (ort_bundle / "README.md").read_text()
    assert 'dialect "ort" (opset 23, with operators of ONNX Runtime\'s own)' in card
    scene = render(random_scene(np.random.default_rng(2)), 40)
    answers = []
    for folder in (ort_bundle, tiny_bundle):
        model = himix_edge.load(folder)
        answers.append(model.generate(model.encode(scene), "describe", max_tokens=16).read())
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize(
    ("config", "dtype", "max_text", "message"),
    [
        (
            {"head_dim": 24},
            "float32",
            None,
            "head_dim that is a multiple of 16, found 24.*portable",
        ),
        ({}, "bfloat16", None, "float32 or float16, found bfloat16.*--dialect portable"),
        ({}, "float32", 60, "max_text means nothing in the ort dialect.*--dialect native"),
    ],
)
def test_what_onnx_runtime_can_t_run(
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    config: dict[str, Any],
    dtype: Dtype,
    max_text: int | None,
    message: str,
) -> None:
    checkpoint = dataclasses.replace(tiny_checkpoint, config=tiny.tiny_config(**config))
    with pytest.raises(ConfigError, match=message):
        export_bundle(
            checkpoint, tmp_path / "bundle", dtype=dtype, dialect="ort", max_text=max_text
        )
    assert not list(tmp_path.iterdir())


def test_float16_takes_half_the_room(tiny_bundle: Path, half_bundle: Path) -> None:
    for name in ("decoder.onnx.data", "vision.onnx.data"):
        sizes = [(folder / name).stat().st_size for folder in (half_bundle, tiny_bundle)]
        assert sizes[0] / sizes[1] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_one_changed_byte_is_found(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    raw = bytearray((copy / name).read_bytes())
    for place in (0, len(raw) // 2, len(raw) - 2):
        changed = raw.copy()
        changed[place] ^= 1
        (copy / name).write_bytes(changed)
        with pytest.raises(BundleError, match=name):
            BundleFiles.open(copy).check()


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_are_found(
    tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    os.truncate(copy / name, (copy / name).stat().st_size - 1)
    with pytest.raises(BundleError, match=rf"{name} is corrupt.*bytes"):
        BundleFiles.open(copy).check()
    (copy / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is corrupt.*no such file"):
        BundleFiles.open(copy).check()


PHASES = [
    "checking the weights",
    "asking the model in PyTorch",
    "vision graph",
    "vision weights",
    "decoder graph",
    "decoder weights",
    "comparing in ONNX Runtime",
    "sealing",
]


@pytest.mark.usefixtures("ready_graphs")
def test_progress_goes_forward_to_the_end(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    heard: list[tuple[str, float]] = []
    exported = export_bundle(
        tiny_checkpoint, tmp_path / "bundle", progress=lambda *call: heard.append(call)
    )
    assert list(dict.fromkeys(phase for phase, _ in heard)) == [*PHASES, "done"]
    done = [fraction for _, fraction in heard]
    assert (done[0], done[-1]) == (0.0, 1.0)
    assert done == sorted(done)
    for phase in ("vision weights", "decoder weights"):
        within = [fraction for name, fraction in heard if name == phase]
        assert len(set(within)) > 10  # a call for every weight
        assert within[-1] == heard[[name for name, _ in heard].index(phase) + len(within)][1]

    assert exported.manifest == Manifest.read(tmp_path / "bundle")
    assert [cost.phase for cost in exported.costs] == PHASES
    making = [cost for cost in exported.costs if cost.phase not in bundle.CHECKS]
    checking = [cost for cost in exported.costs if cost.phase in bundle.CHECKS]
    for whole, parts in ((exported.making, making), (exported.checking, checking)):
        assert whole.seconds == pytest.approx(sum(cost.seconds for cost in parts))
        assert whole.peak_bytes == max(cost.peak_bytes for cost in parts) > 50e6
    assert len(making) + len(checking) == len(PHASES)


@pytest.mark.usefixtures("ready_graphs")
def test_an_older_bundle_is_replaced(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    output.mkdir()  # empty: nothing would be lost
    export_bundle(tiny_checkpoint, output)
    (output / "README.md").write_text("old")
    export_bundle(tiny_checkpoint, output)
    BundleFiles.open(output).check()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where the export begins to work."""

    def work(_: Checkpoint) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(Checkpoint, "check", work)


@pytest.mark.usefixtures("no_work")
class TestRefusedBeforeTheWork:
    def test_a_folder_of_someone_else_s(self, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text("{}")  # many things have one
        (tmp_path / "thesis.txt").write_text("all of it")
        before = contents(tmp_path)
        with pytest.raises(OutputError, match=r"will not replace .*another folder"):
            export_bundle(tiny_checkpoint, tmp_path)
        assert contents(tmp_path) == before

    def test_a_file(self, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
        output = tmp_path / "bundle"
        output.write_text("mine")
        with pytest.raises(OutputError, match="found a file"):
            export_bundle(tiny_checkpoint, output)
        assert output.read_text() == "mine"

    def test_the_checkpoint_itself(self, tiny_checkpoint: Checkpoint, tiny_folder: Path) -> None:
        before = contents(tiny_folder)
        with pytest.raises(OutputError, match="another folder"):
            export_bundle(tiny_checkpoint, tiny_folder)
        assert contents(tiny_folder) == before

    def test_a_disk_that_is_too_small(
        self, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(OutputError, match=r"expected about .* free on the disk, found 0 MB"):
            export_bundle(tiny_checkpoint, tmp_path / "bundle")
        assert contents(tmp_path) == {}

    def test_a_web_app_with_a_model(self, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
        for name in ("manifest.json", "vision.onnx", "app.js"):
            (tmp_path / name).write_text("{}")
        before = contents(tmp_path)
        with pytest.raises(OutputError, match="another folder"):
            export_bundle(tiny_checkpoint, tmp_path)
        assert contents(tmp_path) == before

    def test_a_bundle_that_holds_a_letter(
        self, tiny_checkpoint: Checkpoint, tiny_bundle: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_bundle, tmp_path / "bundle")
        (tmp_path / "bundle" / "letter.txt").write_text("mine")
        with pytest.raises(OutputError, match="another folder"):
            export_bundle(tiny_checkpoint, tmp_path / "bundle")

    def test_a_place_below_a_file(self, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write"):
            export_bundle(tiny_checkpoint, tmp_path / "file" / "bundle")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(OutputError, match="Permission denied"):
            export_bundle(tiny_checkpoint, tmp_path / "bundle")

    @pytest.mark.parametrize(
        ("changes", "error", "reason"),
        [
            ({"tokenizer_json": "{}"}, CheckpointError, "cannot read .*tokenizer.json"),
            ({"tokenizer_json": "a"}, CheckpointError, "cannot read .*tokenizer.json"),
            ({"chat_template": "{% if %}"}, ExportError, "rendered: .*TemplateSyntaxError"),
            ({"chat_template": "hello"}, ExportError, "leaves out the question"),
        ],
    )
    def test_texts_that_cannot_be_used(
        self, tmp_path: Path, changes: dict[str, str], error: type[HimixError], reason: str
    ) -> None:
        checkpoint = tiny.tiny_checkpoint(tmp_path / "checkpoint", tiny.tiny_config(), **changes)
        with pytest.raises(error, match=reason):
            export_bundle(checkpoint, tmp_path / "bundle")
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    def test_a_tokenizer_with_more_tokens_than_the_model(self, tmp_path: Path) -> None:
        config = tiny.tiny_config(vocab_size=299)
        checkpoint = tiny.tiny_checkpoint(tmp_path / "checkpoint", config)
        with pytest.raises(CheckpointError, match="at most 299 token ids, found 300"):
            export_bundle(checkpoint, tmp_path / "bundle")


@pytest.fixture(params=["nothing", "a bundle"])
def place(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path: Path) -> Iterator[Path]:
    """Where a bundle is to go; afterwards all must be there as it was before."""
    output = tmp_path / "place" / "bundle"
    output.parent.mkdir()
    if request.param == "a bundle":
        shutil.copytree(tiny_bundle, output)
    yield output
    if request.param == "a bundle":
        assert contents(output) == contents(tiny_bundle)
        output.rename(tmp_path / "checked")
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.usefixtures("ready_graphs")
class TestCutShort:
    def test_by_ctrl_c(
        self, tiny_checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(bundle, "decoder_onnx_from_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(tiny_checkpoint, place)

    def test_by_a_full_disk(
        self, tiny_checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(bundle, "write_graph", full)
        with pytest.raises(OutputError, match="No space left on device"):
            export_bundle(tiny_checkpoint, place)

    def test_by_the_system_in_the_middle_of_a_file(
        self, tiny_checkpoint: Checkpoint, place: Path
    ) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # less than the weights
        try:
            with pytest.raises(OutputError, match="File too large"):
                export_bundle(tiny_checkpoint, place)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_by_wrong_numbers(
        self, tiny_checkpoint: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def sabotaged(expected: object, folder: Path, *rest: object) -> Parity:
            graph = onnx.load(folder / DECODER_GRAPH)
            [norm] = [w for w in graph.graph.initializer if w.name == "decoder.model.norm.weight"]
            norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * 1.01, norm.name))
            onnx.save(graph, folder / DECODER_GRAPH)
            return verify(expected, folder, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(bundle, "verify", sabotaged)
        with pytest.raises(ParityError, match=r"^decoder\.onnx .* in logits, the worst"):
            export_bundle(tiny_checkpoint, place)

    def test_by_broken_weights(self, place: Path, tmp_path: Path) -> None:
        checkpoint = tiny.tiny_checkpoint(tmp_path / "checkpoint", tiny.tiny_config())
        os.truncate(tmp_path / "checkpoint" / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            export_bundle(checkpoint, place)
