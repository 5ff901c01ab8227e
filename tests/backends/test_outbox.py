"""Messages go out one at a time and in order, and the first one at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.outbox import MAX_WAITING, Outbox
from pipesim.errors import StageFailedError


class Stream:
    """Takes one message at a time; each is written when the test says so."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.under_way: asyncio.Future[None] | None = None

    async def write(self, message: bytes) -> None:
        assert self.under_way is None, "two writes at once"
        self.begun.append(message)
        self.under_way = asyncio.get_running_loop().create_future()
        try:
            await self.under_way
        finally:
            self.under_way = None

    def finish_one(self) -> None:
        if self.under_way and not self.under_way.done():
            self.under_way.set_result(None)


@asynccontextmanager
async def carried(outbox: Outbox, stream: Stream) -> AsyncIterator[asyncio.Task[None]]:
    carrier = asyncio.create_task(outbox.carry(stream.write))
    await asyncio.sleep(0)
    try:
        yield carrier
    finally:
        carrier.cancel()
        await asyncio.gather(carrier, return_exceptions=True)


def test_with_nothing_ahead_of_it_a_message_is_on_its_way_at_once() -> None:
    async def scenario() -> None:
        outbox, stream = Outbox("nobody"), Stream()
        async with carried(outbox, stream):
            for number in range(3):
                outbox.send(bytes([number]))
                assert stream.begun[-1] == bytes([number])
                while stream.under_way:
                    stream.finish_one()
                    await asyncio.sleep(0)
                await asyncio.sleep(0)

    asyncio.run(scenario())


@given(st.lists(st.sampled_from(["send", "turn", "finish"]), max_size=60))
def test_messages_go_out_in_order_and_one_at_a_time(moves: list[str]) -> None:
    async def scenario() -> None:
        outbox, stream, sent = Outbox("nobody"), Stream(), list[bytes]()
        async with carried(outbox, stream) as carrier:
            for move in moves:
                if move == "send":
                    sent.append(b"%d" % len(sent))
                    outbox.send(sent[-1])
                elif move == "finish":
                    stream.finish_one()
                else:
                    await asyncio.sleep(0)
                assert stream.begun == sent[: len(stream.begun)]
            outbox.close()
            while not carrier.done():
                stream.finish_one()
                await asyncio.sleep(0)
            assert stream.begun == sent

    asyncio.run(scenario())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_write_that_breaks_ends_the_carrier(at_once: bool) -> None:
    async def broken(message: bytes) -> None:
        if not at_once:
            await asyncio.sleep(0)
        raise ConnectionResetError(message)

    async def scenario() -> None:
        outbox = Outbox("nobody")
        carrier = asyncio.create_task(outbox.carry(broken))
        await asyncio.sleep(0)
        outbox.send(b"lost")
        with pytest.raises(ConnectionResetError, match="lost"):
            await carrier
        outbox.send(b"waits, as nobody carries any more")

    asyncio.run(scenario())


def test_a_cancelled_carrier_cancels_the_write_that_has_begun() -> None:
    heard: list[str] = []

    async def stubborn(message: bytes) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            heard.append("cancelled")
            await asyncio.sleep(0)  # it may still have something to do
            heard.append("done")
            raise

    async def scenario() -> None:
        outbox = Outbox("nobody")
        carrier = asyncio.create_task(outbox.carry(stubborn))
        await asyncio.sleep(0)
        outbox.send(b"never arrives")
        await asyncio.sleep(0)
        carrier.cancel()
        with pytest.raises(asyncio.CancelledError):
            await carrier

    asyncio.run(scenario())
    assert heard == ["cancelled", "done"]


def test_a_write_may_cope_with_what_it_waits_for() -> None:
    """As often as it likes: first at once, behind ``send``, then in the carrier."""
    heard: list[bytes] = []

    async def patient(message: bytes) -> None:
        for number in range(3):
            loop = asyncio.get_running_loop()
            waited = loop.create_future()
            loop.call_soon(waited.set_exception, ConnectionResetError(f"attempt {number}"))
            with contextlib.suppress(ConnectionResetError):
                await waited
        heard.append(message)

    async def scenario() -> None:
        outbox = Outbox("nobody")
        carrier = asyncio.create_task(outbox.carry(patient))
        await asyncio.sleep(0)
        for message in (b"first", b"second"):
            outbox.send(message)
        outbox.close()
        await carrier

    asyncio.run(scenario())
    assert heard == [b"first", b"second"]


def test_a_reader_that_never_reads_is_an_error() -> None:
    async def scenario() -> None:
        outbox = Outbox("the head")
        for _ in range(MAX_WAITING):
            outbox.send(b"unread")
        with pytest.raises(StageFailedError, match="the head does not read"):
            outbox.send(b"one too many")
        outbox.close()

    asyncio.run(scenario())
