"""The commands about whom to trust: sign, verify, trust."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from himix_edge.cli_options import Commands, Json
from himix_edge.console import print_json

trust_app = Commands()

INTEGRITY_ONLY = (
    "integrity only: whoever changed the files could have changed the manifest; "
    "who made it is checked with --public-key"
)


@trust_app.command()
def sign(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle folder.")] = None,
    key: Annotated[Path | None, typer.Option(help="A private Ed25519 key, in a PEM file.")] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(help="Make a key here, and its public half beside it, in FILE.pub."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign a bundle: manifest.sig, and the engines in it that you built or trust."""
    from himix_edge.bundle.keys import PrivateKey, make_keys
    from himix_edge.bundle.signature import sign_bundle

    if (key is None) == (new_key is None):
        raise typer.BadParameter("name a key with --key, or make one with --new-key")
    if bundle is None and key is not None:
        raise typer.BadParameter("name the bundle to sign")
    private = PrivateKey.read(key) if key else None
    said: dict[str, object] = {}
    if new_key is not None:
        public_path, public = make_keys(new_key)
        said.update(private_key=str(new_key), public_key=str(public_path), key_id=public.id)
        if not as_json:
            print(f"{new_key}: the private key {public.id}; keep it to yourself.")
            print(f"{public_path}: the public key, for whoever gets your bundles.")
        private = PrivateKey.read(new_key)
    if bundle is not None and private is not None:
        signed = sign_bundle(bundle, private)
        said.update(bundle=str(bundle), **dataclasses.asdict(signed))
        if not as_json:
            print(f"{bundle}: signed by the key {signed.key_id}.")
            for name in signed.engines:
                print(f"engines/{name}: signed, too.")
            for name in signed.left_out:
                print(f"engines/{name}: not signed, since you neither built nor trust it.")
    if as_json:
        print_json(said)


@trust_app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    public_key: Annotated[
        Path | None, typer.Option(help="Who must have signed it: a public key, in a PEM file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every file of a bundle and, with a public key, who vouches for them."""
    from himix_edge.bundle.files import BundleFiles
    from himix_edge.bundle.signature import Trusted, stored_signature
    from himix_edge.contract import Manifest
    from himix_edge.engines.listing import engine_states

    trusted = Trusted.read(public_key) if public_key else None
    read_manifest = trusted.read_manifest if trusted else Manifest.read
    with BundleFiles.open(bundle, read_manifest=read_manifest) as files:
        files.check()
        manifest = files.manifest
    engines = engine_states(bundle, manifest, trusted)
    signature = stored_signature(bundle)
    if as_json:
        print_json(
            {
                "bundle": str(bundle),
                "files": len(manifest.files),
                "signed_by": trusted.key.id if trusted else None,
                "unchecked_signature_by": signature.key_id if signature and not trusted else None,
                "engines": [engine.to_dict() for engine in engines],
            }
        )
        return
    if trusted:
        print(f"{bundle}: signed by the key {trusted.key.id}.")
    else:
        print(f"{bundle}: {INTEGRITY_ONLY}.")
        if signature:
            named = f"names the key {signature.key_id!r}"
            print(f"There is a signature that {named}; it is not checked.")
    print(f"All {len(manifest.files)} files are those of its manifest.")
    for engine in engines:
        print(engine)


@trust_app.command()
def trust(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder with engines.")],
    as_json: Json = False,
) -> None:
    """Trust engines that were built elsewhere. An engine is code: it runs as you."""
    from himix_edge.engines.listing import trust_engines

    engines = trust_engines(bundle)
    if as_json:
        print_json({"bundle": str(bundle), "engines": [engine.to_dict() for engine in engines]})
        return
    for engine in engines:
        print(engine)
        for name, record in engine.files.items():
            print(f"  {record.sha256[:12]}  {record.size:>12,}  {name}")
