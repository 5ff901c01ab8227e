"""A process that imports PyTorch once and forks the nodes of a head: N stages start in the time of one.

Each line on stdin forks a node. Lines on stdout are JSON: nodes say ``{"listening": "host:port", "pid": ..}``, the
nursery ``{"pid": .., "status": ..}`` when one has ended. When stdin closes, because the head closed it or ended in
whatever way, all nodes are killed. Should the nursery itself be killed, its nodes end, too.
"""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading

from backends.logs import configure_logging, name_node
from pipesim.errors import BadInputError

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """``python -m backends.nursery``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preload", action="store_true", help="import what model stages and drafters need")
    preload = parser.parse_args().preload
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the head's to handle
    _end_with_parent()
    name_node("node")
    configure_logging()
    if preload:
        import backends.stage_worker  # noqa: F401
    alive, lifeline = os.pipe()  # nodes watch the one end, only we hold the other
    nodes: set[int] = set()

    def collect(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = os.waitstatus_to_exitcode(ended[1])
                os.write(1, json.dumps({"pid": ended[0], "status": status}).encode() + b"\n")

    signal.signal(signal.SIGCHLD, collect)
    while os.read(0, 1):
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(lifeline)
            os.dup2(alive, 0)
            _serve()
        nodes.add(pid)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for pid in nodes:
        with contextlib.suppress(ChildProcessError):  # collected before
            if not os.waitpid(pid, os.WNOHANG)[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    os._exit(0)  # nothing to clean up, and PyTorch takes its time


def _serve() -> None:
    """The life of a forked node; does not return."""
    _end_with_parent()

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    try:
        from backends.serve import serve  # gRPC must not be loaded before a fork

        serve("127.0.0.1:0")
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
