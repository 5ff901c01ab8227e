"""The head's end of its nursery: nodes that run as processes on this machine."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from typing import Any

from pipesim.errors import StageFailedError

NURSERY: tuple[str, ...] = ("backends.nursery",)
"""The module that is the nursery, and arguments before its own: the exactness campaign puts another one here."""

_KILL_AFTER_S = 1.0


class NodeProcess:
    """A node that the nursery forked; it listens at ``address``."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def fate(self) -> str:
        """What became of the process, to complete a sentence that begins with it."""
        if not self._status.done():
            return "still runs"
        status = self._status.result()
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"

    def kill(self) -> None:
        """Ends it at once, even if it is frozen; nothing happens if it has ended."""
        if not self._status.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def note_end(self, status: int) -> None:
        """It ended with this status (negative: by that signal)."""
        if not self._status.done():
            self._status.set_result(status)

    async def ended(self, within_s: float) -> bool:
        """Waits for its end."""
        await asyncio.wait((self._status,), timeout=within_s)
        return self._status.done()


class Nursery:
    """Starts node processes on this machine, and ends them all in :meth:`stop`, or when this process ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._nodes: dict[int, NodeProcess] = {}
        self._born: asyncio.Queue[NodeProcess | None] = asyncio.Queue()
        self._gone = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, preload: bool) -> "Nursery":
        """Starts the nursery; ``preload``: its nodes will need PyTorch."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", *NURSERY, *(["--preload"] if preload else [])),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return cls(process)

    @property
    def ended(self) -> bool:
        """Whether it is dead, and with it all nodes that it had started."""
        return self._gone

    async def spawn(self, count: int) -> list[NodeProcess]:
        """Forks ``count`` nodes and waits until they listen. Raises StageFailedError if they cannot."""
        assert self._process.stdin
        self._process.stdin.write(b"\n" * count)
        born = []
        for _ in range(count):
            node = await self._born.get()
            if node is None:
                if self._gone:
                    self._born.put_nowait(None)  # for whoever else waits
                raise StageFailedError("the stage processes did not start: their messages are on stderr")
            born.append(node)
        return born

    async def _read(self) -> None:
        assert self._process.stdout
        async for line in self._process.stdout:
            told: dict[str, Any] = json.loads(line)
            if "listening" in told:
                self._nodes[told["pid"]] = NodeProcess(told["pid"], told["listening"])
                self._born.put_nowait(self._nodes[told["pid"]])
            elif told["pid"] in self._nodes:
                self._nodes[told["pid"]].note_end(told["status"])
            else:
                self._born.put_nowait(None)
        for node in self._nodes.values():
            node.note_end(-signal.SIGKILL)  # they end with it
        self._gone = True
        self._born.put_nowait(None)

    async def stop(self) -> None:
        """Ends all nodes and waits until they are gone."""
        assert self._process.stdin
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _KILL_AFTER_S)
        if self._process.returncode is None:
            self._process.kill()  # its nodes follow: the kernel, or their lifeline, sees to it
            await self._process.wait()
        self._reader.cancel()
