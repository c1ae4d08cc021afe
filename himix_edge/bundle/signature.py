"""Signatures of bundles: who vouches for the manifest, and with it for every file it lists.

    BUNDLE/manifest.sig                    of the bytes of manifest.json
    BUNDLE/engines/DIGEST/engine.sig       of the bytes of engine.json

Each is one JSON object: the signature, in base64, and the id of the key that made it, which only
helps people to see which key that was. What is signed begins with what it is for, so that the
signature of one kind of file is none for another:

    "himix-edge manifest v1" or "himix-edge engine v1", a zero byte, the bytes of the file
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.keys import KeySource, PrivateKey, PublicKey
from himix_edge.contract import SIGNATURE, Manifest, manifest_bytes
from himix_edge.engines.folders import open_folder, read_small, write_small
from himix_edge.engines.store import StoredEngines
from himix_edge.errors import BundleError, EngineError, OutputError

MOST_SIGNATURE = 4096  # bytes; one has about 150

Kind = Literal["manifest", "engine"]


@dataclass(frozen=True)
class Signature:
    """What stands in a signature's file.

    Attributes:
        key_id: of the key that is said to have made it.
    """

    key_id: str
    signature: bytes

    @classmethod
    def parse(cls, data: bytes) -> Signature:
        """Reads a signature's file.

        Raises:
            ValueError: it is none.
        """
        body = json.loads(data)
        if not isinstance(body, dict) or set(body) != {"key", "signature"}:
            raise ValueError("other fields")
        key_id, text = body["key"], body["signature"]
        if not isinstance(key_id, str) or not isinstance(text, str):
            raise ValueError("fields of other types")
        return cls(key_id, base64.b64decode(text, validate=True))

    def to_json(self) -> bytes:
        """The bytes of the file."""
        text = base64.b64encode(self.signature).decode()
        return (json.dumps({"key": self.key_id, "signature": text}, indent=2) + "\n").encode()


@dataclass(frozen=True)
class Trusted:
    """A public key whose bundles and engines are accepted."""

    key: PublicKey

    @classmethod
    def read(cls, source: KeySource) -> Trusted:
        """Reads the key: a PEM file's path, or its bytes.

        Raises:
            ConfigError: no file there, or one that is no public Ed25519 key.
            DependencyError: the package `cryptography` is missing.
        """
        return cls(PublicKey.read(source))

    def read_manifest(self, bundle: Path) -> Manifest:
        """The manifest of a bundle, parsed from the very bytes that the key has signed.

        Raises:
            BundleError: no bundle there, no signature, one of another key or of other bytes; or a
                manifest that is corrupt or of another version.
        """
        data = manifest_bytes(bundle)
        self._check(bundle, data)
        return Manifest.from_bytes(data, bundle)

    def has_signed_engine(self, record: bytes, signature: bytes) -> bool:
        """Whether the key has signed the record of an engine."""
        try:
            parsed = Signature.parse(signature)
        except (ValueError, RecursionError):
            return False
        return self.key.fits(parsed.signature, _message("engine", record))

    def _check(self, bundle: Path, data: bytes) -> None:
        path = bundle / SIGNATURE
        stored = stored_signature(bundle)
        if stored is None:
            raise BundleError(
                f"{bundle} is not signed",
                expected=f"a {SIGNATURE} by the key {self.key.id}",
                found="none",
                fix="get it from who exported it, or sign it: himix-edge sign "
                f"{bundle} --key private.pem",
            )
        if not self.key.fits(stored.signature, _message("manifest", data)):
            same = stored.key_id == self.key.id
            raise BundleError(
                f"{path} is not the signature of this manifest by this key",
                expected=f"one by the key {self.key.id}",
                found="one of another manifest" if same else f"one by the key {stored.key_id!r}",
                fix="copy the bundle again; if it is another maker's, use that maker's key",
            )


def stored_signature(bundle: Path) -> Signature | None:
    """What stands in a bundle's signature file; None where it has none.

    Raises:
        BundleError: a link, or a file that is no signature.
    """
    try:
        with open_folder(bundle) as folder:
            return Signature.parse(read_small(folder, SIGNATURE, MOST_SIGNATURE))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{bundle / SIGNATURE} is corrupt",
            expected="a JSON object with a key's id and a signature in base64",
            found=f"{type(error).__name__}: {error}",
            fix="copy the bundle again, or sign it again: himix-edge sign",
        ) from error


@dataclass(frozen=True)
class Signed:
    """What was signed.

    Attributes:
        engines: the folders of engines whose records were signed.
        left_out: engines that were not, since this user neither built nor trusts them.
    """

    key_id: str
    engines: list[str]
    left_out: list[str]


def sign_bundle(bundle: Path, key: PrivateKey) -> Signed:
    """Signs the manifest of a bundle, and the records of the engines that this user trusts.

    Every file is compared with its record first: a signature vouches for all of them.

    Raises:
        BundleError: no bundle there, or one with a file that differs from the manifest.
        EngineError: an engine that this user trusts and that has been changed; or this user's key
            of engines can't be relied on.
        OutputError: the bundle can't be written.
    """
    data = manifest_bytes(bundle)
    with BundleFiles(bundle, Manifest.from_bytes(data, bundle)) as files:
        files.check()
    trusted, left_out = [], []
    for name in StoredEngines.names(bundle):
        stored = _own_engines(bundle, name)
        if stored is None:
            left_out.append(name)
            continue
        stored.engines.check()
        trusted.append(stored)
    for stored in trusted:
        stored.put_signature(_signed(key, "engine", stored.record))
    try:
        with open_folder(bundle) as folder:
            write_small(folder, SIGNATURE, _signed(key, "manifest", data))
    except OSError as error:
        raise OutputError(
            f"cannot write {bundle / SIGNATURE}",
            expected="a folder that can be written, with room on the disk",
            found=error.strerror or str(error),
            fix="free some space, or copy the bundle to another place",
        ) from error
    names = [stored.engines.folder.name for stored in trusted]
    return Signed(key.public.id, names, left_out)


def _own_engines(bundle: Path, name: str) -> StoredEngines | None:
    """Engines that this user trusts; None of others, and of those whose record is no record."""
    try:
        stored = StoredEngines.read(bundle, name)
    except EngineError:
        return None
    return stored if stored.is_trusted() else None


def _signed(key: PrivateKey, kind: Kind, data: bytes) -> bytes:
    return Signature(key.public.id, key.sign(_message(kind, data))).to_json()


def _message(kind: Kind, data: bytes) -> bytes:
    """What is signed of a file."""
    return f"himix-edge {kind} v1\0".encode() + data
