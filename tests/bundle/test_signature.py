"""Signatures: who vouches for a bundle, and every way in which it is nobody, or somebody else."""

from __future__ import annotations

import builtins
import dataclasses
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from himix_edge.contract import Manifest
from himix_edge.engines.listing import NOT_TRUSTED, OWN, SIGNED
from himix_edge.engines.store import find_engines
from himix_edge.errors import BundleError, ConfigError, DependencyError, EngineError, OutputError
from himix_edge.export.bundle import BUNDLE
from himix_edge.files import refuse_foreign_folder
from himix_edge.runtimes import load
from tests.engines.conftest import make_bundle
from tests.engines.test_store import ORIN, THOR, put

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa

from himix_edge.bundle.keys import PrivateKey, PublicKey, make_keys
from himix_edge.bundle.signature import Signature, Trusted, sign_bundle, stored_signature


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; its public half is `FILE.pub`."""
    make_keys(tmp_path / "key.pem")
    return tmp_path / "key.pem"


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def another(key: Path) -> Path:
    other = key.with_name("other.pem")
    make_keys(other)
    return other


def test_signed_and_verified(bundle: Path, key: Path, himix: Any) -> None:
    key_id = PublicKey.read(public(key)).id
    done = himix("sign", bundle, "--key", key)
    assert (done.code, done.err, done.out) == (0, "", f"{bundle}: signed by the key {key_id}.\n")
    refuse_foreign_folder(bundle, BUNDLE)  # the signature is its own
    done = himix("verify", bundle, "--public-key", public(key))
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        f"{bundle}: signed by the key {key_id}.\nAll 6 files are those of its manifest.\n"
    )
    body = json.loads(himix("verify", bundle, "--public-key", public(key), "--json").out)
    assert (body["signed_by"], body["files"], body["engines"]) == (key_id, 6, [])


def test_without_a_key_it_is_integrity_only(bundle: Path, key: Path, himix: Any) -> None:
    said = "integrity only: whoever changed the files could have changed the manifest"
    done = himix("verify", bundle)
    assert done.code == 0
    assert said in done.out
    assert "signed" not in done.out
    himix("sign", bundle, "--key", key)
    done = himix("verify", bundle)
    assert said in done.out
    key_id = PublicKey.read(public(key)).id
    assert f"There is a signature that names the key '{key_id}'; it is not checked." in done.out
    body = json.loads(himix("verify", bundle, "--json").out)
    assert (body["signed_by"], body["unchecked_signature_by"]) == (None, key_id)


def test_keys_are_made_and_never_overwritten(tmp_path: Path, bundle: Path, himix: Any) -> None:
    key = tmp_path / "new.pem"
    done = himix("sign", bundle, "--new-key", key, "--json")
    assert done.code == 0
    body = json.loads(done.out)
    assert body["key_id"] == PublicKey.read(public(key)).id
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert Trusted.read(public(key)).read_manifest(bundle) == Manifest.read(bundle)
    before = key.read_bytes()
    done = himix("sign", "--new-key", key)
    assert done.code == 1
    assert "will not write" in done.err
    assert key.read_bytes() == before
    key.unlink()
    with pytest.raises(OutputError, match=r"will not write .*new\.pem\.pub"):
        make_keys(key)
    assert not key.exists()
    assert himix("sign", "--new-key", tmp_path / "gone" / "a.pem").code == 1


@pytest.mark.parametrize(
    "arguments", [[], ["BUNDLE"], ["--key", "K"], ["--key", "K", "--new-key", "N"]]
)
def test_misuse_of_sign(bundle: Path, himix: Any, arguments: list[str]) -> None:
    done = himix("sign", *[str(bundle) if word == "BUNDLE" else word for word in arguments])
    assert (done.code, done.out) == (2, "")


def openssl(*arguments: str | Path) -> None:
    try:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no OpenSSL that knows Ed25519")


def test_keys_of_openssl(tmp_path: Path, bundle: Path) -> None:
    key, beside = tmp_path / "o.pem", tmp_path / "o.pub"
    openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", beside)
    sign_bundle(bundle, PrivateKey.read(key))
    assert Trusted.read(beside).read_manifest(bundle).name == "tiny"
    assert Trusted.read(beside.read_bytes()).read_manifest(bundle).name == "tiny"


def test_an_encrypted_key(
    tmp_path: Path, bundle: Path, himix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "secret.pem"
    monkeypatch.setenv("HIMIX_EDGE_KEY_PASSPHRASE", "open sesame")
    make_keys(key)
    assert b"ENCRYPTED" in key.read_bytes()
    assert himix("sign", bundle, "--key", key).code == 0
    monkeypatch.setenv("HIMIX_EDGE_KEY_PASSPHRASE", "open barley")
    done = himix("sign", bundle, "--key", key)
    assert done.code == 1
    assert "expected the passphrase that it was encrypted with" in done.err
    monkeypatch.delenv("HIMIX_EDGE_KEY_PASSPHRASE")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    done = himix("sign", bundle, "--key", key)
    assert "no terminal to ask at. Fix: set HIMIX_EDGE_KEY_PASSPHRASE" in done.err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda _: "open sesame")
    assert himix("sign", bundle, "--key", key).code == 0


def _private_pem(key: Any) -> bytes:
    encoding, encryption = serialization.Encoding.PEM, serialization.NoEncryption()
    data: bytes = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, encryption)
    return data


def _public_pem(key: Any) -> bytes:
    data: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return data


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: rsa.generate_private_key(65537, 1024), "RSA"),
        (lambda: ec.generate_private_key(ec.SECP256R1()), "EC|EllipticCurve"),
        (ed448.Ed448PrivateKey.generate, "Ed448"),
    ],
    ids=["rsa", "ec", "ed448"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # that the RSA key is short
def test_keys_of_another_kind(tmp_path: Path, make: Callable[[], Any], kind: str) -> None:
    other = make()
    (tmp_path / "private.pem").write_bytes(_private_pem(other))
    with pytest.raises(ConfigError, match=f"a private Ed25519 key, found one of the kind ({kind})"):
        PrivateKey.read(tmp_path / "private.pem")
    with pytest.raises(ConfigError, match=f"a public Ed25519 key, found one of the kind ({kind})"):
        PublicKey.read(_public_pem(other))


def test_each_half_in_the_place_of_the_other(key: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't sign: .*found a public key"):
        PrivateKey.read(public(key))
    with pytest.raises(ConfigError, match=r"found a private key, .*openssl pkey -in .* -pubout"):
        PublicKey.read(key)
    with pytest.raises(ConfigError, match="found a private key"):
        PublicKey.read(key.read_bytes())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no key",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"\0" * 100_000,
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ],
    ids=["empty", "text", "cut", "large", "certificate"],
)
def test_a_file_that_is_no_key(tmp_path: Path, bundle: Path, himix: Any, data: bytes) -> None:
    path = tmp_path / "no.pem"
    path.write_bytes(data)
    for arguments in (("sign", bundle, "--key", path), ("verify", bundle, "--public-key", path)):
        done = himix(*arguments)
        assert done.code == 1
        assert done.err.startswith("Error: ")
        assert done.err.count("\n") == 1
        assert "Fix: " in done.err
    with pytest.raises(ConfigError, match="cannot read the key"):
        PublicKey.read(tmp_path / "gone.pem")


def test_the_package_is_named_where_it_is_missing(
    bundle: Path, key: Path, himix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("cryptography"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match=r"pip install 'himix-edge\[sign\]'"):
        Trusted.read(public(key))
    with pytest.raises(DependencyError, match="need the package cryptography"):
        load(bundle, public_key=public(key))
    for arguments in (["--key", key], ["--new-key", key.with_name("n.pem")]):
        done = himix("sign", bundle, *arguments)
        assert (done.code, done.err.count("\n")) == (1, 1)
    assert himix("verify", bundle).code == 0  # of integrity, which needs no package


def test_a_bundle_that_nobody_signed(bundle: Path, key: Path) -> None:
    with pytest.raises(BundleError, match=r"is not signed: expected a manifest\.sig by the key"):
        load(bundle, public_key=public(key))


def test_a_bundle_that_another_signed(bundle: Path, key: Path, himix: Any) -> None:
    other = PrivateKey.read(another(key))
    sign_bundle(bundle, other)
    with pytest.raises(BundleError, match=f"found one by the key '{other.public.id}'"):
        load(bundle, public_key=public(key).read_bytes())
    stored = stored_signature(bundle)
    assert stored is not None
    forged = dataclasses.replace(stored, key_id=PublicKey.read(public(key)).id)
    (bundle / "manifest.sig").write_bytes(forged.to_json())
    done = himix("verify", bundle, "--public-key", public(key))
    assert done.code == 1
    assert "is not the signature of this manifest by this key" in done.err


def test_a_manifest_that_was_changed_and_sealed_again(bundle: Path, key: Path) -> None:
    sign_bundle(bundle, PrivateKey.read(key))
    changed = dataclasses.replace(Manifest.read(bundle), name="another's")
    (bundle / "manifest.json").write_text(changed.to_json())
    assert Manifest.read(bundle).name == "another's"  # the seal alone is no help
    with pytest.raises(BundleError, match="found one of another manifest"):
        load(bundle, public_key=public(key))


def test_a_file_that_was_changed_under_a_signature(bundle: Path, key: Path, himix: Any) -> None:
    sign_bundle(bundle, PrivateKey.read(key))
    data = (bundle / "vision.onnx").read_bytes()
    (bundle / "vision.onnx").write_bytes(data[::-1])
    done = himix("verify", bundle, "--public-key", public(key))
    assert done.code == 1
    assert "vision.onnx is corrupt" in done.err
    with pytest.raises(BundleError, match=r"vision\.onnx is corrupt"):
        load(bundle, public_key=public(key))
    with pytest.raises(BundleError, match=r"vision\.onnx is corrupt"):  # nor is it signed again
        sign_bundle(bundle, PrivateKey.read(key))


def test_the_bytes_that_are_verified_are_those_that_are_parsed(
    bundle: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_bundle(bundle, PrivateKey.read(key))
    planted = dataclasses.replace(Manifest.read(bundle), name="planted").to_json()
    fits = PublicKey.fits

    def swap(self: PublicKey, signature: bytes, message: bytes) -> bool:
        (bundle / "manifest.json").write_text(planted)
        return fits(self, signature, message)

    monkeypatch.setattr(PublicKey, "fits", swap)
    assert Trusted.read(public(key)).read_manifest(bundle).name == "tiny"
    assert Manifest.read(bundle).name == "planted"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"[" * 4000,
        b"{" + b" " * 5000,
        b'{"key": 1, "signature": 2}',
        b'{"key": "a", "signature": "%"}',
        b'{"key": "a", "signature": "AAAA", "more": 1}',
        b"\xff\xfe",
    ],
    ids=range(9),
)
def test_a_signature_file_that_is_none(bundle: Path, key: Path, himix: Any, data: bytes) -> None:
    (bundle / "manifest.sig").write_bytes(data)
    for arguments in ([], ["--public-key", public(key)]):
        done = himix("verify", bundle, *arguments)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "manifest.sig is corrupt" in done.err


def test_a_signature_that_is_a_link(bundle: Path, key: Path, tmp_path: Path) -> None:
    sign_bundle(bundle, PrivateKey.read(key))
    (bundle / "manifest.sig").rename(tmp_path / "elsewhere")
    (bundle / "manifest.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=r"manifest\.sig is corrupt.*a link"):
        load(bundle, public_key=public(key))
    before = (tmp_path / "elsewhere").read_bytes()
    sign_bundle(bundle, PrivateKey.read(another(key)))  # replaces the link, not what it names
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert not (bundle / "manifest.sig").is_symlink()


def test_a_key_with_nothing_verified_is_refused(bundle: Path, key: Path) -> None:
    sign_bundle(bundle, PrivateKey.read(key))
    with pytest.raises(ConfigError, match="says nothing of files that are not checked"):
        load(bundle, public_key=public(key), verify=False)


def test_a_signature_lets_a_fleets_engines_run(
    bundle: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, himix: Any
) -> None:
    built = put(bundle, ORIN)
    done = himix("sign", bundle, "--key", key)
    assert f"engines/{ORIN.digest}: signed, too.\n" in done.out
    monkeypatch.setenv("HIMIX_EDGE_CONFIG", str(tmp_path / "device"))
    manifest, trusted = Manifest.read(bundle), Trusted.read(public(key))
    with pytest.raises(EngineError, match="did not build"):
        find_engines(bundle, manifest, ORIN)
    assert find_engines(bundle, manifest, ORIN, trusted=trusted).key == built
    with pytest.raises(EngineError, match="or one that the given key has signed"):
        find_engines(bundle, manifest, ORIN, trusted=Trusted.read(public(another(key))))
    shown = himix("verify", bundle, "--public-key", public(key), "--json").out
    assert [engine["trust"] for engine in json.loads(shown)["engines"]] == [SIGNED]
    assert not (tmp_path / "device").exists()  # no key of the device's own is needed


def test_engines_of_others_are_not_signed(
    bundle: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, himix: Any
) -> None:
    put(bundle, ORIN)
    (bundle / "engines" / "broken").mkdir()
    monkeypatch.setenv("HIMIX_EDGE_CONFIG", str(tmp_path / "other"))
    put(bundle, THOR)
    done = himix("sign", bundle, "--key", key)
    for name in (ORIN.digest, "broken"):
        assert f"engines/{name}: not signed, since you neither built nor trust it.\n" in done.out
    shown = himix("verify", bundle, "--public-key", public(key), "--json").out
    trust = {engine["folder"]: engine["trust"] for engine in json.loads(shown)["engines"]}
    assert trust == {ORIN.digest: NOT_TRUSTED, THOR.digest: SIGNED, "broken": NOT_TRUSTED}
    listed = json.loads(himix("info", bundle, "--json").out)["engines"]
    assert {each["folder"]: each["trust"] for each in listed}[THOR.digest] == OWN


def test_a_signature_of_one_kind_is_none_of_another(bundle: Path, key: Path) -> None:
    put(bundle, ORIN)
    sign_bundle(bundle, PrivateKey.read(key))
    trusted = Trusted.read(public(key))
    manifest, signature = bundle / "manifest.json", bundle / "manifest.sig"
    engine = bundle / "engines" / ORIN.digest / "engine.sig"
    record = engine.with_name("engine.json").read_bytes()
    assert trusted.has_signed_engine(record, engine.read_bytes())
    assert not trusted.has_signed_engine(manifest.read_bytes(), signature.read_bytes())
    bare = Signature("x", PrivateKey.read(key).sign(record)).to_json()
    assert not trusted.has_signed_engine(record, bare)
    assert not trusted.has_signed_engine(record, b"[" * 4000)


def test_run_asks_for_the_signature(
    tiny_bundle: Path, tmp_path: Path, key: Path, himix: Any
) -> None:
    picture, folder = tmp_path / "a.png", tmp_path / "copy"
    Image.new("RGB", (20, 20)).save(picture)
    folder.mkdir()
    for path in tiny_bundle.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    run = ("run", picture, "x", "--bundle", folder, "--max-tokens", 1, "--public-key", public(key))
    done = himix(*run)
    assert done.code == 1
    assert "is not signed" in done.err
    himix("sign", folder, "--key", key)
    assert himix(*run).code == 0
    assert load(folder, device="cpu", public_key=public(key)).manifest.name == "tiny"
