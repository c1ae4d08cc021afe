"""Engines are code. What an attacker can plant beside a bundle's graphs, and what becomes of it."""

from __future__ import annotations

import gc
import json
import shutil
import stat
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from himix_edge.bundle.files import BundleFiles
from himix_edge.contract import FileRecord, Manifest
from himix_edge.engines.build import build_engines
from himix_edge.engines.opened import Engines
from himix_edge.engines.plan import plan_build
from himix_edge.engines.store import (
    StoredEngines,
    engine_key,
    find_engines,
    seal_engines,
    timing_cache_path,
    whole_engines,
)
from himix_edge.engines.user_key import make_user_key, user_key
from himix_edge.errors import EngineError, HimixError, OutputError
from himix_edge.runtimes import load
from himix_edge.runtimes.devices import Choices, open_engine
from himix_edge.runtimes.providers import TENSORRT
from tests.engines import fake_builder
from tests.engines.conftest import make_bundle
from tests.engines.fake_builder import fake_cuda, fake_tensorrt
from tests.engines.test_store import ORIN, RTX, SIZES, find, put, tree
from tests.reliability.table import tried
from tests.runtimes.fake_cuda import FakeGpu, runtime_of
from tests.runtimes.fake_tensorrt import engines_of, tensorrt_of
from tests.runtimes.test_devices import GpuOrt, compiled_graph

