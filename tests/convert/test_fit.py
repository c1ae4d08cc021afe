from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from himix_edge.config import HiMixConfig, PreprocessConfig, VisionConfig
from himix_edge.convert import fit as fit_module
from himix_edge.convert import sums as sums_module
from himix_edge.convert.attention import token_weights
from himix_edge.convert.fit import PENALTIES, Fit, FitOptions, Watch, fitted
from himix_edge.convert.images import Calibration
from himix_edge.convert.teacher import Teacher, student_config, student_of
from himix_edge.errors import ConfigError, TrainingError
from himix_edge.models.himix import HiMix
from tests.convert.test_images import write_pictures
from tests.tiny import tiny_config, tiny_model
from tests.tolerances import FIT_FIGURES, FIT_WEIGHTS

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2]]
PICTURES = 19  # 17 to fit on, 2 held out
PLAIN = FitOptions(connector=False)
WEIGHTED = FitOptions(connector=False, weighting="attention")


def vanilla() -> HiMixConfig:
    """16 image tokens of 16 features from three layers."""
    vision = VisionConfig(56, 14, 16, 32, 3, 2, model_type="siglip")
    return dataclasses.replace(
        tiny_config("vanilla"), vision=vision, preprocess=PreprocessConfig(56)
    )


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(tiny_model(vanilla()), prefix_ids=(5, 6))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), PICTURES, size=56)


def student_for(teacher: Teacher, options: FitOptions) -> HiMix:
    config = student_config(teacher, options.joined_layers, options.projection(teacher))
    return student_of(teacher, config)


def fit(
    teacher: Teacher,
    folder: Path,
    state: Path,
    options: FitOptions = PLAIN,
    batch: int = 4,
    watch: Watch = lambda *_: None,
) -> tuple[HiMix, Fit]:
    student = student_for(teacher, options)
    calibration = Calibration(folder, teacher.model.config.preprocess)
    return student, fitted(teacher, student, calibration, PROMPTS, options, state, batch, watch)


def rows(teacher: Teacher, student: HiMix, folder: Path, held_out: bool) -> list[Any]:
    """x [R, d], per layer y [R, 2 Hkv D] and the weights of attention [R], explicitly."""
    xs, ys, weights = [], [], []
    for _, pixels in Calibration(folder, teacher.model.config.preprocess).pictures(held_out):
        own = teacher.model.vision(torch.from_numpy(pixels))
        cache = teacher.image_cache(own)
        joined = student.vision(torch.from_numpy(pixels))
        xs.append(student.injection.inputs(joined)[0])  # type: ignore[operator]
        per_layer = [
            torch.cat([part[0].permute(1, 0, 2).flatten(1) for part in kv], dim=1)
            for kv in teacher.image_targets(cache)
        ]
        ys.append(torch.stack(per_layer))
        weights.append(token_weights(teacher, cache, PROMPTS)[:, 0])
    parts = torch.cat(xs), torch.cat(ys, dim=1), torch.cat(weights, dim=1)
    return [part.double().numpy() for part in parts]


def projections(student: HiMix, layer: int) -> tuple[Any, Any]:
    own: Any = student.injection.layers[layer]  # type: ignore[index]
    weight = torch.cat((own.k_proj.weight, own.v_proj.weight))
    return weight.double().numpy(), torch.cat((own.k_proj.bias, own.v_proj.bias)).double().numpy()


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        FitOptions(joined_layers=(-3,), neighbourhood=3, connector=False),
        FitOptions(joined_layers=(-3,)),
        FitOptions(),
        WEIGHTED,
    ],
    ids=["plain", "wide", "joined", "connector", "weighted"],
)
def test_the_projections_are_those_of_ridge_regression(
    teacher: Teacher, tmp_path: Path, options: FitOptions
) -> None:
    """All rows at once in numpy, by the formula; and the best penalty is tried there, too."""
    folder = write_pictures(tmp_path / "pictures", 42 if options.joined_layers else 19, 56)
    student, found = fit(teacher, folder, tmp_path / "state", options)
    x, y, weights = rows(teacher, student, folder, held_out=False)
    x2, y2, weights2 = rows(teacher, student, folder, held_out=True)
    left: dict[float, list[float]] = {penalty: [] for penalty in PENALTIES}
    for layer in range(2):
        weighted = options.weighting == "attention"
        share = weights[layer] if weighted else np.ones(len(x))
        share2 = weights2[layer] if weighted else np.ones(len(x2))
        for penalty in PENALTIES:
            weight, bias = ridge(x, y[layer], share, penalty)
            error = share2 @ (y2[layer] - x2 @ weight.T - bias) ** 2
            variance = share2 @ (y2[layer] - share2 @ y2[layer] / share2.sum()) ** 2
            half = len(error) // 2
            both = [error[p].sum() / variance[p].sum() for p in (slice(half), slice(half, None))]
            left[penalty] += both
            if penalty == found.penalty:
                own = projections(student, layer)

                assert np.allclose(own[0], weight, rtol=0, atol=FIT_WEIGHTS)
                assert np.allclose(own[1], bias, rtol=0, atol=FIT_WEIGHTS)
                assert found.keys[layer] == pytest.approx(both[0], rel=0, abs=FIT_FIGURES)
                assert found.values[layer] == pytest.approx(both[1], rel=0, abs=FIT_FIGURES)
    assert found.penalty == min(left, key=lambda penalty: sum(left[penalty]))
    assert found.rows == len(x)
    assert found.curve[-1].keys == found.keys


