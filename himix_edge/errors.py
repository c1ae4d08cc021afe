"""The errors of himix-edge, all of them.

HimixError                what every error below is; the command line prints it as one line
├── ConfigError           a config with an unknown key or an impossible value
├── ImageError            an image that can't be read, or is too large to decode
├── PromptError           an empty prompt, or one that the context can't hold
├── BundleError           a bundle that is missing, corrupt, or made by another version
├── CheckpointError       weights that are missing, misshapen, or not finite
├── TrainingError         a training run that can't start or can't go on
├── ExportError           a graph that could not be made
│   ├── ParityError       a graph that was made, and gives other numbers than the model
│   └── QualityError      a quantized graph that has lost too much of the model
├── EngineError           an engine that is missing, another device's, or can't be built
├── OutputError           a place that can't be written
└── DependencyError       a package that this step needs and that is not installed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HimixError(Exception):
    """What failed, what was expected, what was found, and what mends it, in one line.

    Args:
        failed: what could not be done.
        expected: what it needed.
        found: what was there instead.
        fix: the command or the act that mends it.
    """

    def __init__(
        self,
        failed: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.failed, self.expected, self.found, self.fix = failed, expected, found, fix
        facts = [f"expected {expected}" if expected else "", f"found {found}" if found else ""]
        detail = ", ".join(fact for fact in facts if fact)
        line = f"{failed}: {detail}" if detail else failed
        super().__init__(_in_one_line(f"{line}. Fix: {fix}" if fix else line))


def _in_one_line(text: str) -> str:
    """Line breaks as blanks, and what no terminal should get from a file or a name as escapes."""
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ConfigError(HimixError):
    """A config with an unknown key or an impossible value."""


class ImageError(HimixError):
    """An image that can't be read, or is too large to decode."""


class PromptError(HimixError):
    """An empty prompt, or one that the context can't hold."""


class BundleError(HimixError):
    """A bundle that is missing, corrupt, or made by another version."""


class CheckpointError(HimixError):
    """Weights that are missing, misshapen, or not finite."""


class TrainingError(HimixError):
    """A training run that can't start or can't go on."""


class ExportError(HimixError):
    """A graph that could not be made."""


class ParityError(ExportError):
    """A graph that was made, and gives other numbers than the model."""


class QualityError(ExportError):
    """A quantized graph that has lost too much of the model."""


class EngineError(HimixError):
    """An engine that is missing, another device's, or can't be built."""


class OutputError(HimixError):
    """A place that can't be written."""


class DependencyError(HimixError):
    """A package that this step needs and that is not installed."""


def closest(name: str, valid: Iterable[str]) -> str:
    """The valid name nearest to `name`, as in "did you mean 'vision'?", or all of them."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(names)}"


# Which extra brings a package; what a device needs anyway comes with himix-edge itself.
_EXTRAS = {
    **dict.fromkeys(("jinja2", "numpy", "PIL", "rich", "tokenizers", "typer"), "himix-edge"),
    **dict.fromkeys(
        (
            "huggingface_hub",
            "ml_dtypes",
            "onnx",
            "onnx_ir",
            "onnxscript",
            "safetensors",
            "torch",
            "transformers",
        ),
        "'himix-edge[export]'",
    ),
    "cryptography": "'himix-edge[sign]'",
    "matplotlib": "'himix-edge[plot]'",
    "onnxruntime": "'himix-edge[cpu]'",
}


def missing_package(error: BaseException) -> DependencyError | None:
    """The error for a package of ours that isn't installed or can't be loaded; else None.

    Args:
        error: what an import raised, perhaps in the words of a library that was importing, too.
    """
    cause: BaseException | None = error
    while cause is not None:
        package = (getattr(cause, "name", None) or "").split(".")[0]
        if isinstance(cause, ImportError) and package in _EXTRAS:
            absent = isinstance(cause, ModuleNotFoundError) and cause.name == package
            return DependencyError(
                f"this command needs {package}",
                found=None if absent else str(cause),
                fix=f"pip install {_EXTRAS[package]}",
            )
        cause = cause.__cause__ or cause.__context__
    return None
