"""What fits which device, and the command for each thing missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from himix_edge.analysis.memory import Setting, memory
from himix_edge.doctor.facts import Facts, Gpu, Module
from himix_edge.doctor.judge import RTX_PACKAGE, judge
from himix_edge.presets import preset_config
from himix_edge.runtimes.devices import DEVICES
from himix_edge.runtimes.providers import TENSORRT_RTX
from tests.doctor import boards


@pytest.fixture
def orin(tmp_path: Path) -> Facts:
    return boards.facts_of(tmp_path, boards.ORIN_FILES, boards.ORIN_ANSWERS)


@pytest.fixture
def pc(tmp_path: Path) -> Facts:
    return boards.facts_of(tmp_path, boards.PC_FILES, boards.PC_ANSWERS)


def with_module(facts: Facts, name: str, module: Module | None) -> Facts:
    return dataclasses.replace(facts, modules={**facts.modules, name: module})


def without_packages(facts: Facts, *names: str) -> Facts:
    left = {name: version for name, version in facts.packages.items() if name not in names}
    return dataclasses.replace(facts, packages=left)


def commands(facts: Facts) -> list[str]:
    return [command for advice in judge(facts).advice for command in advice.commands]


def test_an_orin_with_jetpack_6_2(orin: Facts) -> None:
    verdict = judge(orin)
    assert verdict.targets == ("jetpack-6.2", "cpu")
    assert verdict.devices == {
        "cpu": "onnxruntime",
        "cuda": "onnxruntime-gpu",
        "tensorrt": "",
        "tensorrt-rtx": f"onnxruntime, {RTX_PACKAGE}",
    }
    assert verdict.can_run
    assert commands(orin)[:4] == [
        "sudo nvpmodel -m 2",
        "sudo jetson_clocks",
        "sudo systemctl set-default multi-user.target",
        "sudo reboot",
    ]
    assert "sudo swapon /swapfile" in commands(orin)


def test_a_thor_lacks_nothing(tmp_path: Path) -> None:
    thor = boards.facts_of(tmp_path, boards.THOR_FILES, boards.THOR_ANSWERS)
    verdict = judge(thor)
    assert verdict.targets == ("jetpack-7.2", "jetpack-6.2", "cpu")
    assert verdict.advice == ()
    assert all(fit.runs and fit.builds for fit in verdict.fits)


def test_a_pc_with_a_card(pc: Facts) -> None:
    verdict = judge(pc)
    assert verdict.targets == ("rtx", "cpu")
    assert verdict.devices["cpu"] == ""
    assert verdict.devices["tensorrt"] == "tensorrt, 10.3 or later, cuda-python"
    assert verdict.devices["tensorrt-rtx"] == RTX_PACKAGE
    assert commands(pc) == [f"pip install onnxruntime {RTX_PACKAGE}"]
    ready = with_module(pc, "onnxruntime_ep_nv_tensorrt_rtx", Module("0.5.0"))
    assert judge(ready).devices["tensorrt-rtx"] == ""
    assert commands(ready) == []
    both = with_module(ready, "tensorrt", Module("10.16.1"))
    assert judge(both).targets == ("tensorrt", "rtx", "cpu")
    assert commands(both) == ["pip install 'cuda-python==13.*'"]
    old = with_module(pc, "tensorrt", Module("10.3.0"))
    assert judge(old).targets == ("jetpack-6.2", "rtx", "cpu")


def test_onnx_runtimes_own_providers(pc: Facts) -> None:
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    devices = judge(dataclasses.replace(pc, providers=providers)).devices
    assert (devices["cuda"], devices["tensorrt"]) == ("", "")
    no_gpu = judge(dataclasses.replace(pc, providers=providers, gpus=())).devices
    assert no_gpu["cuda"] == no_gpu["tensorrt"] == "an NVIDIA GPU with its driver"


def test_the_devices_are_those_of_run(pc: Facts) -> None:
    assert {"auto", *judge(pc).devices} == set(DEVICES)


def test_our_name_of_the_plugin_is_the_runtimes() -> None:
    assert RTX_PACKAGE in TENSORRT_RTX.fix


def test_a_card_for_data_centres(pc: Facts) -> None:
    server = dataclasses.replace(pc, gpus=(Gpu("NVIDIA H100", "9.0", 80 << 30, 79 << 30),))
    assert judge(server).targets == ("cpu",)
    assert commands(server) == ["pip install tensorrt"]


def test_no_gpu_and_no_runtime(pc: Facts) -> None:
    bare = dataclasses.replace(with_module(pc, "onnxruntime", None), gpus=())
    verdict = judge(bare)
    assert not verdict.can_run
    assert verdict.devices["cpu"] == "onnxruntime"
    assert verdict.devices["tensorrt"].startswith("an NVIDIA GPU with its driver, ")
    assert commands(bare) == ["pip install 'himix-edge[cpu]'"]


def test_without_the_base_packages_nothing_runs(pc: Facts) -> None:
    broken = dataclasses.replace(pc, distributions={**pc.distributions, "numpy": None})
    verdict = judge(broken)
    assert not verdict.can_run
    assert verdict.devices["cpu"] == "numpy"
    assert commands(broken)[0] == "pip install himix-edge"


def test_without_typer(pc: Facts) -> None:
    bare = dataclasses.replace(pc, distributions={**pc.distributions, "typer": None})
    assert judge(bare).can_run  # the library needs none; the command does
    assert commands(bare)[0] == "pip install himix-edge"


FRESH = {"libnvinfer10", "python3-libnvinfer", "nvidia-jetpack"}


@pytest.mark.parametrize(
    ("packages", "module", "changes", "first"),
    [
        (FRESH, None, {}, "sudo apt update"),
        ({"python3-libnvinfer"}, None, {}, "sudo apt install python3-libnvinfer"),
        (set(), None, {"isolated": True}, "/usr/bin/python3 -m venv --system-site-packages"),
        (set(), None, {"python": "3.12.1"}, "/usr/bin/python3 -m venv --system-site-packages"),
        (
            set(),
            Module(error="ImportError: libnvdla_compiler.so: cannot open shared object file"),
            {},
            "sudo apt install nvidia-l4t-dla-compiler",
        ),
        (
            set(),
            Module(error="ImportError: libnvinfer.so.10"),
            {},
            "sudo apt install --reinstall python3-libnvinfer",
        ),
    ],
)
def test_what_keeps_python_from_tensorrt(
    orin: Facts, packages: set[str], module: Module | None, changes: Any, first: str
) -> None:
    facts = without_packages(with_module(orin, "tensorrt", module), *packages)
    facts = dataclasses.replace(facts, **changes)
    assert commands(facts)[0].startswith(first)
    assert judge(facts).target == "jetpack-6.2"  # of the library, or JetPack's
    assert not judge(facts).can_run
    assert "pip install 'himix-edge[cpu]'" in commands(facts)


def test_cuda_python_of_jetpacks_cuda(orin: Facts) -> None:
    lacking = with_module(orin, "cuda.bindings.runtime", None)
    assert judge(lacking).devices["tensorrt"] == "cuda-python"
    assert commands(lacking)[0] == "pip install 'cuda-python==12.6.*'"
    unknown = dataclasses.replace(lacking, cuda=None)
    assert commands(unknown)[0] == "pip install 'cuda-python==12.6.*'"
    newer = dataclasses.replace(lacking, cuda="13.2.1")
    assert commands(newer)[0] == "pip install 'cuda-python==13.2.*'"


def test_a_board_of_before(orin: Facts) -> None:
    xavier = dataclasses.replace(
        without_packages(orin, *orin.packages),
        board="NVIDIA Jetson AGX Xavier",
        l4t="35.4.1",
        modules={**orin.modules, "tensorrt": Module("8.5.2")},
    )
    verdict = judge(xavier)
    assert verdict.targets == ("cpu",)
    assert verdict.devices["tensorrt"] == "tensorrt, 10.3 or later"
    assert commands(xavier)[0] == "flash it anew: https://developer.nvidia.com/embedded/jetpack"


@pytest.mark.parametrize(
    ("l4t", "targets"),
    [
        ("36.3.0", ("cpu",)),  # JetPack 6.0: TensorRT 8.6
        ("36.4.3", ("jetpack-6.2", "cpu")),
        ("38.4.0", ("jetpack-6.2", "cpu")),  # JetPack 7.1: TensorRT 10.13
        ("39.2.0", ("jetpack-7.2", "jetpack-6.2", "cpu")),
        (None, ("cpu",)),
    ],
)
def test_a_board_without_tensorrt_yet(
    orin: Facts, l4t: str | None, targets: tuple[str, ...]
) -> None:
    bare = without_packages(with_module(orin, "tensorrt", None), *orin.packages)
    assert judge(dataclasses.replace(bare, l4t=l4t)).targets == targets


def test_fits(orin: Facts) -> None:
    fits = {(fit.encoder, fit.decoder): fit for fit in judge(orin).fits}
    setting = Setting("jetpack-6.2", "portable", "float16")
    small, large = (fits["siglip-so400m-384", name] for name in ("qwen2-0.5b", "llama-3.2-3b"))
    expected = memory(preset_config("siglip-so400m-384", "qwen2-0.5b"), setting)
    assert small.run_bytes == expected.run
    assert (small.runs, small.builds) == (True, True)
    assert (large.runs, large.builds) == (False, False)
    full = dataclasses.replace(orin, available_bytes=expected.run - 1)
    [fit] = [
        f for f in judge(full).fits if (f.encoder, f.decoder) == ("siglip-so400m-384", "qwen2-0.5b")
    ]
    assert not fit.runs
    assert fit.builds == (fit.build_bytes <= expected.run - 1 + (orin.swap_bytes or 0))


def test_a_cards_memory_is_its_own(pc: Facts) -> None:
    small = dataclasses.replace(pc, gpus=(Gpu("GeForce RTX 3050", "8.6", 2 << 30, 1 << 30),))
    assert not any(fit.runs for fit in judge(small).fits)
    on_cpu = dataclasses.replace(small, gpus=())
    assert all(fit.builds is None for fit in judge(on_cpu).fits)
    assert any(fit.runs for fit in judge(on_cpu).fits)
