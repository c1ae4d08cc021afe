"""Token ids against transformers' own, from folders that it has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from jinja2 import UndefinedError
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from himix_edge.contract import ImagePlace
from himix_edge.convert.prompt import place_image
from himix_edge.errors import BundleError, CheckpointError, PromptError
from himix_edge.export.reference import tokenizer_from_texts
from himix_edge.models.chat_files import read_chat_files
from himix_edge.models.tokenizer_files import PROCESSOR_PLACES
from himix_edge.runtimes.tokenizer import Tokenizer
from tests.models.chat_matrix import (
    IMAGE_TEMPLATES,
    KINDS,
    MAKERS,
    TEXT_TEMPLATES,
    TEXTS,
    conversations,
    tokenizer_of_kind,
)

VOCAB_SIZE = 1000  # more than any of the tokenizers has


def write_folder(folder: Path, maker: str, kind: str, template: str, model_type: str) -> Path:
    """A folder as `save_pretrained` writes it."""
    setup = KINDS[kind]
    stock = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer_of_kind(maker, setup), chat_template=template, **setup.named
    )
    stock.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if setup.in_config_alone:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        first = len(stock)
        config["added_tokens_decoder"] = {
            str(first + i): {"content": token, "special": False, "normalized": False}
            for i, token in enumerate(setup.in_config_alone)
        }
        path.write_text(json.dumps(config))
    return folder


def device_tokenizer(folder: Path) -> Tokenizer:
    files = read_chat_files(folder, VOCAB_SIZE)
    return tokenizer_from_texts(files.tokenizer_json, files.chat_template, files.chat)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("template", TEXT_TEMPLATES)
def test_ids_are_those_of_apply_chat_template(
    template: str, maker: str, kind: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, maker, kind, TEXT_TEMPLATES[template], "llama")
    stock = AutoTokenizer.from_pretrained(folder)
    if template == "llama2" and stock.bos_token is None:
        with pytest.raises(UndefinedError, match="'bos_token' is undefined"):
            stock.apply_chat_template(conversations("x")[0], add_generation_prompt=True)
        with pytest.raises(BundleError, match="UndefinedError: 'bos_token' is undefined"):
            device_tokenizer(folder)
        return
    ours = device_tokenizer(folder)
    for text in TEXTS:
        for messages in conversations(text):
            theirs = stock.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            assert ours.encode_chat(messages) == theirs, messages  # type: ignore[arg-type]


def typed(messages: list[dict[str, str]], image: Image.Image) -> list[dict[str, Any]]:
    """As a processor takes them, the image ahead of the first question."""
    found: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = [{"type": "text", "text": message["content"]}]
        if message["role"] == "user" and not any(m["role"] == "user" for m in found):
            content.insert(0, {"type": "image", "image": image})
        found.append({"role": message["role"], "content": content})
    return found


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "in-config-alone"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", IMAGE_TEMPLATES)
def test_ids_are_those_of_the_processor(family: str, maker: str, kind: str, tmp_path: Path) -> None:
    """Without the image's; the last of LLaVA-OneVision's, the newline, is the text's first here."""
    template, is_llava = IMAGE_TEMPLATES[family], family == "llava-1.5"
    folder = write_folder(tmp_path, maker, kind, template, "llava")
    stock: Any = AutoTokenizer.from_pretrained(folder)
    pixels: Any = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    # LLaVA-OneVision's own processor needs torchvision; it makes ids of a text in the same way.
    processor_class: Any = LlavaProcessor
    processor = processor_class(
        pixels, stock, patch_size=14, chat_template=template, num_additional_image_tokens=1,
        vision_feature_select_strategy="default" if is_llava else "full", image_token="<image>",
    )  # fmt: skip
    image_id = stock.convert_tokens_to_ids("<image>")
    files = read_chat_files(folder, VOCAB_SIZE, PROCESSOR_PLACES)
    opening = () if is_llava else (image_id,)
    files = place_image(files, ImagePlace("<image>", image_id, (), opening))
    place = files.chat.image
    assert place is not None
    ours = tokenizer_from_texts(files.tokenizer_json, files.chat_template, files.chat)
    image = Image.fromarray(np.zeros((28, 28, 3), np.uint8))
    compared = 0
    for text in TEXTS:
        for messages in conversations(text):
            theirs = processor.apply_chat_template(
                typed(messages, image), add_generation_prompt=True, tokenize=True
            )
            theirs = theirs[0] if isinstance(theirs[0], list) else theirs
            first = theirs.index(image_id)
            last = len(theirs) - theirs[::-1].index(image_id)
            prefix, rest = theirs[:first], theirs[last:]
            if messages[0]["role"] == "system" and prefix != list(place.prefix_ids):
                with pytest.raises(PromptError, match="text ahead of the image"):
                    ours.encode_chat(messages)  # type: ignore[arg-type]
                continue
            assert prefix == list(place.prefix_ids)
            assert ours.encode_chat(messages) == [*opening, *rest], messages  # type: ignore[arg-type]
            compared += 1
    assert compared >= len(TEXTS)


