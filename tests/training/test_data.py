from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from himix_edge.contract import Chat
from himix_edge.runtimes.chat import ChatTemplate
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.runtimes.tokenizer import Tokenizer as RuntimeTokenizer
from himix_edge.shapes.questions import KINDS, ask, is_right
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene
from himix_edge.training.data import (
    NO_LOSS,
    RENDERED_SIZES,
    image_batch,
    scene_batch,
    text_batch,
)
from himix_edge.training.recipe import ASKED, SHAPES
from himix_edge.training.tokens import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    END_ID,
    USER,
    casual,
    token_ids,
    tokenizer_from_world,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_from_world(0)


def test_the_tokenizer_is_the_same_each_time_and_fits_the_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.to_str() == tokenizer_from_world(0).to_str()
    assert tokenizer.get_vocab_size() <= SHAPES.config.decoder.vocab_size
    assert tokenizer.token_to_id(END) == END_ID
    assert SHAPES.config.decoder.eos_token_ids == (END_ID,)


def test_the_words_of_the_world_are_one_token_each(tokenizer: Tokenizer) -> None:
    sentence = "A large red circle, a small orange triangle and a small black cross."
    assert len(tokenizer.encode(sentence).ids) == len(sentence.split()) + 2  # comma, full stop
    assert tokenizer.decode(tokenizer.encode("Grüße, 世界!").ids) == "Grüße, 世界!"


def test_training_writes_prompts_as_the_runtime_does(tokenizer: Tokenizer, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    chat = ChatTemplate(CHAT_TEMPLATE, Chat())
    runtime = RuntimeTokenizer(path.read_bytes(), chat, path)
    rng = np.random.default_rng(0)
    for kind in KINDS:
        question = ask(kind, random_scene(rng), rng)
        if question:
            prompt, answer = token_ids(tokenizer, question.text, question.answer)
            assert runtime.encode_turn(chat.first, question.text) == prompt
            assert runtime.decode(answer) == question.answer


def test_casual_questions() -> None:
    assert casual("Is there a star?") == "is there a star"
    assert casual("Describe the picture.") == "describe the picture"


def test_texts_are_prompt_then_answer_and_only_the_answer_is_learned(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(5)
    scenes = scene_batch(rng, 6)
    batch = text_batch(scenes, ASKED, tokenizer, rng)
    rows, length = batch.input_ids.shape
    assert rows == len(batch.kinds) == 6 * len(ASKED)
    assert batch.labels.shape == (rows, length)
    for i, kind in enumerate(batch.kinds):
        learned = batch.labels[i] != NO_LOSS
        answer = batch.labels[i][learned].tolist()
        assert answer[-1] == END_ID
        first = int(learned.nonzero()[0])
        last = int(learned.nonzero()[-1])
        assert learned[first : last + 1].all()
        # What is learned at each token is the one that follows it.
        assert torch.equal(batch.input_ids[i, first + 1 : last + 1], batch.labels[i, first:last])
        text = tokenizer.decode(batch.input_ids[i, : first + 1].tolist(), skip_special_tokens=False)
        assert text.startswith(USER)
        assert text.endswith(ASSISTANT)
        if kind == "describe":
            scene = scenes[i // len(ASKED)]
            question = ask("describe", scene, rng)
            assert question
            assert is_right(question, tokenizer.decode(answer))


def test_images_are_preprocessed_scenes() -> None:
    rng = np.random.default_rng(9)
    scenes = scene_batch(rng, 4)
    images = image_batch(scenes, SHAPES.config, rng)
    assert images.shape == (4, 3, 112, 112)
    for scene, image in zip(scenes, images, strict=True):
        possible = [
            pixel_values(render(scene, int(112 * size)), SHAPES.config.preprocess)[0]
            for size in RENDERED_SIZES
        ]
        assert any(np.array_equal(image.numpy(), candidate) for candidate in possible)


def test_batches_depend_on_the_generator_alone(tokenizer: Tokenizer) -> None:
    def batch(seed: int) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        return text_batch(scene_batch(rng, 3), ASKED, tokenizer, rng).input_ids

    assert torch.equal(batch(1), batch(1))
    assert batch(1).shape != batch(2).shape or not torch.equal(batch(1), batch(2))
