"""A Hugging Face folder's tokenizer and chat template as transformers uses them.

`tokenizer.json` alone does not say it: `tokenizer_config.json` adds tokens and names the special
ones, and some of transformers' classes build their tokenizer anew. So transformers reads the
folder, and what it made is written down: a device then has the very same tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast

from himix_edge.contract import Chat
from himix_edge.errors import CheckpointError
from himix_edge.models.hub import json_object
from himix_edge.models.tokenizer_files import (
    TOKENIZER_CONFIG,
    TOKENIZER_PLACES,
    chat_template_of,
    tokenizer_of,
)
from himix_edge.tokenizer_json import panics_as_exceptions, read_tokenizer_json

CONFIG = "config.json"


@dataclass(frozen=True)
class ChatFiles:
    """All that makes token ids of a conversation.

    Attributes:
        tokenizer_json, chat_template: texts.
        chat: the template's variables.
    """

    tokenizer_json: str
    chat_template: str
    chat: Chat


def read_chat_files(
    folder: Path, vocab_size: int, places: Sequence[str] = TOKENIZER_PLACES
) -> ChatFiles:
    """Reads a folder's tokenizer and chat template.

    Args:
        vocab_size: of the decoder; see `read_tokenizer`.
        places: JSON files that may hold the template; see `chat_template_of`.

    Raises:
        CheckpointError: files that are missing or can't be used.
    """
    chat_template = chat_template_of(folder, places)  # first: it names the file that is bad
    return dataclasses.replace(read_tokenizer(folder, vocab_size), chat_template=chat_template)


def read_tokenizer(folder: Path, vocab_size: int) -> ChatFiles:
    """Reads a folder's tokenizer, without a template.

    Args:
        vocab_size: of the decoder. Tokens that transformers adds beyond it, a padding token for
            one, have no row in the embedding and are left out.

    Raises:
        CheckpointError: no tokenizer.json, or a tokenizer that transformers can't read.
    """
    path = tokenizer_of(folder)
    reader: Any = AutoTokenizer if _names_a_class(folder) else PreTrainedTokenizerFast
    try:
        data = path.read_bytes()
        read_tokenizer_json(data)
        # It would otherwise ask at the terminal whether to run code that came with the folder.
        with panics_as_exceptions():
            tokenizer = reader.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        own = json.loads(data)
        made = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # of bad files, transformers and tokenizers raise all kinds
        raise CheckpointError(
            f"cannot read the tokenizer of {folder}",
            expected="a tokenizer.json of the tokenizers package, and files that go with it",
            found=next(iter(str(error).splitlines()), type(error).__name__),
        ) from error
    stored = {token["content"] for token in own.get("added_tokens", ())}
    made["added_tokens"] = [
        token
        for token in made["added_tokens"]
        if token["id"] < vocab_size or token["content"] in stored
    ]
    special = dict(tokenizer.special_tokens_map)
    return ChatFiles(
        json.dumps(made, ensure_ascii=False),
        "",
        Chat(special, bool(tokenizer.split_special_tokens)),
    )


def _names_a_class(folder: Path) -> bool:
    """Whether the folder says which of transformers' tokenizers it is for."""
    if (folder / TOKENIZER_CONFIG).is_file() and json_object(folder / TOKENIZER_CONFIG).get(
        "tokenizer_class"
    ):
        return True
    config = json_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return bool(config.get("tokenizer_class")) or str(config.get("model_type")) in CONFIG_MAPPING
