"""The `himix-edge` command; with the device's packages alone, `run`, `bench` and `doctor` work."""

from __future__ import annotations

import sys

from himix_edge.console import run_command


def main() -> None:
    """Runs the command line and exits."""
    sys.exit(run_command(_main, debug="--debug" in sys.argv))


def _main() -> int:
    try:
        import typer as _  # noqa: F401
    except ImportError:
        return _device_main(sys.argv[1:])
    from himix_edge.cli import main as cli_main

    cli_main(sys.argv[1:])
    return 0


def _device_main(arguments: list[str]) -> int:
    if arguments[:1] == ["doctor"]:
        from himix_edge.doctor.__main__ import main as doctor

        return doctor(arguments[1:])
    if arguments[:1] == ["run"]:
        from himix_edge.runtimes.__main__ import main as run

        return run(arguments[1:])
    if arguments[:1] == ["bench"]:
        from himix_edge.bench.__main__ import main as bench

        return bench(arguments[1:])
    print(
        "Error: of the commands only `run`, `bench` and `doctor` work with a device's packages "
        "alone. Fix: pip install 'himix-edge[cli]', or 'himix-edge[export]' to train and "
        "export",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    main()