PLANTED = b"the attacker's plan"


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test's user has a key of their own, and an empty cache."""
    monkeypatch.setenv("HIMIX_EDGE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HIMIX_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "config"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """All that TensorRT is given to load, on a Jetson Orin."""
    gpu, given = FakeGpu(eager=True), []
    trt = tensorrt_of(gpu)
    runtime: Any = trt.__dict__["Runtime"]

    class Watched(runtime):  # type: ignore[misc]
        def deserialize_cuda_engine(self, data: Any) -> Any:
            given.append(bytes(data))
            return super().deserialize_cuda_engine(data)

    trt.__dict__["Runtime"] = Watched
    bindings = types.ModuleType("cuda.bindings")
    bindings.__dict__["runtime"] = cudart = runtime_of(gpu)
    modules = {"cuda": types.ModuleType("cuda"), "cuda.bindings": bindings}
    for name, module in {**modules, "cuda.bindings.runtime": cudart, "tensorrt": trt}.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield given
    gc.collect()


@pytest.fixture
def real(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose graphs can be run."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "real"))


def become_another_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HIMIX_EDGE_CONFIG", str(tmp_path / "another"))


def plant(folder: Path) -> None:
    """Another plan, with a record that fits it."""
    plan, path = folder / "vision.plan", folder / "engine.json"
    plan.write_bytes(PLANTED)
    record = json.loads(path.read_bytes())
    record["files"]["vision.plan"] = vars(FileRecord.of(plan))
    path.write_text(json.dumps(record))


def unmade(folder: Path) -> None:
    (folder / "engine.mac").unlink()


def guessed(folder: Path) -> None:
    (folder / "engine.mac").write_text("0" * 64 + "\n")


def emptied(folder: Path) -> None:
    (folder / "engine.mac").write_bytes(b"")


def not_ascii(folder: Path) -> None:
    (folder / "engine.mac").write_bytes(b"\xff" * 65)


def kept(folder: Path) -> None:
    """The MAC of the engine that stood there before."""


@pytest.mark.parametrize("mac", [unmade, guessed, emptied, not_ascii, kept])
@tried(
    "Engines",
    "a TensorRT plan planted in a bundle, with a record that fits it",
    "not loaded; `auto` falls back on the CPU and says why",
)
def test_a_planted_plan(real: Path, loaded: list[bytes], mac: Callable[[Path], None]) -> None:
    engines_of(real, FakeGpu(), max_prompt=4)
    (folder,) = (real / "engines").iterdir()
    plant(folder)
    mac(folder)
    model = load(real)
    assert loaded == []
    assert model.device == "cpu"
    assert "an engine that this user did not build" in model.passed_over[0]
    for verify in (True, False):
        with pytest.raises(EngineError, match="did not build"):
            load(real, device="tensorrt", verify=verify)
    assert loaded == []


@tried("Engines", "engines that this user built", "loaded: the bytes that were built, no others")
def test_ones_own_engines(real: Path, loaded: list[bytes]) -> None:
    engines_of(real, FakeGpu(), max_prompt=4)
    assert load(real).device == "tensorrt"
    plans = [path.read_bytes() for path in sorted(real.glob("engines/*/*.plan"))]
    assert sorted(loaded) == sorted(plans)


@tried(
    "Engines",
    "engines that another user built, with that user's MAC",
    "refused, until `himix-edge trust` is called",
)
def test_another_users_engines(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, himix: Any
) -> None:
    put(bundle)
    become_another_user(monkeypatch, tmp_path)
    with pytest.raises(EngineError, match="himix-edge trust"):
        find(bundle)
    make_user_key()
    with pytest.raises(EngineError, match="himix-edge trust"):
        find(bundle)
    assert himix("trust", bundle).code == 0
    assert find(bundle).decoder.read_text() == "decoder engine"


@tried(
    "Engines",
    "a plan that is exchanged after its record was checked",
    "refused: the bytes that are hashed are those that are loaded",
)
def test_a_plan_swapped_between_check_and_use(
    real: Path, loaded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines_of(real, FakeGpu(), max_prompt=4)
    read = Engines.read

    def swapped(self: Engines, path: Path) -> bytes:
        size = path.stat().st_size
        path.unlink()
        path.write_bytes(PLANTED.ljust(size))
        return read(self, path)

    monkeypatch.setattr(Engines, "read", swapped)
    with pytest.raises(EngineError, match=r"vision\.plan is corrupt: expected sha256"):
        load(real, device="tensorrt")
    assert loaded == []


@tried(
    "Engines",
    "a plan that is exchanged while it is loaded",
    "what was checked is loaded: it is read once",
)
def test_a_plan_swapped_after_it_was_read(
    real: Path, loaded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines_of(real, FakeGpu(), max_prompt=4)
    plans = [path.read_bytes() for path in sorted(real.glob("engines/*/*.plan"))]
    read = Engines.read

    def swapped(self: Engines, path: Path) -> bytes:
        data = read(self, path)
        with path.open("r+b") as file:  # the same file, as a mapping of it would see
            file.write(b"X" * len(data))
        return data

    monkeypatch.setattr(Engines, "read", swapped)
    assert load(real, device="tensorrt").device == "tensorrt"
    assert sorted(loaded) == sorted(plans)


def _compiled(bundle: Path, named: str = "vision.engine") -> Engines:
    """Engines of TensorRT for RTX, whose vision graph names some file."""
    key = engine_key(Manifest.read(bundle), RTX, SIZES)
    with whole_engines(bundle, key) as folder:
        for name in ("vision", "decoder"):
            (folder / f"{name}.engine").write_text(f"the engine of {name}")
            (folder / f"{name}.onnx").write_bytes(compiled_graph(f"{name}.engine"))
        (folder / "vision.onnx").write_bytes(compiled_graph(named))
    return seal_engines(bundle, key)


@tried(
    "Engines",
    "an RTX engine that is exchanged while ONNX Runtime opens it",
    "what was checked is opened: a copy that only this user can change",
)
def test_an_rtx_engine_swapped_while_it_is_opened(bundle: Path) -> None:
    engines = _compiled(bundle)
    with engines.copied() as copies:
        (engines.folder / "vision.engine").write_bytes(PLANTED)
        opened = (copies.vision.parent / "vision.engine").read_text()
        assert opened == "the engine of vision"
        assert stat.S_IMODE(copies.folder.stat().st_mode) == 0o700
    with pytest.raises(EngineError, match=r"vision\.engine is corrupt"):
        engines.copied().__enter__()


@pytest.mark.parametrize(
    "named", ["../x.engine", "/tmp/x.engine", "other.engine", "./vision.engine", "", "engine.json"]
)
@tried("Engines", "a compiled graph that names a file elsewhere", "refused")
def test_a_compiled_graph_that_names_another_file(bundle: Path, named: str) -> None:
    engines = _compiled(bundle, named)
    (engines.folder / "other.engine").write_bytes(PLANTED)
    with pytest.raises(EngineError, match=r"vision\.onnx is corrupt: expected the name of a rec"):
        engines.copied().__enter__()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "\x1b[2J", ".hidden", "a\0b"]
)
@tried("Engines", "a record of engines that names ../x", "refused, by `trust` and `sign` too")
def test_a_record_that_names_another_folder(bundle: Path, himix: Any, name: str) -> None:
    put(bundle)
    path = bundle / "engines" / ORIN.digest / "engine.json"
    record = json.loads(path.read_bytes())
    record["files"][name] = {"sha256": "0" * 64, "size": 0}
    path.write_text(json.dumps(record))
    with pytest.raises(EngineError, match="expected names of files in its own folder"):
        find(bundle)
    done = himix("trust", bundle)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "\x1b" not in done.err


@pytest.mark.parametrize("linked", ["engines", "engines/DIGEST", "engine.json", "engine.mac"])
@tried("Engines", "engines, their folder, record or MAC that are a link", "refused")
def test_a_link(bundle: Path, tmp_path: Path, linked: str) -> None:
    put(bundle)
    folder = bundle / "engines" / ORIN.digest
    path = bundle / linked.replace("DIGEST", ORIN.digest)
    path = folder / linked if linked.startswith("engine.") else path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=r"found .*a link|did not build"):
        find(bundle)


@pytest.mark.parametrize("linked", ["engines", "engines/DIGEST"])
@tried("Engines", "a folder of engines that is a link, and a build", "refused, nothing is written")
def test_a_build_through_a_link(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, himix: Any, linked: str
) -> None:
    device = become_orin(monkeypatch)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "engine.json").write_text("precious")
    path = bundle / linked.replace("DIGEST", device.digest)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(victim)
    done = himix("build", bundle)
    assert done.code == 1
    assert "found a link" in done.err
    assert tree(victim) == {"engine.json": b"precious"}


@tried(
    "Engines",
    "the MAC and the record of another bundle's engines",
    "refused: the record names the graphs",
)
def test_a_mac_of_another_bundle(bundle: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other")
    data = (other / "vision.onnx").read_bytes()
    (other / "vision.onnx").write_bytes(data[::-1])
    manifest = Manifest.read(other)
    files = {**manifest.files, "vision.onnx": FileRecord.of(other / "vision.onnx")}
    (other / "manifest.json").write_text(
        Manifest(**{**vars(manifest), "files": files}).to_json(), encoding="utf-8"
    )
    put(other, text="of the other")
    shutil.copytree(other / "engines", bundle / "engines")
    with pytest.raises(EngineError, match="is not this bundle's"):
        find(bundle)
    put(bundle)
    mac = Path("engines", ORIN.digest, "engine.mac")
    shutil.copy(other / mac, bundle / mac)
    with pytest.raises(EngineError, match="did not build"):
        find(bundle)


@tried("Engines", "a valid MAC, and graphs that were changed since", "refused: built of others")
def test_a_stale_mac(bundle: Path) -> None:
    put(bundle)
    manifest = Manifest.read(bundle)
    (bundle / "decoder.onnx").write_text("another graph")
    files = {**manifest.files, "decoder.onnx": FileRecord.of(bundle / "decoder.onnx")}
    (bundle / "manifest.json").write_text(
        Manifest(**{**vars(manifest), "files": files}).to_json(), encoding="utf-8"
    )
    with pytest.raises(EngineError, match="is not this bundle's"):
        find(bundle)


def readable(key: Path) -> None:
    key.chmod(0o640)


def readable_by_all(key: Path) -> None:
    key.chmod(0o604)


def writable_folder(key: Path) -> None:
    key.parent.chmod(0o777)


def soft_link(key: Path) -> None:
    key.rename(key.with_name("elsewhere"))
    key.symlink_to("elsewhere")


def hard_link(key: Path) -> None:
    key.with_name("second").hardlink_to(key)


def cut(key: Path) -> None:
    key.write_bytes(key.read_bytes()[:31])


def lengthened(key: Path) -> None:
    key.write_bytes(key.read_bytes() * 2)


def folder(key: Path) -> None:
    key.unlink()
    key.mkdir()


@pytest.mark.parametrize(
    ("spoil", "fix"),
    [
        (readable, "chmod 600 "),
        (readable_by_all, "chmod 600 "),
        (writable_folder, "chmod 700 "),
        (soft_link, "remove "),
        (hard_link, "remove "),
        (cut, "remove "),
        (lengthened, "remove "),
        (folder, "remove "),
    ],
)
@tried("Engines", "a key that others can read, a link, or cut", "refused, with the command for it")
def test_a_key_that_cannot_be_relied_on(
    bundle: Path, config: Path, himix: Any, spoil: Callable[[Path], None], fix: str
) -> None:
    put(bundle)
    spoil(config / "engine.key")
    with pytest.raises(EngineError, match="can't be relied on") as error:
        find(bundle)
    assert str(error.value.fix).startswith(fix)
    with pytest.raises(EngineError, match="can't be relied on"):
        make_user_key()
    done = himix("trust", bundle)
    assert (done.code, done.err.count("\n")) == (1, 1)
    done = himix("info", bundle)  # goes on, and says so
    assert done.code == 0
    assert "not trusted (" in done.out


@tried("Engines", "a key that another user put there", "refused")
def test_a_key_of_another_user(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_user_key()
    monkeypatch.setattr("os.geteuid", lambda: config.stat().st_uid + 1)
    with pytest.raises(EngineError, match="found another user's folder"):
        user_key()


def become_orin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device with a builder."""
    from himix_edge.engines.gpu import gpu_here
    from himix_edge.engines.trt import engine_device

    modules = {"tensorrt": fake_tensorrt("10.16.1.11"), **fake_cuda()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return engine_device(gpu_here())


@tried("Engines", "a planted timing cache", "not given to TensorRT; measured anew")
def test_a_planted_timing_cache(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = become_orin(monkeypatch)
    given: list[bytes] = []
    create = fake_builder.IBuilderConfig.create_timing_cache

    def watched(self: Any, data: bytes) -> Any:
        given.append(data)
        return create(self, data)

    monkeypatch.setattr(fake_builder.IBuilderConfig, "create_timing_cache", watched)
    path = timing_cache_path(bundle, device)
    build_engines(plan_build(bundle))
    mine = path.read_bytes()
    path.write_bytes(PLANTED)  # beside the MAC of what was measured here
    build_engines(plan_build(bundle))
    (path.parent / f"{path.name}.mac").unlink()
    path.write_bytes(PLANTED)
    build_engines(plan_build(bundle))
    assert PLANTED not in given
    assert given[:2] == [b"", given[1]]
    assert len(json.loads(path.read_bytes())) == len(json.loads(mine))


@tried("Engines", "a timing cache that is a link to another file", "the file is left as it is")
def test_a_timing_cache_that_is_a_link(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = become_orin(monkeypatch)
    victim = tmp_path / ".bashrc"
    victim.write_text("precious")
    path = timing_cache_path(bundle, device)
    path.parent.mkdir()
    for name in (path.name, f"{path.name}.mac"):
        (path.parent / name).symlink_to(victim)
    build_engines(plan_build(bundle))
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


@tried(
    "Engines",
    "a cache of ONNX Runtime's TensorRT provider planted in a bundle",
    "not used: that cache is in the user's own folder",
)
def test_a_planted_cache_of_onnxruntime(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = GpuOrt(TENSORRT.name)
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (real / "engines" / "onnxruntime").mkdir(parents=True)
    (real / "engines" / "onnxruntime" / "x.engine").write_bytes(PLANTED)
    manifest = Manifest.read(real)
    open_engine(BundleFiles.open(real), "tensorrt", Choices(threads=1))
    own = tmp_path / "cache" / "onnxruntime-tensorrt" / manifest.digest()
    for _, _, options in ort.opened:
        assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(own)
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert list(own.iterdir()) == []


@pytest.mark.parametrize("which", [".", ".."])
@tried("Engines", "that cache where others can write, or that is a link", "refused")
def test_a_cache_that_others_can_write(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", GpuOrt(TENSORRT.name))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    manifest = Manifest.read(real)
    own = tmp_path / "cache" / "onnxruntime-tensorrt" / manifest.digest()
    own.mkdir(parents=True, mode=0o700)
    own.parent.chmod(0o700)
    place = own / which
    place.chmod(0o777)
    with pytest.raises(OutputError, match="found a folder that others can write"):
        open_engine(BundleFiles.open(real), "tensorrt", Choices(threads=1))
    place.chmod(0o700)
    own.rename(tmp_path / "elsewhere")
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="found a link"):
        open_engine(BundleFiles.open(real), "tensorrt", Choices(threads=1))


@pytest.mark.parametrize(
    "record", [b"", b"\xff", b"[" * 200_000, b'{"a":' * 9999, b" " * (2 << 20)]
)
@tried("Engines", "a record of engines that is damaged, deep or huge", "refused in one line")
def test_a_hostile_record(bundle: Path, himix: Any, record: bytes) -> None:
    put(bundle)
    (bundle / "engines" / ORIN.digest / "engine.json").write_bytes(record)
    with pytest.raises(HimixError, match="is corrupt"):
        find_engines(bundle, Manifest.read(bundle), ORIN)
    done = himix("trust", bundle)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert himix("info", bundle).code == 0


@tried("Engines", "an engine that is as its record says, sealed by hand", "loaded: by its user")
def test_what_the_user_seals(bundle: Path) -> None:
    put(bundle)
    (bundle / "engines" / ORIN.digest / "engine.mac").unlink()
    with pytest.raises(EngineError, match="did not build"):
        find(bundle)
    StoredEngines.read(bundle, ORIN.digest).trust()
    assert find(bundle).vision.read_text() == "vision engine"
