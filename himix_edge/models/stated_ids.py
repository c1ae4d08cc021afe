"""Which tokens end an answer, and which are never chosen: as a Hugging Face folder states it.

generation_config.json if it names any end token; else config.json; else the tokenizer's own. The
first that names one decides alone, and what a config class of transformers has by default is never
stated. Reference: `GenerationConfig.from_pretrained` and `from_model_config`; where these find no
end token transformers has none, and here the tokenizer's counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from himix_edge.config import DecoderConfig
from himix_edge.contract import TOKENIZER
from himix_edge.errors import CheckpointError
from himix_edge.models.hub import CONFIG, json_object
from himix_edge.models.tokenizer_files import TOKENIZER_CONFIG, special_token
from himix_edge.plain import shown
from himix_edge.tokenizer_json import read_tokenizer_json

GENERATION_CONFIG = "generation_config.json"


def with_stated_ids(
    folder: Path, decoder: DecoderConfig, *configs: Mapping[str, Any]
) -> DecoderConfig:
    """The decoder with the folder's end tokens, and those that its generation never chooses.

    Args:
        configs: `config.json` and its `text_config` as they are written, the first to be asked
            first.

    Raises:
        CheckpointError: an id that is none of the decoder's; it names the file. A file that can't
            be read.
    """
    size = decoder.vocab_size
    ends = _end_token_ids(folder, size, configs)
    stated = dict.fromkeys(_suppressed(folder, size, ends, configs))
    return dataclasses.replace(
        decoder,
        eos_token_ids=ends,
        suppressed_token_ids=tuple(dict.fromkeys((*decoder.suppressed_token_ids, *stated))),
    )


def without_end(decoder: DecoderConfig) -> str | None:
    """What to say of a decoder that no token ends; None of all others."""
    if decoder.eos_token_ids:
        return None
    return (
        "nothing names a token that ends an answer: every answer goes on to its longest. If the "
        f"model has one, put its id into {GENERATION_CONFIG}, as eos_token_id, and begin again"
    )


def _end_token_ids(
    folder: Path, vocab_size: int, configs: tuple[Mapping[str, Any], ...]
) -> tuple[int, ...]:
    path = folder / GENERATION_CONFIG
    places = [(path, json_object(path))] if path.is_file() else []
    places += [(folder / CONFIG, dict(config)) for config in configs]
    for place, data in places:
        if named := _as_list(data.get("eos_token_id")):
            return _ids(place, "eos_token_id", named, vocab_size)
    return _ids(folder / TOKENIZER_CONFIG, "eos_token", list(_of_tokenizer(folder)), vocab_size)


def _suppressed(
    folder: Path, vocab_size: int, ends: tuple[int, ...], configs: tuple[Mapping[str, Any], ...]
) -> tuple[int, ...]:
    """suppress_tokens, and the bad words of one token each; transformers lets these end an answer.

    config.json counts where there is no generation_config.json.
    """
    path = folder / GENERATION_CONFIG
    places = [(path, json_object(path))] if path.is_file() else []
    places = places or [(folder / CONFIG, dict(config)) for config in configs]
    found: list[int] = []
    for place, data in places:
        found += _ids(place, "suppress_tokens", _as_list(data.get("suppress_tokens")), vocab_size)
        words = _as_list(data.get("bad_words_ids"))
        single = [word[0] for word in words if isinstance(word, list) and len(word) == 1]
        found += (i for i in _ids(place, "bad_words_ids", single, vocab_size) if i not in ends)
    return tuple(found)


def _of_tokenizer(folder: Path) -> Iterator[int]:
    """The id of the tokenizer's own end token, if it has one."""
    text = special_token(folder, "eos_token")
    if not text or not (folder / TOKENIZER).is_file():
        return
    try:
        read = read_tokenizer_json((folder / TOKENIZER).read_bytes())
        found = read.tokenizer.token_to_id(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {folder / TOKENIZER}",
            expected="a tokenizer.json of the tokenizers package",
            found=" ".join(str(error).split()),
        ) from error
    if found is None:  # a token that stands in the tokenizer's config alone
        path = folder / TOKENIZER_CONFIG
        added = json_object(path).get("added_tokens_decoder") if path.is_file() else None
        for key, token in added.items() if isinstance(added, dict) else ():
            if isinstance(token, dict) and token.get("content") == text and key.isdecimal():
                found = int(key)
    if found is not None:
        yield found


def _ids(path: Path, name: str, named: list[Any], vocab_size: int) -> tuple[int, ...]:
    if wrong := [i for i in named if type(i) is not int or not 0 <= i < vocab_size]:
        raise CheckpointError(
            f"cannot use {path}",
            expected=f"{name} of 0 to {vocab_size - 1}, the decoder's vocabulary",
            found=shown(wrong[0] if len(wrong) == 1 else wrong),
            fix=f"put the model's own {name} there",
        )
    return tuple(dict.fromkeys(named))


def _as_list(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
