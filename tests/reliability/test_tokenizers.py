"""A tokenizer.json and prompts from a stranger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.mutate_tokenizers import outcome_of
from benchmarks.reliability.tokenizers_json import corpus, mutated
from himix_edge.contract import Chat
from himix_edge.errors import BundleError, PromptError
from himix_edge.runtimes.chat import ChatTemplate, user_message
from himix_edge.runtimes.tokenizer import Tokenizer
from himix_edge.split_patterns import check_pattern
from himix_edge.tokenizer_json import MAX_BYTES
from tests.reliability.table import tried
from tests.runtimes.fakes import byte_tokenizer

WHERE = Path("tokenizer.json")
CHAT = ChatTemplate("{{ messages[-1].content }}", Chat())
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def described(**changes: Any) -> dict[str, Any]:
    return {**corpus()[0], **changes}


def opened(description: dict[str, Any]) -> Tokenizer:
    return Tokenizer(json.dumps(description), CHAT, WHERE)


def model(kind: str, **changes: Any) -> dict[str, Any]:
    found = next(each["model"] for each in corpus() if each["model"]["type"] == kind)
    return {**found, **changes}


@tried(
    "Prompts",
    "tokenizer.json files that end the process, make tokenizers panic, or take gigabytes",
    "refused before tokenizers reads them",
)
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "is cut off"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "is cut off"),
        ({"model": model("BPE", continuing_subword_prefix="xé")}, "second part of a merge lacks"),
        ({"model": model("WordPiece", max_input_chars_per_word=2**60)}, "max_input_chars_per_word"),
        ({"model": model("Unigram", vocab=[["a" * 5000, 0.0]])}, "a token is 5,000"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 200}] * 3}},
            "a text 8,000,000 times as long",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "prepend is 1,000,000"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 2**60, "stop": 0}}, "start is"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 999}}, "100 steps"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(a+)+$"}}}, "repeats what repeats"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "of no length"),
        ({"padding": {"strategy": {"Fixed": 2**40}}}, "padding is"),
        ({"added_tokens": corpus()[0]["added_tokens"] * 33_000}, "number of added tokens is"),
        ({"added_tokens": [{"id": 0, "content": "a" * 9999, "special": True}]}, "an added token"),
        ({"model": {}}, "has no 'vocab'"),
    ],
)  # fmt: skip
def test_what_no_tokenizer_has(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(BundleError, match=f"cannot read tokenizer.json.*{found}"):
        opened(described(**changes))


@tried(
    "Prompts",
    "a tokenizer.json of 100 MB, of millions of lists, nested 100,000 deep, with a name twice",
    "refused before it is parsed, or as it is",
)
def test_what_no_json_has() -> None:
    for data, found in (
        (b" " * (MAX_BYTES + 1), "larger than 64 MiB"),
        (b"[" + b"[]," * 3_000_000 + b"0]", "more than 8,000,000 of ,|more than 2,000,000 of"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
        (json.dumps(described()).replace('"version"', '"model": {}, "version"').encode(), "twice"),
        (b"\xff\xfe", "decode"),
        (b"null", "no model"),
    ):
        with pytest.raises(BundleError, match=found):
            Tokenizer(data, CHAT, WHERE)


@tried(
    "Prompts",
    "a tokenizer that makes tokenizers panic as it encodes or decodes",
    "a PromptError or a BundleError",
)
def test_panics_are_errors() -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    bad = opened(described(post_processor=template))
    with pytest.raises(ValueError, match="index out of bounds"):
        bad.encode("a", add_special_tokens=True)
    strip = {"type": "Strip", "content": "a", "start": 3, "stop": 3}
    bad = opened(described(decoder=strip))
    with pytest.raises(BundleError, match="the tokenizer can't decode an answer"):
        bad.decode(bad.encode("a"))
    regex = {**SPLIT, "pattern": {"Regex": ".*.*.*.*[^a]"}}
    with pytest.raises(PromptError, match=r"can't encode the prompt.*retry-limit"):
        opened(described(pre_tokenizer=regex)).encode_turn((), "a" * 2000)


@tried(
    "Prompts",
    "a prompt, a history or a rendered template of more characters than the context can hold",
    "refused before it is tokenized",
)
def test_prompts_that_are_too_long() -> None:
    tokenizer = Tokenizer(byte_tokenizer().to_str(), CHAT, WHERE)
    longest = max(map(len, byte_tokenizer().get_vocab()))
    assert tokenizer.most_characters(100) == 100 * longest
    assert tokenizer.most_characters() == 1_000_000
    assert len(tokenizer.encode_turn((), "x" * 100, 100)) == 100
    with pytest.raises(PromptError, match=f"at most {100 * longest:,} characters"):
        tokenizer.encode_turn((), "x" * (100 * longest + 1), 100)
    with pytest.raises(PromptError, match=r"at most 1,000,000 characters.*found 1,000,002"):
        tokenizer.encode_turn([user_message("x" * 10**6)], "yz")
    other = opened(described())  # one token may stand for a long word that it doesn't know
    assert other.most_characters(100) == 1_000_000
    assert len(other.encode_turn((), "x" * 100_000, 100)) == 1
    grows = {"type": "Replace", "pattern": {"String": " "}, "content": "_" * 200}
    assert opened(described(normalizer=grows)).most_characters() == 100_000


GPT4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    "pattern",
    [
        GPT4,
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\d{1,3}(?=(?:\d{3})*\b)",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"<\|startoftext\|>|[\p{L}]+|[\p{N}]",
        "",
    ],
)
def test_patterns_in_use(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$", "(a|a)*b", "(.|.){20}x", "(?:a?a)+b", "((a{0,9}){0,9}){0,9}", "(?i:a|b)*",
        r"(?<n>a\g<n>?b)", r"(a)\1", ".*.*.*.*.*x", "a)", "[a", "(?:(?:ab*))*", "[a" * 9,
    ],
)  # fmt: skip
def test_patterns_that_take_exponential_time(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        check_pattern(pattern)


@tried(
    "Prompts",
    "2,500 mutated tokenizer.json files (a sample of them here), each encoding and decoding",
    "it works, or an error of ours",
)
def test_mutated_tokenizers() -> None:
    files = corpus()
    found = [outcome_of(mutated(files, seed)[1]) for seed in range(80)]
    assert not [each for each in found if each.startswith("wrong")]
    assert found.count("works") > 9
    assert found.count("BundleError on loading") > 25
