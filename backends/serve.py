"""The event loop of a node: listens, and says where on stdout."""

import json
import os

from backends.stage_server import NodeServer
from backends.transport import bind, new_server, split_address


async def serve(address: str) -> None:
    """Serves heads at ``host:port`` (port 0: any free one), one after another, until cancelled.

    The first line on stdout is a JSON object that names the address: ``{"listening": "127.0.0.1:40123", "pid": ..}``.

    Raises:
        BadInputError: nobody can listen there.
    """
    server = new_server()
    node = NodeServer()
    node.add_to(server)
    port = bind(server, address)
    await server.start()
    try:
        host, _ = split_address(address, "--listen")
        line = json.dumps({"listening": f"{host}:{port}", "pid": os.getpid()}) + "\n"
        os.write(1, line.encode())  # in one piece: nodes may share this stdout
        await server.wait_for_termination()
    finally:
        node.close()
        await server.stop(grace=0)
