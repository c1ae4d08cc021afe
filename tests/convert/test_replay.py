"""A HiMix decoder over a teacher's own keys and values says what transformers says: every family.

The reference is transformers' class, or its modules, from the image and the whole prompt on, in its
own tokenizer's ids and its own processor's pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from himix_edge.config import ProjectionConfig
from himix_edge.convert.questions import prompt_encoder
from himix_edge.convert.source import teacher_from_folder, teacher_from_source
from himix_edge.convert.teacher import Teacher, TeacherSource, student_config, student_of
from himix_edge.convert.tinyllava import SYSTEM as TINYLLAVA_SYSTEM
from himix_edge.models.decoder import KV
from himix_edge.runtimes.preprocess import pixel_values
from tests import tolerances
from tests.convert.llava import TEXT, image_id, processor, write_llava

QUESTION = "How many objects?"
NEW_TOKENS = 10
UNTIED: dict[str, Any] = {
    "text_config": Qwen2Config(**TEXT, tie_word_embeddings=False),
    "tie_word_embeddings": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "clip-llama": ("llava", {}),
    "siglip-qwen2-full": ("llava_siglip", {}),
    "siglip-qwen2-default": ("llava_siglip", {"vision_feature_select_strategy": "default"}),
    "onevision-tied": ("llava_onevision", {}),
    "onevision-untied": ("llava_onevision", UNTIED),
    "tinyllava": ("tinyllava", {}),
}


@dataclass(frozen=True)
class Case:
    """One family's folder, and what transformers makes of it.

    Attributes:
        reference: the ids of the text so far -> logits [M, V] of its last M positions.
        suppressed: the columns of the logits that the converted model never says.
    """

    source: TeacherSource
    text_ids: list[int]
    reference: Callable[[list[int]], Tensor]
    pixels: Tensor
    suppressed: list[int]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """Those made so far."""
    return {}


@pytest.fixture
def case(
    request: pytest.FixtureRequest,
    cases: dict[str, Case],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    name = request.param
    if name not in cases:
        family, changes = CASES[name]
        cases[name] = case_of(tmp_path_factory.mktemp("llava") / name, family, changes)
    return cases[name]


def case_of(folder: Path, family: str, changes: dict[str, Any]) -> Case:
    model = write_llava(folder, family, **changes)
    source = teacher_from_folder(folder)
    pixels = reference_pixels(family)
    image_tokens = source.config.vision.num_image_tokens
    if family == "tinyllava":
        of_parts, text = tinyllava_reference(folder, model, pixels)
        return Case(source, text, of_parts, pixels, [])
    image = image_id(family)
    onevision = family == "llava_onevision"
    ids = chat_ids(folder)
    place = ids.index(image)
    before, after = ids[:place], ids[place + 1 :]
    whole = [*before, *[image] * (image_tokens + onevision)]
    # OneVision takes the base tile alone where it believes that there are several images.
    extra: dict[str, Any] = {"pixel_values": pixels}
    if onevision:
        extra = {
            "pixel_values": pixels[None],
            "image_sizes": torch.tensor([pixels.shape[-2:]]),
            "batch_num_images": torch.tensor([2]),
        }

    def reference(text: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=torch.tensor([whole + text]), **extra).logits[0]
        return logits[-len(text) :]

    return Case(source, after, reference, pixels, [image] if onevision else [])


def tinyllava_reference(
    folder: Path, modules: tuple[Any, Any, Any], pixels: Tensor
) -> tuple[Callable[[list[int]], Tensor], list[int]]:
    """`prepare_inputs_labels_for_multimodal` and `tokenizer_image_token` for one image."""
    vision, language, connector = modules
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>")
    prompt = f"{TINYLLAVA_SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"
    before, after = (tokenizer(chunk).input_ids for chunk in prompt.split("<image>"))
    assert before[0] == after[0] == tokenizer.bos_token_id
    with torch.no_grad():
        hidden = vision(pixels, output_hidden_states=True).hidden_states[-2]
        image = connector(hidden[:, 1:])
    embedded = language.get_input_embeddings()

    def reference(text: list[int]) -> Tensor:
        parts = (embedded(torch.tensor([before])), image, embedded(torch.tensor([text])))
        with torch.no_grad():
            logits: Tensor = language(inputs_embeds=torch.cat(parts, dim=1)).logits[0]
        return logits[-len(text) :]

    return reference, after[1:]


def chat_ids(folder: Path) -> list[int]:
    """As transformers' processor makes them, before it repeats the image's token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(text).input_ids
    return ids


