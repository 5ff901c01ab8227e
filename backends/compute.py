"""The one thread of a node that computes. Everything else in the process is asyncio and never blocks."""

import queue
import threading
from collections import deque
from collections.abc import Callable


class ComputeThread:
    """Runs jobs in the order they were given, and answers calls for a sign of life between and within jobs.

    A job calls :meth:`checkpoint` wherever it can be bothered: between layers, between drafted levels.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._calls: deque[Callable[[], None]] = deque()
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], failed: Callable[[Exception], None]) -> None:
        """Runs ``job`` after all jobs before it; ``failed`` hears, on the compute thread, what it raised."""

        def guarded() -> None:
            try:
                job()
            except Exception as error:
                failed(error)

        self._jobs.put(guarded)

    def call(self, answer: Callable[[], None]) -> None:
        """Runs ``answer`` on the compute thread at the next checkpoint, ahead of waiting jobs. It must be short."""
        self._calls.append(answer)
        self._jobs.put(self.checkpoint)  # wakes an idle thread

    def checkpoint(self) -> None:
        """Called on the compute thread: runs what :meth:`call` has left."""
        while self._calls:
            self._calls.popleft()()

    def stop(self) -> None:
        """Ends the thread after the jobs that wait; does not wait for it."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.checkpoint()
            job()
            del job  # while we wait, it would keep alive what it refers to
