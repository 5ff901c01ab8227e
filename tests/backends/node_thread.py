"""A node in a thread of this process, for tests that play the head."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

from backends.compute import ComputeLoop
from backends.lease import LoadLayers
from backends.serve import listen
from backends.stage_server import load_layers


@contextlib.asynccontextmanager
async def node_thread(load: LoadLayers = load_layers) -> AsyncIterator[str]:
    """The address of a node that ends when the context does."""
    here = asyncio.get_running_loop()
    listening: asyncio.Future[int] = here.create_future()
    compute = ComputeLoop()
    nodes: list[asyncio.Task[None]] = []

    def listens(port: int) -> None:
        here.call_soon_threadsafe(listening.set_result, port)

    async def main() -> None:
        nodes.append(asyncio.create_task(listen(compute, "127.0.0.1:0", listens, load)))
        await asyncio.wait(nodes)

    thread = threading.Thread(target=compute.run, args=(main(),))
    thread.start()
    try:
        yield f"127.0.0.1:{await listening}"
    finally:
        nodes[0].get_loop().call_soon_threadsafe(nodes[0].cancel)
        await asyncio.to_thread(thread.join)
