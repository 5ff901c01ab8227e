"""A node: listens, says where on stdout, and serves heads."""

import asyncio
import functools
import json
import os
from collections.abc import Callable

from backends.compute import ComputeLoop
from backends.lease import LoadLayers
from backends.stage_server import NodeServer, load_layers
from backends.transport import bind, new_server, split_address


def serve(address: str, device: str = "cpu") -> None:
    """Serves heads at ``host:port`` (port 0: any free one), one after another, until interrupted.

    Stages compute on ``device`` unless their head names another.
    The first line on stdout is a JSON object that names the address: ``{"listening": "127.0.0.1:40123", "pid": ..}``.

    Raises:
        BadInputError: nobody can listen there.
    """

    def announce(port: int) -> None:
        host, _ = split_address(address, "--listen")
        line = json.dumps({"listening": f"{host}:{port}", "pid": os.getpid()}) + "\n"
        os.write(1, line.encode())  # in one piece: nodes may share this stdout

    compute = ComputeLoop()
    compute.run(listen(compute, address, announce, functools.partial(load_layers, device=device)))


async def listen(
    compute: ComputeLoop, address: str, listening: Callable[[int], None], load: LoadLayers = load_layers
) -> None:
    """Serves on ``compute`` until cancelled; ``listening`` hears the port, ``load`` reads the layers of a stage."""
    server = new_server()
    node = NodeServer(compute, load)
    node.add_to(server)
    port = bind(server, address)
    await server.start()
    try:
        listening(port)
        await asyncio.get_running_loop().create_future()
    finally:
        node.close()
        await server.stop(grace=0)
