"""Which engines are run: this user's key, how it is kept, and what becomes of others' engines."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from himix_edge.contract import Manifest
from himix_edge.engines import build as build_module
from himix_edge.engines.build import build_engines
from himix_edge.engines.epcontext import named_engine
from himix_edge.engines.folders import UnusualFileError, open_folder, read_small, write_small
from himix_edge.engines.listing import NOT_TRUSTED, OWN, engine_states, trust_engines
from himix_edge.engines.plan import plan_build
from himix_edge.engines.store import (
    EngineDevice,
    StoredEngines,
    engine_key,
    find_engines,
    seal_engines,
)
from himix_edge.engines.trust import keep_timings, kept_timings
from himix_edge.engines.user_key import config_folder, make_user_key, user_key
from himix_edge.errors import BundleError, EngineError, OutputError
from tests.engines.fake_builder import Script
from tests.engines.test_store import ORIN, RTX, THOR, find, put


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user who has no key yet."""
    monkeypatch.setenv("HIMIX_EDGE_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


def test_the_key_is_made_once_and_for_its_user_alone(config: Path) -> None:
    assert user_key() is None
    assert not config.exists()
    key = make_user_key()
    assert len(key) == 32
    assert key == make_user_key() == user_key()
    assert stat.S_IMODE(config.stat().st_mode) == 0o700
    assert stat.S_IMODE((config / "engine.key").stat().st_mode) == 0o600
    assert [path.name for path in config.iterdir()] == ["engine.key"]


def test_the_mode_does_not_depend_on_the_umask(config: Path) -> None:
    before = os.umask(0)
    try:
        make_user_key()
    finally:
        os.umask(before)
    assert stat.S_IMODE(config.stat().st_mode) == 0o700
    assert stat.S_IMODE((config / "engine.key").stat().st_mode) == 0o600


def test_of_two_first_builds_one_makes_the_key(config: Path) -> None:
    keys: list[bytes] = []
    start = threading.Barrier(8)

    def make() -> None:
        start.wait()
        keys.append(make_user_key())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert set(keys) == {(config / "engine.key").read_bytes()}


def test_where_the_key_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HIMIX_EDGE_CONFIG", "own")
    assert config_folder() == Path("own")
    monkeypatch.delenv("HIMIX_EDGE_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/xdg")
    assert config_folder() == Path("/etc/xdg/himix-edge")
    for none in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", none)
        assert config_folder() == tmp_path / ".config" / "himix-edge"


def test_no_place_for_the_key(bundle: Path, tmp_path: Path, builder: Script, himix: Any) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIMIX_EDGE_CONFIG", str(tmp_path / "file"))
        done = himix("build", bundle)
    assert done.code == 1
    assert f"Error: cannot write {tmp_path}/file/engine.key" in done.err
    assert "set HIMIX_EDGE_CONFIG" in done.err
    assert builder.steps == 0  # said before the work
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIMIX_EDGE_CONFIG", "/proc/himix-edge")
        with pytest.raises(OutputError, match=r"engine\.key"):
            make_user_key()


def another_users(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on, another user works here."""
    monkeypatch.setenv("HIMIX_EDGE_CONFIG", str(folder))


def test_trust_makes_engines_from_elsewhere_ones_own(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, himix: Any
) -> None:
    put(bundle, ORIN)
    put(bundle, THOR)
    another_users(monkeypatch, tmp_path / "other")
    with pytest.raises(EngineError) as error:
        find(bundle)
    assert str(error.value) == (
        f"the engine in {bundle}/engines/{ORIN.digest}, which is code, is not run: expected an "
        "engine that this user built or trusts, found an engine that this user did not build. Fix: "
        f"himix-edge build {bundle} --target trt; or, if you trust where it comes from: "
        f"himix-edge trust {bundle}"
    )
    done = himix("trust", bundle)
    assert (done.code, done.err) == (0, "")
    for device in (ORIN, THOR):
        assert f"engines/{device.digest}: {device}: built here or trusted\n" in done.out
    sha256 = find(bundle).files["vision.plan"].sha256
    assert f"  {sha256[:12]}            13  vision.plan\n" in done.out
    assert find(bundle, THOR).vision.read_text() == "vision engine"
    body = json.loads(himix("trust", bundle, "--json").out)
    assert [engine["trust"] for engine in body["engines"]] == [OWN, OWN]


def test_several_users_trust_the_same_engines(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bundle)
    mac = bundle / "engines" / ORIN.digest / "engine.mac"
    own = mac.read_bytes()
    with monkeypatch.context() as patch:
        another_users(patch, tmp_path / "other")
        for _ in range(2):
            trust_engines(bundle)
            find(bundle)
    find(bundle)
    assert own in mac.read_bytes()
    assert mac.read_bytes().count(b"\n") == 2
    mac.write_bytes(b"0\n" * 2000)  # anything else there does no harm
    trust_engines(bundle)
    assert mac.read_bytes().startswith(own)
    assert len(mac.read_bytes()) < 4096
    find(bundle)


def test_trust_is_for_whole_engines_alone(bundle: Path, himix: Any) -> None:
    done = himix("trust", bundle)
    assert done.code == 1
    assert "has no engines to trust" in done.err
    with pytest.raises(BundleError, match="is not a bundle"):
        trust_engines(bundle / "gone")
    put(bundle, ORIN)
    put(bundle, THOR)
    for mac in bundle.glob("engines/*/engine.mac"):
        mac.unlink()
    (bundle / "engines" / THOR.digest / "decoder.plan").write_text("decoder changed")
    done = himix("trust", bundle)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "decoder.plan is corrupt" in done.err
    assert list(bundle.glob("engines/*/engine.mac")) == []  # none of them


def test_info_lists_engines_and_their_trust(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, himix: Any
) -> None:
    assert json.loads(himix("info", bundle, "--json").out)["engines"] == []
    put(bundle, ORIN)
    assert f"engines/{ORIN.digest}: {ORIN}: built here or trusted\n" in himix("info", bundle).out
    another_users(monkeypatch, tmp_path / "other")
    put(bundle, THOR)
    shown = himix("info", bundle).out
    assert f"engines/{ORIN.digest}: {ORIN}: not trusted\n" in shown
    assert f"engines/{THOR.digest}: {THOR}: built here or trusted\n" in shown
    assert "every file as exported" not in shown
    listed = json.loads(himix("info", bundle, "--json").out)["engines"]
    assert {each["folder"]: each["trust"] for each in listed} == {
        ORIN.digest: NOT_TRUSTED,
        THOR.digest: OWN,
    }
    assert listed[0]["device"]["kind"] == "tensorrt"


def test_info_says_what_is_wrong_with_engines(bundle: Path) -> None:
    put(bundle, ORIN)
    put(bundle, THOR)
    put(bundle, RTX, precision="float32")
    (bundle / "engines" / ORIN.digest / "engine.json").write_text("{")
    (bundle / "engines" / THOR.digest / "decoder.plan").unlink()
    states = {state.folder: state for state in engine_states(bundle, Manifest.read(bundle))}
    assert states[ORIN.digest].trust == NOT_TRUSTED
    assert "no readable record: not trusted (" in str(states[ORIN.digest])
    assert "decoder.plan is corrupt: found no such file" in str(states[THOR.digest].problem)
    assert states[RTX.digest].problem == "built of other graphs than this bundle's"


def test_what_a_stranger_writes_does_not_reach_the_terminal(bundle: Path, himix: Any) -> None:
    put(bundle, dataclasses.replace(ORIN, gpu="\x1b[2J\nOrin"))
    (bundle / "engines" / "\x1b]0;x").mkdir()
    shown = himix("info", bundle).out
    assert "\x1b" not in shown
    assert "TensorRT 10.16.1.11 on \\x1b[2J\\nOrin" in shown
    assert "engines/\\x1b]0;x: no readable record" in shown


def test_a_build_that_is_killed_before_its_seal_is_not_trusted_and_built_again(
    bundle: Path, orin: EngineDevice, builder: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "seal_engines", killed)
        with pytest.raises(SystemError):
            build_engines(plan_build(bundle))
    assert (bundle / "engines" / orin.digest / "engine.json").exists()
    with pytest.raises(EngineError, match="did not build"):
        find_engines(bundle, Manifest.read(bundle), orin)
    built = build_engines(plan_build(bundle))
    assert find_engines(bundle, Manifest.read(bundle), orin) == built.engines
    assert len(builder.timed) == 6  # the timings of the first were its user's


def test_timings_come_back_to_the_user_who_measured_them(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_timings(bundle, "a.timing") == b""
    keep_timings(bundle, "a.timing", b"measured")
    assert kept_timings(bundle, "a.timing") == b"measured"
    for ending in ("timing", "timing.mac"):
        (bundle / "engines" / f"a.{ending}").rename(bundle / "engines" / f"b.{ending}")
    assert kept_timings(bundle, "b.timing") == b""  # for another device
    keep_timings(bundle, "a.timing", b"measured")
    another_users(monkeypatch, tmp_path / "other")
    assert kept_timings(bundle, "a.timing") == b""


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("before")
    (tmp_path / "target").write_text("another's")
    (tmp_path / "link").symlink_to("target")

    def full(*_: object) -> None:
        raise OSError("full")

    with open_folder(tmp_path) as folder:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="full"):
                write_small(folder, "file", b"after")
        assert read_small(folder, "file", 6) == b"before"
        write_small(folder, "link", b"mine")
        assert read_small(folder, "link", 6) == b"mine"
        with pytest.raises(UnusualFileError, match="more than 5 bytes"):
            read_small(folder, "file", 5)
    assert (tmp_path / "target").read_text() == "another's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "target"]


def compiled(*nodes: onnx.NodeProto, **more: Any) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:])
    made: bytes = helper.make_model(graph, **more).SerializeToString()
    return made


def context(**attributes: Any) -> onnx.NodeProto:
    return helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", **attributes)


NAMED = context(main_context=1, ep_cache_context="a.engine", embed_mode=0, notes="a" * 300)


def test_the_engine_that_a_compiled_graph_names() -> None:
    assert named_engine(compiled(NAMED)) == "a.engine"


def _function() -> onnx.FunctionProto:
    return helper.make_function("d", "F", ["x"], ["y"], [NAMED], [helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    "graph",
    [
        compiled(),
        compiled(NAMED, NAMED),
        compiled(helper.make_node("Identity", ["x"], ["y"])),
        compiled(context(ep_cache_context="a.engine")),  # embedded is what no mode means
        compiled(context(ep_cache_context="a.engine", embed_mode=1)),
        compiled(context(embed_mode=0)),
        compiled(NAMED, functions=[_function()]),
        compiled(NAMED) + compiled(NAMED),  # protobuf reads two messages in a row as one
        compiled(NAMED)[:-20],
        b"\xff" * 40,
        b"\x07",
        b"",
    ],
    ids=range(12),
)
def test_a_compiled_graph_that_is_another_thing(graph: bytes) -> None:
    with pytest.raises(ValueError, match=r"node|beyond|wire|number"):
        named_engine(graph)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _linked(path: Path) -> None:
    path.with_suffix(".elsewhere").write_bytes(b"decoder engine")
    path.symlink_to(path.with_suffix(".elsewhere"))


def _twice(path: Path) -> None:
    path.write_bytes(b"decoder engine")
    os.link(path, path.with_suffix(".twice"))


@pytest.mark.parametrize("make", [_fifo, _linked, _twice, Path.mkdir])
def test_a_file_of_another_kind_is_no_engine(bundle: Path, make: Callable[[Path], None]) -> None:
    put(bundle)
    path = find(bundle).decoder
    path.unlink()
    make(path)
    with pytest.raises(EngineError, match=r"decoder\.plan is corrupt: expected a regular file"):
        find(bundle)


def test_a_copy_is_this_users_alone_and_gone_in_the_end(bundle: Path) -> None:
    put(bundle)
    found = find(bundle)
    with found.copied() as copies:
        assert copies.decoder.read_bytes() == found.read(found.decoder) == b"decoder engine"
        assert stat.S_IMODE(copies.folder.stat().st_mode) == 0o700
        assert {path.name for path in copies.folder.iterdir()} >= {"decoder.plan", "vision.plan"}
    assert not copies.folder.exists()


def test_no_room_for_a_copy(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bundle)
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(OutputError, match=r"cannot copy the engines .*set TMPDIR"):
        find(bundle).copied().__enter__()


def test_another_build_at_the_same_time(bundle: Path) -> None:
    put(bundle)
    key = put(bundle, profiles="0" * 12)
    assert StoredEngines.read(bundle, ORIN.digest).engines.key == key
    mine = engine_key(Manifest.read(bundle), ORIN, key.sizes)
    with pytest.raises(EngineError, match="another build has replaced the engines"):
        seal_engines(bundle, mine)