def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (50, 41, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def reference_pixels(family: str) -> Tensor:
    found: Tensor = processor(family)(picture(), return_tensors="pt")["pixel_values"]
    return found[:, 0] if found.dim() == 5 else found  # the first tile is the base tile


def text_ids(source: TeacherSource) -> list[int]:
    """As the device makes them."""
    return prompt_encoder(source).encode_turn((), QUESTION)


def features_of(teacher: Teacher) -> Tensor:
    own = pixel_values(picture(), teacher.model.config.preprocess)
    with torch.no_grad():
        features: Tensor = teacher.model.vision(torch.from_numpy(own))
    return features


def replayed_logits(teacher: Teacher, cache: list[KV], ids: list[int]) -> tuple[Tensor, list[KV]]:
    student = student_of(teacher, student_config(teacher, (), ProjectionConfig()))
    logits, cache = student.decode(torch.tensor([ids]), cache)
    return logits[0], cache


def error(case: Case, ours: Tensor, reference: Tensor) -> float:
    kept = [i for i in range(ours.shape[-1]) if i not in case.suppressed]
    return float((ours - reference)[..., kept].abs().max())


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_prefill_and_ten_tokens_are_transformers(case: Case) -> None:
    teacher = teacher_from_source(case.source)
    ids = text_ids(case.source)
    opening = len(ids) - len(case.text_ids)  # image_newline, which the reference has with the image
    assert ids[opening:] == case.text_ids

    cache = teacher.replayed(teacher.image_cache(features_of(teacher)))
    logits, cache = replayed_logits(teacher, cache, ids)
    text = list(case.text_ids)
    expected = case.reference(text)
    assert error(case, logits[opening:], expected) < tolerances.REPLAY_LOGITS
    student = student_of(teacher, student_config(teacher, (), ProjectionConfig()))
    for _ in range(NEW_TOKENS):
        theirs = expected[-1].clone()
        theirs[case.suppressed] = -torch.inf
        token = int(theirs.argmax())
        assert int(logits[-1].argmax()) == token
        text.append(token)
        step, cache = student.decode(torch.tensor([[token]]), cache)
        logits, expected = step[0], case.reference(text)
        assert error(case, logits, expected[-1:]) < tolerances.REPLAY_LOGITS


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_teachers_own_logits_are_transformers_whatever_is_suppressed(case: Case) -> None:
    """Every column, that of <image> included, whose row of the embedding has been replaced."""
    teacher = teacher_from_source(case.source)
    ids = text_ids(case.source)
    cache = teacher.image_cache(features_of(teacher))
    ours = teacher.logits(torch.tensor([ids]), cache)[0]
    expected = case.reference(case.text_ids)
    opening = len(ids) - len(case.text_ids)
    assert float((ours[opening:] - expected).abs().max()) < tolerances.REPLAY_LOGITS
    student = student_of(teacher, student_config(teacher, (), ProjectionConfig()))
    assert student.config.decoder.suppressed_token_ids == tuple(case.suppressed)
    logits = student.decode(torch.tensor([ids]), teacher.replayed(cache))[0][0]
    for token in case.suppressed:
        assert float(logits[:, token].max()) < float(logits.median()) - 1e4
        assert bool(logits.isfinite().all())


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_the_prefix_the_rotation_and_the_image_matter(case: Case) -> None:
    ids = text_ids(case.source)
    teacher = teacher_from_source(case.source)
    features = features_of(teacher)
    cache = teacher.image_cache(features)
    expected = case.reference(case.text_ids)
    opening = len(ids) - len(case.text_ids)
    without_prefix = Teacher(teacher.model, ())
    wrong = {
        "rotation": (teacher, cache),
        "prefix": (without_prefix, without_prefix.replayed(without_prefix.image_cache(features))),
        "image": (teacher, teacher.replayed(teacher.image_cache(features.flip(1)))),
    }
    for what, (model, slots) in wrong.items():
        logits, _ = replayed_logits(model, slots, ids)
        assert error(case, logits[opening:], expected) > 100 * tolerances.REPLAY_LOGITS, what


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_pixels_are_the_processors(case: Case) -> None:
    own = pixel_values(picture(), case.source.config.preprocess)
    np.testing.assert_allclose(
        own.reshape(case.pixels.shape), case.pixels.numpy(), rtol=0, atol=tolerances.PIXEL_VALUES
    )
