"""What the commands share: how they are made, their common options, what a shell completes.

A value that is no name of anything is refused where it is used, with the closest name; completion
only offers the names.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

import typer
from typer.core import TyperCommand

LARGEST = 2**63 - 1  # of whole numbers on the command line: what every library behind it can hold


class Command(TyperCommand):
    """A command that refuses numbers no library can hold.

    Attributes:
        defaults: the module and the name of a dataclass that is the home of the defaults of the
            options named as its fields. It is imported when help is asked for, so that starting a
            command costs nothing.
    """

    defaults: ClassVar[tuple[str, str] | None] = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As typer does, and then checks whole numbers."""
        left: list[str] = super().parse_args(ctx, args)
        for parameter in self.params:
            value = ctx.params.get(str(parameter.name))
            if isinstance(value, int) and abs(value) > LARGEST:
                raise typer.BadParameter("the number is too large", ctx=ctx, param=parameter)
        return left

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As typer does, with the defaults that have their home elsewhere."""
        if self.defaults is not None:
            module, name = self.defaults
            home = vars(getattr(importlib.import_module(module), name))
            for parameter in self.params:
                default = home.get(str(parameter.name))
                if parameter.default is None and default not in (None, ()):
                    parameter.default, parameter.show_default = default, True
        super().format_help(ctx, formatter)


class Commands(typer.Typer):
    """A set of commands, each a `Command` whose summary is never cut."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """As `Typer.command`; the summary is the first paragraph of the docstring."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            paragraph = inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]
            summary = " ".join(paragraph.split())
            settings.setdefault("cls", Command)
            add: Callable[..., Any] = super(Commands, self).command(
                name, short_help=summary, **settings
            )
            return add(function)

        return register


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_beside(flag: str, context: typer.Context, *names: str) -> None:
    """Misuse, where an option was given that `flag` has no use for."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{option} means nothing beside {flag}")


def named_place(path: Path | None) -> Path | None:
    """Where a file or folder is to be written: of `.` the folder's own path, so that it has a name.

    Raises:
        typer.BadParameter: the root, which has none.
    """
    if path is None or path.name not in ("", ".."):
        return path
    if not path.resolve().name:
        raise typer.BadParameter("it has no name; choose a file or folder within")
    return path.resolve()


def output_option(help_text: str) -> Any:
    """--output, or -o: a place to write to."""
    return typer.Option("--output", "-o", help=help_text, callback=named_place)


# What a shell completes. The names are looked up when the shell asks for them.


def offering(*words: str) -> Callable[[str], list[str]]:
    """Completes one of these words."""
    return _completing(lambda: words)


def _completing(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        with contextlib.suppress(ImportError):  # a package is missing: nothing to offer
            return [name for name in known() if name.startswith(incomplete)]
        return []

    return complete


def _constant(module: str, name: str) -> Callable[[str], list[str]]:
    """Completes one of a collection, or of a Literal's values, by the module that holds it."""

    def known() -> Iterable[str]:
        value = getattr(importlib.import_module(module), name)
        return value if isinstance(value, (tuple, Mapping)) else get_args(value)

    return _completing(known)


boards = _constant("himix_edge.analysis.devices", "DEVICES")
decoders = _constant("himix_edge.presets", "DECODERS")
designs = _constant("himix_edge.config", "Design")
devices = _constant("himix_edge.runtimes.devices", "DEVICES")
dialects = _constant("himix_edge.contract", "Dialect")
dtypes = _constant("himix_edge.contract", "Dtype")
encoders = _constant("himix_edge.presets", "ENCODERS")
engine_targets = _constant("himix_edge.engines.plan", "TARGETS")
recipes = offering("shapes")  # `training.recipe.RECIPES`, whose import takes torch and seconds
storages = _constant("himix_edge.analysis.memory", "STORAGE_BITS")
targets = _constant("himix_edge.targets", "TARGETS")


# Options of several commands.

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, tensorrt, tensorrt-rtx, or auto: the best that works.",
        autocompletion=devices,
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Threads of ONNX Runtime; by default one for each core.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.", min=0)]
Scenes = Annotated[int, typer.Option(help="How many held-out scenes to measure on.", min=1)]
Encoder = Annotated[
    str,
    typer.Option(
        help="A vision encoder: a name that `models` lists, a folder, or a hub id.",
        autocompletion=encoders,
    ),
]
Decoder = Annotated[
    str,
    typer.Option(
        help="A language decoder: a name that `models` lists, a folder, or a hub id.",
        autocompletion=decoders,
    ),
]
Plot = Annotated[Path | None, typer.Option(help="Draw the result into this .png or .svg file.")]
