"""A whole model of random weights: for measuring a device before anything was trained."""

from __future__ import annotations

import json

from tokenizers import pre_tokenizers

from himix_edge.config import HiMixConfig
from himix_edge.errors import ConfigError
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import hollow_model
from himix_edge.models.weights import random_weights

NOTICE = "Its weights are random: time it, weigh it, and don't believe a word it says."
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def random_checkpoint(name: str, config: HiMixConfig) -> Checkpoint:
    """A checkpoint that is nowhere stored: every weight is drawn from its name when it is read.

    Time and memory don't depend on the values. Its tokenizer knows bytes, and calls every id
    beyond them by its number.

    Raises:
        ConfigError: a vocabulary too small for the 256 bytes.
    """
    return Checkpoint(
        name=f"{name}-random",
        notice=NOTICE,
        config=config,
        weights=random_weights(hollow_model(config).state_dict()),
        tokenizer_json=byte_tokenizer(config.decoder.vocab_size),
        chat_template=CHAT_TEMPLATE,
        model_card=f"# {name}, random weights\n\n{NOTICE}\n",
        files={},
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
