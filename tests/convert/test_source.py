"""Folders as they come, old and new, whole and broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import GenerationConfig

from himix_edge.convert.source import teacher_from_folder, teacher_from_source
from himix_edge.errors import CheckpointError
from himix_edge.models.weights import SINGLE_FILE, StoredWeight
from tests import tiny
from tests.convert.llava import VISION, image_id, llava_model, write_tiny_llava
from tests.models.stock import edit, write_decoder

FAMILIES = ("llava", "llava_siglip", "llava_onevision", "tinyllava")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("families")
    return {family: write_tiny_llava(place / family, family) for family in FAMILIES}


@pytest.fixture
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    family: str = request.param
    copy = tmp_path / family
    copy.mkdir()
    for path in folders[family].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def of(*families: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("folder", families, indirect=True)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.read() for name, weight in teacher_from_folder(folder).weights.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rename_tensors(folder: Path, *rules: tuple[str, str]) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    for pattern, new in rules:
        tensors = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE_FILE)


@of("llava", "llava_siglip", "llava_onevision")
@pytest.mark.parametrize("age", ["hub", "in memory"])
def test_names_of_all_ages(folder: Path, age: str) -> None:
    expected = tensors_of(folder)
    if age == "hub":
        rename_tensors(folder, (r"^vision_tower\.", "vision_tower.vision_model."))
    else:
        rename_tensors(
            folder,
            (r"^language_model\.lm_head", "lm_head"),
            (r"^language_model\.model", "model.language_model"),
            (r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"),
        )
    assert same(tensors_of(folder), expected)


def test_shards(tmp_path: Path) -> None:
    whole = write_tiny_llava(tmp_path / "whole", "llava")
    sharded = write_tiny_llava(tmp_path / "sharded", "llava")
    (sharded / SINGLE_FILE).unlink()
    llava_model("llava").save_pretrained(sharded, max_shard_size="100KB")
    assert same(tensors_of(sharded), tensors_of(whole))
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    first.unlink()
    with pytest.raises(CheckpointError, match=f"incomplete.*{first.name}"):
        teacher_from_folder(sharded)


@of("llava_onevision")
def test_newline_is_the_images_row(folder: Path) -> None:
    stored = load_file(folder / SINGLE_FILE)
    embedding = "language_model.model.embed_tokens.weight"
    expected = stored[embedding].clone()
    expected[image_id("llava_onevision")] = stored["image_newline"]
    weights = teacher_from_folder(folder).weights
    assert torch.equal(weights["decoder.model.embed_tokens.weight"].read(), expected)
    assert "image_newline" not in weights


def test_a_projector_without_bias(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "bare", "llava", multimodal_projector_bias=False)
    teacher = teacher_from_source(teacher_from_folder(folder))
    for layer in (0, 2):
        assert not teacher.connector[layer].bias.any()  # type: ignore[index]
        assert teacher.connector[layer].weight.any()  # type: ignore[index]


@of("llava_onevision")
@pytest.mark.parametrize("place", ["whole", "text_config"])
def test_tied_embeddings_are_said_in_either_place(folder: Path, place: str) -> None:
    """As LLaVA-OneVision-0.5B's: no head is stored, and the config says so in one place alone."""
    expected, stored = tensors_of(folder), load_file(folder / SINGLE_FILE)
    assert not [name for name in stored if "lm_head" in name]
    text = _config(folder)["text_config"]
    tied = {"whole": place == "whole", "text_config": place == "text_config"}
    edit(
        folder / "config.json",
        tie_word_embeddings=tied["whole"],
        text_config={**text, "tie_word_embeddings": tied["text_config"]},
    )
    source = teacher_from_folder(folder)
    assert source.config.decoder.tie_word_embeddings
    assert same(tensors_of(folder), expected)
    teacher_from_source(source)  # nothing is missing
    edit(
        folder / "config.json",
        tie_word_embeddings=False,
        text_config={**text, "tie_word_embeddings": False},
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        teacher_from_source(teacher_from_folder(folder))


@of("llava")
@pytest.mark.parametrize(("stated", "layer"), [(-2, -2), ([-1], -1), (3, -2), (1, -4)])
def test_feature_layers(folder: Path, stated: Any, layer: int) -> None:
    edit(folder / "config.json", vision_feature_layer=stated)
    assert teacher_from_folder(folder).config.vision.feature_layer == layer


def test_defaults_of_the_first_llava(tmp_path: Path) -> None:
    """Its config leaves out what is Llama-2-7B's, and all that is CLIP-L's."""
    folder = write_tiny_llava(tmp_path / "llava-1.5-7b", "llava")
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
    edit(folder / "config.json", text_config=text, vision_config=..., image_token_index=386)
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    edit(folder / "preprocessor_config.json", **size)
    config = teacher_from_folder(folder).config
    decoder, vision = config.decoder, config.vision
    assert (decoder.hidden_size, decoder.num_hidden_layers, decoder.head_dim) == (4096, 32, 128)
    assert (decoder.vocab_size, decoder.max_position_embeddings) == (32064, 4096)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_image_tokens) == (
        1024,
        24,
        576,
    )


