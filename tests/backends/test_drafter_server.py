"""The drafter by itself: the server in this process, a drafter whose levels the test lets pass one by one."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from node_thread import node_thread

from backends.control import (
    FROM_DRAFTER,
    FROM_NODE,
    Beat,
    ConfigureDrafter,
    DraftOrder,
    DraftReply,
    EndText,
    ExtendText,
    Failed,
    FromDrafter,
    Heartbeat,
    Ready,
    StartText,
    ToDrafter,
    pack,
    unpack,
)
from backends.drafting.base import Drafter
from backends.sampling import Sampling
from backends.transport import CONTROL, DRAFT, open_channel, path
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.tree import Candidate

TOKEN = b"secret-secret-se"
TIMEOUT_S = 20.0


class SlowDrafter(Drafter):
    """Proposes position numbers; every level waits for the test."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Semaphore(0)
        self.levels: list[int] = []
        self.entered = threading.Semaphore(0)

    def candidates_after(self, context: Sequence[int], path: tuple[int, ...]) -> list[Candidate]:
        self.levels.append(len(context))
        self.entered.release()
        assert self.go.acquire(timeout=TIMEOUT_S)
        return [(len(context) + len(path), 0.9)]


class TestHead:
    """The head's part, by hand."""

    __test__ = False

    def __init__(self, address: str, drafter: SlowDrafter) -> None:
        self.drafter = drafter
        self.channel = open_channel(address)
        self.control = self.channel.stream_stream(path(CONTROL))()
        self.drafts = self.channel.stream_stream(path(DRAFT))()

    async def say(self, message: ToDrafter) -> None:
        await self.drafts.write(pack(message))

    async def order(self, number: int, frontier: int, nodes: int = 4) -> None:
        await self.say(DraftOrder(7, RequestDraft(number, frontier, (), nodes, 1, 0.0, 1.0)))

    async def hear(self) -> FromDrafter:
        return unpack(FROM_DRAFTER, await asyncio.wait_for(self.drafts.read(), TIMEOUT_S))

    async def beat(self) -> None:
        await self.control.write(pack(Heartbeat(1)))
        assert isinstance(unpack(FROM_NODE, await asyncio.wait_for(self.control.read(), TIMEOUT_S)), Beat)

    async def level_entered(self) -> None:
        assert await asyncio.to_thread(self.drafter.entered.acquire, timeout=TIMEOUT_S)


@contextlib.asynccontextmanager
async def drafting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestHead]:
    drafter = SlowDrafter()
    monkeypatch.setattr("backends.drafter_server.load_drafter", lambda order: drafter)
    async with node_thread() as address:
        head = TestHead(address, drafter)
        try:
            await head.control.write(pack(ConfigureDrafter(TOKEN, "slow", "", 160, 100, "float32", "auto", 1, None)))
            assert isinstance(unpack(FROM_NODE, await asyncio.wait_for(head.control.read(), TIMEOUT_S)), Ready)
            await head.drafts.write(TOKEN)
            await head.say(StartText(7, (1, 2, 3), Sampling(), None))
            yield head
        finally:
            drafter.go.release(10**6)
            await head.channel.close()


