"""himix-edge: vision-language models on small devices, by hierarchical vision injection (HiMix).

model = himix_edge.load("bundle/")
image = model.encode("a.png")
for piece in model.generate(image, "describe"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from himix_edge.runtimes.model import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` on first use, so that `import himix_edge` costs nothing and needs nothing."""
    if name == "load":
        from himix_edge.runtimes.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
