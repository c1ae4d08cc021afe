"""Which engines are run: those that this user built or trusts, or that a given key has signed.

An engine is code: TensorRT runs what is in it. A bundle may come from anyone, and so may the
engines within; their record and its hashes only say that nothing was damaged. What lets an engine
be run is a proof over the bytes of that record, beside it:

    engine.mac   HMAC-SHA256 with this user's key, which no bundle holds; a line for each user
    engine.sig   a signature; it counts where the caller names the public key

The record names each file with its sha256, and the graphs that it was built of.
"""

from __future__ import annotations

import contextlib
import hmac
from pathlib import Path
from typing import TYPE_CHECKING

from himix_edge.contract import ENGINES
from himix_edge.engines.folders import open_folder, read_small, write_small
from himix_edge.engines.user_key import make_user_key, user_key
from himix_edge.errors import EngineError, OutputError

if TYPE_CHECKING:
    from himix_edge.bundle.signature import Trusted

MAC = "engine.mac"
ENGINE_SIGNATURE = "engine.sig"
MOST_PROOF = 4096  # bytes; a signature has about 150
MOST_USERS = 32  # whose MACs are kept
MOST_TIMINGS = 256 << 20  # bytes; a timing cache of TensorRT has a few MB

_RECORD = "engine record"
_TIMINGS = "timing cache"


def is_trusted(folder: int, record: bytes) -> bool:
    """Whether a MAC in an open folder is that of the bytes of its record, by this user's key.

    Raises:
        EngineError: this user's key can't be relied on.
    """
    mac = _proof(folder, MAC)
    key = user_key() if mac else None
    return key is not None and _fits(key, _RECORD, record, mac)


def is_signed(folder: int, record: bytes, trusted: Trusted) -> bool:
    """Whether the signature in an open folder is one of its record, by a given key."""
    signature = _proof(folder, ENGINE_SIGNATURE)
    return bool(signature) and trusted.has_signed_engine(record, signature)


def trust_record(folder: int, record: bytes) -> None:
    """Makes the proof that this user trusts a record, in its open folder.

    Raises:
        EngineError: this user's key can't be relied on.
        OSError: it can't be written.
    """
    mine = _mac(make_user_key(), _RECORD, record)
    others = [line for line in _proof(folder, MAC).splitlines(keepends=True) if line != mine]
    write_small(folder, MAC, b"".join([mine, *others[: MOST_USERS - 1]]))


def kept_timings(bundle: Path, name: str) -> bytes:
    """What an earlier build of this user measured; nothing where it is another's, or damaged.

    TensorRT parses it, so that it is not read back from just anyone.

    Args:
        name: of its file, in the folder of engines.
    """
    with contextlib.suppress(OSError, EngineError), open_folder(bundle, ENGINES) as folder:
        data = read_small(folder, name, MOST_TIMINGS)
        key = user_key()
        if key is not None and _fits(
            key, _TIMINGS, _named(name, data), _proof(folder, f"{name}.mac")
        ):
            return data
    return b""


def keep_timings(bundle: Path, name: str, data: bytes) -> None:
    """Keeps what a build measured for the next build of this user.

    Raises:
        EngineError: this user's key can't be relied on.
        OutputError: it can't be written.
    """
    mac = _mac(make_user_key(), _TIMINGS, _named(name, data))
    path = bundle / ENGINES / name
    try:
        path.parent.mkdir(exist_ok=True)
        with open_folder(bundle, ENGINES) as folder:
            write_small(folder, name, data)
            write_small(folder, f"{name}.mac", mac)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}",
            expected="a folder that can be written, with room on the disk",
            found=error.strerror or str(error),
            fix="free some space, or copy the bundle to another place",
        ) from error


def _named(name: str, data: bytes) -> bytes:
    """Timings with their name, which says for what device they are."""
    return name.encode() + b"\0" + data


def _proof(folder: int, name: str) -> bytes:
    """The bytes of a proof; none where it is missing or no plain file."""
    with contextlib.suppress(OSError):
        return read_small(folder, name, MOST_PROOF)
    return b""


def _mac(key: bytes, purpose: str, data: bytes) -> bytes:
    """A line in hexadecimal. A MAC for one purpose is none for another."""
    text = hmac.new(key, f"himix-edge {purpose} v1\0".encode() + data, "sha256").hexdigest()
    return f"{text}\n".encode()


def _fits(key: bytes, purpose: str, data: bytes, macs: bytes) -> bool:
    """Whether one of these lines is the MAC."""
    mine = _mac(key, purpose, data)
    return any(hmac.compare_digest(mine, line) for line in macs.splitlines(keepends=True))
