"""gRPC as this project uses it: long-lived streams of raw bytes between a head and its nodes.

A *node* is one process, a stage or the drafter. Its streams:

* ``Control`` (head <-> node, ``control.py``): configuration, cancellation, heartbeats; a node serves one at a time.
* ``Data`` (predecessor -> stage, ``frames.py``): the ordered runs. The head is the first stage's predecessor.
* ``Results`` (last stage -> head, ``frames.py``): what comes home.
* ``Draft`` (head <-> drafter, ``control.py``).

Only a sender that shows the lease's token may use the last three.
"""

import grpc
import grpc.aio

from backends.frames import MAX_FRAME_BYTES
from pipesim.errors import BadInputError

SERVICE = "pipesim.Node"
CONTROL, DATA, RESULTS, DRAFT = "Control", "Data", "Results", "Draft"

_OPTIONS = [
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.default_compression_algorithm", 0),
    # A frozen peer shows only with ping_timeout_ms; by default gRPC waits a minute.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.ping_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel of its own to ``host:port``; connects when first used."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def new_server() -> grpc.aio.Server:
    """A server without handlers and ports."""
    return grpc.aio.server(options=_OPTIONS)


def bind(server: grpc.aio.Server, address: str) -> int:
    """Listens on ``host:port`` (port 0: any free one); returns the port.

    Raises:
        BadInputError: the address is malformed, or the port is in use or not ours to open.
    """
    split_address(address, "--listen")
    try:
        port = int(server.add_insecure_port(address))
    except RuntimeError as error:
        port = 0
        cause: RuntimeError | None = error
    else:
        cause = None
    if not port:
        raise BadInputError(
            f"--listen {address}: cannot listen there, the port is in use or not allowed: choose another one"
        ) from cause
    return port


def split_address(address: str, field: str) -> tuple[str, int]:
    """Host and port of ``host:port``. Raises BadInputError naming ``field``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise BadInputError(f"{field} {address!r}: write it as HOST:PORT, e.g. 127.0.0.1:50051")
    return host, int(port)


def path(method: str) -> str:
    """The full name of a method."""
    return f"/{SERVICE}/{method}"


def describe_rpc_error(error: grpc.RpcError) -> str:
    """Status code and details of a broken call, on one line."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if code is None or details is None:
        return str(error)
    return f"{code().name}: {' '.join(str(details()).split())}"