def test_a_draft_comes_home_with_its_session_and_span(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with drafting(monkeypatch) as head:
            head.drafter.go.release(10)
            await head.say(ExtendText(7, (4, 5)))
            await head.order(0, frontier=5)
            reply = await head.hear()
            assert isinstance(reply, DraftReply)
            assert (reply.session, reply.request_id) == (7, 0)
            assert reply.tree is not None
            assert reply.tree.tokens == (5, 6, 7, 8)
            assert reply.start <= reply.end

    asyncio.run(test())


def test_a_newer_request_abandons_the_older_between_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with drafting(monkeypatch) as head:
            await head.order(0, frontier=3, nodes=1000)
            await head.level_entered()
            await head.order(1, frontier=2)
            await head.order(2, frontier=1)
            while set(head.drafter.levels) == {3}:  # the server has not read the orders yet
                head.drafter.go.release()
                await head.level_entered()
            replies = []
            head.drafter.go.release(10)
            while not replies or replies[-1].request_id < 2:
                reply = await head.hear()
                assert isinstance(reply, DraftReply)
                replies.append(reply)
            assert [reply.request_id for reply in replies] == [0, 1, 2]
            assert replies[0].tree is None
            assert replies[2].tree is not None

    asyncio.run(test())


@pytest.mark.parametrize(("path", "tokens", "left"), [((9,), (4,), None), ((), (99,), (3,)), ((9,), (9, 5), (4,))])
def test_text_that_contradicts_a_draft_ends_it_between_levels(
    monkeypatch: pytest.MonkeyPatch, path: tuple[int, ...], tokens: tuple[int, ...], left: tuple[int, ...] | None
) -> None:
    """What the path itself loses to is abandoned; otherwise what has grown so far comes home, in time to be re-rooted.

    It proposes 3, 4, 5 .. at positions 3, 4, 5 ..
    """

    async def test() -> None:
        async with drafting(monkeypatch) as head:
            await head.say(DraftOrder(7, RequestDraft(0, 3, path, 1000, 1, 0.0, 1.0)))
            await head.level_entered()
            await head.say(ExtendText(7, tokens))
            reply = asyncio.create_task(head.hear())
            while not reply.done():
                head.drafter.go.release()
                await asyncio.wait({reply}, timeout=0.001)
            answer = reply.result()
            assert isinstance(answer, DraftReply)
            assert len(head.drafter.levels) < 1000
            if left is None:
                assert answer.tree is None
            else:
                assert answer.tree is not None
                assert answer.tree.tokens[: len(left)] == left

    asyncio.run(test())


def test_text_that_agrees_with_a_draft_lets_it_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with drafting(monkeypatch) as head:
            await head.order(0, frontier=3)
            await head.level_entered()
            await head.say(ExtendText(7, (3, 4)))
            head.drafter.go.release(10)
            reply = await head.hear()
            assert isinstance(reply, DraftReply)
            assert reply.tree is not None
            assert reply.tree.tokens == (3, 4, 5, 6)

    asyncio.run(test())


def test_texts_of_several_sessions_do_not_get_into_each_others_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an order nor the end of one abandons a draft of another, and each goes on with its own text."""

    async def test() -> None:
        async with drafting(monkeypatch) as head:
            await head.order(0, frontier=3)
            await head.level_entered()
            await head.say(StartText(8, (1, 2, 3, 4, 5, 6), Sampling(), None))
            await head.say(StartText(9, (1, 2), Sampling(), None))
            await head.say(EndText(9))
            await head.say(DraftOrder(8, RequestDraft(0, 6, (), 2, 1, 0.0, 1.0)))
            await head.say(ExtendText(7, (3,)))
            head.drafter.go.release(20)
            trees = {}
            for _ in range(2):
                reply = await head.hear()
                assert isinstance(reply, DraftReply)
                assert reply.tree is not None
                trees[reply.session] = reply.tree.tokens
            assert trees == {7: (3, 4, 5, 6), 8: (6, 7)}
            await head.say(DraftOrder(9, RequestDraft(0, 2, (), 2, 1, 0.0, 1.0)))
            failed = unpack(FROM_NODE, await asyncio.wait_for(head.control.read(), TIMEOUT_S))
            assert isinstance(failed, Failed)
            assert "session 9, which has no text" in failed.message

    asyncio.run(test())


def test_heartbeats_are_answered_between_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with drafting(monkeypatch) as head:
            await head.order(0, frontier=3, nodes=1000)
            await head.level_entered()
            beat = asyncio.create_task(head.beat())
            while not beat.done():
                head.drafter.go.release()
                await head.level_entered()
            await beat

    asyncio.run(test())


def test_strangers_get_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with drafting(monkeypatch) as head:
            for first in (b"x" * 16, b"", b"short"):
                stranger = head.channel.stream_stream(path(DRAFT))()
                await stranger.write(first)
                assert await stranger.code() is grpc.StatusCode.PERMISSION_DENIED
            malformed = head.channel.stream_stream(path(DRAFT))()
            await malformed.write(TOKEN)
            await malformed.write(b"\xc1")
            assert await malformed.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(test())
