"""The commands as a user meets them: what they print, what they leave behind, how they refuse."""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT

import numpy as np
import pytest
import torch
from PIL import Image

from himix_edge import __version__, bundles, cli
from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import Manifest
from himix_edge.errors import ImageError
from himix_edge.export.bundle import CHECKS
from himix_edge.models.checkpoints import read_checkpoint
from himix_edge.models.pairs import Pair, random_pair
from himix_edge.runtimes import load
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.shapes.questions import description
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene
from himix_edge.trained import trained_checkpoints
from himix_edge.training import recipe
from himix_edge.training.loop import Phase
from tests import tiny
from tests.conftest import Done
from tests.models.stock import write_decoder, write_encoder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the user's own cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(folder))
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    render(random_scene(np.random.default_rng(1)), 64).save(path)
    return path


def refused(done: Done, *, saying: Sequence[str]) -> None:
    """Checks that a command failed with one line on stderr and nothing on stdout."""
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1
    for words in saying:
        assert words in done.err


def test_version(himix) -> None:  # type: ignore[no-untyped-def]
    done = himix("--version")
    assert (done.code, done.out) == (0, f"himix-edge {__version__}\n")


def test_run_answers_and_says_who_does(himix, tiny_bundle: Path, picture: Path) -> None:  # type: ignore[no-untyped-def]
    model = load(tiny_bundle)
    expected = model.generate(model.encode(picture), "describe", max_tokens=9).read()
    done = himix("run", picture, "describe", "--bundle", tiny_bundle, "--max-tokens", 9)
    assert (done.code, done.out) == (0, expected + "\n")
    assert done.err == "Model: tiny. It knows nothing.\n"


def test_run_passes_every_option_on(himix, tiny_bundle: Path, picture: Path) -> None:  # type: ignore[no-untyped-def]
    options = {
        "temperature": 1.5,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "seed": 5,
        "max_tokens": 12,
    }
    model = load(tiny_bundle)
    answer = model.generate(model.encode(picture), "describe", stop=("e",), **options)  # type: ignore[arg-type]
    answer.read()
    flags = [w for name, v in options.items() for w in (f"--{name.replace('_', '-')}", v)]
    done = himix(
        "run", picture, "describe", "--bundle", tiny_bundle, *flags, "--stop", "e", "--json"
    )
    result = json.loads(done.out)
    assert result["text"] == answer.text
    assert result["tokens"] == answer.tokens
    assert result["finish_reason"] == answer.finish_reason
    assert result["image_tokens"] == 4
    assert set(result["milliseconds"]) == {"preprocess", "vision", "prefill", "decode"}