@of("llava", "tinyllava")
def test_licences(folder: Path) -> None:
    assert teacher_from_folder(folder).licence == ""
    (folder / "LICENSE.txt").write_text("\n  Llama 2 Community License\n\nmore")
    assert teacher_from_folder(folder).licence == "Llama 2 Community License"
    card = (
        "---\nlanguage: en\nlicense: other\nlicense_name: 'tongyi'\n---\n# A model\nlicense: no\n"
    )
    (folder / "README.md").write_text(card)
    assert teacher_from_folder(folder).licence == "tongyi"
    (folder / "README.md").write_text(card.replace("other", "apache-2.0"))
    assert teacher_from_folder(folder).licence == "apache-2.0"


def test_own_vanilla_checkpoints(tmp_path: Path) -> None:
    tiny.tiny_checkpoint(tmp_path / "vanilla", tiny.tiny_config("vanilla"))
    tiny.tiny_checkpoint(tmp_path / "himix", tiny.tiny_config("himix"))
    source = teacher_from_folder(tmp_path / "vanilla")
    assert (source.family, source.prefix_ids, source.name) == ("vanilla", (), "tiny")
    assert source.notice == "It knows nothing."
    model = tiny.tiny_model(tiny.tiny_config("vanilla"))
    loaded = teacher_from_source(source).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="expected a checkpoint of the design 'vanilla'"):
        teacher_from_folder(tmp_path / "himix")


@of("llava_onevision")
def test_weights_keep_their_type_and_take_the_one_asked_for(folder: Path) -> None:
    stored = {n: t.to(torch.bfloat16) for n, t in load_file(folder / SINGLE_FILE).items()}
    save_file(stored, folder / SINGLE_FILE)
    source = teacher_from_folder(folder)
    assert {weight.read().dtype for weight in source.weights.values()} == {torch.bfloat16}
    assert teacher_from_source(source).dtype == torch.float32
    assert teacher_from_source(source, torch.float16).dtype == torch.float16
    stored["multi_modal_projector.linear_1.bias"][0] = 1e6
    save_file(stored, folder / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"connector\.0\.bias of .*float16.*use bfloat16"):
        teacher_from_source(teacher_from_folder(folder), torch.float16)


@of(*FAMILIES)
def test_weights_are_not_read_before_they_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(weight: StoredWeight) -> torch.Tensor:
        raise CheckpointError(f"{weight.key} was read")

    monkeypatch.setattr(StoredWeight, "_stored", read)
    source = teacher_from_folder(folder)
    with pytest.raises(CheckpointError, match="was read"):
        source.weights["decoder.model.norm.weight"].read()


@of("tinyllava")
def test_tinyllava_ends_answers_as_its_templates_do(folder: Path) -> None:
    edit(folder / "config.json", text_config={**_config(folder)["text_config"], "eos_token_id": 5})
    assert teacher_from_folder(folder).config.decoder.eos_token_ids == (2, 5)  # "</s>" is 2


@of("llava", "llava_onevision")
@pytest.mark.parametrize(
    ("whole", "text", "expected"),
    [(..., 5, (5,)), (6, 5, (6,)), ([6, 4], ..., (6, 4)), (None, [3], (3,))],
)
def test_ends_that_the_configs_state(
    folder: Path, whole: Any, text: Any, expected: tuple[int, ...]
) -> None:
    """Those of transformers' generation config, where the folder has none."""
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=whole)
    stated = {**_config(folder)["text_config"], "eos_token_id": text}
    kept = {name: value for name, value in stated.items() if value is not ...}
    edit(folder / "config.json", text_config=kept)
    assert teacher_from_folder(folder).config.decoder.eos_token_ids == expected
    found = GenerationConfig.from_model_config(_config(folder)).eos_token_id
    assert (tuple(found) if isinstance(found, list) else (found,)) == expected


