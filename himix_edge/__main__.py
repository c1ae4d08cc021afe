"""The `himix-edge` command, also as `python -m himix_edge`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits."""
    try:
        from himix_edge.cli import main as cli_main
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("Error: the command line needs typer. Fix: pip install typer")
    cli_main(sys.argv[1:])


if __name__ == "__main__":
    main()
