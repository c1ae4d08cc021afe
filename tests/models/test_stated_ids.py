"""What ends an answer, and what is never chosen: as transformers' `generate` has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, Qwen2ForCausalLM

from himix_edge.errors import CheckpointError
from himix_edge.models.huggingface import decoder_from_folder
from himix_edge.models.stated_ids import without_end
from tests import tiny
from tests.models.stock import edit, write_decoder

TOKENIZERS_OWN = (0,)  # `tiny.END`


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("decoders")
    for kind in ("qwen2", "llama"):
        write_decoder(place / kind, kind)
    return {kind: place / kind for kind in ("qwen2", "llama")}


@pytest.fixture(params=["qwen2", "llama"])
def folder(request: pytest.FixtureRequest, written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(written[request.param], tmp_path / request.param))


def ends(folder: Path) -> tuple[int, ...]:
    return decoder_from_folder(folder).decoder.eos_token_ids


def transformers_ends(folder: Path) -> tuple[int, ...] | None:
    """Of its generation config; made of config.json's own words where there is none."""
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        stated = json.loads((folder / "config.json").read_text())
        found = GenerationConfig.from_model_config(stated).eos_token_id
    return tuple(found) if isinstance(found, list) else None if found is None else (found,)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, 7, (7,)),
        (5, [6, 5], (6, 5)),  # as Qwen2-Instruct has them
        (5, 6, (6,)),  # no union
        (5, [6], (6,)),
        ([1, 8, 9], [1, 8, 9], (1, 8, 9)),  # as Llama 3.2 has them
        (None, 6, (6,)),
        (..., 6, (6,)),  # not LlamaConfig's 2
        ([3, 4], "no file", (3, 4)),
        (0, "no file", (0,)),
        ([4, 3, 4], "no file", (4, 3)),
    ],
)
def test_they_are_transformers(
    folder: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    edit(folder / "config.json", eos_token_id=config)
    if generation == "no file":
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", eos_token_id=generation)
    assert ends(folder) == expected
    assert tuple(dict.fromkeys(transformers_ends(folder) or ())) == expected


@pytest.mark.parametrize("generation", [None, ..., [], "no file"])
@pytest.mark.parametrize("config", [None, ..., []])
def test_where_nothing_else_names_one_the_tokenizer_does(
    folder: Path, config: Any, generation: Any
) -> None:
    """LlamaConfig's own 2, which nobody stated, would be there otherwise."""
    edit(folder / "config.json", eos_token_id=config)
    if generation == "no file":
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", eos_token_id=generation)
    assert not transformers_ends(folder)
    assert ends(folder) == TOKENIZERS_OWN
    edit(folder / "tokenizer_config.json", eos_token={"content": "<|user|>", "special": True})
    assert ends(folder) == (1,)


def test_the_config_counts_where_the_generation_config_names_none(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=5)
    edit(folder / "generation_config.json", eos_token_id=...)
    assert ends(folder) == (5,)


def test_an_end_token_of_the_tokenizers_config_alone(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=...)
    (folder / "generation_config.json").unlink()
    edit(
        folder / "tokenizer_config.json",
        eos_token="<|im_end|>",
        added_tokens_decoder={"290": {"content": "<|im_end|>"}, "291": {"content": "<|other|>"}},
    )
    assert ends(folder) == (290,)


def test_a_decoder_that_nothing_ends_is_said_to_be_one(folder: Path, himix: Any) -> None:
    edit(folder / "config.json", eos_token_id=...)
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", eos_token=None)
    decoder = decoder_from_folder(folder).decoder
    assert decoder.eos_token_ids == ()
    assert "generation_config.json" in str(without_end(decoder))
    done = himix("export", "--encoder", "tinyclip-39m", "--decoder", folder, "--random-weights",
                 "--max-text", "5", "-o", folder / "out")  # fmt: skip
    # It goes no further: the cache of this dialect has no fixed size.
    assert "Warning: " in done.err
    assert "nothing names a token that ends an answer" in done.err
    edit(folder / "config.json", eos_token_id=3)
    assert without_end(decoder_from_folder(folder).decoder) is None


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("token", [tiny.VOCAB_SIZE, -1, "7", True, 7.0, [3, 1 << 40], {"a": 1}])
def test_end_tokens_that_are_none(folder: Path, name: str, token: Any) -> None:
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / name, eos_token_id=token)
    message = rf"cannot use .*/{name}: (expected eos_token_id of 0|found .*'eos_token_id')"
    with pytest.raises(CheckpointError, match=message):  # transformers checks types, by itself
        decoder_from_folder(folder)


def test_a_tokenizers_end_token_beyond_the_decoder(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "generation_config.json", eos_token_id=None)
    added = {str(tiny.VOCAB_SIZE): {"content": "<|new|>"}}
    edit(folder / "tokenizer_config.json", eos_token="<|new|>", added_tokens_decoder=added)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: expected eos_token of 0"):
        decoder_from_folder(folder)


def test_what_generation_suppresses_is_not_chosen(written: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written["qwen2"], tmp_path / "qwen2"))
    stock: Any = Qwen2ForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[5, 9, 11]])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    free = stock.generate(prompt, **options)[0, 3:].tolist()
    edit(folder / "generation_config.json", suppress_tokens=sorted(set(free)), eos_token_id=299)
    again: Any = Qwen2ForCausalLM.from_pretrained(folder)
    held = again.generate(prompt, **options)[0, 3:].tolist()
    decoder = decoder_from_folder(folder).decoder
    assert decoder.suppressed_token_ids == tuple(sorted(set(free)))
    assert not set(held) & set(decoder.suppressed_token_ids)
    edit(folder / "generation_config.json", suppress_tokens=[300])
    with pytest.raises(CheckpointError, match=r"generation_config\.json: expected suppress_tokens"):
        decoder_from_folder(folder)


def test_bad_words_of_one_token_are_not_chosen(written: dict[str, Path], tmp_path: Path) -> None:
    """But for those that end an answer, which transformers lets be chosen."""
    folder = Path(shutil.copytree(written["qwen2"], tmp_path / "qwen2"))
    stock: Any = Qwen2ForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[5, 9, 11]])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    free = sorted(set(stock.generate(prompt, **options)[0, 3:].tolist()))
    bad = [*([token] for token in free), [299], [20, 21]]
    edit(folder / "generation_config.json", bad_words_ids=bad, eos_token_id=299)
    again: Any = Qwen2ForCausalLM.from_pretrained(folder)
    held = again.generate(prompt, **options)[0, 3:].tolist()
    decoder = decoder_from_folder(folder).decoder
    assert decoder.suppressed_token_ids == tuple(free)
    assert not set(held) & set(free)


def test_config_suppresses_where_there_is_no_generation_config(folder: Path) -> None:
    edit(folder / "config.json", suppress_tokens=[17], bad_words_ids=[[18]])
    path = folder / "generation_config.json"
    edit(path, eos_token_id=6)
    assert decoder_from_folder(folder).decoder.suppressed_token_ids == ()
    path.unlink()
    assert decoder_from_folder(folder).decoder.suppressed_token_ids == (17, 18)


def test_a_class_has_an_end_token_that_nobody_stated(folder: Path) -> None:
    """What these tests guard against: it is there, in one of the two classes."""
    edit(folder / "config.json", eos_token_id=...)
    if folder.name == "llama":
        assert AutoConfig.from_pretrained(folder).eos_token_id == 2
