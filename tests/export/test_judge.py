"""The judge's figures against torch, its verdicts, and what it refuses to judge with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from himix_edge.bundle.files import BundleFiles
from himix_edge.bundle.quality import MAX_GROWTH, Quality, Way, cost_table, quality_of, summary
from himix_edge.contract import DECODER_GRAPH, MANIFEST, Manifest, Quantization
from himix_edge.errors import ConfigError, ExportError, QualityError
from himix_edge.export import judge
from himix_edge.export.bundle import export_bundle
from himix_edge.export.judge import Bundles, judgement, measured_ways, refuse_loss
from himix_edge.export.judge_text import (
    JudgeText,
    Passage,
    _begin,
    judge_text,
    shipped_text,
    spread,
)
from himix_edge.export.quantized_bundle import quantize_bundle
from himix_edge.export.reading import Sums
from himix_edge.export.recipes import WeightChoice, recipe_for
from himix_edge.models.checkpoints import read_checkpoint, save_checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.models.standin import BLIND_NOTICE
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.shapes.benchmark import NOTICE as SHAPES_NOTICE
from tests import tiny

INT8 = WeightChoice(decoder="int8")
IDS = [5, 40, 41, 90, 7, 120, 33, 250, 16, 18, 77, 64]
TEXT = JudgeText(
    "a few tokens",
    "",
    {
        "prompts of 12 tokens": [Passage(IDS, [0, 3, 10]), Passage(IDS[::-1], list(range(11)))],
        "token by token": [Passage(IDS, [2, 4, 10])],
    },
)
PIXELS = np.random.default_rng(0).standard_normal((2, 1, 3, 28, 28)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Two:
    """Two bundles of other models, and these in torch."""

    bundles: Bundles
    models: tuple[HiMix, HiMix]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder, config = tmp_path_factory.mktemp("two"), tiny.tiny_config()
    models = []
    for name in ("before", "after"):
        checkpoint = tiny.tiny_checkpoint(folder / name / "checkpoint", config)
        model = checkpoint.model()
        if name == "after":
            with torch.no_grad():
                noise = torch.Generator().manual_seed(1)
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
            save_checkpoint(
                folder / name / "noisy",
                model,
                name="noisy",
                notice="",
                tokenizer_json=checkpoint.tokenizer_json,
                chat_template=checkpoint.chat_template,
                model_card="#",
            )
            checkpoint = read_checkpoint(folder / name / "noisy")
        export_bundle(checkpoint, folder / name / "bundle", dialect="ort")
        models.append(model)
    before = folder / "before" / "bundle"
    manifest = Manifest.read(before)
    recipe = recipe_for(before, manifest, WeightChoice("int8", "int8"))  # the images are their own
    bundles = Bundles(before, folder / "after" / "bundle", manifest, recipe)
    return Two(bundles, (models[0], models[1]))


@torch.inference_mode()
def logits_of(model: HiMix, ids: list[int], pixels: Any = None) -> Tensor:
    """[M, V] in float64, all tokens in one step, after an image or after nothing."""
    config = model.config
    if pixels is None:
        decoder = config.decoder
        empty = torch.zeros(1, decoder.num_key_value_heads, 0, decoder.head_dim)
        past = [type(kv)(empty, empty) for kv in model.encode(torch.from_numpy(PIXELS[0]))]
        positions = torch.arange(len(ids))[None]
        hidden, _ = model.decoder(torch.tensor([ids]), positions, past)
        return model.decoder.logits(hidden)[0].double()
    logits, _ = model.decode(torch.tensor([ids]), model.encode(torch.from_numpy(pixels)))
    return logits[0].double()


def figures(two: Two, passages: list[Passage], images: Any) -> dict[str, float]:
    """By torch's own functions."""
    before: list[Tensor] = []
    after: list[Tensor] = []
    targets: list[int] = []
    for number, passage in enumerate(passages):
        pixels = None if images is None else images[number % len(images)]
        for into, model in zip((before, after), two.models, strict=True):
            into.append(logits_of(model, passage.ids[:-1], pixels)[passage.chosen])
        targets += passage.targets
    p, q = torch.cat(before), torch.cat(after)
    wanted = torch.tensor(targets)
    cross = torch.nn.functional.cross_entropy
    return {
        "perplexity_before": float(cross(p, wanted).exp()),
        "perplexity": float(cross(q, wanted).exp()),
        "divergence": float(
            torch.nn.functional.kl_div(
                q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True
            )
        ),
        "agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


def test_the_figures_are_torch_s(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "CHANCE", math.inf)
    ways = measured_ways(two.bundles, TEXT, list(PIXELS))
    assert [(way.text, way.cache, way.tokens) for way in ways] == [
        ("prompts of 12 tokens", "nothing", 14),
        ("token by token", "nothing", 3),
        ("prompts of 12 tokens", "an image", 14),
        ("token by token", "an image", 3),
    ]
    for way in ways:
        images = PIXELS if way.cache == "an image" else None
        expected = figures(two, TEXT.ways[way.text], images)
        found = {name: getattr(way, name) for name in expected}
        assert found == pytest.approx(expected, rel=1e-3)
        assert abs(way.growth) > 1e-3
        assert way.divergence > 1e-3


def test_a_text_in_the_image_s_slots(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judged text goes on after it: as if both were one text."""
    monkeypatch.setattr(judge, "CHANCE", math.inf)
    text = dataclasses.replace(TEXT, stand_in=(9, 8, 7, 6))
    same = dataclasses.replace(two.bundles, after=two.bundles.before)
    way = measured_ways(same, text, [])[2]
    assert way.cache == "a text in the image's slots"
    losses = [
        torch.nn.functional.cross_entropy(
            logits_of(two.models[0], [9, 8, 7, 6, *passage.ids[:-1]])[4:][passage.chosen],
            torch.tensor(passage.targets),
            reduction="none",
        )
        for passage in text.ways["prompts of 12 tokens"]
    ]
    expected = float(torch.cat(losses).mean().exp())
    assert way.perplexity_before == pytest.approx(expected, rel=1e-4)
    assert way.growth == pytest.approx(0, abs=1e-6)
    assert way.agreement == 1


def test_a_model_that_knows_nothing_is_measured_on_the_shortest_prompts_alone(two: Two) -> None:
    ways = measured_ways(two.bundles, TEXT, list(PIXELS))
    assert [way.text for way in ways] == ["prompts of 12 tokens"] * 2
    assert all(way.by_chance for way in ways)
    quality = judgement(TEXT, ways, force=False)
    assert quality.verdict == "not judged"
    assert "no more of the text than chance" in quality.reason
    refuse_loss(quality, Path("out"), INT8)


def test_logits_that_are_no_numbers_are_refused() -> None:
    sums = Sums(tokens=2, loss_before=2.0, loss=math.nan)
    with pytest.raises(ExportError, match="gives what is no number"):
        judge._way("prompts", "nothing", DECODER_GRAPH, sums, 300)


# verdicts


def way(growth: float, text: str = "prompts of 32 tokens", cache: str = "nothing") -> Way:
    return Way(text, cache, DECODER_GRAPH, 100, 20.0, 20 * (1 + growth), 0.1, 0.9)


@pytest.mark.parametrize(
    ("ways", "choice", "message"),
    [
        (
            [way(0.02), way(0.3, "token by token")],
            WeightChoice(decoder="int4"),
            r"grows by at most 10 %, found 26.00 from 20.00, \+30.0 %, on token by token, nothing "
            r"in the cache. Fix: use --block-size 32, or --decoder int8, or .*--force",
        ),
        ([way(0.3)], WeightChoice(decoder="int4", block_size=32), "use --decoder int8, or write"),
        ([way(0.3)], WeightChoice(decoder="int4", head="int4"), "use --head int8"),
        ([way(0.3)], INT8, "leave the decoder as it is"),
        ([way(0.01), way(0.3, cache="an image")], WeightChoice("int8", "int8"), "leave out --vis"),
        ([way(0.3), way(0.3, cache="an image")], WeightChoice("int8", "int8"), "leave the decoder"),
        ([way(0.3, cache="an image")], WeightChoice("int8"), "leave out --vision"),
    ],
)
def test_what_lost_too_much_is_refused(ways: list[Way], choice: WeightChoice, message: str) -> None:
    with pytest.raises(QualityError, match=message) as error:
        refuse_loss(judgement(TEXT, ways, force=False), Path("out"), choice)
    assert "\n" not in str(error.value)
    forced = judgement(TEXT, ways, force=True)
    assert forced.verdict == "forced"
    refuse_loss(forced, Path("out"), choice)
    assert summary(forced).startswith("TOO MUCH IS LOST, written by --force")


def test_what_keeps_the_limit_is_kept_forced_or_not() -> None:
    for force in (False, True):
        quality = judgement(TEXT, [way(MAX_GROWTH - 1e-3), way(-0.1)], force=force)
        assert quality.verdict == "kept"
        refuse_loss(quality, Path("out"), INT8)
    assert summary(quality).startswith("perplexity +9.9 % at worst (prompts of 32 tokens, nothing")


def test_refused_and_forced_from_end_to_end(
    ort_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, himix: Any
) -> None:
    monkeypatch.setattr(judge, "CHANCE", math.inf)
    monkeypatch.setattr(judge, "MAX_GROWTH", -1.0)
    words = tmp_path / "words.txt"
    words.write_text("There is a small red circle. " * 8)
    command = ["quantize", ort_bundle, "-o", tmp_path / "out", "--decoder", "int8"]
    done = himix(*command, "--judge-text", words)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "is not written, as it would lose too much" in done.err
    assert not (tmp_path / "out").exists()
    done = himix(*command, "--judge-text", words, "--force")
    assert done.code == 0
    assert "Warning: " in done.err
    assert "TOO MUCH IS LOST" in done.err
    assert "TOO MUCH IS LOST" in (tmp_path / "out" / "README.md").read_text()
    manifest = Manifest.read(tmp_path / "out")
    quality = quality_of(manifest.quantization)
    assert quality is not None
    assert quality.verdict == "forced"
    assert quality.text.startswith("words.txt, ")
    assert "TOO MUCH IS LOST" in himix("info", tmp_path / "out").out
    assert cost_table(manifest.quantization) in done.out


def test_what_the_manifest_of_another_says_is_not_trusted() -> None:
    quality = dataclasses.asdict(judgement(TEXT, [way(0.1)], force=False))
    how = Quantization(None, "int8", None, None, {"quality": quality})
    assert isinstance(quality_of(how), Quality)
    for bad in (
        None,
        {**quality, "verdict": "superb"},
        {**quality, "ways": [{**quality["ways"][0], "perplexity_before": 0.0}]},
        {**quality, "ways": "none"},
    ):
        how = dataclasses.replace(how, cost={"quality": bad, "vision": {"present.0.key": 3}})
        assert quality_of(how) is None
        assert "quality not measured" in cost_table(how)


# texts


def test_the_shipped_text(ort_bundle: Path) -> None:
    assert len(shipped_text().split()) > 5000
    shipped_text().encode("ascii")
    text = judge_text(BundleFiles.open(ort_bundle), None, ())
    assert set(text.ways) == {"prompts of 32 tokens", "prompts of 256 tokens", "token by token"}
    for passages in text.ways.values():
        assert all(passage.targets == passage.ids[1:] for passage in passages)
    assert [len(p.ids) for p in text.ways["prompts of 32 tokens"]] == [32] * 16


def test_parts_are_spread_evenly_and_lie_over_no_other() -> None:
    assert spread(range(100), 10, 4) == [
        list(range(start, start + 10)) for start in (7, 32, 57, 82)
    ]
    assert spread(range(25), 10, 4) == [list(range(1, 11)), list(range(13, 23))]
    assert spread(range(9), 10, 4) == []


def test_a_decoder_that_sees_nothing_keeps_a_part_back(ort_bundle: Path) -> None:
    files = BundleFiles.open(ort_bundle)
    blind = BundleFiles(ort_bundle, dataclasses.replace(files.manifest, notice=BLIND_NOTICE))
    text = judge_text(blind, None, ())
    ids = Tokenizer.from_bundle(files).encode(shipped_text())
    assert list(text.stand_in) == ids[-4:]


def test_questions_of_the_shapes_world(ort_bundle: Path) -> None:
    files = BundleFiles.open(ort_bundle)
    shapes = BundleFiles(ort_bundle, dataclasses.replace(files.manifest, notice=SHAPES_NOTICE))
    text = judge_text(shapes, None, ())
    tokenizer = Tokenizer.from_bundle(files)
    passages = text.ways["token by token"]
    assert len(text.pictures) == 24
    assert {passage.picture for passage in passages} == set(range(24))
    said = passages[0].targets
    assert said[-1] == 0  # the end
    asked = tokenizer.decode(passages[0].ids[: passages[0].chosen[0] + 1])
    fewer = judge_text(shapes, None, [asked])
    assert 0 < len(fewer.ways["token by token"]) < len(passages)


def test_files_that_are_no_text_to_judge_with(ort_bundle: Path, tmp_path: Path) -> None:
    files, path = BundleFiles.open(ort_bundle), tmp_path / "t.txt"
    with pytest.raises(ConfigError, match="No such file"):
        judge_text(files, path, ())
    for content, message in (
        (b"", r"t\.txt is no text to judge this bundle with.*32 tokens or more.*found 0 tokens"),
        (b"too short", "found . tokens, too few"),
        (b"\xff\xfe", "line 1 is no text"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            quantize_bundle(ort_bundle, tmp_path / "out", INT8, text=path)
    assert not (tmp_path / "out").exists()


class Words:
    """A tokenizer of a few words."""

    def __init__(self, unknown: bool) -> None:
        self.unknown = unknown

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        if not self.unknown:
            raise ValueError("WordLevel error: Missing [UNK] token")
        return [7, *([1] * 40)] if add_special_tokens else [1] * 40

    def decode(self, ids: list[int]) -> str:
        return ""


def test_a_vocabulary_that_lacks_the_words(
    ort_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = BundleFiles.open(ort_bundle)
    words = tmp_path / "words.txt"
    words.write_text("a b c\n" * 40)
    for unknown, reason in ((True, "100% is not in the vocab"), (False, "lacks words: WordLevel")):
        monkeypatch.setattr(Tokenizer, "from_bundle", lambda _, u=unknown: Words(u))
        text = judge_text(files, None, ())
        assert text.ways == {}
        assert reason in text.reason
        quality = judgement(text, [], force=False)
        assert quality.verdict == "not judged"
        assert "--judge-text" in summary(quality)
        with pytest.raises(ConfigError, match=reason):
            judge_text(files, words, ())
    assert _begin(Words(True)) == [7]  # type: ignore[arg-type]
    assert (ort_bundle / MANIFEST).is_file()
