"""Help, completion, defaults and odd values: what all commands have in common."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from himix_edge import cli
from himix_edge.analysis.memory import Setting
from himix_edge.bench.measure import Options
from himix_edge.cli_options import LARGEST
from himix_edge.config import Design
from himix_edge.contract import Dialect, Dtype
from himix_edge.convert.fit import FitOptions
from himix_edge.convert.pipeline import ConvertOptions
from himix_edge.engines import plan
from himix_edge.errors import DependencyError, HimixError, missing_package
from himix_edge.export.quantize import METHODS
from himix_edge.presets import DECODERS, ENCODERS
from himix_edge.runtimes.devices import DEVICES
from himix_edge.runtimes.sampling import SamplingOptions
from himix_edge.targets import TARGETS
from himix_edge.training.recipe import RECIPES

GROUP: Any = typer.main.get_command(cli.app)
COMMANDS: dict[str, Any] = dict(GROUP.commands)


def words_of(text: str) -> str:
    """A text whatever its line breaks; help is also broken after hyphens."""
    return " ".join(text.split()).replace("- ", "-")


# Help.


@pytest.mark.parametrize("columns", [80, 200, 60])
def test_each_summary_is_whole(himix: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = himix("--help")
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= columns
    shown = words_of(done.out)
    assert len(COMMANDS) == 17
    for name, command in COMMANDS.items():
        summary = words_of(inspect.cleandoc(command.callback.__doc__).split("\n\n")[0])
        assert summary.endswith(".")
        assert f"{name} {summary}" in shown
    assert "..." not in shown.replace("[ARGS]...", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_whole_and_ascii(himix: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = himix(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()
    shown = words_of(done.out)
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert words_of(parameter.help) in shown
        assert parameter.help[-1] in ".;"


def test_an_unknown_command_names_the_closest(himix: Any) -> None:
    done = himix("exprot")
    assert (done.code, done.out) == (2, "")
    assert "No such command 'exprot'. Did you mean 'export'?" in done.err


# Defaults.


def test_defaults_have_one_home(himix: Any) -> None:
    shown = words_of(himix("run", "--help").out)
    for name in ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty"):
        default = getattr(SamplingOptions, name)
        option = f"--{name.replace('_', '-')}"
        assert re.search(rf"{option} \S+ [^\[]*\[default: {default}\]", shown), option
    shown = words_of(himix("bench", "--help").out)
    assert f"[default: {Options.text}]" in shown
    assert f"[default: {Options.rounds}]" in shown
    for options, name in ((SamplingOptions, "run"), (Options, "bench")):
        own = get_type_hints(options).keys() & {p.name for p in COMMANDS[name].params}
        assert {p.default for p in COMMANDS[name].params if p.name in own} <= {None, *home(options)}


def home(options: type) -> set[Any]:
    """A dataclass's defaults, which `--help` fills in."""
    return {value for value in vars(options).values() if isinstance(value, (int, float, str))}


@pytest.mark.parametrize(
    ("name", "options", "others"),
    [
        ("convert", ConvertOptions, {}),
        ("convert", FitOptions, {}),
        ("plan", Setting, {"text": "text_tokens"}),
    ],
)
def test_defaults_that_are_written_twice_agree(
    name: str, options: type, others: dict[str, str]
) -> None:
    compared = 0
    for parameter in COMMANDS[name].params:
        field = others.get(parameter.name, parameter.name)
        if field in vars(options):
            assert parameter.default == getattr(options, field), field
            compared += 1
    assert compared >= 2


# Completion.


def completed(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """What bash is offered for the last word of a command line."""
    monkeypatch.setenv("_HIMIX_EDGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit):
        cli.main([])
    return capsys.readouterr().out.split()


STORED = ["int8", "int4", "fp8"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", list(COMMANDS)),
        ("ex", ["export"]),
        ("export --enc", ["--encoder"]),
        ("export --target ", list(TARGETS)),
        ("export --target jet", ["jetpack-6.2", "jetpack-7.2"]),
        ("export --debug --dialect ", list(get_args(Dialect))),
        ("export --dtype ", list(get_args(Dtype))),
        ("export --encoder ", list(ENCODERS)),
        ("export --decoder ", list(DECODERS)),
        ("quantize b --vision ", STORED),
        ("quantize b --decoder ", STORED),
        ("quantize b --method ", list(METHODS)),
        ("quantize b --head ", ["int8", "int4"]),
        ("quantize b --prefill ", ["int8"]),
        ("run a.png b --device ", list(DEVICES)),
        ("eval --device c", ["cpu", "cuda"]),
        ("build b --target ", list(plan.TARGETS)),
        ("plan --device rtx-40", ["rtx-4060", "rtx-4090"]),
        ("plan --weights ", STORED),
        ("convert x --dtype ", list(get_args(Dtype))),
        ("convert x --weighting ", list(get_args(get_type_hints(FitOptions)["weighting"]))),
        ("train --recipe ", list(RECIPES)),
        ("train --design ", list(get_args(Design))),
        ("flops --decoder vic", ["vicuna-7b"]),
        ("bench b --vs ", ["vanilla"]),
        ("train --design nothing", []),
    ],
)
def test_a_shell_completes(
    line: str,
    offered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = completed(f"himix-edge {line}", monkeypatch, capsys)
    assert [name for name in found if name != "--debug"] == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_HIMIX_EDGE_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit):
        cli.main([])
    script = capsys.readouterr().out
    assert "_HIMIX_EDGE_COMPLETE" in script
    assert "himix-edge" in script


def test_completion_without_a_package_offers_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "himix_edge.runtimes.devices", None)
    assert completed("himix-edge run a b --device ", monkeypatch, capsys) == []