def test_run_says_what_becomes_of_a_stripe(himix, tiny_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stripe = tmp_path / "stripe.png"
    Image.new("RGB", (400, 50), "red").save(stripe)
    run = ("run", stripe, "describe", "--bundle", tiny_bundle, "--max-tokens", 2)
    done = himix(*run)
    assert (
        "\nNote: crop keeps the middle 12 % of this 400 x 50 picture; run --resize pad" in done.err
    )
    [notice] = json.loads(himix(*run, "--json", "--resize", "pad").out)["notices"]
    assert notice.startswith("pad gives this 400 x 50 picture 12 %")
    refused(himix(*run, "--resize", "pads"), saying=["resize", "did you mean 'pad'"])


def test_run_reads_stdin(  # type: ignore[no-untyped-def]
    himix, tiny_bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("describe", "--bundle", tiny_bundle, "--max-tokens", 5)
    expected = himix("run", picture, *run)
    for data in (picture.read_bytes(), b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        done = himix("run", "-", *run)
        if data:
            assert (done.code, done.out) == (0, expected.out)
        else:
            refused(done, saying=["an empty file"])


def test_run_fetches_no_url(himix, tiny_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    url = "https://example.org/a.png"
    refused(himix("run", url, "describe", "--bundle", tiny_bundle), saying=[url, "is a URL"])


def test_run_takes_the_last_export(himix, tiny_bundle: Path, picture: Path) -> None:  # type: ignore[no-untyped-def]
    bundles.remember_export(tiny_bundle)
    done = himix("run", picture, "describe", "--max-tokens", 2)
    assert (done.code, done.err) == (0, "Model: tiny. It knows nothing.\n")


def test_an_export_that_is_gone_is_not_the_last_one(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    bundles.remember_export(copy)
    assert bundles.last_export() == copy
    shutil.rmtree(copy)
    assert bundles.last_export() is None


def huge_png(path: Path) -> Path:
    """20,000 x 20,000 pixels by its header; nobody has to wait for the rest."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def test_bad_pictures(himix, tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = tmp_path / "text.png"
    text.write_text("I am no picture.")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(picture.read_bytes()[:-200])
    for image, saying in (
        (tmp_path / "gone.png", ["gone.png", "No such file"]),
        (tmp_path, ["directory"]),
        (text, ["text.png"]),
        (truncated, ["truncated.png", "whole"]),
        (huge_png(tmp_path / "huge.png"), ["too large", "52 megapixels"]),
    ):
        refused(himix("run", image, "describe", "--bundle", tiny_bundle), saying=saying)


def test_bad_prompts_and_options(himix, tiny_bundle: Path, picture: Path) -> None:  # type: ignore[no-untyped-def]
    run = ("run", picture, "--bundle", tiny_bundle)
    refused(himix(*run, ""), saying=["prompt is empty"])
    refused(himix(*run, " \n"), saying=["prompt is empty"])
    refused(himix(*run, "how many " * 300), saying=["too long", "at most 25"])
    refused(himix(*run, "describe", "--top-p", "1.5"), saying=["top_p", "at most 1", "1.5"])
    refused(himix(*run, "describe", "--temperature", "-1"), saying=["temperature"])


def test_bad_bundles(himix, tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(himix("run", picture, "x", "--bundle", tmp_path), saying=["is not a bundle", "export"])
    refused(himix("info", tmp_path / "gone"), saying=["is not a bundle", "no such folder"])
    for name in sorted(path.name for path in tiny_bundle.iterdir()):
        copy = tmp_path / name.replace(".", "-")
        shutil.copytree(tiny_bundle, copy)
        damaged = bytearray((copy / name).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (copy / name).write_bytes(damaged)
        for command in (("info", copy), ("run", picture, "x", "--bundle", copy)):
            refused(himix(*command), saying=[name, "corrupt", "export it again"])


def test_misuse_names_what_was_meant(himix, picture: Path) -> None:  # type: ignore[no-untyped-def]
    done = himix("run", picture, "describe", "--bundel", "x")
    assert done.code == 2
    assert "--bundle" in done.err.split("--bundel", 1)[1]
    assert himix("exprot").code == 2
    assert himix("run", picture).code == 2
    refused(himix("train", "--recipe", "shape"), saying=["'shape'", "'shapes'"])
    refused(himix("train", "--design", "vanila"), saying=["'vanila'", "'vanilla'"])


def test_debug_shows_the_traceback(tiny_bundle: Path) -> None:
    with pytest.raises(ImageError):
        cli.main(["run", "gone.png", "x", "--bundle", str(tiny_bundle), "--debug"])


@pytest.mark.usefixtures("ready_graphs")
def test_export_makes_the_bundle_that_run_then_takes(  # type: ignore[no-untyped-def]
    himix, tiny_folder: Path, picture: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    done = himix("export", "--checkpoint", tiny_folder, "-o", folder)
    assert done.code == 0
    first, second = done.out.splitlines()
    size = sum(record.size for record in Manifest.read(folder).files.values())
    assert first == f"{folder}: {size / 1e6:.1f} MB, equal to the model in PyTorch."
    figures = r"in \d+ s and ([\d,]+) MB"
    shown = re.fullmatch(rf"made {figures} of memory, checked {figures}\.", second)
    assert shown
    assert all(50 < float(peak.replace(",", "")) < 20_000 for peak in shown.groups())
    assert done.err == ""  # no terminal, no progress bar
    BundleFiles.open(folder).check()
    assert bundles.last_export() == folder
    assert himix("run", picture, "describe", "--max-tokens", 2).code == 0


def test_export_of_a_pair_with_random_weights_says_what_torch_says(  # type: ignore[no-untyped-def]
    himix, picture: Path, tmp_path: Path
) -> None:
    encoder, decoder, folder = tmp_path / "siglip", tmp_path / "llama3", tmp_path / "bundle"
    write_encoder(encoder, "SiglipVisionModel")
    write_decoder(decoder, "llama3")
    pair = ("--encoder", encoder, "--decoder", decoder)
    done = himix("export", *pair, "--random-weights", "-o", folder, "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert result["bundle"] == str(folder)
    assert result["manifest"]["name"] == "siglip-llama3-random"
    assert result["manifest"]["dialect"] == "ort"
    assert result["manifest"]["dtype"] == "float32"
    assert result["manifest"]["config"]["vision"]["model_type"] == "siglip"
    assert {cost["phase"] for cost in result["costs"]} >= {"vision weights", *CHECKS}
    for cost in result["costs"]:
        assert cost["seconds"] >= 0
        assert cost["peak_bytes"] > 50e6

    bundle = load(folder)
    answer = bundle.generate(bundle.encode(picture), "describe", max_tokens=12)
    text = answer.read()
    model = random_pair(Pair(str(encoder), str(decoder))).model()
    pixels = torch.from_numpy(pixel_values(Image.open(picture), model.config.preprocess))
    prompt = torch.tensor([bundle.tokenizer.encode_turn((), "describe")])
    assert prompt.shape == (1, 5)  # by the decoder's own tokenizer
    expected = model.generate_greedy(pixels, prompt, 12)
    assert answer.tokens == len(expected) == 12
    assert len(set(expected)) >= 3  # not one token for ever
    assert text == bundle.tokenizer.decode(expected)
    asked = himix("run", picture, "describe", "--max-tokens", 12)
    assert asked.out == f"{text}\n"
    assert "random" in asked.err


def test_export_refuses_before_it_works(  # type: ignore[no-untyped-def]
    himix, tiny_folder: Path, tmp_path: Path
) -> None:
    export = ("export", "--checkpoint", tiny_folder, "-o")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    refused(himix(*export, mine), saying=["will not replace", "mine"])
    assert [path.name for path in mine.iterdir()] == ["letter.txt"]
    file = tmp_path / "file"
    file.write_text("")
    refused(himix(*export, file / "bundle"), saying=["cannot write", "file"])
    refused(himix("export", "--checkpoint", mine), saying=["is not a checkpoint", "config.json"])


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (["--dtype", "float61"], ["no dtype is named 'float61'", "'float16'"]),
        (["--dtype", "fp4"], ["no dtype is named 'fp4'"]),
        (["--target", "jetpack-7"], ["no target is named 'jetpack-7'", "'jetpack-7.2'"]),
        (["--dialect", "natve"], ["no dialect is named 'natve'", "'native'"]),
        (["--max-text", "64"], ["max_text means nothing in the ort", "--dialect native"]),
        (["--target", "rtx", "--max-text", "0"], ["max_text is out of range", "found 0"]),
        (["--calibration", "nowhere"], ["nowhere", "too few pictures"]),
        (["--encoder", "tinyclip-93m"], ["no encoder is named", "'tinyclip-39m'"]),
        (["--encoder", "tinyclip-39m", "--decoder", "qwen2-5b"], ["no decoder", "'qwen2-0.5b'"]),
        (["--decoder", "qwen2-0.5b"], ["the encoder is missing", "--encoder"]),
        (["--random-weights"], ["the encoder is missing", "--encoder"]),
        (
            ["--encoder", "tinyclip-39m", "--random-weights", "--checkpoint", "x"],
            ["weights of its own", "leave out"],
        ),
        (
            ["--encoder", "tinyclip-39m"],
            ["tinyclip-39m and qwen2-0.5b are not there", "train one", "--checkpoint", "--random"],
        ),
    ],
)
def test_export_options_that_name_nothing(  # type: ignore[no-untyped-def]
    himix, tmp_path: Path, options: list[str], saying: list[str]
) -> None:
    output = tmp_path / "bundle"
    refused(himix("export", *options, "-o", output), saying=saying)
    assert not output.exists()


@pytest.mark.usefixtures("ready_graphs")
def test_export_for_a_target(himix, tiny_folder: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    output = tmp_path / "bundle"
    options = ("--target", "tensorrt", "--dtype", "float32", "--max-text", 60)
    done = himix("export", "--checkpoint", tiny_folder, *options, "-o", output, "--json")
    assert done.code == 0, done.err
    manifest = json.loads(done.out)["manifest"]
    assert (manifest["dialect"], manifest["dtype"]) == ("native", "float32")
    assert manifest["cache_slots"] == 4 + 60
    assert "native, float32, a cache of 64 slots" in himix("info", output).out


def test_run_on_a_device_that_is_not_there(  # type: ignore[no-untyped-def]
    himix, tiny_bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    asked = ("run", picture, "what", "--bundle", tiny_bundle, "--device")
    refused(himix(*asked, "cuad"), saying=["no device is named 'cuad'", "'cuda'"])
    refused(himix(*asked, "cuda"), saying=["CUDAExecutionProvider", "onnxruntime-gpu"])
    refused(himix(*asked, "tensorrt"), saying=["TensorRT is missing", "apt install"])


def test_ctrl_c_in_export_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "himix_edge", "export"),
            *("--checkpoint", str(tiny_folder), "-o", str(place / "bundle")),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(place.glob(".*.partial/new/*")) and time.monotonic() < deadline:
        time.sleep(0.02)  # until it writes
    assert list(place.glob(".*.partial/new/*"))
    process.send_signal(SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert list(place.iterdir()) == []


def test_info_says_what_a_bundle_is(himix, tiny_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    done = himix("info", tiny_bundle)
    assert done.code == 0
    assert done.out.startswith("tiny: ")
    assert "28 px, 4 tokens" in done.out
    assert all(path.name in done.out for path in tiny_bundle.iterdir() if path.suffix == ".onnx")
    shown = json.loads(himix("info", tiny_bundle, "--json").out)
    assert shown["config"]["vision"]["image_size"] == 28
    assert shown["files"]["vision.onnx"]["size"] == (tiny_bundle / "vision.onnx").stat().st_size


def test_eval_compares_a_bundle_with_its_checkpoint(  # type: ignore[no-untyped-def]
    himix, tiny_bundle: Path, tiny_folder: Path
) -> None:
    arguments = ("eval", tiny_bundle, "--scenes", 2, "--against", tiny_folder)
    result = json.loads(himix(*arguments, "--json").out)
    asked = result["kinds"]["all"]["asked"]
    assert asked == sum(v["asked"] for kind, v in result["kinds"].items() if kind != "all")
    assert result["against"]["same_answers"] == result["against"]["of"] == asked
    shown = himix(*arguments).out
    assert f"{asked} of {asked} answers are the same" in shown
    assert "| describe | 2 | 0.0% | 50.0% | 0.0% |" in shown


def test_eval_refuses_what_is_neither_bundle_nor_checkpoint(himix, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused(himix("eval", tmp_path), saying=["neither a bundle nor a checkpoint"])


def test_scene_draws_the_scene_of_a_seed(himix, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "s.png"
    scene = random_scene(np.random.default_rng(7))
    assert himix("scene", "-o", path, "--seed", 7, "--size", 100).out == f"{path}\n"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(render(scene, 100)))
    shown = himix("scene", "-o", path, "--seed", 7, "--answer").out
    assert shown == description(scene) + "\n"
    refused(himix("scene", "-o", path / "x.png"), saying=["cannot write"])


def test_train_ends_with_a_checkpoint_and_its_card(  # type: ignore[no-untyped-def]
    himix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = (
        Phase("encoder", 2, 1, 1e-3),
        Phase("finetune", 2, 1, 1e-3, asked=("describe", "relation")),
    )
    config = tiny.tiny_config(vocab_size=448)
    monkeypatch.setitem(recipe.RECIPES, "tiny", recipe.Recipe("tiny", config, phases))
    command = ("train", "--recipe", "tiny", "--scenes", 2, "-o", tmp_path / "run")
    done = himix(*command)
    folder = tmp_path / "run" / "checkpoint"
    assert (done.code, done.out) == (0, f"{folder}\n")
    assert trained_checkpoints() == [folder]
    checkpoint = read_checkpoint(folder)
    assert checkpoint.name == "himix-tiny-demo"
    card = checkpoint.model_card
    assert "| describe | 2 | " in card
    assert "| finetune | " in card
    weights = checkpoint.model().state_dict()
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert [json.loads(line)["phase"] for line in log.splitlines()] == ["encoder", "finetune"]

    assert himix(*command).code == 0  # again: everything is there, nothing is trained
    assert (tmp_path / "run" / "log.jsonl").read_text() == log
    again = read_checkpoint(folder).model().state_dict()
    assert all(np.array_equal(weights[key], tensor) for key, tensor in again.items())
    refused(himix(*command, "--seed", 1), saying=["another run", "delete"])
