"""The demo model's own tokenizer and chat template, made from the world's questions and answers."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from himix_edge.shapes.questions import KINDS, ask
from himix_edge.shapes.scenes import random_scene

END, USER, ASSISTANT = CONTROLS = ("<|end|>", "<|user|>", "<|assistant|>")
END_ID, USER_ID, ASSISTANT_ID = range(3)  # control tokens come first
VOCABULARY_LIMIT = 1024
CORPUS_SCENES = 2000

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}" + USER + "{{ message['content'] }}"
    "{%- else -%}" + ASSISTANT + "{{ message['content'] }}" + END + "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}" + ASSISTANT + "{%- endif -%}"
)


def tokenizer_from_world(seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer: the world's words are one token each, other text is spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        special_tokens=[AddedToken(token, special=True) for token in CONTROLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    return tokenizer


def token_ids(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The prompt's and the answer's tokens, as the chat template sets them."""
    prompt = [USER_ID, *tokenizer.encode(question).ids, ASSISTANT_ID]
    return prompt, [*tokenizer.encode(answer).ids, END_ID]


def _corpus(seed: int) -> list[str]:
    texts = []
    rng = np.random.default_rng(seed)
    for _ in range(CORPUS_SCENES):
        scene = random_scene(rng)
        for question in (ask(kind, scene, rng) for kind in KINDS):
            if question:
                texts += [question.text, casual(question.text), question.answer]
    return texts


def casual(text: str) -> str:
    """The question as people type it: no capital, no question mark."""
    return text[0].lower() + text[1:].rstrip("?.")