# Odd values.


def numbers() -> Iterator[tuple[str, str]]:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if "int" in str(parameter.type_descriptor.annotation):
                yield name, max(parameter.opts, key=len)


@pytest.mark.parametrize(("name", "option"), list(numbers()))
def test_whole_numbers_that_nothing_can_hold(himix: Any, name: str, option: str) -> None:
    required = {
        "run": ["a.png", "what"],
        "quantize": ["b", "-o", "x"],
        "convert": ["b", "--calibration", "x", "-o", "x"],
        "scene": ["-o", "x"],
        "plan": ["--device", "cpu"],
    }
    arguments = required.get(name, ["b"] if name in ("build", "bench") else [])
    for value in ("1" * 400, str(LARGEST + 1), "-" + "1" * 400, "9" * 5000, "", "1.5", "one"):
        done = himix(name, *arguments, f"{option}={value}")
        assert (done.code, done.out) == (2, ""), value[:30]
        assert option in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["scene", "-o", "x.png", "--seed", "-1"],
        ["scene", "-o", "x.png", "--size", "0"],
        ["scene", "-o", "x", "--count", "0"],
        ["eval", "--scenes", "0"],
        ["eval", "--scenes", "-1"],
        ["train", "--scenes", "0"],
        ["train", "--seed", "-1"],
        ["run", "a.png", "what", "--seed", "-1"],
        ["scene", "-o", "/"],
        ["scene"],
        ["info"],
        ["info", "a", "b"],
        ["models", "--jsno"],
    ],
)
def test_misuse(himix: Any, arguments: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = himix(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage: himix-edge" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", ""],
        ["info", "/dev/null"],
        ["run", "", "what", "--bundle", "BUNDLE"],
        ["run", "PICTURE", "", "--bundle", "BUNDLE"],
        ["run", "PICTURE", "what", "--bundle", "PICTURE"],
        ["run", "PICTURE", "what", "--bundle", "BUNDLE", "--device", ""],
        ["run", "PICTURE", "what", "--bundle", "BUNDLE", "--threads", "99999999999"],
        ["run", "PICTURE", "what", "--bundle", "BUNDLE", "--temperature", "nan"],
        ["run", "PICTURE", "what", "--bundle", "BUNDLE", "--stop", ""],
        ["build", "PICTURE", "--dry-run"],
        ["build", "BUNDLE", "--dry-run", "--target", ""],
        ["scene", "-o", ""],
        ["scene", "-o", "PICTURE/x.png"],
        ["export", "--target", ""],
        ["export", "--checkpoint", "PICTURE"],
        ["plan", "--device", ""],
        ["flops", "--encoder", ""],
        ["flops", "--text", "-1"],
        ["quantize", "PICTURE", "-o", "x", "--decoder", "int8"],
        ["train", "--design", ""],
        ["convert", "BUNDLE", "--calibration", "BUNDLE", "-o", "."],
        ["convert", "nowhere", "--calibration", "BUNDLE", "-o", "x", "--join", "a"],
    ],
)
def test_values_of_no_use_are_one_line(
    himix: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: Any, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "a.png"
    assert himix("scene", "-o", picture).code == 0
    given = {"BUNDLE": str(tiny_bundle), "PICTURE": str(picture)}
    words = [re.sub("BUNDLE|PICTURE", lambda word: given[word[0]], word) for word in arguments]
    done = himix(*words)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("Error: ")
    assert done.err.count("\n") == 1


def test_debug_is_no_option_after_two_dashes(himix: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    done = himix("run", "--bundle", tiny_bundle, "--", tmp_path / "gone.png", "--debug")
    assert done.code == 1
    assert "gone.png" in done.err


def test_an_error_is_one_line_without_control_characters() -> None:
    error = HimixError("no\nlines", found="\x1b[2J\r\u202e", fix="é ü 日本 😀")
    assert str(error) == r"no lines: found \x1b[2J \u202e. Fix: é ü 日本 😀"


# Packages that are missing.


def test_a_missing_package_is_named_with_what_brings_it() -> None:
    absent = ModuleNotFoundError("No module named 'torch'", name="torch")
    found = missing_package(absent)
    assert isinstance(found, DependencyError)
    expected = "this command needs torch. Fix: pip install 'himix-edge[export]'"
    assert str(found) == expected
    wrapped = ModuleNotFoundError("Could not import module 'PreTrainedModel'.")
    wrapped.__cause__ = absent
    assert str(missing_package(wrapped)) == expected
    broken = ImportError("libtorch.so: cannot open shared object file", name="torch._C")
    assert "found libtorch.so: cannot open shared object file" in str(missing_package(broken))
    plot = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")
    assert "'himix-edge[plot]'" in str(missing_package(plot))
    ours = ImportError("cannot import name 'x'", name="himix_edge.files")
    assert missing_package(ours) is None
    assert missing_package(ImportError("?")) is None


def test_starting_imports_nothing_heavy() -> None:
    heavy = ("numpy", "PIL", "tokenizers", "onnxruntime", "torch", "jinja2", "rich")
    code = f"import sys, himix_edge.cli; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