def ridge(x: Any, y: Any, weights: Any, penalty: float) -> tuple[Any, Any]:
    share = weights / weights.sum()
    x0, y0 = x - share @ x, y - share @ y
    covariance = (x0 * share[:, None]).T @ x0
    covariance += penalty * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    weight = np.linalg.solve(covariance, (x0 * share[:, None]).T @ y0).T
    return weight, share @ y - weight @ (share @ x)


def test_behind_the_connector_the_first_layer_is_linear(
    teacher: Teacher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys and values are projections of the connector's normed output: nothing is left."""
    monkeypatch.setattr(fit_module, "PENALTIES", (1e-9,))  # the later layers would choose 0.1
    _, plain = fit(teacher, folder, tmp_path / "plain")
    _, found = fit(teacher, folder, tmp_path / "state", FitOptions())
    assert found.keys[0] < 1e-6
    assert found.values[0] < 1e-6
    assert plain.values[0] > 1e-3
    assert found.keys[1] > 1e-3


def test_the_student_is_then_near_its_teacher(
    teacher: Teacher, folder: Path, tmp_path: Path
) -> None:
    """What the figures say holds for the cache that the student really makes."""
    student, found = fit(teacher, folder, tmp_path / "state")
    error: list[Tensor] = []
    whole: list[Tensor] = []
    for _, pixels in Calibration(folder, teacher.model.config.preprocess).pictures(held_out=True):
        cache = teacher.image_cache(teacher.model.vision(torch.from_numpy(pixels)))
        values = student.encode(torch.from_numpy(pixels))[1].value[:, :, 2:]
        error.append(values - cache[1].value[:, :, 2:])
        whole.append(cache[1].value[:, :, 2:])
    variance = torch.cat(whole).var(dim=(0, 2), correction=0).sum()
    left = torch.cat(error).square().mean(dim=(0, 2)).sum() / variance
    assert found.values[1] == pytest.approx(float(left), rel=0, abs=1e-5)


@pytest.mark.parametrize("options", [PLAIN, WEIGHTED], ids=["plain", "weighted"])
def test_figures_do_not_depend_on_the_batch(
    teacher: Teacher, folder: Path, tmp_path: Path, options: FitOptions
) -> None:
    _, one = fit(teacher, folder, tmp_path / "one", options, batch=1)
    _, five = fit(teacher, folder, tmp_path / "five", options, batch=5)
    assert_alike(one, five)


def interrupting(part: str, at: int) -> Watch:
    def watch(name: str, done: int, *_: object) -> None:
        if name == part and done >= at:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize(("part", "at"), [("held out", 1), ("fitted", 6)])
def test_an_interrupted_fit_comes_to_the_same(
    teacher: Teacher,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    at: int,
) -> None:
    seen: list[tuple[str, int]] = []

    def note(name: str, done: int, *_: object) -> None:
        seen.append((name, done))

    _, whole = fit(teacher, folder, tmp_path / "whole", batch=3)
    monkeypatch.setattr(sums_module, "SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        fit(teacher, folder, tmp_path / "state", batch=2, watch=interrupting(part, at))
    _, resumed = fit(teacher, folder, tmp_path / "state", batch=2, watch=note)
    assert_alike(whole, resumed)
    assert seen[0] == (("held out", 2) if part == "held out" else ("fitted", 8))

    again, done = fit(
        teacher, folder, tmp_path / "state", watch=interrupting(part, 0)
    )  # nothing is left to do
    assert done == resumed
    assert projections(again, 1)[0].any()


def assert_alike(one: Fit, other: Fit) -> None:
    assert [point.images for point in one.curve] == [point.images for point in other.curve]
    for a, b in zip([one, *one.curve], [other, *other.curve], strict=True):
        for part in ("keys", "values"):
            assert getattr(a, part) == pytest.approx(getattr(b, part), rel=0, abs=FIT_FIGURES)
    assert one.trained_keys == pytest.approx(other.trained_keys, rel=0, abs=FIT_FIGURES)
    assert (one.images, one.held_out, one.penalty) == (other.images, other.held_out, other.penalty)
    assert one.skipped == other.skipped


def test_the_curve_has_a_point_at_every_power_of_two(
    teacher: Teacher, folder: Path, tmp_path: Path
) -> None:
    _, found = fit(teacher, folder, tmp_path / "state")
    assert [point.images for point in found.curve] == [2, 4, 8, 16, 17]  # 2 have 32 rows for 16
    small = tmp_path / "small"
    small.mkdir()
    for path in Calibration(folder, teacher.model.config.preprocess).files[:9]:  # held out: 007
        (small / path.name).write_bytes(path.read_bytes())
    _, fewer = fit(teacher, small, tmp_path / "fewer")
    assert (fewer.images, fewer.held_out) == (8, 1)
    assert [point.images for point in fewer.curve] == [2, 4, 8]
    assert fewer.trained_keys != found.trained_keys


def test_half_precision_teachers_are_fitted(folder: Path, tmp_path: Path) -> None:
    model, half = tiny_model(vanilla()), tiny_model(vanilla())
    for weight, rounded in zip(model.parameters(), half.parameters(), strict=True):
        weight.copy_(weight.bfloat16())
        rounded.data = weight.bfloat16()
    _, wide = fit(Teacher(model, (5, 6)), folder, tmp_path / "wide", FitOptions())
    _, found = fit(Teacher(half, (5, 6)), folder, tmp_path / "half", FitOptions())
    assert found.keys == pytest.approx(wide.keys, rel=0, abs=2e-2)  # bfloat16's own noise
    assert found.values == pytest.approx(wide.values, rel=0, abs=2e-2)


def test_unreadable_pictures_are_named_after_an_interruption_too(
    teacher: Teacher, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in folder.iterdir():
        (pictures / path.name).write_bytes(path.read_bytes())
    for name in ("002.png", "016.png"):
        (pictures / name).write_bytes(b"no picture")
    monkeypatch.setattr(sums_module, "SAVE_SECONDS", -1.0)

    with pytest.raises(KeyboardInterrupt):
        fit(teacher, pictures, tmp_path / "state", watch=interrupting("fitted", 6))
    _, found = fit(teacher, pictures, tmp_path / "state")
    assert list(found.skipped) == ["002.png", "016.png"]
    assert (found.images, found.held_out) == (15, 2)


def test_too_few_pictures_are_refused_with_the_number(teacher: Teacher, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 5, 56)
    with pytest.raises(ConfigError, match=r"18 to fit on.*144 inputs take 288.*found 4 to fit on"):
        fit(teacher, pictures, tmp_path / "state", FitOptions(neighbourhood=3, connector=False))
    for i in range(3):
        (pictures / f"00{i}.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"2 to fit on.*found 1 to fit on \(3 files can't"):
        fit(teacher, pictures, tmp_path / "state")


def test_held_out_pictures_that_cannot_be_read_are_refused(
    teacher: Teacher, tmp_path: Path
) -> None:
    pictures = write_pictures(tmp_path / "pictures", 8, 56)
    (pictures / "007.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"held out none can be read: expected .*007\.png"):
        fit(teacher, pictures, tmp_path / "state")


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_there_must_be_prompts_to_weigh_by(
    teacher: Teacher, folder: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    calibration = Calibration(folder, teacher.model.config.preprocess)
    student = student_for(teacher, WEIGHTED)
    state = tmp_path / "state"
    with pytest.raises(ConfigError, match="nothing to weigh image tokens by"):
        fitted(teacher, student, calibration, prompts, WEIGHTED, state, 4, lambda *_: None)


def test_the_state_of_another_run_is_refused_by_what_differs(
    teacher: Teacher, tmp_path: Path
) -> None:
    pictures, state = write_pictures(tmp_path / "pictures", 9, 56), tmp_path / "state"
    fit(teacher, pictures, state)
    with pytest.raises(TrainingError, match=r'weighting "attention".*found.*weighting "none"'):
        fit(teacher, pictures, state, WEIGHTED)
    other = Teacher(tiny_model(vanilla()), prefix_ids=(5, 7))
    with pytest.raises(TrainingError, match=r"teacher\.prefix \[5, 7\].*teacher\.prefix \[5, 6\]"):
        fit(other, pictures, state)
    (pictures / "009.png").write_bytes((pictures / "008.png").read_bytes())
    with pytest.raises(TrainingError, match=r"expected pictures\.009\.png \d+, found nothing more"):
        fit(teacher, pictures, state)


@pytest.mark.parametrize("damage", ["cut", "lacking", "misshapen"])
def test_a_damaged_state_is_moved_aside_and_the_fit_begins_anew(
    teacher: Teacher,
    folder: Path,
    tmp_path: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = tmp_path / "state"
    _, before = fit(teacher, folder, state)
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:5000])
    else:
        with safe_open(state, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(state)
        first = tensors.pop("fitted/x")
        if damage == "misshapen":
            tensors["fitted/x"] = first[:, 1:].contiguous()
        save_file(tensors, state, metadata)
    _, after = fit(teacher, folder, state)
    assert after == before
    assert (tmp_path / "state.damaged").is_file()
    assert capsys.readouterr().err.startswith(f"Warning: {state} is damaged ")