@of("llava", "llava_onevision")
def test_ends_of_no_config_are_the_tokenizers(folder: Path) -> None:
    """LlamaConfig's own 2, and Qwen2Config's none, were never stated."""
    (folder / "generation_config.json").write_text("{}")
    text = {k: v for k, v in _config(folder)["text_config"].items() if k != "eos_token_id"}
    edit(folder / "config.json", text_config=text)
    edit(folder / "tokenizer_config.json", eos_token="a")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = teacher_from_folder(folder).config.decoder.eos_token_ids
    assert ends == (tokenizer.token_to_id("a"),)
    edit(folder / "generation_config.json", eos_token_id=8)
    assert teacher_from_folder(folder).config.decoder.eos_token_ids == (8,)


def _config(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return data


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llava", {"projector_hidden_act": "silu"}, "projector_hidden_act is unknown.*gelu.*silu"),
    ("llava", {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer.*one layer.*-2, -5"),
    ("llava", {"vision_feature_layer": 0}, "feature_layer is invalid"),
    ("llava", {"vision_feature_select_strategy": "full"}, "'default' with CLIP.*'full'"),
    ("llava", {"image_token_index": 600}, "image_token_index is invalid.*0 to 599.*600"),
    ("llava", {"image_token_index": 500}, "lacks the image's token.*500"),
    (
        "llava",
        {"vision_config": {"model_type": "pixtral"}},
        "its vision_config is unknown.*clip_vision_model, siglip_vision_model.*'pixtral'",
    ),
    (
        "llava",
        {"text_config": {"model_type": "mistral"}},
        "its text_config is unknown.*llama, qwen2.*'mistral'",
    ),
    ("llava", {"quantization_config": {"quant_method": "awq"}}, "quantized weights.*awq"),
    ("llava_siglip", {"vision_config": {**VISION, "model_type": "dinov2"}}, "'dinov2'"),
    ("tinyllava", {"connector_type": "qformer"}, "connector_type.*'mlp2x_gelu'.*qformer"),
    ("tinyllava", {"image_aspect_ratio": "pad"}, "image_aspect_ratio.*'square'.*pad"),
    ("tinyllava", {"vision_feature_select_strategy": "cls_patch"}, "'patch'.*cls_patch"),
    ("tinyllava", {"vision_model_name_or_path2": "dinov2"}, "path2 is unknown.*dinov2"),
    ("tinyllava", {"text_config": {"model_type": "phi"}}, "its text_config.*llama, qwen2.*'phi'"),
    ("tinyllava", {"text_config": ...}, "its text_config is unknown.*None"),
    ("tinyllava", {"vision_config": {"model_type": "dinov2"}}, "clip.*siglip.*'dinov2'"),
    ("llava", {"model_type": "llava_next"}, "llava, llava_onevision, tinyllava.*'llava_next'"),
]


@pytest.mark.parametrize(("folder", "changes", "message"), REFUSALS, indirect=["folder"])
def test_what_we_do_not_have(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        teacher_from_folder(folder)


def test_folders_that_are_no_llava(tmp_path: Path) -> None:
    write_decoder(tmp_path / "qwen2", "qwen2")
    with pytest.raises(
        CheckpointError, match=r"no vision-language model.*found model_type 'qwen2'"
    ):
        teacher_from_folder(tmp_path / "qwen2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"incomplete: expected config\.json"):
        teacher_from_folder(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a config\.json without model_type"):
        teacher_from_folder(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such folder"):
        teacher_from_folder(tmp_path / "nowhere")


@of("llava_onevision")
def test_weights_that_do_not_fit(folder: Path) -> None:
    stored = load_file(folder / SINGLE_FILE)
    lost = stored.pop("multi_modal_projector.linear_2.weight")
    save_file({**stored, "multi_modal_projector.linear_3.weight": lost}, folder / SINGLE_FILE)
    with pytest.raises(
        CheckpointError,
        match=r"connector\.2\.weight is missing; .*\.linear_3\.weight is unknown",
    ):
        teacher_from_source(teacher_from_folder(folder))
    newline = stored.pop("image_newline")
    save_file(stored, folder / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="incomplete: expected image_newline"):
        teacher_from_folder(folder)
    save_file({**stored, "image_newline": newline[:5].clone()}, folder / SINGLE_FILE)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight has rows of \[64\], not \[5\]"
    ):
        teacher_from_source(teacher_from_folder(folder))
