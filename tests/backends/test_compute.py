"""The one thread of a node: what a job lets happen when it looks up."""

import asyncio
import socket

from backends.compute import ComputeLoop


def test_what_takes_many_turns_of_the_loop_is_not_left_behind() -> None:
    """A new stream needs more of them than a message does, and nothing arrives on a socket in between."""
    compute, (here, there) = ComputeLoop(), socket.socketpair()
    here.setblocking(False)
    handled = False

    async def handle() -> None:
        nonlocal handled
        await asyncio.get_running_loop().sock_recv(here, 1)
        for _ in range(30):
            await asyncio.sleep(0)
        handled = True

    def job() -> None:
        there.send(b"x")
        for _ in range(10):
            compute.checkpoint()
        seen.append(handled)

    async def main() -> None:
        handling = asyncio.create_task(handle())
        await asyncio.sleep(0)
        compute.submit(job, lambda error: None)
        await handling

    seen: list[bool] = []
    with here, there:
        compute.run(main())
    assert seen == [True]
