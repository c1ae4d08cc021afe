"""What the model was asked, and that it is written down as the model said it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from himix_edge.export.expected import Expected, expected_from_model, trial_images
from himix_edge.models.checkpoints import Checkpoint
from himix_edge.models.himix import HiMix
from himix_edge.runtimes.preprocess import pixel_values
from himix_edge.shapes.render import render
from himix_edge.shapes.scenes import random_scene
from tests.tolerances import CACHED_DECODE

PROMPTS = [[1, 40, 41, 42, 2], [1, 50, 2]]


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> HiMix:
    return tiny_checkpoint.model()


@pytest.fixture(scope="module")
def expected(model: HiMix) -> Expected:
    return expected_from_model(model, trial_images(model.config.preprocess), PROMPTS)


def test_trial_images_are_preprocessed_pictures(model: HiMix) -> None:
    images = trial_images(model.config.preprocess)
    assert [image.shape for image in images] == [(1, 3, 28, 28)] * 3
    assert all(image.std() > 0.05 for image in images)
    assert not any(np.array_equal(images[0], image) for image in images[1:])
    first = render(random_scene(np.random.default_rng(0)))
    assert np.array_equal(images[0], pixel_values(first, model.config.preprocess))


def test_every_image_is_asked_alone_and_two_together(expected: Expected, model: HiMix) -> None:
    images = trial_images(model.config.preprocess)
    alone, both = expected.cases[:-1], expected.cases[-1]
    for i, case in enumerate(alone):
        assert np.array_equal(case.pixels, images[i])
        assert case.prefill.ids.tolist() == [PROMPTS[i % 2]]
    assert np.array_equal(both.pixels, np.concatenate(images[:2]))
    assert both.prefill.ids.tolist() == [PROMPTS[0][-3:], PROMPTS[1]]


def test_numbers_are_those_of_one_full_forward_pass(expected: Expected, model: HiMix) -> None:
    for case in expected.cases:
        pixels, ids = torch.from_numpy(case.pixels), torch.from_numpy(case.prefill.ids)
        image = [part.numpy() for kv in model.encode(pixels) for part in kv]
        for found, part in zip(case.image, image, strict=True):
            np.testing.assert_array_equal(found, part)
        logits = model(pixels, ids)[:, -1]
        np.testing.assert_allclose(case.prefill.logits, logits, rtol=0, atol=CACHED_DECODE)
        assert case.decode.ids.tolist() == logits.argmax(-1)[:, None].tolist()

        longer = torch.cat((ids, torch.from_numpy(case.decode.ids)), dim=1)
        all_logits, cache = model.decode(longer, model.encode(pixels))
        np.testing.assert_allclose(
            case.decode.logits, all_logits[:, -1], rtol=0, atol=CACHED_DECODE
        )
        count = ids.shape[1]
        flat = [part.numpy() for kv in cache for part in kv]
        for i, part in enumerate(flat):
            prefill, decode = case.prefill.present[i], case.decode.present[i]
            new = np.concatenate((prefill, decode), axis=2)
            assert (prefill.shape[2], decode.shape[2]) == (count, 1)
            np.testing.assert_allclose(new, part[:, :, 4:], rtol=0, atol=CACHED_DECODE)


def test_greedy_is_the_model_s(expected: Expected, model: HiMix) -> None:
    assert len(expected.greedy) == 3
    for i, greedy in enumerate(expected.greedy):
        assert greedy.prompt == PROMPTS[i % 2]
        pixels, prompt = torch.from_numpy(greedy.pixels), torch.tensor([greedy.prompt])
        assert greedy.tokens == model.generate_greedy(pixels, prompt, 16)
        assert [int(logits.argmax()) for logits in greedy.logits] == greedy.tokens
        text = torch.tensor([greedy.prompt + greedy.tokens[:-1]])
        logits = model(pixels, text)[0, -1]
        np.testing.assert_allclose(greedy.logits[-1], logits, rtol=0, atol=CACHED_DECODE)


def test_greedy_ends_with_the_first_end_token(tiny_checkpoint: Checkpoint) -> None:
    model = tiny_checkpoint.model()
    images = trial_images(model.config.preprocess)
    first = expected_from_model(model, images, PROMPTS).greedy[0].tokens
    end = next(token for token in first[1:] if token != first[0])
    decoder = dataclasses.replace(model.config.decoder, eos_token_ids=(end,))
    model.config = dataclasses.replace(model.config, decoder=decoder)
    cut = expected_from_model(model, images, PROMPTS).greedy[0]
    assert cut.tokens == first[: first.index(end) + 1]
    assert len(cut.logits) == len(cut.tokens)
