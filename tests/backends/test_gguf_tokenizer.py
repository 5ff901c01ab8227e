"""SentencePiece vocabularies of GGUF files cut text as SentencePiece itself does."""

import io
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import TEXTS
from tokenizers import Tokenizer

from backends.gguf_tokenizer import tokenizer_from_gguf, wants_bos
from pipesim.errors import BadInputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
COMMON = ("the rows of a pipeline and a window: (0) x2y3 {'a': [1, 2]}", "windows", "def row(x): return x")
CORPUS = [*TEXTS, *COMMON * 40]
WHOLE = ["\u2581\u2581", "\u2581\u2581\u2581", "\n", "\n\n", "<b>"]
"""What the second vocabulary never cuts, as Gemma's."""


@pytest.fixture(scope="module", params=["with a space in front", "without, and with whole tokens"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Tokenizer]:
    """A small vocabulary, and what a GGUF converter makes of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = request.param == "with a space in front"
    whole = [] if prefix else WHOLE
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="bpe",
        vocab_size=480,
        hard_vocab_limit=False,
        character_coverage=0.98,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=whole,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [theirs.id_to_piece(index) for index in range(theirs.get_piece_size())]

    def kind(index: int) -> int:
        if pieces[index] in whole:
            return USER_DEFINED
        tests = ((theirs.is_control, CONTROL), (theirs.is_unknown, UNKNOWN), (theirs.is_byte, BYTE))
        return next((kind for test, kind in tests if test(index)), NORMAL)

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.replace("\u2581", " ") if p in whole else p for p in pieces],
        "tokenizer.ggml.scores": [theirs.get_score(index) for index in range(len(pieces))],
        "tokenizer.ggml.token_type": [kind(index) for index in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return theirs, tokenizer_from_gguf(metadata, "made here")


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_cut_as_sentencepiece_does(pair: tuple[Any, Tokenizer], text: str) -> None:
    theirs, ours = pair
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from(["row", "s", " ", "  ", "\n", "<b>", "é", "字", "window", "x"])).map("".join))
def test_any_text_is_cut_as_sentencepiece_does_and_comes_back(pair: tuple[Any, Tokenizer], text: str) -> None:
    theirs, ours = pair
    ids = ours.encode(text).ids
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def test_control_tokens_are_found_in_text_and_do_not_show(pair: tuple[Any, Tokenizer]) -> None:
    _, ours = pair
    ids = ours.encode("row</s>").ids
    assert ids[-1] == 2
    assert ours.decode(ids, skip_special_tokens=True) == "row"


def test_a_sentencepiece_file_wants_a_beginning_unless_it_says_otherwise() -> None:
    assert wants_bos({"tokenizer.ggml.model": "llama"})
    assert not wants_bos({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False})
    assert not wants_bos({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"})
    assert wants_bos({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"})


def test_unknown_kinds_of_tokenizers_are_named() -> None:
    with pytest.raises(BadInputError, match="tokenizer model 't5'"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "t5"}, "a file")
    words = {"tokenizer.ggml.pre": "tekken", "tokenizer.ggml.tokens": []}
    with pytest.raises(BadInputError, match="pre-tokenizer 'tekken'"):
        tokenizer_from_gguf({"tokenizer.ggml.model": "gpt2", **words}, "a file")
