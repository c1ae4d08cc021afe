"""Tokenizers and chat templates, wherever a folder has them."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from himix_edge.errors import CheckpointError
from himix_edge.models.huggingface import decoder_from_folder
from himix_edge.models.tokenizer_files import chat_template_of, tokenizer_of
from tests import tiny
from tests.models.stock import (
    edit,
)


def test_chat_templates_wherever_they_are(qwen2: Path) -> None:
    jinja, config = qwen2 / "chat_template.jinja", qwen2 / "tokenizer_config.json"
    (qwen2 / "chat_template.json").write_text('{"chat_template": "the processor\'s"}')
    edit(config, chat_template=[
        {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"},
    ])  # fmt: skip
    assert chat_template_of(qwen2) == tiny.CHAT_TEMPLATE
    jinja.unlink()
    assert chat_template_of(qwen2) == "the default"
    edit(config, chat_template={"default": "the default of a dict", "rag": "documents"})
    assert chat_template_of(qwen2) == "the default of a dict"
    edit(config, chat_template="the only")
    assert chat_template_of(qwen2) == "the only"
    edit(config, chat_template=...)
    assert chat_template_of(qwen2) == "the processor's"
    (qwen2 / "chat_template.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no chat template.*write the Jinja template .*jinja"
    ):
        decoder_from_folder(qwen2)
    edit(config, chat_template=[{"name": "tool_use", "template": "tools"}])
    with pytest.raises(CheckpointError, match="no chat template"):
        decoder_from_folder(qwen2)
    config.unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        decoder_from_folder(qwen2)
    jinja.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"cannot read .*chat_template\.jinja"):
        decoder_from_folder(qwen2)


# None with leading spaces, to which transformers' LlamaTokenizer adds none of its own.
TEXTS = ("A red circle.", "two  spaces", "caf\u00e9 \u2603")


def sentencepiece_model() -> bytes:
    """Llama's kind: pieces and bytes."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.CORPUS * 20), model_writer=written, vocab_size=320,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


def write_byte_level(folder: Path) -> None:
    """Qwen2's and GPT-2's first files, of the tokenizer that stands there."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)))


def slow_folder(folder: Path, kind: str, **configs: dict[str, Any]) -> Path:
    """A copy's tokenizer in a form that no device reads, beside these configs alone."""
    if kind == "tokenizer.model":
        (folder / kind).write_bytes(sentencepiece_model())
    else:
        write_byte_level(folder)
    (folder / "tokenizer.json").unlink()
    for name in ("tokenizer_config", "config"):
        (folder / f"{name}.json").write_text(json.dumps(configs.get(name, {})))
    return folder


def advice(folder: Path) -> list[str]:
    with pytest.raises(CheckpointError, match=r"no tokenizer that a device can read") as error:
        tokenizer_of(folder)
    line = str(error.value)
    assert "\n" not in line
    return shlex.split(line.split("convert it with: ")[1])


LLAMA_CLASS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("tokenizer.model", {"tokenizer_config": LLAMA_CLASS}),
    "llama without a class": ("tokenizer.model", {"config": {"model_type": "llama"}}),
    "tinyllava without a class": ("tokenizer.model", {"config": {"model_type": "tinyllava"}}),
    "no config at all": ("tokenizer.model", {}),
    "qwen2": ("vocab.json", {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}),
    "qwen2 without a class": ("vocab.json", {"config": {"text_config": {"model_type": "qwen2"}}}),
    "gpt2 without a class": ("vocab.json", {"config": {"model_type": "llama"}}),
}


@pytest.mark.parametrize("case", SLOW)
def test_the_advised_command_makes_the_same_tokenizer(qwen2: Path, case: str) -> None:
    kind, configs = SLOW[case]
    before = Tokenizer.from_file(str(qwen2 / "tokenizer.json"))
    folder = slow_folder(qwen2, kind, **configs)
    python, option, script = advice(folder)
    assert (python, option) == ("python", "-c")
    exec(compile(script, "advice", "exec"), {})
    made = Tokenizer.from_file(str(tokenizer_of(folder)))
    if kind == "tokenizer.model":
        reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / kind))
        for text in TEXTS:
            ids = made.encode(text, add_special_tokens=False).ids
            assert ids == reference.encode(text), text
    else:
        for text in TEXTS:
            assert made.encode(text).tokens == before.encode(text).tokens, text


@pytest.mark.slow
def test_a_shell_runs_the_advised_command(qwen2: Path, tmp_path: Path) -> None:
    """Whatever the folder is called, and as it is printed."""
    folder = Path(shutil.move(qwen2, tmp_path / 'it\'s a "$HOME" `x`'))
    slow_folder(folder, "tokenizer.model", tokenizer_config=LLAMA_CLASS)
    with pytest.raises(CheckpointError) as error:
        tokenizer_of(folder)
    command = str(error.value).split("convert it with: python ")[1]
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True)
    assert tokenizer_of(folder).is_file()


@pytest.mark.parametrize("left", [[], ["vocab.json"], ["merges.txt"]])
def test_a_folder_of_no_tokenizer_at_all(qwen2: Path, left: list[str]) -> None:
    write_byte_level(qwen2)
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - set(left):
        (qwen2 / name).unlink()
    with pytest.raises(CheckpointError, match=r"copy the model's tokenizer\.json there") as error:
        decoder_from_folder(qwen2)
    assert "python" not in str(error.value)
