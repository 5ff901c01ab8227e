"""Messages in pieces: whole at the other end, and never more of them on their way than the reader has made room for."""

import asyncio
import functools
from collections.abc import Callable, Coroutine

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import flow
from backends.compute import ComputeLoop
from backends.flow import PIECE_BYTES, Flow, Joiner
from backends.outbox import Outbox


class Link:
    """Both ends of a stream. Pieces and acknowledgements arrive when the test says so, or at once."""

    def __init__(self) -> None:
        self.there: asyncio.Queue[bytes] = asyncio.Queue()
        self.back: asyncio.Queue[bytes] = asyncio.Queue()
        self.read, self.write = self.back.get, self.there.put  # the writer's
        self.largest = 0

    def reader(self) -> Joiner:
        end = Link()
        end.read, end.write = self._take, self.back.put  # type: ignore[method-assign]
        return Joiner(end)

    async def _take(self) -> bytes:
        self.largest = max(self.largest, self.on_its_way)
        return await self.there.get()

    @property
    def on_its_way(self) -> int:
        return sum(map(len, list(self.there._queue)))  # type: ignore[attr-defined]


def over(link: Link, messages: list[bytes], test: Callable[[], Coroutine[None, None, None]]) -> None:
    """Runs ``test`` while ``messages`` are written."""

    async def run() -> None:
        outbox = Outbox("the test")
        for message in messages:
            outbox.send(message)
        outbox.close()
        writing = asyncio.create_task(Flow(link).carry(outbox))
        try:
            await asyncio.wait_for(test(), 20.0)
        finally:
            writing.cancel()

    asyncio.run(run())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


SIZES = st.one_of(st.integers(0, 5), st.builds(lambda n, d: n * PIECE_BYTES + d, st.integers(1, 4), st.integers(-1, 1)))


@given(sizes=st.lists(SIZES, max_size=6))
def test_messages_of_any_size_arrive_whole_and_in_order(sizes: list[int]) -> None:
    messages = [bytes([65 + index]) * size for index, size in enumerate(sizes)]

    async def test() -> None:
        reader = link.reader()
        assert [await reader.read() for _ in messages] == messages

    link = Link()
    over(link, messages, test)


def test_nobody_writes_more_than_two_pieces_ahead_of_a_reader_who_has_acknowledged_none() -> None:
    async def test() -> None:
        await settle()
        assert link.on_its_way == 2 * PIECE_BYTES

    link = Link()
    over(link, [bytes(10 * PIECE_BYTES)], test)


@pytest.mark.parametrize(("quick_s", "late_s", "ahead"), [(1e9, 1e9, "more"), (0.0, 1e9, "same"), (0.0, 0.0, "same")])
def test_a_link_that_acknowledges_quickly_gets_more_at_once(
    quick_s: float, late_s: float, ahead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "_QUICK_S", quick_s)
    monkeypatch.setattr(flow, "_LATE_S", late_s)

    async def test() -> None:
        reader = link.reader()
        for _ in range(4):
            await settle()
            await reader.read()
        assert (link.largest > 2 * PIECE_BYTES) == (ahead == "more")

    link = Link()
    over(link, [bytes(3 * PIECE_BYTES)] * 6, test)


def test_a_link_that_slows_down_gets_less_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(flow, "_QUICK_S", 1e9)
        reader = link.reader()
        for _ in range(4):
            await settle()
            await reader.read()
        assert link.largest > 4 * PIECE_BYTES
        monkeypatch.setattr(flow, "_LATE_S", 0.0)
        for _ in range(8):
            await reader.read()
        await settle()
        assert link.on_its_way <= 2 * PIECE_BYTES

    link = Link()
    over(link, [bytes(3 * PIECE_BYTES)] * 20, test)


def test_a_message_that_is_cut_off_is_none() -> None:
    async def test() -> None:
        await link.there.put(bytes(PIECE_BYTES))
        await link.there.put(grpc.aio.EOF)
        assert await link.reader().read() is grpc.aio.EOF

    link = Link()
    over(link, [], test)


def test_a_computation_may_send_while_there_is_no_room() -> None:
    """It runs while the event loop stands still: see ``compute.py``."""
    sent, compute, link = [bytes(2 * PIECE_BYTES - 1), b"short"], ComputeLoop(), Link()
    broken: list[Exception] = []

    async def main() -> None:
        outbox = Outbox("the test")
        writing = asyncio.create_task(Flow(link).carry(outbox))
        for message in sent:
            await settle()
            compute.submit(functools.partial(outbox.send, message), broken.append)
        await settle()
        reader = link.reader()
        assert [await asyncio.wait_for(reader.read(), 20.0) for _ in sent] == sent
        writing.cancel()

    compute.run(main())
    assert not broken
