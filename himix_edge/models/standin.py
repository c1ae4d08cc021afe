"""Models of random weights, whole or in part: to measure a device before anything was trained."""

from __future__ import annotations

import json

from tokenizers import pre_tokenizers

from himix_edge.config import HiMixConfig
from himix_edge.contract import Chat
from himix_edge.errors import ConfigError
from himix_edge.models.chat_files import ChatFiles
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import hollow_model
from himix_edge.models.weights import Weights, random_weights

NOTICE = "Its weights are random: time it, weigh it, and don't believe a word it says."
# Of a pretrained decoder whose projections are random: it reads text, and sees nothing.
BLIND_NOTICE = (
    "Its projections are random: it reads text as its decoder does, and what it says of a picture "
    "means nothing."
)
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def random_checkpoint(
    name: str,
    config: HiMixConfig,
    pretrained: Weights | None = None,
    chat_files: ChatFiles | None = None,
) -> Checkpoint:
    """A checkpoint whose weights are drawn from their names when they are read, save some.

    Time and memory don't depend on the values.

    Args:
        pretrained: weights that are not random: those of a whole encoder, or of a whole decoder.
        chat_files: of a pretrained decoder. Without them the tokenizer knows bytes, and calls every
            id beyond them by its number.

    Raises:
        ConfigError: a vocabulary too small for the 256 bytes.
    """
    notice = BLIND_NOTICE if chat_files else NOTICE
    files = chat_files or ChatFiles(
        byte_tokenizer(config.decoder.vocab_size), CHAT_TEMPLATE, Chat()
    )
    weights = {**random_weights(hollow_model(config).state_dict()), **(pretrained or {})}
    return Checkpoint(
        name=f"{name}-random",
        notice=notice,
        config=config,
        weights=weights,
        tokenizer_json=files.tokenizer_json,
        chat_template=files.chat_template,
        model_card=f"# {name}, random weights\n\n{notice}\n",
        files={},
        chat=files.chat,
    )


def byte_tokenizer(vocab_size: int) -> str:
    """A `tokenizer.json` of that many ids: the bytes first, then "<256>" and so on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet):
        raise ConfigError(
            "vocab_size is too small for random weights",
            expected=f"{len(alphabet)} or more: one id a byte",
            found=str(vocab_size),
        )
    tokens = [*alphabet, *(f"<{i}>" for i in range(len(alphabet), vocab_size))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {**byte_level, "trim_offsets": False},
            "decoder": {**byte_level, "trim_offsets": False},
            "model": {
                "type": "BPE",
                "vocab": {token: i for i, token in enumerate(tokens)},
                "merges": [],
            },
        }
    )
