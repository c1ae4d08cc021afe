"""matplotlib, which a plot needs and which nobody else has to install."""

from __future__ import annotations

from himix_edge.errors import DependencyError


def require_plots() -> None:
    """Before anything is drawn, or before a long work that ends in a plot.

    Raises:
        DependencyError: matplotlib isn't installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"a plot needs {error.name}", fix="pip install 'himix-edge[plot]'"
        ) from error
