from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import himix_edge
from himix_edge.contract import (
    DECODER_GRAPH,
    MANIFEST,
    PREPROCESSOR,
    TOKENIZER,
    VISION_GRAPH,
    Chat,
    Manifest,
)
from himix_edge.errors import BundleError, ConfigError, ImageError, PromptError
from himix_edge.runtimes.chat import Message, assistant_message, user_message
from himix_edge.runtimes.conversation import EncodedImage
from himix_edge.runtimes.model import Model, load
from himix_edge.runtimes.preprocess import load_image, pixel_values
from himix_edge.runtimes.sampling import SamplingOptions
from tests.runtimes.conftest import TinyBundle
from tests.runtimes.fakes import (
    CHAT,
    VOCAB_SIZE,
    FakeEngine,
    Rule,
    arithmetic,
    byte_tokenizer,
    ids_of,
    manifest,
    tiny_config,
    tokenizer_at,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def fake_model(tmp_path: Path, rule: Rule, capacity: int = 1000) -> Model:
    config = tiny_config()
    decoder = dataclasses.replace(config.decoder, max_position_embeddings=capacity)
    description = manifest(dataclasses.replace(config, decoder=decoder))
    tokenizer = byte_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Model(
        description,
        tokenizer_at(tmp_path / "tokenizer.json", CHAT),
        FakeEngine(rule, capacity),
    )


# One question


def test_an_answer(tmp_path: Path) -> None:
    model = fake_model(tmp_path, lambda _, text, __: [*ids_of("A dog."), 0][len(text) - 6])
    answer = model.generate(model.encode(PICTURE), "what")
    assert list(answer) == list("A dog.")
    assert (answer.text, answer.prompt_tokens, answer.tokens) == ("A dog.", 6, 6)
    assert answer.finish_reason == "stop"
    assert set(answer.milliseconds) == {"prefill", "decode"}
    assert isinstance(model.engine, FakeEngine)
    assert model.engine.fed[0] == [1, *ids_of("what"), 2]


def test_options_by_object_and_by_name(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    image = model.encode(PICTURE)
    five = SamplingOptions(max_tokens=5)
    assert len(model.generate(image, "x").read()) == SamplingOptions().max_tokens
    assert len(model.generate(image, "x", five).read()) == 5
    assert len(model.generate(image, "x", max_tokens=4).read()) == 4
    whole = model.generate(image, "x", five).read()
    cut = model.generate(image, "x", five, stop=(whole[2:4],))
    assert (cut.read(), cut.finish_reason) == (whole[:2], "stop")
    with pytest.raises(ConfigError, match=r"unknown sampling option 'max_token'.*'max_tokens'\?"):
        model.generate(image, "x", max_token=4)


def test_a_seed_fixes_the_answer(bundle: TinyBundle) -> None:
    model = load(bundle.folder, threads=1)
    image = model.encode(PICTURE)

    def text(seed: int) -> list[str]:
        return list(model.generate(image, "what", temperature=1.5, seed=seed, max_tokens=20))

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", None, 5])
def test_no_prompt(tmp_path: Path, prompt: str) -> None:
    model = fake_model(tmp_path, arithmetic)
    with pytest.raises(PromptError, match="the prompt is empty: expected a question"):
        model.generate(model.encode(PICTURE), prompt)


def test_a_prompt_must_leave_room_for_a_token(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic, capacity=20)
    image = model.encode(PICTURE)
    with pytest.raises(PromptError) as error:
        model.generate(image, "x" * 18)
    assert str(error.value) == (
        "the prompt is too long: expected at most 19 tokens, template and earlier turns included, "
        "found 20. "
        "Fix: shorten it"
    )
    answer = model.generate(image, "x" * 17)
    assert len(answer.read()) == 1
    assert answer.finish_reason == "length"


def test_a_full_context_ends_the_answer(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic, capacity=20)
    answer = model.generate(model.encode(PICTURE), "what", max_tokens=50)
    answer.read()
    assert (answer.prompt_tokens, answer.tokens, answer.finish_reason) == (6, 14, "length")


def test_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png can't be read"):
        fake_model(tmp_path, arithmetic).encode(tmp_path / "none.png")


def test_many_questions_on_one_image(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    image, other = model.encode(PICTURE), model.encode(PICTURE[::-1] // 2)
    first = model.generate(image, "what", max_tokens=9).read()
    assert model.generate(image, "who", max_tokens=9).read() != first
    assert model.generate(other, "what", max_tokens=9).read() != first
    assert model.generate(image, "what", max_tokens=9).read() == first


def test_two_answers_read_by_turns(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    image = model.encode(PICTURE)
    alone = [model.generate(image, prompt, max_tokens=9).read() for prompt in ("what", "who")]
    answers = [model.generate(image, prompt, max_tokens=9) for prompt in ("what", "who")]
    for _ in range(9):
        for answer in answers:
            next(answer)
    assert [answer.text for answer in answers] == alone


# Conversations


def fed(model: Model) -> list[int]:
    assert isinstance(model.engine, FakeEngine)
    return [token for step in model.engine.fed for token in step]


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_further_turn_goes_on_from_the_text_before(tmp_path: Path, reason: str) -> None:
    """Whether or not the answer before ended with its end token, the template closes it once."""

    def rule(image: int, text: list[int], positions: list[int]) -> int:
        ended = reason == "stop" and len(text) == 1 + 4 + 1 + 3
        return 0 if ended else arithmetic(image, text, positions)

    model = fake_model(tmp_path, rule)
    conversation = model.chat(model.encode(PICTURE))
    first = conversation.ask("what", max_tokens=3 if reason == "length" else 50)
    said = first.read()
    assert (len(said), first.finish_reason) == (3, reason)
    second = conversation.ask("who", max_tokens=6)
    text = [1, *ids_of("what"), 2, *ids_of(said), 0, 1, *ids_of("who"), 2]
    assert conversation._cache
    number = conversation._cache.tensors[0]
    for character in second:
        expected = arithmetic(number, text, list(range(len(text))))
        assert ids_of(character) == [expected]
        text.append(expected)
    assert (second.prompt_tokens, second.cached_tokens) == (15, 9 if reason == "stop" else 8)
    assert fed(model) == text[:-1]  # each token once; the last not yet


def test_an_answer_left_early_ends_where_it_was_left(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    conversation = model.chat(model.encode(PICTURE))
    left = conversation.ask("what")
    said = next(left) + next(left)
    conversation.ask("who", max_tokens=1).read()
    assert list(left) == []
    assert fed(model) == [1, *ids_of("what"), 2, *ids_of(said), 0, 1, *ids_of("who"), 2]


def test_a_question_whose_answer_nobody_reads(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    conversation = model.chat(model.encode(PICTURE))
    conversation.ask("what")
    conversation.ask("who", max_tokens=1).read()
    assert fed(model) == [1, *ids_of("what"), 2, 0, 1, *ids_of("who"), 2]


def test_a_refused_question_changes_nothing(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic, capacity=30)
    conversation = model.chat(model.encode(PICTURE))
    answer = conversation.ask("what", max_tokens=5)
    next(answer)
    with pytest.raises(PromptError, match=r"at most 29 tokens, .*found 110.* new conversation"):
        conversation.ask("x" * 100)
    with pytest.raises(PromptError, match="empty"):
        conversation.ask(" ")
    with pytest.raises(ConfigError):
        conversation.ask("x", top_p=3)
    assert len(answer.read()) == 5


def test_a_context_that_the_answer_has_filled(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic, capacity=20)
    conversation = model.chat(model.encode(PICTURE))
    assert len(conversation.ask("what").read()) == 14
    with pytest.raises(PromptError, match=r"at most 19 tokens, .*found 24"):
        conversation.ask("x")


# A real bundle


def test_how_an_image_is_given_and_resized(
    bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(bundle.folder, threads=1)
    config = bundle.model.config.preprocess
    wide = np.concatenate([PICTURE] * 5, 1)
    seen: list[np.ndarray[Any, Any]] = []
    encode = model.engine.encode

    def watched(pixels: Any) -> Any:
        seen.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(model.engine, "encode", watched)
    plain = model.encode(wide)
    swapped = model.encode(wide[:, :, ::-1], channels="BGR")
    padded = model.encode(wide, resize="pad")
    np.testing.assert_array_equal(seen[0], pixel_values(load_image(wide), config))
    np.testing.assert_array_equal(seen[1], seen[0])
    padding = dataclasses.replace(config, resize="pad")
    np.testing.assert_array_equal(seen[2], pixel_values(load_image(wide), padding))
    assert plain.notices == swapped.notices
    assert "15 %" in plain.notices[0]
    assert "pad gives this 200 x 30 picture 15 %" in padded.notices[0]
    assert model.encode(PICTURE).notices == ()
    with pytest.raises(ConfigError, match=r"found 'crops'.*mean 'crop'"):
        model.encode(wide, resize="crops")


def greedy(tiny: TinyBundle, text: list[int], count: int) -> list[int]:
    pixels = pixel_values(load_image(PICTURE), tiny.model.config.preprocess)
    return tiny.model.generate_greedy(torch.from_numpy(pixels), torch.tensor([text]), count)


@pytest.mark.parametrize("name", ["bundle", "vanilla_bundle"])
def test_conversations_are_the_models_own(name: str, request: pytest.FixtureRequest) -> None:
    """Three turns on one cache; each answer is the model's to the whole text from scratch."""
    tiny = request.getfixturevalue(name)
    model = load(tiny.folder, threads=1)
    conversation = model.chat(model.encode(PICTURE))
    history: list[Message] = []
    for question in ("what", "who is it", "why"):
        text = model.tokenizer.encode_turn(history, question)
        expected = [token for token in greedy(tiny, text, 6) if token != 0]
        answer = conversation.ask(question, max_tokens=6)
        answer.read()
        assert conversation._text == text + expected
        assert answer.prompt_tokens == len(text)
        assert answer.text == model.tokenizer.decode(expected)
        assert answer.tokens == len(expected)
        history += [user_message(question), assistant_message(answer.text)]
        assert conversation.messages == history
    assert len(text) > 30


def test_load_from_the_package_and_by_string(bundle: TinyBundle) -> None:
    model = himix_edge.load(str(bundle.folder), threads=1)
    assert isinstance(model, Model)
    image = model.encode(PICTURE)
    assert isinstance(image, EncodedImage)
    assert set(image.milliseconds) == {"preprocess", "vision"}
    assert all(ms > 0 for ms in image.milliseconds.values())
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        himix_edge.lod  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [VISION_GRAPH, DECODER_GRAPH, f"{DECODER_GRAPH}.data", TOKENIZER, PREPROCESSOR, MANIFEST],
)
def test_one_byte_flipped(bundle: TinyBundle, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name} is corrupt"):
        load(folder)


def test_verify_may_be_left_out(bundle: TinyBundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    (folder / TOKENIZER).write_text((folder / TOKENIZER).read_text() + " ")
    with pytest.raises(BundleError, match=r"tokenizer\.json is corrupt"):
        load(folder)
    assert load(folder, verify=False, threads=1).manifest.name == "tiny"


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle.*himix-edge export"):
        load(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        load(tmp_path / "gone")


def test_a_tokenizer_with_more_ids_than_the_decoder(bundle: TinyBundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["dog"])
    tokenizer.save(str(folder / TOKENIZER))
    description = manifest(bundle.model.config, folder)
    files = {name: record for name, record in description.files.items() if name != MANIFEST}
    (folder / MANIFEST).write_text(dataclasses.replace(description, files=files).to_json())
    with pytest.raises(
        BundleError, match=f"at most {VOCAB_SIZE} token ids, found {VOCAB_SIZE + 1}"
    ):
        load(folder)


def test_manifest_of_the_model(bundle: TinyBundle) -> None:
    model = load(bundle.folder, threads=1)
    assert model.manifest == Manifest.read(bundle.folder)
    assert model.tokenizer.chat.chat == Chat({"eos_token": "<|end|>"})  # of the model's config


# The library's surface


def test_a_picture_in_the_place_of_an_encoded_image(bundle: TinyBundle) -> None:
    model = load(bundle.folder, threads=1)
    expected = model.generate(model.encode(PICTURE), "what", max_tokens=6).read()
    assert model.generate(PICTURE, "what", max_tokens=6).read() == expected
    assert model.chat(PICTURE).ask("what", max_tokens=6).read() == expected
    with pytest.raises(ImageError, match=r"none\.png"):
        model.generate("none.png", "what")


def test_an_image_of_another_bundle_is_refused(
    bundle: TinyBundle, vanilla_bundle: TinyBundle
) -> None:
    model, other = load(bundle.folder, threads=1), load(vanilla_bundle.folder, threads=1)
    for ask in (model.generate, lambda image, _: model.chat(image)):
        with pytest.raises(ImageError, match=r"encoded by another bundle.*expected bundle "):
            ask(other.encode(PICTURE), "what")
    again = load(bundle.folder, threads=1)  # the same bundle, opened twice
    answer = again.generate(model.encode(PICTURE), "what", max_tokens=6)
    assert answer.read() == model.generate(PICTURE, "what", max_tokens=6).read()


def test_a_model_is_closed_at_the_end_of_its_block(bundle: TinyBundle) -> None:
    with load(bundle.folder, threads=1) as model:
        image = model.encode(PICTURE)
        answer = model.generate(image, "what", max_tokens=6)
        next(answer)
        whole = model.generate(image, "what", max_tokens=6).read()
        talk = model.chat(image)
    assert answer.read() == whole  # what was begun goes on
    for use in (
        lambda: model.encode(PICTURE),
        lambda: model.generate(image, "what"),
        lambda: talk.ask("what"),
    ):
        with pytest.raises(BundleError, match=r"'tiny' is closed.*himix_edge\.load"):
            use()
    model.close()  # twice is no error


def test_what_things_are_called(bundle: TinyBundle) -> None:
    model = load(bundle.folder, threads=1)
    image = model.encode(PICTURE)
    answer = model.generate(image, "what", max_tokens=1)
    assert repr(model) == "<Model 'tiny' on cpu>"
    assert repr(image) == "<EncodedImage of 9 tokens>"
    assert repr(model.chat(image, system="Be brief.")) == "<Conversation of 1 messages>"
    assert repr(answer) == "<Answer '', finish_reason=None>"
    answer.read()
    assert repr(answer) == f"<Answer {answer.text!r}, finish_reason='length'>"


@pytest.mark.parametrize("name", ["bundle", "vanilla_bundle"])
def test_a_history_is_as_if_it_had_been_asked(name: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(name).folder, threads=1)
    image = model.encode(PICTURE)
    talk = model.chat(image)
    for question in ("what", "who"):
        talk.ask(question, max_tokens=4).read()
    again = model.chat(image, history=talk.messages)
    answers = [each.ask("why", max_tokens=6) for each in (talk, again)]
    assert answers[0].read() == answers[1].read()
    assert answers[0].prompt_tokens == answers[1].prompt_tokens
    assert talk.messages == again.messages


def test_a_system_prompt_comes_first(tmp_path: Path) -> None:
    model = fake_model(tmp_path, arithmetic)
    model.chat(PICTURE, system="Hm").ask("what", max_tokens=1).read()
    assert fed(model) == [2, *ids_of("Hm"), 0, 1, *ids_of("what"), 2]  # as its template has it
    assert isinstance(model.engine, FakeEngine)
    model.engine.fed.clear()
    model.generate(PICTURE, "what", system="Hm", max_tokens=1).read()
    assert fed(model) == [2, *ids_of("Hm"), 0, 1, *ids_of("what"), 2]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (["what"], "no message of a conversation"),
        ([{"role": "user"}], "no message of a conversation"),
        ([{"role": "user", "content": 5}], "no message of a conversation"),
        ([{"role": "user", "content": "a", "tool": "b"}], "no message of a conversation"),
        ([{"role": "user", "content": "a"}], "ends in a question"),
        (None, "history is no conversation.*a list of messages, found NoneType"),
    ],
)
def test_a_history_that_is_none(tmp_path: Path, history: list[Message], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        fake_model(tmp_path, arithmetic).chat(PICTURE, history=history)


def test_arguments_of_another_type(tmp_path: Path) -> None:
    model: Any = fake_model(tmp_path, arithmetic)
    with pytest.raises(PromptError, match=r"system prompt is no text.*found int"):
        model.chat(PICTURE, system=5)
    with pytest.raises(ConfigError, match=r"no options of sampling.*found dict"):
        model.generate(PICTURE, "what", {"temperature": 1})


def test_a_stop_string_is_no_part_of_the_next_prompt(tmp_path: Path) -> None:
    model = fake_model(tmp_path, lambda _, text, __: [*ids_of("A dog."), 0][(len(text) - 6) % 7])
    talk = model.chat(model.encode(PICTURE))
    assert talk.ask("what", stop=("dog",)).read() == "A "
    assert isinstance(model.engine, FakeEngine)
    model.engine.fed.clear()
    second = talk.ask("who", max_tokens=1)
    second.read()
    assert second.cached_tokens == 6 + len("A ")
    assert fed(model) == [0, 1, *ids_of("who"), 2]
