"""Machines of their own on this one: network namespaces behind a switch, whose links can be slowed down and cut.

A machine is a namespace with one interface, ``eth0``; the switch is a bridge in a namespace of its own. Nothing of this
machine's own network is touched, and all is gone when the last namespace is.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import pytest

BURST_BYTES = 1514
"""The least that ``tc tbf`` can work with, a full Ethernet frame: so much passes at once after a pause."""
PAYLOAD_SHARE = 1448 / 1514
"""Of what tbf counts: Ethernet, IP and TCP headers of a full frame are 66 bytes."""
_QUEUE_S = 30  # nothing is dropped: TCP would take it for congestion
_numbers = itertools.count()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Machines:
    """Machines by name, each with an address of its own; :func:`machines` starts and ends them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._prefix = f"pipesim-{os.getpid()}-{next(_numbers)}-"
        self._addresses = {name: f"10.0.0.{number}" for number, name in enumerate(names, start=1)}

    def start(self) -> None:
        """Raises CalledProcessError where this is not allowed."""
        switch = self._namespace("switch")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "name", "switch", "up", "type", "bridge")
        for name, address in self._addresses.items():
            machine = self._namespace(name)
            _run("ip", "netns", "add", machine)
            pair = ("type", "veth", "peer", "name", "eth0", "netns", machine)
            _run("ip", "-n", switch, "link", "add", "name", f"to-{name}", *pair)
            _run("ip", "-n", switch, "link", "set", "dev", f"to-{name}", "master", "switch", "up")
            _run("ip", "-n", machine, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _run("ip", "-n", machine, "link", "set", "dev", interface, "up")

    def stop(self) -> None:
        """Ends them, however far they came."""
        for name in ("switch", *self._addresses):
            subprocess.run(("ip", "netns", "delete", self._namespace(name)), check=False, capture_output=True)

    def address(self, name: str) -> str:
        """Where the others reach it."""
        return self._addresses[name]

    def on(self, name: str, command: Sequence[str]) -> list[str]:
        """The command, to be run there."""
        return ["ip", "netns", "exec", self._namespace(name), *command]

    def limit(self, name: str, mbps: float | None) -> None:
        """What the machine sends shares 10^6 bits per second, headers included, from now on; None: no limit."""
        machine = self._namespace(name)
        subprocess.run(
            ("tc", "-n", machine, "qdisc", "delete", "dev", "eth0", "root"), check=False, capture_output=True
        )
        if mbps is not None:
            bucket = ("rate", f"{round(1e6 * mbps)}bit", "burst", str(BURST_BYTES), "latency", f"{_QUEUE_S}s")
            _run("tc", "-n", machine, "qdisc", "add", "dev", "eth0", "root", "tbf", *bucket)

    def plug(self, name: str, plugged: bool) -> None:
        """Pulls the machine's cable out of the switch, or puts it back."""
        _run("ip", "-n", self._namespace("switch"), "link", "set", "dev", f"to-{name}", "up" if plugged else "down")

    def part(self, names: Sequence[str], parted: bool) -> None:
        """Keeps ``names`` from each other, though not from the others, or lets them talk again."""
        for name in names:
            state = ("type", "bridge_slave", "isolated", "on" if parted else "off")
            _run("ip", "-n", self._namespace("switch"), "link", "set", "dev", f"to-{name}", *state)

    def _namespace(self, name: str) -> str:
        return self._prefix + name


@contextlib.contextmanager
def machines(*names: str) -> Iterator[Machines]:
    """Machines that end when the context does. Skips, and says why, where there can be none."""
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if os.geteuid() != 0:
        pytest.skip("SKIPPED: network namespaces and tc need root")
    if missing:
        pytest.skip(f"SKIPPED: needs the commands {' and '.join(missing)}: install iproute2")
    started = Machines(names)
    try:
        try:
            started.start()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"SKIPPED: no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield started
    finally:
        started.stop()
