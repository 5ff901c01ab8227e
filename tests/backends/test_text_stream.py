"""Text ends before the first complete stop string, whichever runs bring its tokens."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.text_stream import TextStream
from pipesim.errors import BadInputError

PIECES = ["a", "b", "ab", "ba", "c", "abc", " ", ""]
STOPS = st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3)


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in ids)


def first_end(text: str, stops: list[str]) -> int | None:
    """How many characters until a stop string is complete, by looking at every beginning of the text."""
    return next((end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)), None)


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30), STOPS, st.lists(st.integers(1, 6), max_size=30))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(
    ids: list[int], stops: list[str], cuts: list[int]
) -> None:
    whole = decode(ids)
    end = first_end(whole, stops)
    stream, shown, fed = TextStream(decode, stops), "", 0
    for cut in [*cuts, len(ids)]:
        shown += stream.feed(ids[fed : fed + cut])
        fed += cut
        assert whole.startswith(shown)
    shown += stream.finish()
    if end is None:
        assert (shown, stream.ended) == (whole, None)
        return
    longest = max(len(stop) for stop in stops if whole[:end].endswith(stop))
    assert shown == whole[: end - longest]
    assert stream.ended == next(n for n in range(len(ids) + 1) if len(decode(ids[:n])) >= end)
    assert stream.feed(ids) == stream.finish() == ""


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30), STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(ids: list[int], stops: list[str]) -> None:
    stream, shown = TextStream(decode, stops), ""
    for index, token in enumerate(ids):
        shown += stream.feed([token])
        if stream.ended is None:
            held = decode(ids[: index + 1])[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_may_end_in_what_waited_for_the_rest_of_a_character() -> None:
    def cut_off(ids: Sequence[int]) -> str:
        return "\ufffd" * len(ids)

    stream = TextStream(cut_off, ["\ufffd\ufffd"])
    assert stream.feed([1, 1]) == ""
    assert stream.finish() == ""
    assert stream.ended == 2


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(BadInputError, match="empty string"):
        TextStream(decode, ["a", ""])
