from __future__ import annotations

import pytest

from himix_edge.errors import ConfigError
from himix_edge.targets import TARGETS, target


@pytest.mark.parametrize(
    ("name", "dialect", "dtype"),
    [
        ("cpu", "ort", "float32"),
        ("jetpack-6.2", "portable", "float16"),  # TensorRT 10.3 has no TensorScatter
        ("jetpack-7.2", "native", "float16"),
        ("tensorrt", "native", "float16"),
        ("rtx", "native", "float16"),
    ],
)
def test_what_a_target_takes(name: str, dialect: str, dtype: str) -> None:
    assert (target(name).dialect, target(name).dtype) == (dialect, dtype)
    assert name in TARGETS


def test_a_name_of_none_is_an_error_that_names_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"no target is named 'jetpack-7'.*'jetpack-7.2'"):
        target("jetpack-7")


def test_either_may_be_chosen_otherwise() -> None:
    cpu = target("cpu")
    assert cpu.updated(None, None) == cpu
    for dialect in ("portable", "native", "ort"):
        assert cpu.updated(dialect, None).dialect == dialect
    assert cpu.updated(None, "bfloat16").dtype == "bfloat16"
    assert cpu.updated("native", "float16").engine == cpu.engine


@pytest.mark.parametrize(
    ("dialect", "dtype", "message"),
    [
        ("natve", None, "no dialect is named 'natve'. Fix: did you mean 'native'"),
        (None, "fp16", "no dtype is named 'fp16'. Fix: did you mean 'float16'"),
    ],
)
def test_unknown_graphs_are_errors(dialect: str | None, dtype: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target("cpu").updated(dialect, dtype)