def test_a_users_image_token_is_refused(tmp_path: Path) -> None:
    """transformers' model fails as well: more placeholders than images."""
    folder = write_folder(tmp_path, "byte-level", "plain", IMAGE_TEMPLATES["llava-1.5"], "llava")
    files = read_chat_files(folder, VOCAB_SIZE, PROCESSOR_PLACES)
    files = place_image(files, ImagePlace("<image>", 4, ()))
    ours = tokenizer_from_texts(files.tokenizer_json, files.chat_template, files.chat)
    with pytest.raises(PromptError, match="found 2 times"):
        ours.encode_turn((), "is <image> a word?")


def test_split_special_tokens(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "byte-level", "plain", TEXT_TEMPLATES["qwen2"], "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": True}))
    stock, ours = AutoTokenizer.from_pretrained(folder), device_tokenizer(folder)
    messages = [{"role": "user", "content": "a <|im_end|> b"}]
    theirs = stock.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages) == theirs  # type: ignore[arg-type]
    assert stock.convert_tokens_to_ids("<|im_end|>") not in theirs


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_of_a_folder_that_names_no_class(file: str, tmp_path: Path) -> None:
    """As a HiMix checkpoint has them whose tokenizer_config.json was put beside it."""
    template = TEXT_TEMPLATES["vicuna"]
    folder = write_folder(tmp_path, "byte-level", "bos-and-eos", template, "no-type-of-these")
    (folder / "tokenizer_config.json").unlink()
    (folder / file).write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    messages = conversations("What is it?")[1]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert device_tokenizer(folder).encode_chat(messages) == theirs  # type: ignore[arg-type]


def test_a_class_that_config_names(tmp_path: Path) -> None:
    """LlamaTokenizer has a way of its own with blanks after special tokens."""
    template = TEXT_TEMPLATES["qwen2"]
    folder = write_folder(tmp_path, "sentencepiece", "plain", template, "no-type-of-these")
    (folder / "tokenizer_config.json").write_text("{}")
    plain = device_tokenizer(folder).encode_turn((), "what")
    config = {"model_type": "no-type-of-these", "tokenizer_class": "LlamaTokenizer"}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "what"}], add_generation_prompt=True, return_dict=False
    )
    assert device_tokenizer(folder).encode_turn((), "what") == theirs
    assert theirs != plain


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_no_code_of_the_folder_is_run(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would ask at the terminal whether it may."""
    folder = write_folder(tmp_path, "byte-level", "plain", TEXT_TEMPLATES["qwen2"], "no-such-type")
    is_config = file == "config.json"
    own = {"AutoConfig": "own.Own"} if is_config else {"AutoTokenizer": [None, "own.Own"]}
    data = json.loads((folder / file).read_text())
    changes = {"auto_map": own} if is_config else {"auto_map": own, "tokenizer_class": "Own"}
    (folder / file).write_text(json.dumps({**data, **changes}))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    if is_config:
        assert device_tokenizer(folder).encode_turn((), "x")
    else:
        with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
            read_chat_files(folder, VOCAB_SIZE)
    assert "[y/N]" not in "".join(capsys.readouterr())


def test_words_that_the_tokenizer_cannot_encode(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "byte-level", "plain", TEXT_TEMPLATES["qwen2"], "llama")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(PromptError, match=r"can't encode the prompt.*Missing \[UNK\]"):
        device_tokenizer(folder).encode_turn((), "a dog")


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer of") as error:
        read_chat_files(tmp_path, VOCAB_SIZE)
    assert "\n" not in str(error.value)


def test_a_token_beyond_the_embedding_is_left_out(tmp_path: Path) -> None:
    """A padding token that only the config names: the model has no row for it."""
    folder = write_folder(tmp_path, "byte-level", "plain", TEXT_TEMPLATES["qwen2"], "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "<|new pad|>"}))
    stock: Any = AutoTokenizer.from_pretrained(folder)
    size = len(stock) - 1
    assert stock.convert_tokens_to_ids("<|new pad|>") == size
    files = read_chat_files(folder, size)
    ours = tokenizer_from_texts(files.tokenizer_json, files.chat_template, files.chat)
    assert ours.vocab_size == size
    assert files.chat.special_tokens["pad_token"] == "<|new pad|>"
    assert max(ours.encode_turn((), "a <|new pad|> b")) < size
    with_row = read_chat_files(folder, size + 1)
    ours = tokenizer_from_texts(with_row.tokenizer_json, with_row.chat_template, with_row.chat)
    messages = [{"role": "user", "content": "a <|new pad|> b"}]
    theirs = stock.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages) == theirs  # type: ignore[arg-type]


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "byte-level", "plain", TEXT_TEMPLATES["qwen2"], "llama")
    (folder / "chat_template.jinja").write_bytes("{{ 'Où?' }}".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"cannot read .*chat_template\.jinja"):
        read_chat_files(folder, VOCAB_SIZE)
