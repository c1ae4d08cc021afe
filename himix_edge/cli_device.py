"""The commands for a device: build, plan, doctor."""

from __future__ import annotations

import typer

device = typer.Typer()
