from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from himix_edge.errors import ImageError
from himix_edge.runtimes import __main__ as command
from himix_edge.runtimes.model import load
from himix_edge.runtimes.sampling import SamplingOptions
from tests.runtimes.conftest import TinyBundle


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 60)).save(path)
    return path


def test_the_answer_on_stdout_and_who_gave_it_on_stderr(
    bundle: TinyBundle, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(bundle.folder, threads=1)
    expected = model.generate(model.encode(picture), "what", max_tokens=8).read()
    arguments = [str(picture), "what", "--bundle", str(bundle.folder), "--max-tokens", "8"]
    arguments += ["--threads", "1"]
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == expected + "\n"
    assert err == "Model: tiny. It knows nothing.\n"


def test_json(bundle: TinyBundle, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(bundle.folder, threads=1)
    answer = model.generate(model.encode(picture), "what", max_tokens=8)
    answer.read()
    arguments = [str(picture), "what", "--bundle", str(bundle.folder)]
    arguments += ["--max-tokens", "8", "--json"]
    assert command.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    milliseconds = result.pop("milliseconds")
    assert result == {
        "model": "tiny",
        "device": "cpu",
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "image_tokens": 9,
        "prompt_tokens": 6,
        "tokens": answer.tokens,
        "notices": [],
    }
    assert list(milliseconds) == ["preprocess", "vision", "prefill", "decode"]
    assert all(ms > 0 for ms in milliseconds.values())


def test_every_option_reaches_the_sampler() -> None:
    arguments = "i p --temperature 0.5 --top-k 4 --top-p 0.9 --repetition-penalty 1.1 --seed 3"
    arguments += " --max-tokens 7 --stop one --stop two"
    given = command.parser().parse_args(arguments.split())
    options = command.options_from_arguments(given)
    assert options == SamplingOptions(0.5, 4, 0.9, 1.1, 3, 7, ("one", "two"))
    given = command.parser().parse_args(["i", "p"])
    assert command.options_from_arguments(given) == SamplingOptions()


def test_an_error_is_one_line_and_exit_code_1(
    bundle: TinyBundle, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, image = str(bundle.folder), str(picture)
    for arguments, message in (
        (["--bundle", folder, image, " "], "Error: the prompt is empty"),
        (
            ["--bundle", folder, image, "x" * 100],
            "Error: the prompt is too long: expected at most 63 tokens",
        ),
        (
            ["--bundle", folder, "gone.png", "x"],
            "Error: image gone.png can't be read: found No such file",
        ),
        (["--bundle", "gone", image, "x"], "Error: gone is not a bundle"),
        (["--bundle", folder, image, "x", "--top-p", "7"], "Error: top_p is out of range"),
        (["--bundle", folder, image, "x", "--threads", "0"], "Error: threads is out of range"),
    ):
        assert command.main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(message)
        assert err.count("\n") == 1


def test_debug_shows_the_traceback(bundle: TinyBundle) -> None:
    with pytest.raises(ImageError):
        command.main(["--bundle", str(bundle.folder), "gone.png", "x", "--debug"])


def test_ctrl_c(bundle: TinyBundle, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        del arguments, options
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "print_answer", interrupted)
    assert command.main(["--bundle", str(bundle.folder), str(picture), "x"]) == 130


def test_as_a_process_whose_reader_has_gone(bundle: TinyBundle, picture: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "himix_edge.runtimes"),
            *(str(picture), "what", "--bundle", str(bundle.folder)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == "Model: tiny. It knows nothing.\n"
    assert process.wait() == 1
