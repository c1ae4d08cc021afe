from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from himix_edge.contract import Chat
from himix_edge.errors import BundleError, PromptError
from himix_edge.runtimes.chat import ChatTemplate, assistant_message, user_message
from himix_edge.runtimes.tokenizer import Detokenizer, Tokenizer
from tests.runtimes.fakes import CHAT, END, byte_tokenizer, ids_of, tokenizer_at

CORPUS = [
    "describe the picture",
    "a red circle left of a small blue star",
    "naïve café 東京 🙂",
] * 3
TEXTS = [
    "describe",
    "What's in   the picture?\n\n1. a\ttab ",
    "naïve café — 東京 🙂👩‍👩‍👧",
    " leading and trailing ",
    "e\u0301 is one letter",
    "\ufffd is a character too",
]


def byte_level_bpe() -> tokenizers.Tokenizer:
    """As Qwen2 and Llama 3 have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<|user|>"), AddedToken("<|assistant|>")])  # not special
    return tokenizer


def sentencepiece_bpe() -> tokenizers.Tokenizer:
    """As Llama 2 and TinyLlama have it: a space before the text, unknown characters as bytes."""
    characters = [*sorted(set("".join(CORPUS)) - set(" ï東🙂é")), "▁"]
    names = ["<unk>", END, *(f"<0x{b:02X}>" for b in range(256)), *characters, "▁r", "▁re", "▁red"]
    merges = [("▁", "r"), ("▁r", "e"), ("▁re", "d")]
    vocab = {name: i for i, name in enumerate(names)}
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True), AddedToken(END, special=True)])
    return tokenizer


def metaspace_unigram() -> tokenizers.Tokenizer:
    """As T5 and newer SentencePiece conversions have it."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", END], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


MAKERS = [byte_tokenizer, byte_level_bpe, sentencepiece_bpe, metaspace_unigram]


def saved(tokenizer: tokenizers.Tokenizer, folder: Path, chat: ChatTemplate = CHAT) -> Tokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer_at(folder / "tokenizer.json", chat)


@pytest.fixture(params=MAKERS, ids=lambda maker: str(maker.__name__), scope="module")
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return saved(request.param(), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [saved(maker(), tmp_path_factory.mktemp("tokenizer")) for maker in MAKERS]


# Encoding


def test_turns_by_hand(tmp_path: Path) -> None:
    ours = saved(byte_tokenizer(), tmp_path)
    first = [1, *ids_of("Hi é"), 2]
    assert ours.encode_turn(CHAT.first, "Hi é") == first
    history = [user_message("Hi é"), assistant_message("Yes")]
    assert ours.encode_turn(history, "Hi") == [*first, *ids_of("Yes"), 0, 1, *ids_of("Hi"), 2]
    assert ours.vocab_size == 259


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_turn_is_the_whole_text_encoded(maker: object, text: str, tmp_path: Path) -> None:
    reference = maker()  # type: ignore[operator]
    chat = ChatTemplate(f"{END}USER: {{{{ messages[0].content }}}}{END}\nASSISTANT:", Chat())
    ids = saved(reference, tmp_path, chat).encode_turn((), text)
    whole = reference.encode(f"{END}USER: {text}{END}\nASSISTANT:", add_special_tokens=False)
    assert ids == whole.ids
    assert ids.count(reference.token_to_id(END)) == 2


def test_a_prompt_that_is_not_unicode(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="the prompt is no text: expected Unicode"):
        saved(byte_tokenizer(), tmp_path).encode_turn(CHAT.first, "caf\udce9")


def test_truncation_and_padding_in_the_file_are_of_no_effect(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    ours = saved(tokenizer, tmp_path)
    assert ours.encode_turn(CHAT.first, "describe") == [1, *ids_of("describe"), 2]


@pytest.mark.parametrize("content", ["", "{}", "Dear Sir", '{"added_tokens": []}', "[1]"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*tokenizer\.json") as error:
        Tokenizer(content, CHAT, tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)
    with pytest.raises(BundleError, match="No such file"):
        Tokenizer.from_folder(tmp_path, Chat())


# Decoding


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if tokenizer.vocab_size > 100:  # those that can spell anything
        assert "".join(pieces) == text


@given(seed=st.randoms(use_true_random=False), length=st.integers(0, 40))
def test_pieces_of_any_tokens_are_their_text(
    all_tokenizers: list[Tokenizer], seed: object, length: int
) -> None:
    """Random ids: mostly broken characters, in every state of disorder."""
    for tokenizer in all_tokenizers:
        ids = [seed.randrange(tokenizer.vocab_size) for _ in range(length)]  # type: ignore[attr-defined]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_no_piece_ends_within_a_character(tmp_path: Path) -> None:
    ours = saved(byte_tokenizer(), tmp_path)
    assert pieces_of(ours, ids_of("aé🙂b")) == ["a", "", "é", "", "", "", "🙂", "b", ""]
    assert pieces_of(ours, ids_of("a🙂")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_a_byte_run_of_sentencepiece_appears_when_it_ends(tmp_path: Path) -> None:
    tokenizer = sentencepiece_bpe()
    ours = saved(tokenizer, tmp_path)
    ids = tokenizer.encode("red é red").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["▁red", "▁", "<0xC3>", "<0xA9>", "▁red"]
    assert pieces_of(ours, ids) == ["red", " ", "", "", "é red", ""]


def test_control_tokens_are_not_shown(tmp_path: Path) -> None:
    ours = saved(byte_tokenizer(), tmp_path)
    assert pieces_of(ours, [1, *ids_of("a"), 2, *ids_of("b"), 0]) == ["", "a", "", "b", "", ""]
