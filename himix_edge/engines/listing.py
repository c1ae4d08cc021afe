"""The engines of a bundle, for people: which there are, and which of them would be run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himix_edge.contract import FileRecord, Manifest
from himix_edge.engines.key import EngineDevice
from himix_edge.engines.store import StoredEngines
from himix_edge.errors import EngineError, HimixError

if TYPE_CHECKING:
    from himix_edge.bundle.signature import Trusted

OWN, SIGNED, NOT_TRUSTED = "built here or trusted", "signed", "not trusted"


@dataclass(frozen=True)
class EngineState:
    """A folder of engines, and whether a runtime would run them.

    Attributes:
        device: what they fit; None where their record can't be read.
        trust: one of OWN, SIGNED, NOT_TRUSTED.
        problem: why they would not be run although they are trusted, or can't be looked into.
    """

    folder: str
    device: EngineDevice | None
    files: dict[str, FileRecord]
    trust: str
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """One line; what it says of the device may be a stranger's text."""
        where = str(self.device) if self.device else "no readable record"
        problem = f" ({self.problem})" if self.problem else ""
        line = f"engines/{self.folder}: {where}: {self.trust}{problem}"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def engine_states(
    bundle: Path, manifest: Manifest, trusted: Trusted | None = None
) -> list[EngineState]:
    """The engines of a bundle, each compared with its record.

    Args:
        trusted: whose signature makes an engine as good as one that was built here.

    Raises:
        EngineError: the folder of engines is a link.
    """
    return [_state(bundle, name, manifest, trusted) for name in StoredEngines.names(bundle)]


def trust_engines(bundle: Path) -> list[EngineState]:
    """Makes all engines of a bundle this user's own: those that others built are run from now on.

    Raises:
        BundleError: no bundle there.
        EngineError: there are none; or one is damaged or a link, and then none of them is trusted.
        OutputError: the bundle or this user's key can't be written.
    """
    manifest = Manifest.read(bundle)
    stored = [StoredEngines.read(bundle, name) for name in StoredEngines.names(bundle)]
    if not stored:
        raise EngineError(
            f"{bundle} has no engines to trust",
            expected="engines that were built for this bundle",
            found="none",
            fix=f"build them: himix-edge build {bundle}",
        )
    for each in stored:
        each.engines.check()
    for each in stored:
        each.trust()
    return engine_states(bundle, manifest)


def _state(bundle: Path, name: str, manifest: Manifest, trusted: Trusted | None) -> EngineState:
    try:
        stored = StoredEngines.read(bundle, name)
    except EngineError as error:
        return EngineState(name, None, {}, NOT_TRUSTED, _short(error))
    trust, problem = NOT_TRUSTED, None
    try:
        if trusted and stored.is_signed(trusted):
            trust = SIGNED
        elif stored.is_trusted():
            trust = OWN
        stored.engines.check()
    except HimixError as error:
        problem = _short(error)
    if problem is None and not stored.is_of(manifest):
        problem = "built of other graphs than this bundle's"
    engines = stored.engines
    return EngineState(name, engines.key.device, dict(engines.files), trust, problem)


def _short(error: HimixError) -> str:
    return f"{error.failed}: found {error.found}"
