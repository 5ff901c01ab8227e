"""What gRPC's C++ core is told before it is imported."""

import os
import subprocess
import sys

import pytest

OPEN_A_CHANNEL = """
import asyncio, os, backends, grpc.aio
async def main():
    server = grpc.aio.server()
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
    await server.stop(0)
asyncio.run(main())
print(os.environ.get("GRPC_EXPERIMENTS", ""))
"""


@pytest.mark.parametrize("own", [None, "", "-tcp_rcv_lowat"])
def test_grpc_knows_all_it_is_told_and_a_users_choice_stands(own: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    if own is not None:
        environment["GRPC_EXPERIMENTS"] = own
    done = subprocess.run(
        [sys.executable, "-c", OPEN_A_CHANNEL], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "", "an unknown switch is a line of the log"
    assert own is None or done.stdout == f"{own}\n"
