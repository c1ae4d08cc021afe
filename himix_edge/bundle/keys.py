"""Ed25519 keys in PEM files: who signs bundles, and whose bundles are accepted.

They are those of OpenSSL: `openssl genpkey -algorithm ed25519`, `openssl pkey -pubout`.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himix_edge.errors import ConfigError, DependencyError, OutputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

PASSPHRASE = "HIMIX_EDGE_KEY_PASSPHRASE"
MOST_PEM = 1 << 16  # bytes; a key has about a hundred
_GET_PUBLIC = "get the public key from whoever signed the bundle"
_MAKE_PAIR = "make a pair: himix-edge sign --new-key private.pem"
KeySource = str | os.PathLike[str] | bytes  # a PEM file's path, or its bytes


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with.

    Attributes:
        id: sixteen hexadecimal digits of the key's sha256, by which people tell keys apart.
    """

    id: str
    _key: Ed25519PublicKey

    @classmethod
    def of(cls, key: Ed25519PublicKey) -> PublicKey:
        """A key of `cryptography` as one of ours."""
        return cls(hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16], key)

    @classmethod
    def read(cls, source: KeySource) -> PublicKey:
        """Reads a public key.

        Raises:
            ConfigError: no file there, or one that is no public Ed25519 key.
            DependencyError: the package `cryptography` is missing.
        """
        load, ed25519 = _cryptography()
        data, name = _pem(source)
        if b"PRIVATE KEY-----" in data:
            raise ConfigError(
                f"{name} can't be used as a public key",
                expected="a public Ed25519 key",
                found="a private key, which stays with who signs",
                fix=f"openssl pkey -in {shlex.quote(name)} -pubout -out public.pem",
            )
        with _readable(name, "a public Ed25519 key in a PEM file", _GET_PUBLIC):
            key = load.load_pem_public_key(data)
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise _wrong_kind(name, "a public", key, _GET_PUBLIC)
        return cls.of(key)

    def fits(self, signature: bytes, message: bytes) -> bool:
        """Whether this key's private half has signed a message."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """A key that signs."""

    public: PublicKey
    _key: Ed25519PrivateKey

    @classmethod
    def read(cls, path: Path) -> PrivateKey:
        """Reads a private key; an encrypted one with $HIMIX_EDGE_KEY_PASSPHRASE, or by asking.

        Raises:
            ConfigError: no file there, one that is no private Ed25519 key, a wrong passphrase, or
                none and nobody to ask.
            DependencyError: the package `cryptography` is missing.
        """
        load, ed25519 = _cryptography()
        data, name = _pem(path)
        if b"PUBLIC KEY-----" in data:
            raise ConfigError(
                f"{name} can't sign",
                expected="a private Ed25519 key",
                found="a public key",
                fix="name the file that it was made with, or make a pair: himix-edge sign "
                "--new-key private.pem",
            )
        try:
            with _readable(name, "a private Ed25519 key in a PEM file", _MAKE_PAIR):
                key = load.load_pem_private_key(data, password=None)
        except TypeError:  # it is encrypted
            passphrase = _passphrase(name)
            wanted = "the passphrase that it was encrypted with"
            with _readable(name, wanted, f"try again, or set {PASSPHRASE}"):
                key = load.load_pem_private_key(data, password=passphrase)
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise _wrong_kind(name, "a private", key, _MAKE_PAIR)
        return cls(PublicKey.of(key.public_key()), key)

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, of 64 bytes."""
        signature: bytes = self._key.sign(message)
        return signature


def make_keys(path: Path) -> tuple[Path, PublicKey]:
    """Makes a pair: the private key at `path`, with mode 0600, and the public one beside it.

    The private key is encrypted if $HIMIX_EDGE_KEY_PASSPHRASE is set.

    Returns:
        the public key's path, which is `path` with ".pub" added, and the key.

    Raises:
        DependencyError: the package `cryptography` is missing.
        OutputError: one of the files is there already, or can't be written.
    """
    load, ed25519 = _cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    passphrase = os.environ.get(PASSPHRASE, "").encode()
    private = key.private_bytes(
        load.Encoding.PEM,
        load.PrivateFormat.PKCS8,
        load.BestAvailableEncryption(passphrase) if passphrase else load.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        load.Encoding.PEM, load.PublicFormat.SubjectPublicKeyInfo
    )
    beside = path.with_name(f"{path.name}.pub")
    with contextlib.ExitStack() as undo:
        for place, data, mode in ((path, private, 0o600), (beside, public, 0o644)):
            _create(place, data, mode)
            undo.callback(place.unlink, missing_ok=True)
        undo.pop_all()
    return beside, PublicKey.of(key.public_key())


def _create(path: Path, data: bytes, mode: int) -> None:
    """Writes a file where there is none."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        exists = isinstance(error, FileExistsError)
        raise OutputError(
            f"will not write {path}" if exists else f"cannot write {path}",
            expected="no file there yet" if exists else "a folder that can be written",
            found="one that may be a key in use" if exists else error.strerror,
            fix="choose another place, or move it away",
        ) from error


def _cryptography() -> tuple[Any, Any]:
    """Two modules of the package: about files, and about this kind of key."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise DependencyError(
            "signatures need the package cryptography",
            found=None if isinstance(error, ModuleNotFoundError) else str(error),
            fix="pip install 'himix-edge[sign]'",
        ) from error
    return serialization, ed25519


def _pem(source: KeySource) -> tuple[bytes, str]:
    """The bytes of a key, and how to call it."""
    if isinstance(source, bytes):
        return source, "the key"
    path = Path(source)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_PEM + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the key {path}",
            expected="a PEM file",
            found=error.strerror or str(error),
            fix="name the key's file",
        ) from error
    if len(data) > MOST_PEM:
        raise ConfigError(
            f"{path} is no key",
            expected="a PEM file",
            found=f"more than {MOST_PEM} bytes",
            fix="name the key's file",
        )
    return data, str(path)


@contextlib.contextmanager
def _readable(name: str, expected: str, fix: str) -> Iterator[None]:
    """What `cryptography` makes of a file that is no key, or of a kind it does not know."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{name} can't be read",
            expected=expected,
            found=" ".join(str(error).split()).split(". ")[0] or "something else",
            fix=fix,
        ) from error


def _passphrase(name: str) -> bytes:
    if given := os.environ.get(PASSPHRASE):
        return given.encode()
    if not sys.stdin.isatty():
        raise ConfigError(
            f"{name} is encrypted",
            expected="its passphrase",
            found="none, and no terminal to ask at",
            fix=f"set {PASSPHRASE}",
        )
    return getpass.getpass(f"Passphrase of {name}: ").encode()


def _wrong_kind(name: str, which: str, key: object, fix: str) -> ConfigError:
    kind = type(key).__name__.lstrip("_").removesuffix("PublicKey").removesuffix("PrivateKey")
    return ConfigError(
        f"{name} is of another kind",
        expected=f"{which} Ed25519 key",
        found=f"one of the kind {kind}",
        fix=fix,
    )
