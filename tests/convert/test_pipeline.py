"""A conversion from a folder to a checkpoint, and on to a bundle that answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from himix_edge.convert import pipeline
from himix_edge.convert.fit import FitOptions
from himix_edge.convert.judge import encoded, greedy
from himix_edge.convert.pipeline import PAGE, REPORT, STATE, ConvertOptions, convert
from himix_edge.convert.questions import prompt_encoder
from himix_edge.convert.report import Conversion
from himix_edge.convert.source import teacher_from_folder, teacher_from_source
from himix_edge.errors import CheckpointError, ConfigError, ImageError, OutputError, TrainingError
from himix_edge.export.bundle import export_bundle
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.models.weights import stored_weights
from himix_edge.runtimes import load
from himix_edge.runtimes.preprocess import pixel_values
from tests import tolerances
from tests.convert.llava import write_tiny_llava

PICTURES = 40  # of 16 tokens: twice the 88 inputs, and some
QUICK = ConvertOptions(judge=1)
DISTILLED = dataclasses.replace(QUICK, distil=3, distil_images=2)


def silent(*_: object) -> None: ...


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        blocks = random.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(blocks).resize((32, 40)).save(folder / f"{i:03}.png")
    (folder / "prompts.txt").write_text("What is it?\nHow many?\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("llava") / "tiny-ov", "llava_onevision")


@pytest.fixture(scope="module")
def finished(
    llava: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Conversion]:
    output = tmp_path_factory.mktemp("finished") / "checkpoint"
    return output, convert(llava, pictures, output, QUICK, silent)


@pytest.fixture(scope="module")
def distilled(
    llava: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Conversion]:
    output = tmp_path_factory.mktemp("distilled") / "checkpoint"
    return output, convert(llava, pictures, output, DISTILLED, silent)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def injection_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = stored_weights(folder)
    return {name: w.read() for name, w in weights.items() if name.startswith("injection.")}


def test_encoder_and_decoder_are_the_sources_bit_for_bit(
    finished: tuple[Path, Conversion], llava: Path
) -> None:
    output, _ = finished
    source, found = teacher_from_folder(llava), read_checkpoint(output)
    own = {name for name in found.weights if name.startswith("injection.")}
    taken = {name for name in source.weights if not name.startswith("injection.")}
    assert found.weights.keys() - own == taken
    for name in taken:
        assert found.weights[name].read().equal(source.weights[name].read()), name
    assert found.tokenizer_json == source.tokenizer_json
    assert found.config.prefix_tokens == len(source.prefix_ids) > 0
    found.check()  # every weight that the config asks for, finite


def test_the_report_lies_beside_the_weights(finished: tuple[Path, Conversion]) -> None:
    output, conversion = finished
    report = json.loads((output / REPORT).read_text(encoding="utf-8"))
    assert report == conversion.to_dict()
    assert report["pictures"] == {"images": 35, "held_out": 5, "skipped": {}}
    assert report["judgements"]["fitted"]["answers"] == 2  # one picture, two prompts
    assert report["options"]["connector"] is True
    assert report["fit"]["keys"][0] < 0.01  # behind the connector the first layer is linear
    assert "tiny-ov" in (output / PAGE).read_text(encoding="utf-8")
    assert "Converted from tiny-ov" in (output / "README.md").read_text(encoding="utf-8")
    assert not output.with_name(output.name + STATE).exists()


def test_its_bundle_answers_as_the_model_in_torch(pictures: Path, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "llava", "tinyllava")
    before = digests(folder)
    convert(folder, pictures, tmp_path / "checkpoint", QUICK, silent)
    assert digests(folder) == before  # a source is only read
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle", dialect="ort")

    model = checkpoint.model()
    picture = pictures / "007.png"
    pixels = torch.from_numpy(pixel_values(Image.open(picture), checkpoint.config.preprocess))
    tokenizer = prompt_encoder(teacher_from_folder(folder))
    with torch.inference_mode():
        ids = encoded("What is it?", tokenizer, model)
        expected = tokenizer.decode(greedy(model, ids, model.encode(pixels), 8))
    loaded = load(tmp_path / "bundle")
    answer = loaded.generate(loaded.encode(picture), "What is it?", max_tokens=8).read()
    assert answer == expected
    assert len(ids) > 5


class StoppedError(Exception):
    """As if by Ctrl-C."""


def test_an_interrupted_conversion_goes_on(
    distilled: tuple[Path, Conversion], llava: Path, pictures: Path, tmp_path: Path
) -> None:
    """Whichever phase it was in, the weights are those of one that was never interrupted."""
    output = tmp_path / "output"
    for phase in ("fitted", "distilling", "blame"):

        def stopping(name: str, done: int, *_: object, phase: str = phase) -> None:
            if name == phase and done >= 1:
                raise StoppedError

        with pytest.raises(StoppedError):
            convert(llava, pictures, output, DISTILLED, stopping)
        assert not output.exists()
    convert(llava, pictures, output, DISTILLED, silent)
    assert {path.name for path in tmp_path.iterdir()} == {"output"}  # no state, nothing partial
    whole, again = injection_of(distilled[0]), injection_of(output)
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.allclose(again[name], tensor, rtol=0, atol=tolerances.FIT_FIGURES), name


def test_distilling_moves_the_projections_alone(
    finished: tuple[Path, Conversion], distilled: tuple[Path, Conversion]
) -> None:
    (folder, conversion), before = distilled, stored_weights(finished[0])
    after = stored_weights(folder)
    moved = {name for name in before if not before[name].read().equal(after[name].read())}
    projections = {name for name in before if name.startswith("injection.")}
    assert moved == projections - {"injection.prefix"}
    assert conversion.distilled is not None
    assert conversion.fitted == finished[1].fitted
    assert conversion.distilled.kl != conversion.fitted.kl


def test_a_state_of_other_options_is_refused(llava: Path, pictures: Path, tmp_path: Path) -> None:
    def stopping(name: str, *_: object) -> None:
        if name == "judge":
            raise StoppedError

    output = tmp_path / "output"
    with pytest.raises(StoppedError):
        convert(llava, pictures, output, QUICK, stopping)
    other = dataclasses.replace(QUICK, fit=FitOptions(weighting="attention"))
    with pytest.raises(TrainingError, match=r"another run.*attention.*delete"):
        convert(llava, pictures, output, other, silent)


def test_unreadable_pictures_are_passed_over_and_named(
    llava: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "007.png").write_text("no picture at all", encoding="utf-8")  # one of those held out
    conversion = convert(llava, folder, tmp_path / "checkpoint", QUICK, silent)
    assert list(conversion.fit.skipped) == ["003.png", "007.png"]
    assert (conversion.fit.images, conversion.fit.held_out) == (34, 4)
    page = (tmp_path / "checkpoint" / PAGE).read_text(encoding="utf-8")
    assert "003.png" in page


def test_what_is_refused_before_any_work(llava: Path, pictures: Path, tmp_path: Path) -> None:
    def never(name: str, *_: object) -> None:
        raise AssertionError(name)

    def refused(error: type[Exception], match: str, **given: Any) -> None:
        arguments = {"source": llava, "pictures": pictures, "output": tmp_path / "new"} | given
        with pytest.raises(error, match=match):
            convert(**arguments, options=QUICK, watch=never)
        assert not (tmp_path / "new").exists()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("mine", encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(OutputError, "will not replace .*foreign", output=foreign)
    (tmp_path / f"mine{STATE}").mkdir()
    (tmp_path / f"mine{STATE}" / "notes.txt").write_text("mine", encoding="utf-8")
    refused(OutputError, "will not replace .*mine.state", output=tmp_path / "mine")
    refused(CheckpointError, "cannot find .*nowhere", source=str(tmp_path / "nowhere"))
    refused(CheckpointError, "incomplete.*config.json", source=empty)
    refused(ConfigError, "too few pictures.*found 0", pictures=empty)
    refused(ConfigError, "no such folder", pictures=tmp_path / "nowhere")
    shutil.copy(pictures / "001.png", empty / "a.png")
    shutil.copy(pictures / "002.png", empty / "b.png")
    (empty / "questions.jsonl").write_text('{"image": "a.png", "promt": "?"}\n', encoding="utf-8")
    refused(ConfigError, "line 1.*did you mean 'prompt'", pictures=empty)


def test_too_few_pictures_for_the_rank(llava: Path, pictures: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for i in range(4):
        shutil.copy(pictures / f"{i:03}.png", few / f"{i}.png")
    with pytest.raises(ConfigError, match=r"expected 11 to fit on.*88 inputs.*176.*found 3"):
        convert(llava, few, tmp_path / "output", QUICK, silent)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"distil": -1}, "distil is invalid: expected 0 or more, found -1"),
        ({"judge": 0}, "judge is invalid"),
        ({"batch": 0}, "batch is invalid"),
        ({"device": "cuda:7"}, "can't compute on 'cuda:7'.*--device cpu"),
        ({"device": "toaster"}, "can't compute on 'toaster'"),
    ],
)
def test_options_that_are_off(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ConvertOptions(**changes)


def test_a_teacher_in_half_precision_comes_close_to_one_in_full(
    finished: tuple[Path, Conversion], llava: Path, pictures: Path, tmp_path: Path
) -> None:
    options = dataclasses.replace(QUICK, dtype="bfloat16")
    convert(llava, pictures, tmp_path / "checkpoint", options, silent)
    whole, half = injection_of(finished[0]), injection_of(tmp_path / "checkpoint")
    name = "injection.layers.1.v_proj.weight"
    cosine = torch.cosine_similarity(whole[name].ravel(), half[name].ravel(), dim=0)
    assert half[name].dtype == torch.float32
    assert 0.9 < float(cosine) < 1 - 1e-7


def test_a_page_that_cant_be_drawn_is_known_at_once(
    llava: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ImageError("no matplotlib")

    monkeypatch.setattr(pipeline, "require_plots", missing)
    monkeypatch.setattr(pipeline, "teacher_from_folder", lambda _: pytest.fail("it began"))
    with pytest.raises(ImageError):
        convert(llava, pictures, tmp_path / "output", QUICK, silent)


def test_a_checkpoint_in_torch_says_what_the_student_said(
    finished: tuple[Path, Conversion], llava: Path, pictures: Path
) -> None:
    """The answers of the report are those of the model that was saved."""
    output, conversion = finished
    model, source = read_checkpoint(output).model(), teacher_from_folder(llava)
    teacher, tokenizer = teacher_from_source(source), prompt_encoder(source)
    for exchange in conversion.fitted.exchanges:
        image = Image.open(pictures / exchange.image)
        pixels = torch.from_numpy(pixel_values(image, source.config.preprocess))
        with torch.inference_mode():
            ids = encoded(exchange.prompt, tokenizer, model)
            said = greedy(model, ids, model.encode(pixels), 64)
            cache = teacher.image_cache(teacher.model.vision(pixels))
            taught = greedy(teacher.model, ids, cache, 64)
        assert tokenizer.decode(said) == exchange.student
        assert tokenizer.decode(taught) == exchange.teacher
