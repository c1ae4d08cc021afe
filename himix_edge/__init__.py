"""himix-edge: vision-language models on small devices, by hierarchical vision injection (HiMix).

model = himix_edge.load("bundle/")
image = model.encode("a.png")
for piece in model.generate(image, "describe"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from himix_edge.telemetry import turn_off_telemetry

if TYPE_CHECKING:
    from himix_edge.errors import HimixError as HimixError
    from himix_edge.runtimes.conversation import Conversation as Conversation
    from himix_edge.runtimes.conversation import EncodedImage as EncodedImage
    from himix_edge.runtimes.generate import Answer as Answer
    from himix_edge.runtimes.model import Model as Model
    from himix_edge.runtimes.model import load as load
    from himix_edge.runtimes.sampling import SamplingOptions as SamplingOptions

turn_off_telemetry()  # before any module of the package can import onnxruntime

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Conversation",
    "EncodedImage",
    "HimixError",
    "Model",
    "SamplingOptions",
    "__version__",
    "load",
]

_HOMES = {
    "Answer": "himix_edge.runtimes.generate",
    "Conversation": "himix_edge.runtimes.conversation",
    "EncodedImage": "himix_edge.runtimes.conversation",
    "HimixError": "himix_edge.errors",
    "Model": "himix_edge.runtimes.model",
    "SamplingOptions": "himix_edge.runtimes.sampling",
    "load": "himix_edge.runtimes.model",
}


def __getattr__(name: str) -> Any:
    """A public name on first use, so that `import himix_edge` costs nothing and needs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
